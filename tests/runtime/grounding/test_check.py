"""The comparison with the reference: equal values pass, every planted difference fails."""

import dataclasses

import numpy as np
import pytest

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import Quantization, ReferenceSample
from gap_runtime.errors import CheckError
from gap_runtime.grounding.check import check_bundle
from gap_runtime.grounding.compare import (
    TOLERANCES,
    Tolerance,
    compare_stages,
    find_margin,
    find_tolerance,
    first_divergence,
    is_near_tie,
    match_boxes,
)
from gap_runtime.grounding.decode import Decoded
from gap_runtime.grounding.grounder import StageValues
from gap_runtime.pictures.boxes import Box

TOLERANCE = Tolerance(pixels=1e-5, visual=1e-3, logits=1e-3, near_tie=1e-4, iou=0.9)
STRICT = dataclasses.replace(TOLERANCE, iou=None)
PROMPT = [1, 4, 4, 2]
BOX = Box(x0=10, y0=20, x1=30, y1=40)


def make_expected():
    return {
        "pixels": np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 2, 2),
        "visual_tokens": np.linspace(-4, 4, 40, dtype=np.float32).reshape(1, 20, 2),
        "kept_index": np.arange(20)[None] * 2,
        "position_ids": np.arange(30)[None],
        "logits": np.linspace(-10, 5, 11, dtype=np.float32),
    }


def make_values(**changes):
    """What a perfect backend gives; the position IDs go on over the padding and the answer."""
    expected = make_expected()
    token_ids = changes.pop("token_ids", [5, 6, 7])
    logits = changes.pop("logits", expected["logits"])
    del expected["logits"]
    decoded = Decoded(
        token_ids=token_ids,
        probabilities=[1.0] * len(token_ids),
        prefill_logits=logits,
        last_logits=logits,
        prefill_ms=1.0,
        decode_ms=1.0,
        calls=len(token_ids),
        drafted=0,
        accepted=0,
    )
    values = {**expected, "position_ids": np.arange(36)[None], **changes}
    values = {"prompt_ids": PROMPT, **values}
    return StageValues(**values, decoded=decoded, milliseconds={})


def make_sample(**changes):
    sample = ReferenceSample(
        key="mug/0.5",
        sample="mug",
        image="mug.png",
        phrase="the mug",
        bucket="",
        ratio=0.5,
        kept=20,
        answer="[0.1, 0.2, 0.3, 0.4]",
        token_ids=(5, 6, 7),
        boxes=(Box(10.0, 20.0, 30.0, 40.0),),
        prompt_ids=tuple(PROMPT),
        token_margins=(0.5, 0.5, 0.5, 0.5),
    )
    return dataclasses.replace(sample, **changes)


def compare(values, *, boxes=(BOX,), scores=None, tolerance=TOLERANCE, **changes):
    return compare_stages(
        values,
        make_expected() | ({} if scores is None else {"scores": scores}),
        make_sample(**changes),
        ratio=0.5,
        answer="the answer",
        boxes=boxes,
        tolerance=tolerance,
    )


def tied(margin, count=1):
    """Scores in which the last `count` kept patches and their neighbours lie a margin apart."""
    scores = np.full(42, 0.1, np.float32)
    scores[0:40:2] = 2
    last = np.arange(20 - count, 20) * 2
    scores[last] = 1
    scores[last + 1] = 1 - margin
    return scores


def changed(name, index, value):
    """The expected array of that name with one element replaced."""
    array = make_expected()[name].copy()
    array[index] = value
    return array


def swapped(count):
    """Kept patches of which the last `count` differ from the expected ones."""
    kept = make_expected()["kept_index"].copy()
    kept[0, 20 - count :] += 1
    return kept


def test_equal_values_pass():
    row = compare(make_values())
    assert row.passed
    assert row.reasons == ()
    assert row.kept_equal
    assert row.positions_equal
    assert row.same_tokens
    assert row.first_divergence is None
    assert (row.pixels_error, row.visual_error, row.max_logit_error) == (0, 0, 0)
    assert row.kept_jaccard == 1
    assert row.iou == 1


def test_row_says_what_was_compared():
    row = compare(make_values())
    assert (row.ratio, row.sample, row.answer) == (0.5, "mug", "the answer")
    assert row.reference_answer == "[0.1, 0.2, 0.3, 0.4]"


