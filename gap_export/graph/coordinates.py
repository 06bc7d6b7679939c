"""Tokens that always stay because their positions lie where rotary embedding is extreme.

The positions whose rotary cosines are largest in the mean over all frequencies, and those whose
sines are, act as the axes that a model reads places from. Which tokens that are depends on
positions alone: a constant of the graph. A pruner chooses among the others.

    tokens        of N visual tokens
    coordinates   round(share * N) by cosines, as many by sines; what is in both counts once
    others        what the pruner sees: features, tokens and places of all the rest
    kept          coordinates first, ascending, then the pruner's choice in its own order

References:
    IVC-Prune (arXiv:2602.03060): 5 or 10 % of the visual tokens by each, by model; with three
    position IDs the mean is over all three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import Feature, Kept, Pruner, VisionFeatures

# A axes of positions, B batch (1), N visual tokens that may be removed, K kept, P positions,
# F rotary frequencies.


def find_coordinates(
    tables: tuple[Tensor, ...], ids: Sequence[Sequence[int]], share: float
) -> tuple[int, ...]:
    """The tokens that always stay, ascending.

    Args:
        tables: Rotary cosines and sines [P, F].
        ids: Position IDs [A, N] of the tokens before pruning.
        share: Of the tokens, by cosines and again by sines; at least one by each.
    """
    tokens = len(ids[0])
    count = max(1, round(share * tokens))
    found: set[int] = set()
    for table_PF in tables:
        used = {place for axis in ids for place in axis}
        # Exact sums: where two are equal, they are equal on every machine.
        sums = {place: math.fsum(table_PF[place].tolist()) for place in used}
        means = [math.fsum(sums[axis[token]] for axis in ids) for token in range(tokens)]
        found.update(sorted(range(tokens), key=lambda token: (-means[token], token))[:count])
    return tuple(sorted(found))


def find_ids(tokens: Sequence[int], start: int, grid: tuple[int, int] | None) -> list[list[int]]:
    """Position IDs [A, N] of visual tokens before pruning.

    Args:
        tokens: Indices among all visual tokens.
        start: ID of the picture's start.
        grid: Rows and columns of the picture where a token has three IDs; None where one counts.
    """
    if grid is None:
        return [[start + index for index in tokens]]
    return [
        [start for _ in tokens],
        [start + index // grid[1] for index in tokens],
        [start + index % grid[1] for index in tokens],
    ]


def choose(
    pruner: Pruner,
    features: VisionFeatures,
    kept: int,
    config: PruneConfig,
    coordinates: tuple[int, ...],
) -> Kept:
    """A pruner's choice of `kept` tokens, `coordinates` among them, which come first."""
    if not coordinates:
        return pruner.prune(features, kept, config)
    tokens = features.geometry.tokens
    others = [index for index in range(tokens) if index not in set(coordinates)]
    choice = pruner.prune(
        _leave_out(features, others, coordinates), kept - len(coordinates), config
    )
    order = choice.order
    index_N = torch.arange(tokens)
    spread_NN = (torch.tensor(others)[:, None] == index_N).float()
    if isinstance(order, tuple):
        full: Tensor | tuple[int, ...] = (*coordinates, *(others[index] for index in order))
    else:
        own_BK = torch.tensor([coordinates])
        full = torch.cat([own_BK, torch.tensor(others)[order]], dim=1)
    mix_BKN = extra_BN = None
    if choice.mix_BKN is not None:
        own_BKN = (torch.tensor([coordinates])[..., None] == index_N).float()
        mix_BKN = torch.cat([own_BKN, choice.mix_BKN.float() @ spread_NN], dim=1)
    if choice.extra_BN is not None:
        extra_BN = choice.extra_BN.float() @ spread_NN
    return Kept(order=full, mix_BKN=mix_BKN, extra_BN=extra_BN, extra_divisor=choice.extra_divisor)


def _leave_out(
    features: VisionFeatures, others: list[int], coordinates: tuple[int, ...]
) -> VisionFeatures:
    """What a pruner sees of the other tokens."""
    geometry = features.geometry
    by_token = torch.tensor(others)
    strip = geometry.strip
    by_patch = torch.tensor([index * strip + k for index in others for k in range(strip)])

    def pick(feature: Feature, value: Tensor) -> Tensor:
        if feature is Feature.TEXT:
            return value
        whole = feature in {Feature.TOKENS, Feature.TEXT_PATCHES}
        return torch.index_select(value, 1, by_token if whole else by_patch)

    return replace(
        features,
        patches_BNC=torch.index_select(features.patches_BNC, 1, by_token),
        geometry=replace(geometry, missing=coordinates),
        values={feature: pick(feature, value) for feature, value in features.values.items()},
    )
