"""Tokens that always stay for their positions' rotary angles, written out plainly.

A second form of gap_export.graph.coordinates: from the frequencies themselves, not from the
graphs' tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Pruner

# N visual tokens that may be removed.


def find_coordinates(
    frequencies: Sequence[float], places: Sequence[Sequence[int]], share: float
) -> list[int]:
    """The tokens that always stay, in raster order.

    Args:
        frequencies: Angle that each rotary pair turns by in a step.
        places: Position IDs of each token before pruning, one or three.
        share: Of the tokens by mean cosine, and again by mean sine.

    References:
        IVC-Prune, arXiv:2602.03060.
    """

    def rank(wave: Callable[[float], float]) -> list[int]:
        # Exact sums: cells that mirror each other tie, whatever the order of rows and columns.
        means = [
            math.fsum(wave(place * turn) for place in token for turn in frequencies)
            for token in places
        ]
        best = torch.sort(
            torch.tensor(means, dtype=torch.float64), descending=True, stable=True
        ).indices.tolist()
        return list(best[: max(1, round(share * len(places)))])

    return sorted({*rank(math.cos), *rank(math.sin)})


def choose_eagerly(
    pruner: Pruner,
    vision: EagerVision,
    kept: int,
    config: PruneConfig,
    coordinates: Sequence[int],
) -> EagerChoice:
    """The pruner's choice among the other tokens, behind those that always stay."""
    if not coordinates:
        return pruner.prune_eagerly(vision, kept, config)
    stay = list(coordinates)
    tokens, strip = len(vision.patches), vision.geometry.strip
    others = [index for index in range(tokens) if index not in stay]

    def arrange(values: Tensor) -> Tensor:
        arranged = vision.arrange(values)
        by_token = arranged.reshape(tokens, strip, *arranged.shape[1:])
        return by_token[others].flatten(0, 1)

    text_patches = vision.text_patches
    seen = replace(
        vision,
        patches=vision.patches[others],
        tokens=vision.tokens[others],
        text_patches=None if text_patches is None else text_patches[others],
        geometry=replace(vision.geometry, missing=tuple(stay)),
        arrange=arrange,
    )
    choice = pruner.prune_eagerly(seen, kept - len(stay), config)
    scores = None
    if choice.scores is not None:
        by_token = dict(zip(others, choice.scores, strict=True))
        scores = tuple(by_token.get(index, math.inf) for index in range(tokens))
    weights = None
    if choice.extra_weights is not None:
        weights = torch.zeros(tokens, dtype=choice.extra_weights.dtype)
        weights[others] = choice.extra_weights
    return EagerChoice(
        order=(*stay, *(others[index] for index in choice.order)),
        scores=scores,
        rows=None if choice.rows is None else torch.cat([vision.patches[stay], choice.rows]),
        extra=choice.extra,
        extra_weights=weights,
    )
