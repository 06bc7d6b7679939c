"""Keep the patches whose CLIP features fit the phrase best; one extra token is the others' mean.

With CLIP these are the least similar ones, see `VisionFeatures.text_sign`. Own order: raster.

References:
    TRIM (arXiv:2409.10994): dot products of features that are not normalized. Its softmax keeps
    their order, so it is left out. It also has an adaptive count, see `count_adaptively`; here
    the count is a constant.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gap_export.blocks.selection import (
    mark,
    mark_removed,
    score_by_phrase,
    sort_ascending,
)
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures
from gap_export.reference.selection import count_outliers

PUBLISHED_AS: Final = "TRIM"
NEEDS: Final = frozenset({Feature.TEXT, Feature.TEXT_PATCHES})
EXTRA: Final = 1


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Top tokens by score in raster order, and the mean of the removed ones."""
    del config
    scores_BN = score_by_phrase(features)
    tokens = scores_BN.shape[1]
    order_BK = sort_ascending(torch.topk(scores_BN, kept, dim=-1).indices)
    return Kept(
        order=order_BK,
        extra_BN=mark_removed(mark(order_BK, tokens)),
        extra_divisor=float(max(1, tokens - kept)),
    )


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the text tower's own output; ties go to the lower index."""
    del config
    scores = _score(vision)
    best = torch.sort(scores, descending=True, stable=True).indices[:kept].tolist()
    order = tuple(sorted(best))
    removed = [index for index in range(len(scores)) if index not in best]
    if not removed:
        return EagerChoice(order=order, scores=tuple(scores.tolist()))
    weights = torch.zeros(len(scores), dtype=torch.float64)
    weights[removed] = 1 / len(removed)
    return EagerChoice(
        order=order,
        scores=tuple(scores.tolist()),
        extra=vision.patches[removed].double().mean(dim=0).to(vision.patches.dtype),
        extra_weights=weights,
    )


def count_adaptively(vision: EagerVision) -> int:
    """Outliers of the softmax of the scores."""
    return count_outliers(torch.softmax(_score(vision), dim=0))


def _score(vision: EagerVision) -> Tensor:
    assert vision.text is not None
    assert vision.text_patches is not None
    return vision.text_sign * (vision.text_patches.double() @ vision.text.double())
