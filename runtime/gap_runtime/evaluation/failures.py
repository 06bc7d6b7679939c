"""Which answers are shown as failed: wrong ones, each phrase once, the worst first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.evaluation.data import Data
from gap_runtime.evaluation.protocol import ScoringProtocol
from gap_runtime.evaluation.results import Answers, Row
from gap_runtime.evaluation.score import judge_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A wrong answer.

    `status` as in Judgement. `wrong_label` says that a review found the label wrong.
    """

    row: Row
    iou: float
    status: str
    wrong_label: bool


def find_failures(answers: Answers, protocol: ScoringProtocol, data: Data) -> list[Failure]:
    """Every phrase that was answered wrong, at the smallest ratio where it was.

    Labels that a review found wrong come last, since there the answer may be right; before them
    the phrases that were lost with the least pruning, least overlap first.
    """
    wrong = {each.key for each in data.expressions if each.wrong}
    asked = [row for row in answers.rows if row.problem is None]
    judged = judge_rows(asked, protocol, answers.header.box)
    found = [
        Failure(row=row, iou=float(iou), status=status, wrong_label=row.key in wrong)
        for row, iou, status, hit in zip(
            asked, judged.iou, judged.status, judged.hits[1], strict=True
        )
        if not hit
    ]
    found.sort(key=lambda each: (each.wrong_label, each.row.ratio, each.iou, each.row.key))
    first: dict[str, Failure] = {}
    for each in found:
        first.setdefault(each.row.key, each)
    return list(first.values())


def load_failures(
    failures: list[Failure], data: Data, count: int
) -> Iterator[tuple[Failure, Image.Image]]:
    """The first failures with their pictures; those whose picture has gone are left out."""
    pictures = {each.key: each.picture for each in data.expressions}
    for failure in failures:
        if not count:
            return
        try:
            picture = pictures[failure.row.key].load()
        except InputError:
            continue
        count -= 1
        yield failure, picture
