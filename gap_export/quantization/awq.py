"""Activation-aware scaling (AWQ): inputs that carry much are made large before rounding.

A weight's columns are multiplied by a factor for each input, and what makes the input is divided
by it, so the model stays the same while large inputs lose less. The factor is the mean size of
the input to a power, and the power the one of a grid that loses least.

References:
    AWQ: Activation-aware Weight Quantization, arXiv:2306.00978.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gap_export.checkpoint.sources import TensorSource, cut_pieces, make_tensor
from gap_export.interfaces.decoder import SmoothingGroup
from gap_export.interfaces.family import InputStatistics
from gap_export.quantization.scheme import Scheme
from gap_export.quantization.values import Smoothing, round_weight

# I inputs of a weight, O its outputs.

_POWERS: Final = tuple(k / 10 for k in range(11))
_SEARCH_ROWS: Final = 256
"""Outputs of a weight that a power is judged by; all of them would not say much else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothedModel:
    """What changes in a model: how weights are quantized, and the sources of what feeds them."""

    smoothings: dict[str, Smoothing]
    sources: dict[str, TensorSource]


def find_scaled(groups: Iterable[SmoothingGroup], schemes: Collection[str]) -> set[str]:
    """Names of the tensors that smoothing divides besides weights that are quantized.

    Args:
        groups: Weights that read the same input, with what makes it.
        schemes: Names of the weights that are quantized, whose inputs all are seen.
    """
    return {
        group.maker
        for group in groups
        if group.maker not in schemes and all(name in schemes for name in group.readers)
    }


def smooth_model(
    sources: Mapping[str, TensorSource],
    schemes: Mapping[str, Scheme],
    groups: Sequence[SmoothingGroup],
    statistics: Mapping[str, InputStatistics],
    *,
    dtype: str,
) -> SmoothedModel:
    """Find the factors of every group, and what else is known of the inputs of quantized weights.

    Args:
        sources: Of the model's tensors.
        schemes: Of the weights that are quantized.
        groups: Weights that read the same input, with what makes it.
        statistics: Of the inputs, by weight; those without any are rounded plainly.
        dtype: Of the scales.
    """
    smoothings = {
        name: Smoothing(importance=statistics[name].mean_square.float())
        for name in schemes
        if name in statistics
    }
    changed: dict[str, TensorSource] = {}
    for group in groups:
        readers = [name for name in group.readers if name in smoothings]
        if len(readers) != len(group.readers):
            # A reader that stays as it is would read a scaled input.
            continue
        factors = _search(
            {name: sources[name] for name in readers}, schemes, statistics[readers[0]], dtype
        )
        for name in readers:
            smoothings[name] = dataclasses.replace(smoothings[name], columns=factors)
        if group.maker in smoothings:
            smoothings[group.maker] = dataclasses.replace(
                smoothings[group.maker], rows=1 / factors
            )
        else:
            changed[group.maker] = _divided(sources[group.maker], factors)
    return SmoothedModel(smoothings=smoothings, sources=changed)


def _search(
    readers: Mapping[str, TensorSource],
    schemes: Mapping[str, Scheme],
    statistics: InputStatistics,
    dtype: str,
) -> Tensor:
    """The factors [I] by which the readers of an input lose least together."""
    mean_I = statistics.mean_size.float().clamp_min(1e-8)
    square_I = statistics.mean_square.float()
    samples = {name: _some_rows(source) for name, source in readers.items()}
    best, least = torch.ones_like(mean_I), float("inf")
    for power in _POWERS:
        factors_I = mean_I**power
        factors_I = factors_I / (factors_I.max() * factors_I.min()).sqrt()
        loss = 0.0
        for name, weight_OI in samples.items():
            scaled_OI = weight_OI * factors_I
            values_OI, scales = round_weight(scaled_OI, schemes[name], dtype)
            block = weight_OI.shape[1] // scales.shape[1]
            error_OI = values_OI * scales.repeat_interleave(block, dim=1) - scaled_OI
            # Every weight counts alike, however many rows of it were looked at.
            loss += float(((error_OI / factors_I).square() * square_I).mean())
        if loss < least:
            best, least = factors_I, loss
    return best


def _some_rows(source: TensorSource) -> Tensor:
    """Rows of a weight from all over it, float32."""
    pieces = list(cut_pieces(source))
    most = max(1, _SEARCH_ROWS // len(pieces))
    parts = []
    for piece in pieces:
        if source.cut:
            piece = piece.rows(0, min(most, piece.shape[0]))  # noqa: PLW2901 - fewer rows of it
        parts.append(make_tensor(piece).float()[:_SEARCH_ROWS])
    return torch.cat(parts)


def _divided(source: TensorSource, factors: Tensor) -> TensorSource:
    """A norm's weight [I], or a linear layer's [I, in] that stays as it is, divided by factors."""

    def make(*values: Tensor) -> Tensor:
        made = values[0] if source.make is None else source.make(*values)
        return made / factors.reshape(-1, *[1] * (made.ndim - 1))

    return TensorSource(shape=source.shape, inputs=source.inputs, make=make)
