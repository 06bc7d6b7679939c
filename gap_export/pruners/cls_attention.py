"""Keep the patches that the CLS token attends to most.

References:
    FasterVLM (arXiv:2412.01818): head mean of the CLS row of the attention in the block that
    gives the patch features.
"""

from __future__ import annotations

from typing import Final

import torch

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures

PUBLISHED_AS: Final = "FasterVLM"
NEEDS: Final = frozenset({Feature.CLS_ATTENTION})
EXTRA: Final = 0


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Top tokens by score, best first."""
    del config
    scores_BN = features.by_token(Feature.CLS_ATTENTION)
    return Kept(order=torch.topk(scores_BN, kept, dim=-1).indices)


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the tower's own attention map; ties go to the lower index."""
    del config
    attention = vision.attentions[vision.layer - 1]
    scores = vision.by_token(attention[:, :, 0, 1:].mean(dim=1))
    order = torch.sort(scores, descending=True, stable=True).indices
    return EagerChoice(order=tuple(order[:kept].tolist()), scores=tuple(scores.tolist()))
