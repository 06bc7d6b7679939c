"""An evaluation as tables and as words, for the terminal and for the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gap_runtime.evaluation.api import Evaluation
    from gap_runtime.report.evaluation_page import PageTable


def write_evaluation(found: Evaluation, path: Path, protocol: str, *, pictures: int) -> None:
    """The same tables as a page, with pictures of what failed under a protocol."""
    from gap_runtime.evaluation.failures import find_failures, load_failures  # noqa: PLC0415
    from gap_runtime.evaluation.protocol import UNPARSABLE, load_protocol  # noqa: PLC0415
    from gap_runtime.report.evaluation_page import (  # noqa: PLC0415
        PageFailure,
        make_evaluation_page,
    )
    from gap_runtime.report.page import write_page  # noqa: PLC0415

    judge = load_protocol(protocol)
    failures = find_failures(found.answers, judge, found.data)

    def name(ratio: float, iou: float, status: str, *, wrong_label: bool) -> str:
        overlap = f"IoU {iou:.2f}" if judge.MEASURE == "iou" else "outside the box"
        what = "no box" if status == UNPARSABLE else overlap
        doubt = ", its label was found wrong" if wrong_label else ""
        return f"{ratio:g} removed, {what}{doubt}"

    shown = (
        PageFailure(
            phrase=each.row.phrase,
            what=name(each.row.ratio, each.iou, each.status, wrong_label=each.wrong_label),
            answer=each.row.answer or "",
            picture=picture,
            found=each.row.found,
            true=each.row.box,
        )
        for each, picture in load_failures(failures, found.data, pictures)
        if each.row.box is not None
    )
    subject = found.answers.header.subject
    about = (
        f"Pruner {subject.strategy}, positions {subject.positions}, on {subject.engine}; "
        f"{found.data.describe()}. What failed is said by the protocol {protocol}."
    )
    page = make_evaluation_page(
        f"{subject.name} on {found.data.name}",
        [about, *found.data.notes, *list_words(found)],
        make_tables(found),
        shown,
        wrong=len(failures),
    )
    write_page(path, page)


def make_tables(found: Evaluation) -> list[PageTable]:
    """Everything but pictures, for the terminal and for the page."""
    from gap_runtime.report.evaluation_page import PageTable  # noqa: PLC0415

    subject = found.answers.header.subject
    scores = PageTable(
        title=f"{subject.name} ({subject.strategy}, positions {subject.positions}) on "
        f"{subject.engine}, {found.data.describe()}",
        header=[
            *("protocol", "frame", "labels", "ratio", "phrases", _name_accuracy(found), "95 %"),
            *("@0.25", "@0.75", "mean IoU", "unparsable", "degenerate", "tokens", "calls", "ms"),
        ],
        rows=[
            [
                each.protocol,
                each.frame,
                each.labels,
                f"{each.ratio:g}",
                each.phrases,
                _percent(each.accuracy),
                f"{_percent(each.low)} to {_percent(each.high)}",
                _percent(each.accuracy_25),
                _percent(each.accuracy_75),
                _number(each.mean_iou),
                each.unparsable,
                each.degenerate,
                f"{each.tokens:.1f}",
                f"{each.calls:.1f}" if each.calls else "-",
                f"{each.median_ms:.0f}",
            ]
            for each in found.scores
        ],
    )
    tables = [scores, *_make_groups(found), _make_comparisons(found), _make_standings(found)]
    return [table for table in tables if table.rows]


def _make_groups(found: Evaluation) -> list[PageTable]:
    """Accuracy by size of the true box, and by the parts that the data have."""
    from gap_runtime.report.evaluation_page import PageTable  # noqa: PLC0415

    accuracy = _name_accuracy(found)
    sizes = [
        (score, size.size, size, size.mean_iou) for score in found.scores for size in score.sizes
    ]
    parts = [(score, part.part, part, None) for score in found.scores for part in score.parts]
    return [
        PageTable(
            title=title,
            header=[
                *("protocol", "labels", "ratio", name, "phrases", accuracy, "95 %"),
                *(("mean IoU",) if name == "size" else ()),
            ],
            rows=[
                [
                    score.protocol,
                    score.labels,
                    f"{score.ratio:g}",
                    label,
                    group.phrases,
                    _percent(group.accuracy),
                    f"{_percent(group.low)} to {_percent(group.high)}",
                    *(() if mean_iou is None else (_number(mean_iou),)),
                ]
                for score, label, group, mean_iou in rows
            ],
        )
        for title, name, rows in (
            (f"{accuracy} by the true box's share of the picture", "size", sizes),
            (f"{accuracy} by part of the data", "part", parts),
        )
    ]


def _make_standings(found: Evaluation) -> PageTable:
    """Published figures on the same set, by row; empty where nobody publishes any."""
    from gap_runtime.evaluation.published import list_standings  # noqa: PLC0415
    from gap_runtime.report.evaluation_page import PageTable  # noqa: PLC0415

    # Ratios differ in what could not be asked, if in anything.
    ratios: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = {}
    for each in found.scores:
        for standing in list_standings(each, found.data):
            key = (each.protocol, each.labels, standing.who, standing.reasons)
            ratios.setdefault(key, []).append(f"{each.ratio:g}")
    return PageTable(
        title="beside which published figures a row may be put (prompts are the model's own)",
        header=["protocol", "labels", "ratio", "published by", "compares"],
        rows=[
            [
                *(protocol, labels, ", ".join(those), who),
                f"no, theirs: {', '.join(reasons)}" if reasons else "yes",
            ]
            for (protocol, labels, who, reasons), those in ratios.items()
        ],
    )


def _name_accuracy(found: Evaluation) -> str:
    """What the accuracy is called: of boxes, of points, or of both in one table."""
    measures = {each.measure for each in found.scores}
    if measures == {"point"}:
        return "in the box"
    return "Acc@0.5" if "point" not in measures else "Acc@0.5 or in the box"


def _make_comparisons(found: Evaluation) -> PageTable:
    """The paired comparison; empty where nothing was to be compared."""
    from gap_runtime.report.evaluation_page import PageTable  # noqa: PLC0415

    other = found.comparisons[0].other if found.comparisons else ""
    return PageTable(
        title=f"against {other}, phrase by phrase",
        header=[
            *("protocol", "labels", "ratio", "its ratio", "phrases", "Acc@0.5", "its Acc@0.5"),
            *("only here", "only there", "McNemar p", "other answers"),
        ],
        rows=[
            [
                each.protocol,
                each.labels,
                f"{each.ratio:g}",
                f"{each.other_ratio:g}",
                each.phrases,
                _percent(each.accuracy),
                _percent(each.other_accuracy),
                each.only_this,
                each.only_other,
                f"{each.p:.2g}",
                each.differing,
            ]
            for each in found.comparisons
        ],
    )


def list_words(found: Evaluation) -> list[str]:
    """What the comparisons say."""
    return [
        f"{each.protocol}, {each.labels} labels, ratio {each.ratio:g} against "
        f"{each.other_ratio:g} of {each.other}: {each.describe()}"
        for each in found.comparisons
    ]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
