"""Keep the patches that CLS attends to most, and merge the others into them.

Each kept patch takes in its 32 nearest by the cosine of keys, weighted by their attention; one
extra token is the weighted sum of the removed ones. Attention is of one head as wide as all, in
the block after the patches.

References:
    PruMerge (arXiv:2403.15388), which keeps as many as are outliers; here the count is a
    constant, and `count_adaptively` tells what theirs would be.
"""

from __future__ import annotations

from typing import Final

import torch

from gap_export.blocks.selection import merge_nearest
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures
from gap_export.reference.selection import attend_as_one, count_outliers, merge_nearest_eagerly

PUBLISHED_AS: Final = "PruMerge"
NEEDS: Final = frozenset({Feature.MERGE_ATTENTION, Feature.MERGE_KEYS})
EXTRA: Final = 1


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Top tokens by attention, best first, merged."""
    del config
    attention_BN = features.by_token(Feature.MERGE_ATTENTION)
    return merge_nearest(features, torch.topk(attention_BN, kept, dim=-1).indices)


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the tower's own queries and keys; ties go to the lower index."""
    del config
    attention = attend_as_one(vision)
    order = torch.sort(attention, descending=True, stable=True).indices[:kept]
    return merge_nearest_eagerly(vision, tuple(order.tolist()), attention, attention)


def count_adaptively(vision: EagerVision) -> int:
    """Outliers of the attention."""
    return count_outliers(attend_as_one(vision))
