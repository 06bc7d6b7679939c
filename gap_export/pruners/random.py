"""Keep patches drawn at export with a seed: the same ones for every picture.

The draw is an initializer of the graph, because TensorRT ignores the seed of random operators.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures

NEEDS: Final[frozenset[Feature]] = frozenset()
EXTRA: Final = 0
DRAWS: Final = True


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """The drawn patches, in the order of the draw."""
    return Kept(order=_draw(features.geometry.tokens, kept, config.seed))


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same draw."""
    return EagerChoice(order=_draw(vision.geometry.tokens, kept, config.seed), scores=None)


def _draw(tokens: int, kept: int, seed: int) -> tuple[int, ...]:
    """The first `kept` of a permutation, so that a higher ratio keeps a subset of a lower."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(tokens)
    return tuple(int(index) for index in order[:kept])
