"""Keep the patches whose features fit the phrase best.

The paper names a text-visual baseline without its formula; this definition is ours: the score of
TRIM, a dot product of features that are not normalized, without its extra token. With CLIP the
least similar patches are kept, see `VisionFeatures.text_sign`.

References:
    Grounding-Aware Token Pruning, arXiv:2506.21873; TRIM, arXiv:2409.10994.
"""

from __future__ import annotations

from typing import Final

import torch

from gap_export.blocks.selection import score_by_phrase
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures

NEEDS: Final = frozenset({Feature.TEXT, Feature.TEXT_PATCHES})
EXTRA: Final = 0


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Top tokens by score, best first."""
    del config
    return Kept(order=torch.topk(score_by_phrase(features), kept, dim=-1).indices)


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the text tower's own output; ties go to the lower index."""
    del config
    assert vision.text is not None
    assert vision.text_patches is not None
    scores = vision.text_sign * (vision.text_patches.double() @ vision.text.double())
    order = torch.sort(scores, descending=True, stable=True).indices
    return EagerChoice(order=tuple(order[:kept].tolist()), scores=tuple(scores.tolist()))