def test_differences_within_the_tolerances_pass():
    row = compare(
        make_values(
            pixels=changed("pixels", (0, 0, 0, 0), -1 + 5e-6),
            visual_tokens=changed("visual_tokens", (0, 0, 0), -4 + 4 * 5e-4),
            logits=changed("logits", 0, -10 + 10 * 5e-4),
        )
    )
    assert row.passed
    first = make_expected()["visual_tokens"][0, 0]
    assert row.visual_error == pytest.approx(4 * 5e-4 / np.linalg.norm(first), rel=1e-2)
    assert row.relative_logit_error == pytest.approx(5e-4, rel=1e-2)
    assert row.max_logit_error == pytest.approx(5e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        ({"pixels": changed("pixels", (0, 1, 0, 0), 0.5)}, "pixels differ by"),
        ({"pixels": changed("pixels", (0, 1, 0, 0), np.nan)}, "pixels differ by"),
        # Another number of views: numpy would compare each one, or raise.
        ({"pixels": np.stack([make_expected()["pixels"]] * 3, axis=1)}, "pixels differ by inf"),
        ({"pixels": make_expected()["pixels"][..., :1]}, "pixels differ by inf"),
        ({"kept_index": swapped(1)}, "kept patches differ (Jaccard 0.905, no near tie)"),
        (
            {"position_ids": np.where(np.arange(36) == 29, 99, np.arange(36))[None]},
            "position IDs differ",
        ),
        ({"position_ids": np.arange(29)[None]}, "position IDs differ"),
        (
            {"visual_tokens": changed("visual_tokens", (0, 3, 1), 9)},
            "visual tokens differ by",
        ),
        (
            {"visual_tokens": changed("visual_tokens", (0, 3, 1), np.nan)},
            "visual tokens are not finite (gap-export probe names the first tensor)",
        ),
        ({"logits": changed("logits", 4, 3)}, "prefill logits differ by"),
        ({"logits": changed("logits", 4, np.nan)}, "prefill logits differ by inf (relative)"),
        ({"logits": changed("logits", 4, np.inf)}, "prefill logits differ by inf (relative)"),
    ],
)
def test_planted_difference_fails_with_its_reason_alone(planted, reason):
    row = compare(make_values(**planted))
    assert not row.passed
    assert len(row.reasons) == 1
    assert row.reasons[0].startswith(reason)


@pytest.mark.parametrize(
    ("token_ids", "at"), [([5, 6, 8], 2), ([5, 6], 2), ([5, 6, 7, 7], 3), ([], 0)]
)
def test_other_tokens_with_another_box_fail(token_ids, at):
    far = Box(x0=50, y0=50, x1=60, y1=60)
    row = compare(make_values(token_ids=token_ids), boxes=(far,))
    assert row.reasons == (f"answers part at token {at}",)
    assert row.first_divergence == at
    assert not row.same_tokens
    assert not row.passed


def test_other_tokens_without_any_box_fail():
    sample = make_sample(boxes=())
    row = compare_stages(
        make_values(token_ids=[5, 6, 8]),
        make_expected(),
        sample,
        ratio=0.5,
        answer="no",
        boxes=(),
        tolerance=TOLERANCE,
    )
    assert row.iou is None
    assert row.reasons == ("answers part at token 2",)


def test_other_tokens_with_nearly_the_same_box_pass_and_are_told():
    near = Box(x0=10, y0=20, x1=30, y1=41)
    row = compare(make_values(token_ids=[5, 6, 8]), boxes=(near,))
    assert row.passed
    assert row.iou == pytest.approx(20 / 21)
    assert row.first_divergence == 2


def test_float32_takes_no_other_tokens_whatever_the_box():
    near = Box(x0=10, y0=20, x1=30, y1=41)
    row = compare(make_values(token_ids=[5, 6, 8]), boxes=(near,), tolerance=STRICT)
    assert row.reasons == ("answers part at token 2",)
    assert TOLERANCES["float32"].iou is None


def test_a_near_tie_of_two_tokens_excuses_the_other_one_and_is_told():
    margins = (0.5, 0.5, 1e-6, 0.5)
    row = compare(make_values(token_ids=[5, 6, 8]), tolerance=STRICT, token_margins=margins)
    assert row.passed
    assert row.token_near_tie
    assert not row.same_tokens


