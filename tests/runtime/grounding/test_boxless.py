"""Where PyTorch itself gives no box: counted by ratio, said in a line."""

import pytest

from gap_runtime.bundle.manifest import Reference, ReferenceSample
from gap_runtime.grounding.boxless import BoxCount, count_boxes, describe_boxless

BOX = (1.0, 2.0, 3.0, 4.0)


def make_reference(*answers):
    """A reference of (ratio, boxes)."""
    samples = tuple(
        ReferenceSample(
            key=f"s/{k}",
            sample="s",
            image="samples/s.png",
            phrase="the mug",
            bucket="",
            ratio=ratio,
            kept=3,
            answer="",
            token_ids=(),
            boxes=boxes,
            prompt_ids=(1,),
            token_margins=(),
        )
        for k, (ratio, boxes) in enumerate(answers)
    )
    return Reference(arrays="reference.npz", dtype="float32", samples=samples)


def test_answers_with_a_box_are_counted_by_ratio():
    reference = make_reference(
        (0.75, ()), (None, (BOX,)), (0.5, (BOX, BOX)), (0.5, ()), (0.75, ()), (None, (BOX,))
    )
    assert count_boxes(reference) == (
        BoxCount(ratio=None, samples=2, boxed=2),
        BoxCount(ratio=0.5, samples=2, boxed=1),
        BoxCount(ratio=0.75, samples=2, boxed=0),
    )
    assert count_boxes(None) == ()


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ([], ""),
        ([(None, 3, 3), (0.5, 3, 3)], ""),
        ([(None, 3, 3), (0.75, 3, 0)], "PyTorch itself gives no box for 3 of 3 at 0.75"),
        (
            [(None, 4, 3), (0.5, 4, 4), (0.875, 4, 2)],
            "PyTorch itself gives no box for 1 of 4 unpruned, 2 of 4 at 0.875",
        ),
    ],
)
def test_what_lacks_is_one_line(counts, line):
    made = [BoxCount(ratio=ratio, samples=all_, boxed=boxed) for ratio, all_, boxed in counts]
    assert describe_boxless(made) == line
