"""The figures of a sweep as flat rows, the same for the page, the CSV files and the JSON."""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypedDict

from gap_export.analysis.sweep import UNPRUNED, Sweep, Swept
from gap_runtime.bundle.manifest import RatioEntry
from gap_runtime.evaluation.compare import Comparison, compare_rows
from gap_runtime.evaluation.data import Data
from gap_runtime.evaluation.protocol import load_protocol
from gap_runtime.evaluation.published import Standing, describe_standings, list_standings
from gap_runtime.evaluation.results import Answers
from gap_runtime.evaluation.score import PUBLISHED, PartScore, Score, SizeScore, score_rows
from gap_runtime.records import dump_record, load_record

EXPORTED: Final = "exported"
PYTORCH: Final = "pytorch"
MAIN_MODE: Final = "gap"
STAGES: Final = ("preprocess", "vision", "prefill", "decode")
_PUBLISHED: Final = Path(__file__).with_name("published.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A row of the paper's table, Acc@0.5 in percent."""

    source: str
    model: str
    data: str
    unpruned: float
    pruned: float
    gap: float


class CellName(TypedDict):
    """Which cell a row is of. `side` is `exported` or `pytorch`."""

    pruner: str
    positions: str
    ratio: float
    side: str
    protocol: str
    labels: str


class CellRow(CellName):
    """The figures of a cell: what was asked, what a prompt costs, and the score.

    `cache_bytes` is the KV cache that an export at this ratio alone would have. The score is as
    in an evaluation; `*_ms` are means per phrase, null where they were not measured.
    `compares_with` and `differs_from` name published figures.
    """

    set: str
    split: str
    split_by: str
    kept: int
    patches: int
    extra: int
    prompt_tokens: int
    cache_bytes: int
    frame: str
    measure: str
    left_out: int
    phrases: int
    unasked: int
    hits: int
    accuracy: float
    low: float
    high: float
    accuracy_25: float
    accuracy_75: float
    accuracy_90: float
    mean_accuracy: float
    mean_iou: float
    unparsable: int
    degenerate: int
    tokens: float
    calls: float
    drafted: float
    accepted: float
    median_ms: float
    preprocess_ms: float | None
    vision_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    total_ms: float | None
    compares_with: str
    differs_from: str


class SizeRow(CellName):
    """Accuracy of one size class of true boxes; an interval of 95 %."""

    size: str
    phrases: int
    accuracy: float
    low: float
    high: float
    mean_iou: float


class PartRow(CellName):
    """Accuracy of a part of the data; an interval of 95 %."""

    part: str
    phrases: int
    accuracy: float
    low: float
    high: float


class PairRow(TypedDict):
    """Two sets of answers to the same phrases; `kind` is `parity`, `positions` or `pruning`.

    `only_this` and `only_other` are the phrases that just one of them got right, `p` is McNemar's
    exact two-sided test on them, `differing` counts answers that are not the same text.
    """

    kind: str
    pruner: str
    positions: str
    against: str
    protocol: str
    labels: str
    ratio: float
    other_ratio: float
    phrases: int
    accuracy: float
    other_accuracy: float
    only_this: int
    only_other: int
    p: float
    differing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a prompt costs at one ratio: the longest of all buckets.

    `cache_bytes` is the KV cache that an export at this ratio alone would have.
    """

    kept: int
    patches: int
    extra: int
    prompt_tokens: int
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One pruner, mode and ratio, by one side (`exported` or `pytorch`) under one protocol.

    `standings` are the published figures that it compares with or not.
    """

    pruner: str
    positions: str
    side: str
    size: Size
    score: Score
    standings: tuple[Standing, ...]

    @property
    def ratio(self) -> float:
        """Share that was removed."""
        return self.score.ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two sets of answers to the same phrases; `kind` is `parity`, `positions` or `pruning`."""

    kind: str
    pruner: str
    positions: str
    against: str
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Everything that the report shows but for pictures; the first protocol is the main one.

    `by_count`: people asked by counts that stay, not by shares removed.
    """

    protocols: tuple[str, ...]
    cells: tuple[Cell, ...]
    pairs: tuple[Pair, ...]
    published: tuple[Published, ...]
    by_count: bool

    def find(self, pruner: str, positions: str, ratio: float, side: str = EXPORTED) -> Cell | None:
        """A cell under the main protocol; ratio 0 is the unpruned model whatever the pruner."""
        if not ratio:
            pruner, positions = UNPRUNED, MAIN_MODE
        for cell in self.cells:
            key = (cell.pruner, cell.positions, cell.ratio, cell.side, cell.score.protocol)
            wanted = (pruner, positions, ratio, side, self.protocols[0])
            if key == wanted and cell.score.labels == PUBLISHED:
                return cell
        return None

    def name_ratio(self, ratio: float) -> str:
        """A ratio as people asked for it: of pictures of several sizes the largest one's count."""
        if not self.by_count:
            return f"{ratio:g}"
        return str(max(cell.size.kept for cell in self.cells if cell.ratio == ratio))

    @property
    def pruners(self) -> list[str]:
        """Names, without that of no pruning."""
        names = dict.fromkeys(cell.pruner for cell in self.cells)
        return [name for name in names if name != UNPRUNED]

    @property
    def modes(self) -> list[str]:
        """Position modes in the order that was asked for."""
        return list(dict.fromkeys(c.positions for c in self.cells if c.pruner != UNPRUNED))

    @property
    def ratios(self) -> list[float]:
        """All ratios, ascending."""
        return sorted({cell.ratio for cell in self.cells})


def make_tables(sweep: Sweep, protocols: Sequence[str]) -> Tables:
    """Score and compare everything."""
    cells: list[Cell] = []
    for swept in sweep.swept:
        for side, answers in ((EXPORTED, swept.exported), (PYTORCH, swept.eager)):
            if answers is not None:
                cells += _score(swept, side, answers, protocols, sweep.plan.request.data)
    return Tables(
        protocols=tuple(protocols),
        cells=tuple(cells),
        pairs=tuple(_compare(sweep, protocols)),
        published=read_published(),
        by_count=bool(sweep.plan.request.keep),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The largest ratio of a pruner that loses at most so many points of accuracy.

    `ratio` is None where every one loses more. `shown` is it as people asked for it, a share
    removed or, with `by_count`, a count kept. `lost` points are those of that ratio, or else the
    least of any; `high` is the end of their 95 % interval: above `within`, more phrases are
    needed to be sure.
    """

    pruner: str
    positions: str
    within: float
    ratio: float | None
    shown: str
    by_count: bool
    lost: float
    high: float

    def describe(self) -> str:
        """It in words."""
        name = f"{self.pruner}, {self.positions}"
        if self.ratio is None:
            every = "count" if self.by_count else "ratio"
            return (
                f"{name}: every {every} loses more than {self.within:g} points, at least "
                f"{self.lost:.1f}"
            )
        sure = "" if self.high <= self.within else "; ask more phrases to be sure"
        best = (
            f"{self.shown} tokens kept are the fewest"
            if self.by_count
            else f"{self.shown} removed is the most"
        )
        return (
            f"{name}: {best} within {self.within:g} points of the unpruned model "
            f"({self.lost:.1f} lost, 95 % up to {self.high:.1f}{sure})"
        )


def advise(tables: Tables, within: float) -> list[Advice]:
    """Advice for every pruner, the one that may remove most first; main protocol, all labels."""
    mode = MAIN_MODE if MAIN_MODE in tables.modes or not tables.modes else tables.modes[0]
    by_pruner: dict[str, list[Comparison]] = {}
    for pair in tables.pairs:
        found = pair.comparison
        if (pair.kind, pair.positions) == ("pruning", mode) and (
            (found.protocol, found.labels) == (tables.protocols[0], PUBLISHED)
        ):
            by_pruner.setdefault(pair.pruner, []).append(found)
    advice = []
    for pruner, comparisons in by_pruner.items():
        fitting = [each for each in comparisons if each.find_loss()[0] <= within]
        best = max(fitting, key=lambda each: each.ratio, default=None)
        shown = best or min(comparisons, key=lambda each: each.find_loss()[0])
        lost, _, high = shown.find_loss()
        advice.append(
            Advice(
                pruner=pruner,
                positions=mode,
                within=within,
                ratio=None if best is None else best.ratio,
                shown="" if best is None else tables.name_ratio(best.ratio),
                by_count=tables.by_count,
                lost=lost,
                high=high,
            )
        )
    return sorted(advice, key=lambda each: (-(each.ratio or 0.0), each.lost))


def read_published() -> tuple[Published, ...]:
    """The paper's figures."""
    data = tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))
    return tuple(load_record(Published, each, _PUBLISHED.name) for each in data["figures"])


