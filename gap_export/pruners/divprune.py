"""Keep patches that lie far apart: always the one farthest from those chosen.

The distance is 1 - cosine behind the projector. The first is the one farthest from its nearest.
Tokens that are the same, as the padding of a picture may be, have the distances of the first of
them: their own differ by rounding alone, which would choose among them. Own order: that of the
choice.

References:
    DivPrune (arXiv:2503.02175). The loop over tokens is unrolled: the count is a constant.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

from gap_export.blocks.selection import find_first_same
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures
from gap_export.reference.selection import find_first_same_eagerly
from gap_export.tracing.farthest import choose_farthest

# B batch (1), N visual tokens, D token width.

PUBLISHED_AS: Final = "DivPrune"
NEEDS: Final = frozenset({Feature.TOKENS})
EXTRA: Final = 0
_LEAST: Final = 1e-6
"""Least distance: what is less is rounding, and such tokens go by index."""
_OWN: Final = -1.0
_FAR: Final = 4.0


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Tokens in the order of choice; three nodes for each."""
    del config
    unit_ND = functional.normalize(features.values[Feature.TOKENS][0], dim=-1)
    tokens = unit_ND.shape[0]
    is_own_NN = torch.arange(tokens)[:, None] == torch.arange(tokens)
    cosine_NN = unit_ND @ unit_ND.T
    first_N = find_first_same(cosine_NN)
    distance_NN = (1.0 - cosine_NN).clamp(min=_LEAST)
    distance_NN = distance_NN.index_select(0, first_N).index_select(1, first_N)
    nearest_B1N = torch.where(is_own_NN, _FAR, distance_NN).amin(dim=1)[None, None]
    # A token's distance to itself makes it the nearest for good once it is chosen.
    distance_NN = torch.where(is_own_NN, _OWN, distance_NN)
    first_B1 = nearest_B1N.argmax(dim=-1)
    return Kept(order=choose_farthest(distance_NN, first_B1, kept))


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the projector's own output; ties go to the lower index."""
    del config
    directions = torch.stack([t / t.norm().clamp(min=1e-12) for t in vision.tokens.double()])
    cosines = directions @ directions.T
    first = find_first_same_eagerly(cosines)
    distances = (1 - cosines).clamp(min=_LEAST)[first][:, first]
    total = len(distances)
    to_others = distances.clone()
    to_others[range(total), range(total)] = torch.inf
    order = [int(to_others.min(dim=1).values.argmax())]
    nearest = distances[order[0]]
    while len(order) < kept:
        offered = nearest.clone()
        offered[order] = -torch.inf
        order.append(int(offered.argmax()))
        nearest = torch.minimum(nearest, distances[order[-1]])
    return EagerChoice(order=tuple(order), scores=None)
