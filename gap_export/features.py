"""What a vision tower hands to a pruner, and what a pruner hands back.

The types are all that models and pruners share: a family fills in the features that a pruner
asks for, a pruner sees neither the family nor the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from gap_export.config import PruneConfig

# B batch (1), N patches, K kept, C vision width.


class Feature(Enum):
    """A by-product of the vision tower that a pruner may ask for. The value is its name."""

    CLS_ATTENTION = "cls_attention"
    """[B, N] float32: attention that the CLS token pays to each patch, mean over heads, in the
    block whose output the patches are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFeatures:
    """Patches before the projector, with the features that the pruner asked for."""

    patches_BNC: Tensor
    grid: tuple[int, int]
    extras: dict[Feature, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A pruner's choice: distinct patch indices in the pruner's own order.

    `order` is int64 [B, K], or a tuple of K numbers where it is the same for every picture.
    """

    order: Tensor | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerVision:
    """What the reference gives to a pruner's eager form: outputs of the library's own tower."""

    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    layer: int
    """Index of the hidden state that the patches are taken from, counted from 0."""
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerChoice:
    """An eager pruner's choice: indices in its own order, and all scores where it scores."""

    order: tuple[int, ...]
    scores: tuple[float, ...] | None


class Pruner(Protocol):
    """A module in gap_export.pruners."""

    NEEDS: frozenset[Feature]

    def prune(self, features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
        """Choose patches in the graph; every size is a constant."""

    def prune_eagerly(self, vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
        """The same choice for the reference, written plainly from the library's outputs."""