def _score(
    swept: Swept, side: str, answers: Answers, protocols: Sequence[str], data: Data
) -> Iterable[Cell]:
    for name in protocols:
        protocol, box = load_protocol(name), answers.header.box
        for score in score_rows(answers.rows, name, protocol, box, data.expressions):
            yield Cell(
                pruner=swept.variant.pruner,
                positions=swept.variant.positions,
                side=side,
                size=measure_size(swept, score.ratio),
                score=score,
                standings=list_standings(score, data),
            )


def measure_size(swept: Swept, ratio: float) -> Size:
    """Tokens and cache of the largest bucket at one ratio."""
    plan = swept.variant.plan
    entries = [entry for entry in plan.entries if entry.ratio == ratio]

    def prompt(entry: RatioEntry) -> int:
        return plan.layout.at(entry).prompt

    entry = max(entries, key=prompt)
    return Size(
        kept=entry.kept,
        patches=entry.patches,
        extra=entry.extra,
        prompt_tokens=prompt(entry),
        cache_bytes=plan.layout.at(entry).capacity * plan.cache_bytes_per_slot,
    )


def _compare(sweep: Sweep, protocols: Sequence[str]) -> Iterable[Pair]:
    """PyTorch against the exported graphs, other modes against GAP, pruned against unpruned."""
    unpruned = next((s for s in sweep.swept if s.variant.name == UNPRUNED), None)
    main = {s.variant.pruner: s for s in sweep.swept if s.variant.positions == MAIN_MODE}
    for swept in sweep.swept:
        variant, exported = swept.variant, swept.exported
        others: list[tuple[str, str, Answers | None]] = [("parity", "PyTorch", swept.eager)]
        if variant is not (unpruned and unpruned.variant):
            best = main.get(variant.pruner)
            if best is not None and best is not swept:
                others.append(("positions", MAIN_MODE, best.exported))
            others.append(("pruning", UNPRUNED, unpruned.exported if unpruned else None))
        for kind, against, answers in others:
            if answers is None or not _share_phrases(exported, answers):
                continue
            for name in protocols:
                for found in compare_rows(
                    exported,
                    answers,
                    against,
                    name,
                    load_protocol(name),
                    sweep.plan.request.data.expressions,
                ):
                    yield Pair(
                        kind=kind,
                        pruner=variant.pruner,
                        positions=variant.positions,
                        against=against,
                        comparison=found,
                    )


