"""Counts of tokens."""

import pytest

from gap_runtime.bundle.layout import TokenLayout, count_kept, find_ratio
from gap_runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [
        (576, 0, 576),
        (576, 0.5, 288),
        (576, 0.9, 58),  # 57.6
        (576, 0.25, 432),
        (64, 0.75, 16),
        (5, 0.9, 1),  # exactly 0.5 of a patch; in binary 0.49999999999999989
        (5, 0.7, 2),  # 1.5, in binary 1.5000000000000002
        (5, 0.1, 5),  # 4.5
        (15, 0.3, 11),  # 10.5, and half to even would give 10
        (3, 0.5, 2),  # 1.5
        (1, 0.5, 1),
        (1000, 0.9994, 1),
    ],
)
def test_kept_count_is_rounded_half_up_in_decimal(patches, ratio, kept):
    assert count_kept(patches, ratio) == kept


def test_kept_count_is_an_integer():
    assert type(count_kept(576, 0.5)) is int


@pytest.mark.parametrize("ratio", [1, 1.0, 1.5, -0.01, -1, float("inf"), float("-inf")])
def test_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"outside \[0, 1\)"):
        count_kept(576, ratio)


def test_ratio_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="ratio nan is outside"):
        count_kept(576, float("nan"))


def test_ratio_that_leaves_no_patch_is_refused_with_the_highest_that_does():
    with pytest.raises(ConfigError, match=r"leaves none of 10 visual tokens; use at most 0\.9$"):
        count_kept(10, 0.96)


@pytest.mark.parametrize("patches", [1, 2, 7, 64, 196, 576, 1024])
def test_advised_highest_ratio_is_accepted(patches):
    with pytest.raises(ConfigError) as caught:
        count_kept(patches, 0.99999)
    advised = float(str(caught.value).rpartition(" ")[2])
    assert count_kept(patches, advised) >= 1


@pytest.mark.parametrize(
    ("ratio", "meant"),
    [
        (50, "did you mean 0.5 or --keep 50?"),
        (12.5, "did you mean 0.125?"),
        (144, "did you mean --keep 144?"),
    ],
)
def test_a_percentage_or_a_count_is_told_what_it_may_mean(ratio, meant):
    with pytest.raises(ConfigError) as caught:
        count_kept(576, ratio)
    assert str(caught.value).endswith(meant)


@pytest.mark.parametrize("ratio", [1, 1.5, -50, float("inf"), float("nan")])
def test_other_numbers_mean_nothing_else(ratio):
    with pytest.raises(ConfigError) as caught:
        count_kept(576, ratio)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("patches", [1, 2, 3, 25, 64, 576, 2304])
def test_a_count_has_a_ratio_that_keeps_as_many(patches):
    for kept in range(1, patches + 1):
        assert count_kept(patches, find_ratio(patches, kept)) == kept
    assert find_ratio(patches, patches) == 0


def test_the_ratio_of_a_count_is_as_short_as_can_be():
    assert [find_ratio(576, kept) for kept in (288, 144, 64)] == [0.5, 0.75, 0.889]


@pytest.fixture
def llava():
    return TokenLayout(prefix=5, patches=576, kept=288, extra=2, suffix=40, answer=32)


def test_visual_slots_are_kept_and_extra(llava):
    assert llava.visual == 290


def test_prompt_slots_hold_text_and_visual_tokens(llava):
    assert llava.prompt == 335


def test_capacity_has_room_for_the_answer(llava):
    assert llava.capacity == 367


def test_positions_count_removed_patches_too(llava):
    assert llava.positions == 655


def test_without_pruning_slots_and_positions_are_as_many():
    full = TokenLayout(prefix=5, patches=64, kept=64, extra=0, suffix=32, answer=24)
    assert full.capacity == full.positions == 125
