"""Keep the patches whose state is most like that of the CLS token.

The paper names a CLS-visual baseline without its formula; this definition is ours: the cosine of
the two states behind the block that gives the patch features.
"""

from __future__ import annotations

from typing import Final

import torch

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures

NEEDS: Final = frozenset({Feature.CLS_SIMILARITY})
EXTRA: Final = 0


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Top tokens by cosine, best first."""
    del config
    scores_BN = features.by_token(Feature.CLS_SIMILARITY)
    return Kept(order=torch.topk(scores_BN, kept, dim=-1).indices)


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the tower's own hidden states; ties go to the lower index."""
    del config
    states = vision.hidden_states[vision.layer]
    cosine = torch.cosine_similarity(states[:, 1:], states[:, :1], dim=-1)
    scores = vision.by_token(cosine)
    order = torch.sort(scores, descending=True, stable=True).indices
    return EagerChoice(order=tuple(order[:kept].tolist()), scores=tuple(scores.tolist()))
