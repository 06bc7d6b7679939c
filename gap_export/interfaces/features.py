"""What a vision tower hands to a pruner, and what a pruner hands back.

The types are all that models and pruners share: a family fills in the features that a pruner
asks for, a pruner sees neither the family nor the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from torch import Tensor

from gap_export.config.records import PruneConfig

# B batch (1), N visual tokens that may be removed, P patches (N times the strip), K kept,
# C patch width, D decoder width, W text width, V views of the picture, T tokens of a view,
# H heads, d head width.


class Feature(Enum):
    """A by-product of the vision stage that a pruner may ask for. The value is its name.

    All are float32 whatever the model's dtype. Shapes are by patch, P, but for the last three.
    """

    CLS_ATTENTION = "cls_attention"
    """[B, P]: attention that the CLS token pays to each patch, mean over heads, in the block
    whose output the patches are."""

    ATTENTION = "attention"
    """[B, P]: the attention of CLS, or the column's where the tower has no CLS token. For pruners
    that can do with either; towers do not give it themselves, see `settle_needs`."""

    COLUMN_ATTENTION = "column_attention"
    """[B, P]: attention that each patch receives in that block, mean over heads and over all
    tokens of its view that pay it, CLS among them where there is one."""

    CLS_SIMILARITY = "cls_similarity"
    """[B, P]: cosine between the state of the CLS token and that of each patch."""

    KEYS = "keys"
    """[B, P, d]: attention keys, mean over heads, in the block whose output the patches are."""

    MERGE_ATTENTION = "merge_attention"
    """[B, P]: attention that the CLS token pays to each patch in the block after the patches
    (the last one where none follows), all heads taken as one: softmax(q k / sqrt(C))."""

    MERGE_KEYS = "merge_keys"
    """[B, P, C]: keys of that block."""

    TOKENS = "tokens"
    """[B, N, D]: all visual tokens, behind the projector."""

    TEXT = "text_features"
    """[B, W]: the phrase, an input of the vision graph."""

    TEXT_PATCHES = "text_patches"
    """[B, N, W]: patches in the space of the phrase."""


CLS_FEATURES: Final = frozenset(
    {Feature.CLS_ATTENTION, Feature.CLS_SIMILARITY, Feature.MERGE_ATTENTION}
)
"""What only a tower with a CLS token can give."""


def settle_needs(needs: frozenset[Feature], given: Collection[Feature]) -> frozenset[Feature]:
    """What a pruner needs in terms of what a tower gives: any attention is its best one."""
    if Feature.ATTENTION not in needs:
        return needs
    has_cls = Feature.CLS_ATTENTION in given
    best = Feature.CLS_ATTENTION if has_cls else Feature.COLUMN_ATTENTION
    return needs - {Feature.ATTENTION} | {best}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where the tokens that may be removed lie: grids of (rows, columns), one after another.

    A token is made of `strip` patches, which lie behind one another in features by patch.
    `missing` are tokens of the grids that a pruner does not see, as they stay whatever it chooses.
    """

    grids: tuple[tuple[int, int], ...]
    strip: int = 1
    missing: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens, N."""
        return sum(rows * columns for rows, columns in self.grids) - len(self.missing)

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Grid, row and column of every token."""
        everywhere = [
            (number, row, column)
            for number, (rows, columns) in enumerate(self.grids)
            for row in range(rows)
            for column in range(columns)
        ]
        return [place for k, place in enumerate(everywhere) if k not in set(self.missing)]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFeatures:
    """Tokens before the projector [B, N, C], with the features that the pruner asked for.

    Where the decoder takes planes, what they are made of lies behind each token's own values.
    `text_sign` is +1 where patches that show the phrase are similar to it, and -1 for CLIP,
    whose patches of the referred area are the least similar.
    """

    patches_BNC: Tensor
    geometry: Geometry
    values: dict[Feature, Tensor]
    text_sign: int

    def by_token(self, feature: Feature) -> Tensor:
        """A feature by patch [B, P, ...] as its mean over each token's strip [B, N, ...]."""
        value = self.values[feature]
        strip = self.geometry.strip
        if strip == 1:
            return value
        batch, patches, *rest = value.shape
        return value.reshape(batch, patches // strip, strip, *rest).mean(dim=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A pruner's choice: distinct tokens in the pruner's own order.

    `order` is int64 [B, K], or a tuple of K numbers where it is the same for every picture.
    `mix_BKN` says by which weights a kept token takes in others (None: each stays as it is).
    `extra_BN`, over `extra_divisor`, are the weights of the extra token (None: there is none).
    """

    order: Tensor | tuple[int, ...]
    mix_BKN: Tensor | None = None
    extra_BN: Tensor | None = None
    extra_divisor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerVision:
    """What the reference gives to a pruner's eager form: outputs of the model's own modules.

    `patches` [N, C] and `tokens` [N, D] stand before and behind the projector; `planes` are what
    the decoder is given behind each token, None where it takes none. `hidden_states`
    [V, T, C] and `attentions` [V, H, T, T] are by layer, `queries` and `keys` [V, T, C] the
    outputs of each block's projections. `leading` of the T tokens stand before the patches: 1 in
    a tower with a CLS token, otherwise 0. `layer` is the index of the hidden state that the
    patches are taken from. `arrange` brings [V, T - leading, ...] into the order of the patches.
    `text` [W] and `text_patches` [N, W] are None until a phrase is read, for pruners that need
    one.
    """

    patches: Tensor
    tokens: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    leading: int
    layer: int
    geometry: Geometry
    arrange: Callable[[Tensor], Tensor]
    text: Tensor | None = None
    text_patches: Tensor | None = None
    text_sign: int = 1
    planes: Tensor | None = None

    def by_token(self, values: Tensor) -> Tensor:
        """Values by view and patch [V, T - leading, ...] as means by token [N, ...]."""
        arranged = self.arrange(values)
        return arranged.reshape(-1, self.geometry.strip, *arranged.shape[1:]).mean(dim=1)

    def without_leading(self, values: Tensor) -> Tensor:
        """Values by view and tower token [V, T, ...] of the patches alone."""
        return values[:, self.leading :]

    @property
    def merge_block(self) -> int:
        """Index of the block after the patches, or of the last one."""
        return min(self.layer, len(self.keys) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerChoice:
    """An eager pruner's choice: indices in its own order, and all scores where it scores.

    `rows` [K, C] are the kept tokens where the pruner changes them, `extra` [C] is the extra
    token and `extra_weights` [N] what it is made of.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...] | None
    rows: Tensor | None = None
    extra: Tensor | None = None
    extra_weights: Tensor | None = None


class Pruner(Protocol):
    """A module in gap_export.pruners.

    One that draws by `config.seed` says so by `DRAWS = True`, which a sweep over seeds asks for.
    One that has an adaptive rule also defines `count_adaptively(vision) -> int`, the number of
    tokens that the rule keeps of one picture; see `AdaptivePruner`.
    """

    NEEDS: frozenset[Feature]
    EXTRA: int
    """Extra tokens that it makes of what it removes: 0 or 1."""

    def prune(self, features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
        """Choose tokens in the graph; every size is a constant."""

    def prune_eagerly(self, vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
        """The same choice for the reference, written plainly from the library's outputs."""


class AdaptivePruner(Pruner, Protocol):
    """A pruner whose method chooses the number of tokens by the picture."""

    def count_adaptively(self, vision: EagerVision) -> int:
        """Tokens that the published rule keeps of this picture, without extra ones."""
