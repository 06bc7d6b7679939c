"""Arrangements of the ablations: position modes are the reference's, others are worked out."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from gap_export.reference.choice import place_tokens

SCRIPT = Path(__file__).parents[2] / "refshapes" / "arrangements.py"
ORDER = [200, 3, 77, 16, 255, 0, 41]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("arrangements", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def lay(script, label, order=ORDER, keep=64):
    (variant,) = (each for each in script.list_variants(keep) if each.label == label)
    return variant.lay(list(order), np.random.default_rng(5))


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        ("right IDs, right order (GAP)", "gap"),
        ("counted anew, right order (compact)", "compact"),
        ("pruner's order, IDs ascending (permuted)", "permuted"),
    ],
)
def test_a_position_mode_is_the_references(script, label, mode):
    laid = lay(script, label)
    slots, (ids,) = place_tokens(0, 256, 1, list(ORDER), mode)
    assert laid.slots == slots
    assert [*laid.ids, laid.text] == ids


@pytest.mark.parametrize("order", [ORDER, [200, 3, 77, 16, 0, 41]])
def test_text_behind_the_last_kept_token_is_the_references(script, order):
    laid = lay(script, "text behind the last token kept (compact-grid)", order)
    # A picture of one row: its columns are the cells of one axis.
    slots, axes = place_tokens(0, 256, 1, list(order), "compact-grid", grid=(1, 256))
    assert laid.slots == slots
    assert [*laid.ids, laid.text] == axes[2]
    nearer = lay(script, "only the text nearer by 8", order)
    assert (nearer.slots, nearer.ids, nearer.text) == (laid.slots, laid.ids, 248)


def test_order_and_value_are_parted(script):
    for label in (
        "right IDs, reversed",
        "right IDs, in the pruner's order",
        "right IDs, any order",
    ):
        laid = lay(script, label)
        assert laid.slots == laid.ids != sorted(ORDER)
        assert sorted(laid.ids) == sorted(ORDER)
    dealt = lay(script, "IDs dealt anew, right order")
    assert dealt.slots == sorted(ORDER) == sorted(dealt.ids) != dealt.ids
    text = lay(script, "only the text counted anew")
    assert (text.ids, text.text) == (sorted(ORDER), len(ORDER))


@pytest.mark.parametrize("cells", [1, 2, 4, 8])
def test_every_id_is_off_by_so_many_cells_and_stays_in_the_picture(script, cells):
    laid = lay(script, f"each off by {cells}, to any side")
    sides = set()
    for token, place in zip(laid.slots, laid.ids, strict=True):
        (row, column), (down, right) = divmod(token, 16), divmod(place, 16)
        assert 0 <= place < 256
        assert abs(row - down) + abs(column - right) == cells
        sides.add((np.sign(down - row), np.sign(right - column)))
    assert len(sides) > 1
    moved = lay(script, f"all off by {cells} to the right")
    assert moved.ids == [token + cells for token in sorted(ORDER)]


@pytest.mark.parametrize("keep", [64, 128, 100])
def test_where_nothing_is_removed_tokens_share_compacts_ids(script, keep):
    laid = lay(script, "IDs in compact's range", range(256), keep)
    assert laid.slots == list(range(256))
    counts = [laid.ids.count(each) for each in range(keep)]
    assert sum(counts) == 256
    assert {*counts} <= {256 // keep, -(-256 // keep)}
    assert laid.ids == sorted(laid.ids)
    assert laid.text == keep
