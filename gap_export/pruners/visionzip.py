"""Keep the patches that CLS attends to most, and evenly spaced others that stand for the rest.

Ten of 64 tokens are of the second kind, and at least one of two or more. Every removed patch is
given to the one of them whose key is most like its own, to which the mean of what it was given is
added. Of several with the same key the first takes in all (**ours**): the padding of a picture is
alike everywhere, and which of its tokens a patch is nearest to would be a matter of the last bit.
Own order: the first kind in raster order, then the second.

References:
    VisionZip (arXiv:2412.04467). Its authors count the CLS token among the first kind. CLS has no
    place in the raster, so it is left out here, but the second kind is counted as if it were
    there: 63 kept are their 64 (54 + 10) without CLS, token for token; 64 kept are one patch more.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gap_export.blocks.selection import mark, mark_removed, sort_ascending
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures

# B batch (1), N visual tokens, D dominant, R not dominant, X contextual, K = D + X, d key width.

PUBLISHED_AS: Final = "VisionZip"
NEEDS: Final = frozenset({Feature.CLS_ATTENTION, Feature.KEYS})
EXTRA: Final = 0
_SAME: Final = 1e-6
"""How far the cosine of keys that are the same may be below 1; float32 rounds to 1e-7."""


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Dominant tokens, then contextual ones with what they take in."""
    del config
    scores_BN = features.by_token(Feature.CLS_ATTENTION)
    tokens = scores_BN.shape[1]
    contextual = _count_contextual(kept)
    dominant_BD = sort_ascending(torch.topk(scores_BN, kept - contextual, dim=-1).indices)
    if not contextual:
        return Kept(order=dominant_BD)
    rest_BN = mark_removed(mark(dominant_BD, tokens))
    # The rest in raster order: dominant ones are moved behind all.
    keys_BN = torch.arange(tokens, dtype=torch.float32) + tokens * (1.0 - rest_BN)
    rest = tokens - (kept - contextual)
    rest_BR = torch.topk(keys_BN, rest, largest=False).values.to(torch.int64)
    target_BX = torch.index_select(rest_BR, 1, torch.tensor(_space(rest, contextual)))
    order_BK = torch.cat([dominant_BD, target_BX], dim=1)
    marks_BKN = mark(order_BK, tokens)
    given_BXN = _give(features, target_BX) * mark_removed(marks_BKN)[:, None]
    means_BXN = given_BXN / given_BXN.sum(dim=-1, keepdim=True).clamp(min=1.0)
    nothing_BDN = torch.zeros(1, kept - contextual, tokens)
    return Kept(order=order_BK, mix_BKN=marks_BKN + torch.cat([nothing_BDN, means_BXN], dim=1))


def _give(features: VisionFeatures, target_BX: Tensor) -> Tensor:
    """Which contextual token every token is most like, one-hot [B, X, N]."""
    count = target_BX.shape[1]
    unit_BNd = functional.normalize(features.by_token(Feature.KEYS), dim=-1)
    targets_BXd = torch.index_select(unit_BNd, 1, target_BX[0])
    nearest_BN = (unit_BNd @ targets_BXd.mT).argmax(dim=-1)
    others_BXX = (targets_BXd @ targets_BXd.mT <= 1.0 - _SAME).float()
    first_BX = (torch.arange(count, dtype=torch.float32) + count * others_BXX).amin(dim=-1)
    return (mark(nearest_BN, count) @ mark(first_BX.to(torch.int64), count)).mT


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the tower's own attention map and keys; ties go to the lower index."""
    del config
    attention = vision.attentions[vision.layer - 1]
    scores = vision.by_token(attention[:, :, 0, 1:].double().mean(dim=1))
    contextual = _count_contextual(kept)
    best = torch.sort(scores, descending=True, stable=True).indices[: kept - contextual]
    dominant = sorted(best.tolist())
    rest = [index for index in range(len(scores)) if index not in dominant]
    targets = [rest[place] for place in _space(len(rest), contextual)]
    order = (*dominant, *targets)
    # No scores: another dominant token would shift what lies evenly spaced among the rest.
    if kept == len(scores) or not contextual:
        return EagerChoice(order=order, scores=None)
    keys = vision.keys[vision.layer - 1][:, 1:].double()
    by_head = keys.reshape(*keys.shape[:2], attention.shape[1], -1)
    directions = functional.normalize(vision.by_token(by_head.mean(dim=2)), dim=-1)
    given: dict[int, list[int]] = {target: [] for target in targets}
    alike = (directions[targets] @ directions[targets].T > 1 - _SAME).tolist()
    for index in rest:
        if index not in given:
            nearest = (directions[targets] @ directions[index]).argmax()
            given[targets[alike[int(nearest)].index(True)]].append(index)
    patches = vision.patches.double()
    rows = patches[list(order)]
    for place, target in enumerate(targets, start=len(dominant)):
        if given[target]:
            rows[place] += patches[given[target]].mean(dim=0)
    return EagerChoice(order=order, scores=None, rows=rows.to(vision.patches.dtype))


def _count_contextual(kept: int) -> int:
    """Tokens of the second kind; CLS, which is not kept, counts as the authors count it."""
    return max(1, (kept + 1) * 10 // 64) if kept >= 2 else 0


def _space(rest: int, count: int) -> list[int]:
    """Places of contextual tokens among the rest."""
    return list(range(0, rest, max(1, rest // count)))[:count] if count else []
