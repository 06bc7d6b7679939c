"""What several pruners do with scores and indices in graphs: operators with constant sizes only.

The same for the reference, which shares nothing with it, is in gap_export.reference.selection.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gap_export.interfaces.features import Feature, Kept, VisionFeatures

# B batch (1), N visual tokens, K kept, C patch width.

_NEIGHBOURS: Final = 32
_SAME: Final = 1e-6
"""How far the cosine of tokens that are the same may be below 1; float32 rounds to 1e-7."""


def sort_ascending(index_BK: Tensor) -> Tensor:
    """Indices in raster order; ONNX has no sort, and float32 holds indices up to 2**24."""
    count = index_BK.shape[1]
    values_BK = torch.topk(index_BK.to(torch.float32), count, largest=False).values
    return values_BK.to(torch.int64)


def mark(index_BK: Tensor, tokens: int) -> Tensor:
    """One-hot rows: float32 [B, K, N]."""
    return (index_BK[..., None] == torch.arange(tokens)).float()


def mark_removed(marks_BKN: Tensor) -> Tensor:
    """1 where a token is in no row, else 0: float32 [B, N]."""
    return 1.0 - marks_BKN.amax(dim=1)


def find_first_same(cosine_NN: Tensor) -> Tensor:
    """Of every token the first that is the same as it, mostly the token itself: int64 [N].

    The padding of a picture may be alike everywhere. What is computed of such tokens differs by
    rounding alone, so whoever chooses among them takes the first one's value for all.
    """
    tokens = cosine_NN.shape[0]
    index_N = torch.arange(tokens, dtype=torch.float32)
    others_NN = (cosine_NN < 1.0 - _SAME).float()
    # A token of nothing but zeros is like no other, and not like itself either.
    return torch.minimum((index_N + tokens * others_NN).amin(dim=1), index_N).to(torch.int64)


def score_by_phrase(features: VisionFeatures) -> Tensor:
    """Dot products of the patches with the phrase, turned so that more is better: [B, N]."""
    text_BW1 = features.values[Feature.TEXT][..., None]
    return features.text_sign * (features.values[Feature.TEXT_PATCHES] @ text_BW1)[..., 0]


def merge_nearest(features: VisionFeatures, order_BK: Tensor) -> Kept:
    """Each kept token takes in its 32 nearest, weighted by attention; the rest is the extra one.

    Nearest by the cosine of keys, kept ones too. Neighbours are all that are as near as the 32nd,
    so an exact tie takes in more.

    References:
        PruMerge, arXiv:2403.15388.
    """
    attention_BN = features.by_token(Feature.MERGE_ATTENTION)
    unit_BNC = functional.normalize(features.by_token(Feature.MERGE_KEYS), dim=-1)
    tokens = unit_BNC.shape[1]
    own_BKN = mark(order_BK, tokens)
    mix_BKN = own_BKN
    neighbours = min(_NEIGHBOURS, tokens - 1)
    if neighbours:
        centers_BKC = torch.index_select(unit_BNC, 1, order_BK[0])
        cosine_BKN = torch.where(own_BKN > 0, -2.0, centers_BKC @ unit_BNC.mT)
        limit_BK1 = torch.topk(cosine_BKN, neighbours, dim=-1).values[..., -1:]
        near_BKN = (cosine_BKN >= limit_BK1).float()
        mix_BKN = own_BKN + near_BKN * attention_BN[:, None]
    return Kept(order=order_BK, mix_BKN=mix_BKN, extra_BN=mark_removed(own_BKN) * attention_BN)
