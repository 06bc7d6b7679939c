"""The long run: every phrase at every ratio, picture by picture, on from where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.evaluation.answer import Answer, Answerer
from gap_runtime.evaluation.data import Data
from gap_runtime.evaluation.expression import Expression, Picture
from gap_runtime.evaluation.results import Answers, AnswerWriter, DataFacts, Header, Row
from gap_runtime.pictures.boxes import BoxFormat, PictureFrame, clip_box, parse_boxes

Open = Callable[[], Answerer]
"""Loads a model where it is needed; picklable, for that may be another machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A picture with the phrases and ratios that are still to be asked."""

    picture: Picture
    questions: tuple[tuple[Expression, float], ...]


Work = Callable[[Answerer, Unit], Iterable[Row]]
"""The rows of a unit."""
Spread = Callable[[Sequence[Unit], Work, Open], Iterable[Iterable[Row]]]
"""Does units somewhere and gives the rows of each as it is done, in any order."""


def describe_data(data: Data) -> DataFacts:
    """Data as the header of a file of answers names them."""
    return DataFacts(
        name=data.name, format=data.format, phrases=len(data.expressions), sha256=data.sha256
    )


def evaluate(
    data: Data,
    header: Header,
    open_answerer: Open,
    *,
    ratios: tuple[float, ...],
    path: Path | None = None,
    resume: bool = False,
    spread: Spread | None = None,
    begin: Callable[[int], Callable[[int], None]] | None = None,
) -> Answers:
    """Ask every phrase at every ratio.

    Args:
        data: What to ask.
        header: Who answers what.
        open_answerer: Loads the model; not called where everything has been answered.
        ratios: Of the model.
        path: File to append answers to.
        resume: Go on with that file.
        spread: Does the work elsewhere; here, one after another, by default.
        begin: Called with how many answers are missing; what it gives is called with how many
            more there are.

    Returns:
        Answers at these ratios, in the order of the data.
    """
    order = {each.key: k for k, each in enumerate(data.expressions)}
    with AnswerWriter(header, path, resume=resume) as writer:
        if path is not None:
            _require_asked(writer.rows, data, path)
        done = {(row.key, row.ratio) for row in writer.rows}
        units = plan_units(data, ratios, done)
        advance = begin(sum(len(unit.questions) for unit in units)) if begin else None
        work = partial(answer_unit, box=header.box)
        for rows in (spread or _work_here)(units, work, open_answerer) if units else ():
            for row in rows:
                writer.add(row)
                if advance is not None:
                    advance(1)
        wanted = [row for row in writer.rows if row.ratio in ratios]
    rows = sorted(wanted, key=lambda row: (ratios.index(row.ratio), order[row.key]))
    return Answers(header=header, rows=tuple(rows))


def _require_asked(rows: list[Row], data: Data, path: Path) -> None:
    """Refuse rows that answer something else than the data ask.

    Raises:
        InputError: With the first one.
    """
    asked = {each.key: each for each in data.expressions}
    for row in rows:
        each = asked.get(row.key)
        if each is None or (row.picture, row.phrase) != (each.picture.key, each.phrase):
            raise InputError(
                f"{path}: its row '{row.key:.60}' is no phrase of the data; give another --out"
            )
        # What a reader gave as integers comes back as floats, which compare alike.
        if row.box not in {None, each.box} or each.size not in {None, row.size or each.size}:
            raise InputError(
                f"{path}: its row '{row.key:.60}' has another box or size than the data; give "
                "another --out"
            )


def plan_units(data: Data, ratios: tuple[float, ...], done: set[tuple[str, float]]) -> list[Unit]:
    """What is left, by picture in the order of the data, and by ratio within a picture."""
    by_picture: dict[str, list[Expression]] = {}
    for each in data.expressions:
        by_picture.setdefault(each.picture.key, []).append(each)
    units = []
    for group in by_picture.values():
        questions = tuple(
            (each, ratio) for ratio in ratios for each in group if (each.key, ratio) not in done
        )
        if questions:
            units.append(Unit(picture=group[0].picture, questions=questions))
    return units


def _work_here(units: Sequence[Unit], work: Work, open_answerer: Open) -> Iterator[Iterable[Row]]:
    answerer = open_answerer()
    for unit in units:
        yield work(answerer, unit)


def answer_unit(answerer: Answerer, unit: Unit, *, box: BoxFormat) -> Iterator[Row]:
    """The rows of one picture; a picture or phrase of no use gives rows that say why."""
    try:
        picture = unit.picture.load()
        view = answerer.look(picture)
    except InputError as error:
        for each, ratio in unit.questions:
            yield _report(each, ratio, str(error))
        return
    for each, ratio in unit.questions:
        yield _ask(answerer, view, each, ratio, picture, box)


def _ask(
    answerer: Answerer,
    view: Any,
    each: Expression,
    ratio: float,
    picture: Image.Image,
    box: BoxFormat,
) -> Row:
    try:
        _require_size(each, picture)
        answer = answerer.answer(view, each.phrase, ratio)
    except InputError as error:
        return _report(each, ratio, str(error))
    return _record(each, ratio, picture, answer, box)


def _require_size(each: Expression, picture: Image.Image) -> None:
    """Refuse a box that was drawn on a picture of another size."""
    if each.size not in {None, picture.size}:
        assert each.size is not None
        raise InputError(
            f"{each.picture.key}: the picture is {picture.width}x{picture.height}, the data say "
            f"{each.size[0]}x{each.size[1]}; is it another version of it?"
        )
    if clip_box(list(each.box), *picture.size) is None:
        raise InputError(f"{each.picture.key}: the true box lies outside the picture")


def _report(each: Expression, ratio: float, problem: str) -> Row:
    return Row(
        key=each.key,
        ratio=ratio,
        picture=each.picture.key,
        phrase=each.phrase,
        problem=problem,
    )


def _record(
    each: Expression, ratio: float, picture: Image.Image, answer: Answer, box: BoxFormat
) -> Row:
    frame = answer.frame or PictureFrame.whole(picture.size)
    found = parse_boxes(answer.text, box, frame).boxes
    return Row(
        key=each.key,
        ratio=ratio,
        picture=each.picture.key,
        phrase=each.phrase,
        size=picture.size,
        box=each.box,
        answer=answer.text,
        token_ids=answer.token_ids,
        milliseconds={name: round(value, 3) for name, value in answer.milliseconds.items()},
        found=found,
        frame=frame if box.frame == "resized" else None,
        calls=answer.calls,
        drafted=answer.drafted,
        accepted=answer.accepted,
    )
