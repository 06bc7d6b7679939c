"""Three position IDs a token, by time, row and column, against the library's own count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truths.axes import count_positions

from gap_export.graph.positions import place_tokens
from gap_export.reference import choice as reference
from gap_runtime.bundle.layout import TokenLayout


@st.composite
def choices(draw):
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    order = draw(st.permutations(range(rows * columns)))
    kept = draw(st.integers(1, rows * columns))
    return draw(st.integers(0, 9)), (rows, columns), draw(st.integers(1, 9)), tuple(order[:kept])


def by_graph(before, grid, after, order, mode, *, rule=None, centroid=None):
    patches = grid[0] * grid[1]
    layout = TokenLayout(
        prefix=before,
        patches=patches,
        kept=len(order),
        extra=int(rule is not None),
        suffix=after,
        answer=5,
    )
    places = place_tokens(
        layout,
        torch.tensor([order]),
        mode,
        extra_rule=rule,
        centroid_B=None if centroid is None else torch.tensor([centroid]),
        grid=grid,
    )
    assert places.position_ids_AS.dtype == torch.int64
    assert places.position_ids_AS.shape == (3, layout.prompt)
    return places.position_ids_AS.tolist()


def by_reference(before, grid, after, order, mode, place=None):
    return reference.place_tokens(
        before, grid[0] * grid[1], after, list(order), mode, extra_place=place, grid=grid
    )[1]


@given(choices())
@settings(max_examples=60, deadline=None)
def test_kept_tokens_stay_in_their_cells(choice):
    before, grid, after, order = choice
    whole = count_positions(before, grid, after)
    behind = range(before + grid[0] * grid[1], whole.shape[1])
    left = [*range(before), *(before + k for k in sorted(order)), *behind]
    for mode in ("gap", "permuted"):
        expected = whole[:, left].tolist()
        assert by_graph(*choice, mode) == by_reference(*choice, mode) == expected


@given(choices())
@settings(max_examples=20, deadline=None)
def test_compact_ids_are_one_running_number(choice):
    before, _, after, order = choice
    for mode in ("compact", "permuted-compact"):
        expected = [list(range(before + len(order) + after))] * 3
        assert by_graph(*choice, mode) == by_reference(*choice, mode) == expected


@pytest.mark.parametrize(
    ("rule", "centroid", "place", "extra", "text"),
    [
        # 2 rows of 3; the extra token behind 1 and 4: the last cell, behind all, the cell of 2.
        ("last-visual", None, 5.5, [2, 3, 4], 5),
        ("append", None, 6, [5, 5, 5], 6),
        ("centroid", 2, 2.5, [2, 2, 4], 5),
    ],
)
def test_an_extra_token_has_a_cell(rule, centroid, place, extra, text):
    asked = 2, (2, 3), 2, (4, 1)
    first, second = [2, 2, 3], [2, 3, 3]
    cells = [first, extra, second] if rule == "centroid" else [first, second, extra]
    expected = [[0, 1, *(cell[axis] for cell in cells), text, text + 1] for axis in range(3)]
    assert by_graph(*asked, "gap", rule=rule, centroid=centroid) == expected
    assert by_reference(*asked, "gap", place) == expected


@given(choices())
@settings(max_examples=30, deadline=None)
def test_the_grid_mode_moves_the_text_up_to_the_kept_cells(choice):
    before, grid, after, order = choice
    kept = count_positions(before, grid, 0)[:, [before + k for k in sorted(order)]]
    start = int(kept.max()) + 1
    expected = [[*range(before), *axis.tolist(), *range(start, start + after)] for axis in kept]
    assert by_graph(*choice, "compact-grid") == expected
    assert by_reference(*choice, "compact-grid") == expected


@pytest.mark.parametrize(
    ("rule", "centroid", "place", "extra", "text"),
    [
        # 3 rows of 3; the extra token behind 1 and 3: the last cell, behind all, the cell of 2.
        ("last-visual", None, 8.5, [2, 4, 4], 5),
        ("append", None, 9, [4, 4, 4], 5),
        ("centroid", 2, 2.5, [2, 2, 4], 5),
    ],
)
def test_an_extra_token_of_the_grid_mode(rule, centroid, place, extra, text):
    asked = 2, (3, 3), 2, (3, 1)
    first, second = [2, 2, 3], [2, 3, 2]
    cells = [first, extra, second] if rule == "centroid" else [first, second, extra]
    expected = [[0, 1, *(cell[axis] for cell in cells), text, text + 1] for axis in range(3)]
    assert by_graph(*asked, "compact-grid", rule=rule, centroid=centroid) == expected
    assert by_reference(*asked, "compact-grid", place) == expected