def test_a_near_tie_elsewhere_excuses_nothing():
    margins = (1e-6, 1e-6, 0.5, 1e-6)
    row = compare(make_values(token_ids=[5, 6, 8]), tolerance=STRICT, token_margins=margins)
    assert row.reasons == ("answers part at token 2",)


def test_another_prompt_fails():
    row = compare(make_values(prompt_ids=[1, 4, 2]))
    assert row.reasons == ("the prompt's tokens differ",)


def test_a_wrong_token_of_small_length_is_seen():
    expected = make_expected()["visual_tokens"]
    wrong = expected.copy()
    wrong[0, 10] = -wrong[0, 10]
    row = compare(make_values(visual_tokens=wrong))
    assert row.visual_error == pytest.approx(2, rel=1e-3)
    assert not row.passed


def test_patches_in_another_order_pass_only_where_their_scores_tie():
    kept = make_expected()["kept_index"].copy()
    kept[0, [18, 19]] = kept[0, [19, 18]]
    assert compare(make_values(kept_index=kept), scores=tied(1e-5, 2)).near_tie
    apart = tied(1e-5, 1)
    assert not compare(make_values(kept_index=kept), scores=apart).near_tie


def test_another_box_from_the_same_tokens_fails():
    # A parser or a picture size that differs from the exporter's.
    far = Box(x0=50, y0=50, x1=60, y1=60)
    assert not compare(make_values(), boxes=(far,)).passed


def test_padding_of_the_position_ids_is_not_compared():
    positions = np.arange(36)
    positions[30:] = -1
    assert compare(make_values(position_ids=positions[None])).passed


def test_every_axis_of_positions_is_compared():
    """A text token has the same ID on all axes, one of the picture its own on each."""
    wanted = np.stack([np.arange(36), np.arange(36) + 2, np.arange(36) * 3])
    expected = make_expected() | {"position_ids": wanted[:, :30]}
    arguments = {"ratio": 0.5, "answer": "a", "boxes": (BOX,), "tolerance": TOLERANCE}

    def compare_with(found):
        values = make_values(position_ids=found)
        return compare_stages(values, expected, make_sample(), **arguments)

    assert compare_with(wanted).positions_equal
    for axis in range(3):
        other = wanted.copy()
        other[axis, 17] += 1
        assert compare_with(other).reasons == ("position IDs differ",)
    assert compare_with(wanted[:1]).reasons == ("position IDs differ",)


def test_every_difference_is_listed():
    row = compare(
        make_values(
            pixels=changed("pixels", (0, 0, 0, 0), 7),
            position_ids=np.zeros((1, 36), np.int64),
            logits=changed("logits", 0, 100),
        )
    )
    assert [reason.split()[0] for reason in row.reasons] == ["pixels", "position", "prefill"]


def other_positions(row):
    """Position IDs as the gap mode gives them where another patch was kept."""
    positions = np.arange(36)
    positions[row] += 1
    return positions[None]


def test_near_tie_excuses_other_patches_and_their_positions():
    values = make_values(
        kept_index=swapped(1),
        position_ids=other_positions(20),
        visual_tokens=changed("visual_tokens", (0, 19, 0), 9),
        logits=changed("logits", 0, 3),
    )
    row = compare(values, scores=tied(1e-5))
    assert row.passed
    assert row.near_tie
    assert not row.kept_equal
    assert row.kept_jaccard == pytest.approx(19 / 21)


def test_what_cannot_be_compared_after_a_near_tie_is_not_given_as_equal():
    row = compare(make_values(kept_index=swapped(1)), scores=tied(1e-5))
    assert row.visual_error is None
    assert row.relative_logit_error is None


@pytest.mark.parametrize("scores", [None, tied(1e-3)])
def test_without_a_near_tie_other_patches_fail(scores):
    row = compare(make_values(kept_index=swapped(1)), scores=scores)
    assert not row.passed
    assert not row.near_tie


def test_several_near_ties_are_excused_at_any_kept_count():
    assert compare(make_values(kept_index=swapped(3)), scores=tied(1e-5, 3)).near_tie


def test_near_tie_does_not_excuse_patches_that_do_not_tie():
    row = compare(make_values(kept_index=swapped(3)), scores=tied(1e-5))
    assert not row.passed
    assert row.reasons[0].startswith("kept patches differ (Jaccard 0.739")