def _share_phrases(this: Answers, other: Answers) -> bool:
    """Whether any phrase was answered by both; where no picture could be read there is none."""
    asked = {row.key for row in this.rows if row.problem is None}
    return any(row.problem is None and row.key in asked for row in other.rows)


def flatten_cells(cells: Iterable[Cell], data: Data) -> list[CellRow]:
    """Cells as rows of plain values; each names all that its figures depend on."""
    rows: list[CellRow] = []
    for cell in cells:
        score = dump_record(replace(cell.score, sizes=(), parts=(), milliseconds={}))
        for name in ("sizes", "parts", "milliseconds", "ratio", "protocol"):
            del score[name]
        compares, differs = describe_standings(cell.standings)
        times = cell.score.milliseconds
        row: Any = {
            "pruner": cell.pruner,
            "positions": cell.positions,
            "ratio": cell.ratio,
            "side": cell.side,
            "protocol": cell.score.protocol,
            "set": data.set or data.name,
            "split": data.split,
            "split_by": data.by,
            **dump_record(cell.size),
            **score,
            **{f"{stage}_ms": times.get(stage) for stage in (*STAGES, "total")},
            "compares_with": compares,
            "differs_from": differs,
        }
        rows.append(row)
    return rows


def flatten_sizes(cells: Iterable[Cell]) -> list[SizeRow]:
    """Accuracy by the size of the true box, as rows of plain values."""
    return [_join(cell, size) for cell in cells for size in cell.score.sizes]


def flatten_parts(cells: Iterable[Cell]) -> list[PartRow]:
    """Accuracy by part of the data, as rows of plain values; none where it has no parts."""
    return [_join(cell, part) for cell in cells for part in cell.score.parts]


def _join(cell: Cell, record: SizeScore | PartScore) -> Any:
    """A cell's name and what a record has, as one row."""
    name: CellName = {
        "pruner": cell.pruner,
        "positions": cell.positions,
        "ratio": cell.ratio,
        "side": cell.side,
        "protocol": cell.score.protocol,
        "labels": cell.score.labels,
    }
    return {**name, **dump_record(record)}


def flatten_pairs(pairs: Iterable[Pair]) -> list[PairRow]:
    """Comparisons as rows of plain values."""
    rows: list[PairRow] = []
    for pair in pairs:
        found = dump_record(pair.comparison)
        del found["other"]
        row: Any = {
            "kind": pair.kind,
            "pruner": pair.pruner,
            "positions": pair.positions,
            "against": pair.against,
            **found,
        }
        rows.append(row)
    return rows


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as the text of a CSV file; empty where there are none."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
