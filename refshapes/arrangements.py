"""How the ablations number and order kept tokens: which slot holds which, with which ID."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

MAIN: Final = "visionzip"
"""The pruner whose tokens are numbered anew: the model's own."""
GRID: Final = 16
TOKENS: Final = GRID * GRID
_SEEDS: Final = (0, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """Which token each slot holds, its ID, and the ID of the text behind the picture.

    IDs count from the picture's start.
    """

    slots: list[int]
    ids: list[int]
    text: int


Lay = Callable[[list[int], np.random.Generator], Laid]
"""Kept tokens in the pruner's own order, and what draws, to slots and IDs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to prune and to number. `pruner` None leaves all tokens in the prompt.

    `shift` is by how many columns all IDs of the picture are off, where the text's are not.
    Without `merges`, kept tokens stay as they are whatever the pruner adds to them.
    """

    group: str
    label: str
    pruner: str | None
    lay: Lay
    seeds: tuple[int, ...] = (0,)
    shift: int = 0
    merges: bool = True

    @property
    def name(self) -> str:
        """One of all."""
        return f"{self.group}: {self.label}"


def keep_both(order: list[int], _: np.random.Generator) -> Laid:
    """GAP: the order and the IDs from before pruning."""
    return Laid(slots=sorted(order), ids=sorted(order), text=TOKENS)


def renumber(*, picture: bool, text: bool) -> Lay:
    """Raster order; the picture's IDs, where its text begins, or both counted anew."""

    def lay(order: list[int], _: np.random.Generator) -> Laid:
        kept = sorted(order)
        ids = list(range(len(kept))) if picture else kept
        return Laid(slots=kept, ids=ids, text=len(kept) if text else TOKENS)

    return lay


def stretch(order: list[int], _: np.random.Generator) -> Laid:
    """Raster order, IDs counted anew in even steps over the whole picture."""
    kept = sorted(order)
    ids = [rank * TOKENS // len(kept) for rank in range(len(kept))]
    return Laid(slots=kept, ids=ids, text=TOKENS)


def squeeze(count: int) -> Lay:
    """Nothing is removed, and tokens share so many IDs, those that compact gives."""

    def lay(order: list[int], _: np.random.Generator) -> Laid:
        kept = sorted(order)
        return Laid(slots=kept, ids=[index * count // TOKENS for index in kept], text=count)

    return lay


def own_order(order: list[int], _: np.random.Generator) -> Laid:
    """The pruner's own order, each token with its ID."""
    return Laid(slots=list(order), ids=list(order), text=TOKENS)


def deal_ascending(order: list[int], _: np.random.Generator) -> Laid:
    """The pruner's own order under ascending IDs, so that tokens have each other's: permuted."""
    return Laid(slots=list(order), ids=sorted(order), text=TOKENS)


def reverse(order: list[int], _: np.random.Generator) -> Laid:
    """From the last token to the first, each with its ID."""
    kept = sorted(order, reverse=True)
    return Laid(slots=kept, ids=kept, text=TOKENS)


def shuffle_order(order: list[int], draw: np.random.Generator) -> Laid:
    """Any order, each token with its ID."""
    kept = [int(index) for index in draw.permutation(sorted(order))]
    return Laid(slots=kept, ids=kept, text=TOKENS)


def shuffle_ids(order: list[int], draw: np.random.Generator) -> Laid:
    """Raster order, the same IDs dealt anew among the tokens."""
    kept = sorted(order)
    return Laid(slots=kept, ids=[int(each) for each in draw.permutation(kept)], text=TOKENS)


def scatter(cells: int) -> Lay:
    """Raster order, each ID off by so many cells to one of the four sides inside the picture."""

    def lay(order: list[int], draw: np.random.Generator) -> Laid:
        kept = sorted(order)
        ids = []
        for index in kept:
            row, column = divmod(index, GRID)
            sides = [
                (row + down) * GRID + column + right
                for down, right in ((0, cells), (0, -cells), (cells, 0), (-cells, 0))
                if 0 <= row + down < GRID and 0 <= column + right < GRID
            ]
            ids.append(int(draw.choice(sides)))
        return Laid(slots=kept, ids=ids, text=TOKENS)

    return lay


def shift_picture(by: int) -> Lay:
    """Raster order, all IDs of the picture larger by the same."""

    def lay(order: list[int], _: np.random.Generator) -> Laid:
        kept = sorted(order)
        return Laid(slots=kept, ids=[index + by for index in kept], text=TOKENS)

    return lay


def shift_all(by: int) -> Lay:
    """Raster order, all IDs from the picture on larger by the same, the text's too."""

    def lay(order: list[int], _: np.random.Generator) -> Laid:
        kept = sorted(order)
        return Laid(slots=kept, ids=[index + by for index in kept], text=TOKENS + by)

    return lay


def near_text(by: int) -> Lay:
    """GAP, but the text behind the picture begins so many IDs earlier."""

    def lay(order: list[int], _: np.random.Generator) -> Laid:
        return Laid(slots=sorted(order), ids=sorted(order), text=TOKENS - by)

    return lay


def follow_last(order: list[int], _: np.random.Generator) -> Laid:
    """GAP, but the text begins behind the last token that is kept: compact-grid of one axis."""
    kept = sorted(order)
    return Laid(slots=kept, ids=kept, text=kept[-1] + 1)


KEPT, EXACT, APART, WHOLE = "what is kept", "how exact", "order and value", "nothing removed"
_VARIANTS: Final = (
    Variant(group=WHOLE, label="IDs as they are", pruner=None, lay=keep_both),
    Variant(
        group=WHOLE,
        label="each ID off by one cell",
        pruner=None,
        lay=scatter(1),
        seeds=_SEEDS[:1],
    ),
    Variant(group=WHOLE, label="IDs dealt anew", pruner=None, lay=shuffle_ids, seeds=_SEEDS[:1]),
    Variant(
        group=WHOLE,
        label="any order, right IDs",
        pruner=None,
        lay=shuffle_order,
        seeds=_SEEDS[:1],
    ),
    *(
        Variant(group=KEPT, label=pruner, pruner=pruner, lay=keep_both)
        for pruner in ("visionzip", "cls_attention", "random", "spatial")
    ),
    Variant(
        group=KEPT, label="nuwa's 2x2 strata alone", pruner="nuwa", lay=keep_both, merges=False
    ),
    Variant(group=KEPT, label="nuwa", pruner="nuwa", lay=keep_both),
    *(
        Variant(group=KEPT, label=pruner, pruner=pruner, lay=keep_both)
        for pruner in ("visionzip+ivc", "cls_attention+ivc", "random+ivc", "nuwa+ivc")
    ),
    *(
        Variant(
            group=EXACT,
            label=f"each off by {cells}, to any side",
            pruner=MAIN,
            lay=scatter(cells),
            seeds=_SEEDS,
        )
        for cells in (1, 2, 4, 8)
    ),
    *(
        Variant(
            group=EXACT,
            label=f"all off by {columns} to the right",
            pruner=MAIN,
            lay=shift_picture(columns),
            shift=columns,
        )
        for columns in (1, 2, 4, 8)
    ),
    *(
        Variant(group=EXACT, label=f"all and the text off by {by}", pruner=MAIN, lay=shift_all(by))
        for by in (4, 16)
    ),
    *(
        Variant(group=EXACT, label=f"only the text nearer by {by}", pruner=MAIN, lay=near_text(by))
        for by in (1, 2, 4, 8, 16, 32, 64)
    ),
    Variant(group=APART, label="right IDs, right order (GAP)", pruner=MAIN, lay=keep_both),
    Variant(group=APART, label="right IDs, in the pruner's order", pruner=MAIN, lay=own_order),
    Variant(
        group=APART,
        label="pruner's order, IDs ascending (permuted)",
        pruner=MAIN,
        lay=deal_ascending,
    ),
    Variant(group=APART, label="right IDs, reversed", pruner=MAIN, lay=reverse),
    Variant(
        group=APART, label="right IDs, any order", pruner=MAIN, lay=shuffle_order, seeds=_SEEDS
    ),
    Variant(
        group=APART,
        label="counted anew, right order (compact)",
        pruner=MAIN,
        lay=renumber(picture=True, text=True),
    ),
    Variant(
        group=APART,
        label="only the picture counted anew",
        pruner=MAIN,
        lay=renumber(picture=True, text=False),
    ),
    Variant(
        group=APART,
        label="only the text counted anew",
        pruner=MAIN,
        lay=renumber(picture=False, text=True),
    ),
    Variant(
        group=APART,
        label="text behind the last token kept (compact-grid)",
        pruner=MAIN,
        lay=follow_last,
    ),
    Variant(
        group=APART, label="counted anew in even steps, right order", pruner=MAIN, lay=stretch
    ),
    Variant(
        group=APART,
        label="IDs dealt anew, right order",
        pruner=MAIN,
        lay=shuffle_ids,
        seeds=_SEEDS,
    ),
)


def list_variants(keep: int) -> tuple[Variant, ...]:
    """All of them, where pruners leave so many tokens."""
    lay = squeeze(keep)
    squeezed = Variant(group=WHOLE, label="IDs in compact's range", pruner=None, lay=lay)
    return (_VARIANTS[0], squeezed, *_VARIANTS[1:])
