"""Keep the patches that all tokens together attend to most; needs no CLS token.

The score of a patch is the mean of its column in the attention map of the block that gives the
patch features, over heads and over all tokens that pay attention.

References:
    The score that the authors of VisPruner (arXiv:2412.01818) and VisionZip (arXiv:2412.04467)
    use for towers without a CLS token.
"""

from __future__ import annotations

from typing import Final

import torch

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures

NEEDS: Final = frozenset({Feature.COLUMN_ATTENTION})
EXTRA: Final = 0


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Top tokens by score, best first."""
    del config
    scores_BN = features.by_token(Feature.COLUMN_ATTENTION)
    return Kept(order=torch.topk(scores_BN, kept, dim=-1).indices)


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the tower's own attention map; ties go to the lower index."""
    del config
    attention = vision.attentions[vision.layer - 1]
    scores = vision.by_token(vision.without_leading(attention.double().mean(dim=(1, 2))))
    order = torch.sort(scores, descending=True, stable=True).indices
    return EagerChoice(order=tuple(order[:kept].tolist()), scores=tuple(scores.tolist()))
