"""By-products of a vision tower that pruners score patches with, from a block's projections.

All are float32 whatever the model's dtype; the first token of a view is CLS.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gap_export.interfaces.features import Feature

# V views, T tokens of a view (CLS first), P patches of a view, C width, H heads, d head width.


def cls_features(width: int, heads: int) -> dict[Feature, tuple[int, ...]]:
    """By-products that any tower with a CLS token gives, with their sizes behind the patches."""
    return {
        Feature.CLS_ATTENTION: (),
        Feature.COLUMN_ATTENTION: (),
        Feature.CLS_SIMILARITY: (),
        Feature.KEYS: (width // heads,),
        Feature.MERGE_ATTENTION: (),
        Feature.MERGE_KEYS: (width,),
    }


def give_features(
    needs: frozenset[Feature],
    states_VTC: Tensor,
    last: tuple[Tensor, Tensor],
    merging: tuple[Tensor, Tensor],
    heads: int,
) -> dict[Feature, Tensor]:
    """The by-products of a tower with a CLS token that are asked for.

    What nobody asks for is dropped again when the graph is tidied.

    Args:
        needs: Those asked for.
        states_VTC: Behind the last block that is run.
        last: Queries and keys [V, T, C] of that block.
        merging: Those of the block that merging pruners look at.
        heads: Of every block.
    """
    query_VTC, key_VTC = last
    merge_query_VTC, merge_key_VTC = merging
    values = {
        Feature.CLS_ATTENTION: cls_attention(query_VTC[:, 0], key_VTC, heads),
        Feature.CLS_SIMILARITY: cls_similarity(states_VTC),
        Feature.KEYS: mean_keys(key_VTC, heads),
        Feature.MERGE_ATTENTION: merge_attention(merge_query_VTC[:, 0], merge_key_VTC),
        Feature.MERGE_KEYS: merge_key_VTC[:, 1:].float(),
    }
    # It has the whole attention map, which is too large to be made for nothing.
    if Feature.COLUMN_ATTENTION in needs:
        values[Feature.COLUMN_ATTENTION] = column_attention(query_VTC, key_VTC, heads)
    return {feature: values[feature] for feature in needs}


def cls_attention(query_VC: Tensor, key_VTC: Tensor, heads: int) -> Tensor:
    """[V, P]: attention from CLS to each patch, mean over heads.

    One row of the attention map: the block itself runs fused.
    """
    query_VHd = _split(query_VC, heads)
    key_VTHd = _split(key_VTC, heads)
    scale = query_VHd.shape[-1] ** -0.5
    logits_VHT = (key_VTHd.permute(0, 2, 1, 3) @ query_VHd[..., None])[..., 0] * scale
    return torch.softmax(logits_VHT, dim=-1).mean(dim=1)[:, 1:]


def column_attention(
    query_VTC: Tensor, key_VTC: Tensor, heads: int, *, leading: int = 1
) -> Tensor:
    """[V, P]: attention that each patch receives, mean over heads and over all tokens of a view.

    `leading` tokens stand before the patches. Needs the whole attention map, which the block
    itself does without.
    """
    query_VHTd = _split(query_VTC, heads).permute(0, 2, 1, 3)
    key_VHdT = _split(key_VTC, heads).permute(0, 2, 3, 1)
    logits_VHTT = query_VHTd @ key_VHdT * query_VHTd.shape[-1] ** -0.5
    return torch.softmax(logits_VHTT, dim=-1).mean(dim=2).mean(dim=1)[:, leading:]


def merge_attention(query_VC: Tensor, key_VTC: Tensor) -> Tensor:
    """[V, P]: attention from CLS to each patch, all heads taken as one wide head.

    References:
        PruMerge, arXiv:2403.15388.
    """
    scale = query_VC.shape[-1] ** -0.5
    logits_VT = (key_VTC.float() @ query_VC.float()[..., None])[..., 0] * scale
    return torch.softmax(logits_VT, dim=-1)[:, 1:]


def cls_similarity(states_VTC: Tensor) -> Tensor:
    """[V, P]: cosine between the state of CLS and that of each patch."""
    unit_VTC = functional.normalize(states_VTC.float(), dim=-1)
    return (unit_VTC[:, 1:] @ unit_VTC[:, 0, :, None])[..., 0]


def mean_keys(key_VTC: Tensor, heads: int, *, leading: int = 1) -> Tensor:
    """[V, P, d]: keys of the patches, mean over heads; `leading` tokens stand before them."""
    return _split(key_VTC[:, leading:], heads).mean(dim=2)


def _split(x_VC: Tensor, heads: int) -> Tensor:
    """[..., C] to float32 [..., H, d]."""
    return x_VC.reshape(*x_VC.shape[:-1], heads, x_VC.shape[-1] // heads).float()
