"""What several pruners' eager forms do with a picture, one token after another.

Shares nothing with the graphs' gap_export.blocks.selection, constants included, so that an error
in one cannot be in the other.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gap_export.interfaces.features import EagerChoice, EagerVision

# N visual tokens.

_NEIGHBOURS: Final = 32
"""Nearest tokens that a kept one takes in, as published (arXiv:2403.15388)."""
_SAME: Final = 1e-6
"""How far the cosine of tokens that are the same may be below 1."""


def read_attention(vision: EagerVision) -> Tensor:
    """Attention that each token gets in the block that gives the patches, mean over heads: [N].

    What CLS pays, or all tokens of a view where there is no CLS token.
    """
    by_head = vision.attentions[vision.layer - 1].double()
    paid = by_head[:, :, 0] if vision.leading else by_head.mean(dim=2)
    return vision.by_token(vision.without_leading(paid.mean(dim=1)))


def find_first_same_eagerly(cosines: Tensor) -> list[int]:
    """Of every token the first whose cosine with it is 1 but for rounding, or itself."""
    alike = (cosines >= 1 - _SAME).tolist()
    return [[*row[:index], True].index(True) for index, row in enumerate(alike)]


def attend_as_one(vision: EagerVision) -> Tensor:
    """What CLS pays to each token in the block after the patches, all heads taken as one: [N]."""
    queries = vision.queries[vision.merge_block].double()
    keys = vision.keys[vision.merge_block].double()
    scale = keys.shape[-1] ** -0.5
    views = [torch.softmax(k @ q[0] * scale, dim=0) for q, k in zip(queries, keys, strict=True)]
    return vision.by_token(torch.stack(views)[:, 1:])


def merge_nearest_eagerly(
    vision: EagerVision, order: tuple[int, ...], attention: Tensor, scores: Tensor
) -> EagerChoice:
    """The choice with its merged rows, one token after another.

    Args:
        vision: Of the picture.
        order: Kept tokens.
        attention: Weights [N].
        scores: For the choice [N].
    """
    given = tuple(scores.tolist())
    if len(order) == len(attention):
        return EagerChoice(order=order, scores=given)
    patches = vision.patches.double()
    keys = vision.by_token(vision.without_leading(vision.keys[vision.merge_block]).double())
    directions = torch.stack([key / key.norm().clamp(min=1e-12) for key in keys])
    rows = []
    for center in order:
        cosines = directions @ directions[center]
        nearest = torch.sort(cosines, descending=True, stable=True).indices.tolist()
        nearest.remove(center)
        near = nearest[:_NEIGHBOURS]
        rows.append(patches[center] + attention[near] @ patches[near])
    weights = attention.clone()
    weights[list(order)] = 0
    return EagerChoice(
        order=order,
        scores=given,
        rows=torch.stack(rows).to(vision.patches.dtype),
        extra=(weights @ patches).to(vision.patches.dtype),
        extra_weights=weights,
    )


def count_outliers(values: Tensor) -> int:
    """How many values lie more than 1.5 quartile ranges above the third quartile.

    As published the count goes through a ratio and back.
    """
    first, third = torch.quantile(
        values.double(), torch.tensor([0.25, 0.75], dtype=torch.float64)
    ).tolist()
    outliers = sum(value > third + 1.5 * (third - first) for value in values.tolist())
    return int(len(values) * (outliers / len(values)))