def test_near_tie_does_not_excuse_pixels():
    values = make_values(kept_index=swapped(1), pixels=changed("pixels", (0, 0, 0, 0), 7))
    assert not compare(values, scores=tied(1e-5)).passed


def test_near_tie_does_not_excuse_another_box():
    values = make_values(kept_index=swapped(1), token_ids=[1, 2, 3])
    far = Box(x0=50, y0=50, x1=60, y1=60)
    assert not compare(values, boxes=(far,), scores=tied(1e-5)).passed


def test_near_tie_without_other_patches_excuses_nothing():
    row = compare(make_values(position_ids=np.zeros((1, 36), np.int64)), scores=tied(1e-9))
    assert row.reasons == ("position IDs differ",)


@pytest.mark.parametrize(
    ("one", "other", "at"),
    [
        ([], [], None),
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([], [4], 0),
    ],
)
def test_first_divergence(one, other, at):
    assert first_divergence(one, other) == at


def test_no_boxes_on_either_side_give_no_iou():
    assert match_boxes((), ()) is None


@pytest.mark.parametrize(("found", "expected"), [((BOX,), ()), ((), (BOX,)), ((BOX, BOX), (BOX,))])
def test_another_number_of_boxes_gives_zero(found, expected):
    assert match_boxes(found, expected) == 0


def test_the_worst_pair_of_boxes_counts():
    half = Box(x0=10, y0=20, x1=20, y1=40)
    assert match_boxes((BOX, half), (BOX, BOX)) == pytest.approx(0.5)


def test_boxes_are_matched_in_order():
    far = Box(x0=50, y0=50, x1=60, y1=60)
    assert match_boxes((BOX, far), (far, BOX)) == 0


def test_every_precision_of_the_exporter_has_tolerances():
    assert set(TOLERANCES) == {"float32", "float16", "bfloat16", "int8", "int4"}


@pytest.mark.parametrize(
    ("weights", "logits", "misses"),
    [(None, 1e-1, 0.02), ("int8", 1e-1, 0.02), ("int4", 3e-1, 0.05)],
)
def test_behind_a_cache_of_int8_the_decoder_may_differ_as_with_such_weights(
    manifest, weights, logits, misses
):
    quantization = weights and Quantization(weights=weights, method="nearest", parts=("decoder",))
    plain = dataclasses.replace(manifest, quantization=quantization)
    cache = dataclasses.replace(manifest.cache, dtype="int8")
    own = TOLERANCES[weights or manifest.dtype]
    assert find_tolerance(plain) == own
    found = find_tolerance(dataclasses.replace(plain, cache=cache))
    assert (found.logits, found.misses, found.iou) == (logits, misses, 0.5)
    # Pictures never pass through the cache.
    assert (found.pixels, found.visual, found.near_tie, found.jaccard) == (
        *(own.pixels, own.visual, own.near_tie),
        own.jaccard,
    )


def test_bundle_without_reference_cannot_be_checked(make_bundle):
    with pytest.raises(CheckError, match="no reference answers in it"):
        check_bundle(Bundle.open(make_bundle()))


def test_tokens_that_are_never_removed_do_not_spoil_a_tie():
    # Fixed tokens have infinite scores; in the pruner's order they come last.
    scores = np.array([1, 0.5, 0.50001, 0.1, np.inf, np.inf], np.float32)
    expected = np.array([0, 2, 1, 4, 5])
    assert is_near_tie(np.array([0, 1, 2, 4, 5]), expected, scores, 1e-4)
    assert not is_near_tie(np.array([1, 2, 0, 4, 5]), expected, scores, 1e-4)


def test_a_token_that_may_not_be_removed_ties_with_none():
    scores = np.array([1, 0.5, 0.50001, 0.1, np.inf, np.inf], np.float32)
    assert not is_near_tie(np.array([0, 1, 2, 4]), np.array([0, 1, 4, 5]), scores, 1e-4)
    assert not is_near_tie(np.array([0, 1, 2, 5]), np.array([0, 1, 2, 4]), scores, 1e-4)


def test_the_margin_is_that_of_the_best_other_token():
    logits = np.array([1, -4, 3, 2.5], np.float32)
    assert find_margin(logits, [0, 3]) == 0.125
    assert find_margin(logits, [1]) == 1.75
