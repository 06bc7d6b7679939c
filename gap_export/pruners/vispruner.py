"""Keep the patches that CLS attends to most, and as many others that differ from each other.

Half of the count, rounded down, goes by attention. The others, in that order too, are thinned in
rounds until the rest of the count is left: those at even places go that are most like one at an
odd place, eight in a round. Patches that are the same, as those of equal tiles are, have the
attention and the cosines of the first of them: their own differ by rounding alone, which would
choose among them. Own order: by attention, then what the last round left.

References:
    VisPruner (arXiv:2412.01818, second version): the cosine is of the patches before the
    projector. Its counts are constants, so the rounds are unrolled. Ours: odd counts, where a
    round drops no more than there are even places.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

from gap_export.blocks.selection import find_first_same
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures
from gap_export.reference.selection import find_first_same_eagerly

# B batch (1), N visual tokens, C patch width, R not yet chosen, E at even places, O at odd ones.

PUBLISHED_AS: Final = "VisPruner"
NEEDS: Final = frozenset({Feature.CLS_ATTENTION})
EXTRA: Final = 0
_DROPS: Final = 8


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Important tokens, best first, then diverse ones."""
    del config
    scores_BN = features.by_token(Feature.CLS_ATTENTION)
    unit_NC = functional.normalize(features.patches_BNC[0].float(), dim=-1)
    cosine_NN = unit_NC @ unit_NC.T
    first_N = find_first_same(cosine_NN)
    scores_BN = torch.index_select(scores_BN, 1, first_N)
    cosine_NN = cosine_NN.index_select(0, first_N).index_select(1, first_N)
    # Of the same direction to the last bit, whatever the length of a unit vector comes out as.
    cosine_NN = torch.where(first_N[:, None] == first_N, 1.0, cosine_NN)
    ranked_N = torch.topk(scores_BN, scores_BN.shape[1], dim=-1).indices[0]
    important = kept // 2
    rest_R = ranked_N[important:]
    while (surplus := rest_R.shape[0] - (kept - important)) > 0:
        even_E, odd_O = rest_R[0::2], rest_R[1::2]
        drops = min(_DROPS, surplus, even_E.shape[0])
        cosine_EN = torch.index_select(cosine_NN, 0, even_E)
        likeness_E = torch.index_select(cosine_EN, 1, odd_O).amax(dim=1)
        rank_E = torch.topk(likeness_E, even_E.shape[0]).indices
        rest_R = torch.cat([torch.index_select(even_E, 0, rank_E[drops:]), odd_O])
    return Kept(order=torch.cat([ranked_N[:important], rest_R])[None])


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the tower's own attention map and output; ties go to the lower place."""
    del config
    attention = vision.attentions[vision.layer - 1]
    scores = vision.by_token(attention[:, :, 0, 1:].double().mean(dim=1))
    directions = functional.normalize(vision.patches.double(), dim=-1)
    cosines = directions @ directions.T
    first = find_first_same_eagerly(cosines)
    scores, cosines = scores[first], cosines[first][:, first]
    place = torch.tensor(first)
    cosines = torch.where(place[:, None] == place, 1.0, cosines)
    ranked = torch.sort(scores, descending=True, stable=True).indices.tolist()
    chosen, rest = ranked[: kept // 2], ranked[kept // 2 :]
    while len(chosen) + len(rest) > kept:
        evens, odds = rest[::2], rest[1::2]
        likeness = cosines[evens][:, odds].max(dim=1).values.tolist()
        by_likeness = sorted(range(len(evens)), key=lambda place: -likeness[place])
        drops = min(_DROPS, len(chosen) + len(rest) - kept, len(evens))
        rest = [evens[place] for place in by_likeness[drops:]] + odds
    return EagerChoice(order=(*chosen, *rest), scores=None)
