"""Keep a few pivots, and for each of them the tokens that duplicate it least; needs no CLS token.

Pivots are the tokens of the largest absolute sum behind the projector. One after another, largest
first, each takes its share of the count: of the tokens that nobody took, those with the smallest
cosine to it. Tokens that are the same, as the padding of a picture may be, have the size and the
cosines of the first of them: their own differ by rounding alone, which would choose among them.
Own order: pivots, then as they were taken.

References:
    DART (arXiv:2502.11494), which prunes inside the language model, by keys and states of its
    second layer, with as many text tokens as further pivots. Before the language model there are
    neither, so tokens stand for both, as in TensorRT Edge-LLM, and all pivots are the picture's.
    Ours: pivots go by size, where the authors' set has no order, and the count is exact, where
    theirs is rounded down to a multiple of their pivots.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

from gap_export.blocks.selection import find_first_same
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures
from gap_export.reference.selection import find_first_same_eagerly

# B batch (1), N visual tokens, D token width, P pivots, S share of a pivot.

PUBLISHED_AS: Final = "DART"
NEEDS: Final = frozenset({Feature.TOKENS})
EXTRA: Final = 0
_PIVOTS: Final = 4
"""Of the picture, as published."""
_TAKEN: Final = 4.0
"""Added to a cosine, more than any other is."""


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Pivots, then each one's share; five nodes for a pivot."""
    del config
    tokens_BND = features.values[Feature.TOKENS]
    index_N = torch.arange(tokens_BND.shape[1])
    shares = _share(kept)
    unit_ND = functional.normalize(tokens_BND[0], dim=-1)
    cosine_NN = unit_ND @ unit_ND.T
    first_N = find_first_same(cosine_NN)
    size_BN = torch.index_select(tokens_BND.abs().sum(dim=-1), 1, first_N)
    pivots_BP = torch.topk(size_BN, len(shares), dim=-1).indices
    cosine_PN = torch.index_select(cosine_NN, 0, pivots_BP[0]).index_select(1, first_N)
    taken_N = (pivots_BP[0][:, None] == index_N).float().amax(dim=0) * _TAKEN
    chosen = [pivots_BP]
    for pivot, share in enumerate(shares):
        if not share:
            break
        left_BN = (cosine_PN[pivot] + taken_N)[None]
        chosen.append(torch.topk(left_BN, share, dim=-1, largest=False).indices)
        is_new_N = (chosen[-1][0][:, None] == index_N).float().amax(dim=0)
        taken_N = torch.maximum(taken_N, is_new_N * _TAKEN)
    return Kept(order=torch.cat(chosen, dim=1))


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the projector's own output; ties go to the lower index."""
    del config
    tokens = vision.tokens.double()
    directions = torch.stack([token / token.norm().clamp(min=1e-12) for token in tokens])
    shares = _share(kept)
    cosines = directions @ directions.T
    first = find_first_same_eagerly(cosines)
    sizes, cosines = tokens.abs().sum(dim=-1)[first], cosines[:, first]
    order = torch.sort(sizes, descending=True, stable=True).indices[: len(shares)].tolist()
    for pivot, share in zip(tuple(order), shares, strict=True):
        left = [index for index in range(len(tokens)) if index not in order]
        likeness = cosines[pivot, left].tolist()
        least = sorted(range(len(left)), key=likeness.__getitem__)
        order += [left[place] for place in least[:share]]
    return EagerChoice(order=tuple(order), scores=None)


def _share(kept: int) -> list[int]:
    """How many tokens each pivot takes; what is left over goes to the first ones."""
    pivots = min(_PIVOTS, kept)
    return [(kept - 1 - pivot) // pivots for pivot in range(pivots)]
