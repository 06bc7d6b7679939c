"""The parts of a sweep's page: its facts, plots and tables as HTML."""

from __future__ import annotations

from typing import Any

from gap_export.analysis.report.plots import (
    Line,
    plot_accuracy,
    plot_bars,
)
from gap_export.analysis.report.tables import (
    MAIN_MODE,
    PYTORCH,
    STAGES,
    Cell,
    Pair,
    Tables,
)
from gap_export.analysis.sweep import UNPRUNED
from gap_runtime.display import format_bytes
from gap_runtime.evaluation.data import Data
from gap_runtime.evaluation.published import describe_standings
from gap_runtime.evaluation.score import PUBLISHED
from gap_runtime.report.page import make_table


def is_main(cell: Cell, tables: Tables) -> bool:
    """Whether a cell is scored by the first protocol, with the labels as published."""
    return cell.score.protocol == tables.protocols[0] and cell.score.labels == PUBLISHED


def percent(value: float | None) -> str:
    """A share for people; a dash where there is none."""
    return "-" if value is None or value != value else f"{100 * value:.1f}"  # noqa: PLR0124


def list_facts(tables: Tables) -> list[tuple[str, str, str]]:
    """The figures that stand at the top: name, value, remark."""
    facts = []
    unpruned = tables.find(UNPRUNED, MAIN_MODE, 0.0)
    if unpruned is not None:
        facts.append(("unpruned", f"{percent(unpruned.score.accuracy)} %", "Acc@0.5"))
    ratio = next((r for r in tables.ratios if r >= 0.5), max(tables.ratios, default=0.0))
    for cell in _best_pruner(tables, ratio):
        remark = f"{cell.pruner}, {ratio:g} removed"
        facts.append((cell.positions, f"{percent(cell.score.accuracy)} %", remark))
    parity = list_pairs(tables, "parity")
    if parity:
        differing = sum(pair.comparison.differing for pair in parity)
        asked = sum(pair.comparison.phrases for pair in parity)
        facts.append(
            ("differing answers", f"{differing:,}", f"of {asked:,}, PyTorch and exported")
        )
    return facts


def _best_pruner(tables: Tables, ratio: float) -> list[Cell]:
    """All modes of the pruner that is best at one ratio with GAP, or in the first mode."""
    rows = [
        [cell for mode in tables.modes if (cell := tables.find(pruner, mode, ratio))]
        for pruner in tables.pruners
    ]
    found = [row for row in rows if row] if ratio else []
    return max(
        found,
        key=lambda row: next(
            (c.score.accuracy for c in row if c.positions == MAIN_MODE), row[0].score.accuracy
        ),
        default=[],
    )


def plot_pruners(tables: Tables) -> list[str]:
    """Accuracy over ratios, a plot for each pruner, as SVG."""
    unpruned = tables.find(UNPRUNED, MAIN_MODE, 0.0)
    plots = []
    for pruner in tables.pruners:
        lines = []
        for k, mode in enumerate(tables.modes):
            cells = [c for r in tables.ratios if r and (c := tables.find(pruner, mode, r))]
            eager = [tables.find(pruner, mode, cell.ratio, PYTORCH) for cell in cells]
            if cells:
                lines.append(
                    Line(
                        label=mode,
                        style=k,
                        ratios=[cell.ratio for cell in cells],
                        values=[100 * cell.score.accuracy for cell in cells],
                        low=[100 * cell.score.low for cell in cells],
                        high=[100 * cell.score.high for cell in cells],
                        hollow=[100 * c.score.accuracy if c else None for c in eager],
                    )
                )
        said = "; ".join(
            f"{line.label} " + ", ".join(f"{v:.1f} at {r:g}" for r, v in _points(line))
            for line in lines
        )
        base = None if unpruned is None else 100 * unpruned.score.accuracy
        alt = f"Acc@0.5 in percent by ratio for pruner {pruner}: {said}"
        plots.append(plot_accuracy(pruner, lines, base, alt))
    return plots


def _points(line: Line) -> list[tuple[float, float]]:
    return list(zip(line.ratios, line.values, strict=True))


def tabulate_accuracy(tables: Tables) -> str:
    """A row for each pruner and mode, a column for each ratio; PyTorch's where it differs."""
    rows = []
    for pruner in tables.pruners:
        for mode in tables.modes:
            cells = [tables.find(pruner, mode, ratio) for ratio in tables.ratios]
            rows.append([f"{pruner}, {mode}", *(_describe_accuracy(cell) for cell in cells)])
    if not rows:
        cell = tables.find(UNPRUNED, MAIN_MODE, 0.0)
        rows.append([UNPRUNED, _describe_accuracy(cell)])
    by = "tokens kept" if tables.by_count else "share removed"
    return make_table(
        f"Acc@0.5 in % of the exported graphs, with the 95 % interval, by {by}",
        ["pruner, positions", *(tables.name_ratio(ratio) for ratio in tables.ratios)],
        rows,
    )


def _describe_accuracy(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    score = cell.score
    return f"{percent(score.accuracy)} ({percent(score.low)} to {percent(score.high)})"


def compare_with_paper(tables: Tables) -> dict[str, Any]:
    """The paper's table with its figures, and the same with those measured here."""
    others = [mode for mode in tables.modes if mode != MAIN_MODE]
    rows = []
    unpruned = tables.find(UNPRUNED, MAIN_MODE, 0.0)
    for pruner in tables.pruners:
        for ratio in tables.ratios:
            gap = tables.find(pruner, MAIN_MODE, ratio) if ratio else None
            if gap is None:
                continue
            pruned = [tables.find(pruner, mode, ratio) for mode in others]
            rows.append(
                {
                    "pruner": pruner,
                    "ratio": ratio,
                    "unpruned": unpruned and unpruned.score.accuracy,
                    "pruned": [cell and cell.score.accuracy for cell in pruned],
                    "gap": gap.score.accuracy,
                    "restored": _divide(gap.score.accuracy, unpruned),
                }
            )
    return {"modes": others, "rows": rows}


def _divide(accuracy: float, unpruned: Cell | None) -> float | None:
    if unpruned is None or not unpruned.score.accuracy:
        return None
    return accuracy / unpruned.score.accuracy


def plot_costs(tables: Tables) -> list[str]:
    """Milliseconds by stage, tokens and cache by ratio; the mean of all pruners."""
    groups = _group_costs(tables)
    ratios = list(groups)
    times = [
        (stage, [_mean(c.score.milliseconds.get(stage, 0.0) for c in groups[r]) for r in ratios])
        for stage in STAGES
    ]
    totals = [sum(values[k] for _, values in times) for k in range(len(ratios))]
    prompts = [_mean(c.size.prompt_tokens for c in groups[r]) for r in ratios]
    caches = [_mean(c.size.cache_bytes / 2**20 for c in groups[r]) for r in ratios]

    def say(what: str, values: list[float]) -> str:
        said = ", ".join(f"{v:,.4g} at {r:g}" for r, v in zip(ratios, values, strict=True))
        return f"{what} by share removed: {said}"

    return [
        plot_bars("Time per phrase", "ms", ratios, times, say("Milliseconds", totals)),
        plot_bars(
            "Longest prompt",
            "tokens",
            ratios,
            [("prompt", prompts)],
            say("Tokens of the longest prompt", prompts),
        ),
        plot_bars(
            "KV cache", "MiB", ratios, [("cache", caches)], say("MiB of the KV cache", caches)
        ),
    ]


def _group_costs(tables: Tables) -> dict[float, list[Cell]]:
    """Cells of the exported graphs by ratio: all pruners in the main mode, or the first one."""
    mode = MAIN_MODE if MAIN_MODE in tables.modes or not tables.modes else tables.modes[0]
    groups = {}
    for ratio in tables.ratios:
        names = tables.pruners if ratio else [UNPRUNED]
        cells = [c for name in names if (c := tables.find(name, mode, ratio))]
        if cells:
            groups[ratio] = cells
    return groups


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))


def tabulate_costs(tables: Tables) -> str:
    """Time, tokens and memory of each pruner at each ratio."""
    rows = []
    for ratio, cells in _group_costs(tables).items():
        for cell in cells:
            times = cell.score.milliseconds
            rows.append(
                [
                    f"{cell.pruner}, {ratio:g}",
                    _describe_tokens(cell),
                    str(cell.size.prompt_tokens),
                    format_bytes(cell.size.cache_bytes),
                    *(f"{times.get(stage, 0.0):.1f}" for stage in (*STAGES, "total")),
                    f"{cell.score.median_ms:.1f}",
                    f"{cell.score.tokens:.1f}",
                ]
            )
    return make_table(
        "Milliseconds per phrase by stage (means, and the median of the whole), tokens and cache",
        [
            *("pruner, ratio", "visual tokens", "longest prompt", "KV cache"),
            *(*STAGES, "total", "median", "answer tokens"),
        ],
        rows,
    )


def _describe_tokens(cell: Cell) -> str:
    extra = f" + {cell.size.extra}" if cell.size.extra else ""
    return f"{cell.size.kept}{extra} of {cell.size.patches}"


def list_pairs(tables: Tables, kind: str) -> list[Pair]:
    """Comparisons of one kind that the page shows."""
    return [
        pair
        for pair in tables.pairs
        if pair.kind == kind
        and pair.comparison.protocol == tables.protocols[0]
        and pair.comparison.labels == PUBLISHED
    ]


def tabulate_parity(tables: Tables) -> str:
    """A row for each bundle."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in list_pairs(tables, "parity"):
        groups.setdefault((pair.pruner, pair.positions), []).append(pair)
    rows = []
    for (pruner, mode), pairs in groups.items():
        found = [pair.comparison for pair in pairs]
        rows.append(
            [
                pruner if pruner == UNPRUNED else f"{pruner}, {mode}",
                ", ".join(f"{each.ratio:g}" for each in found),
                f"{sum(each.phrases for each in found):,}",
                f"{sum(each.differing for each in found):,}",
                f"{sum(each.only_other for each in found):,}",
                f"{sum(each.only_this for each in found):,}",
            ]
        )
    return make_table(
        "Answers of PyTorch (float32) and of the exported graphs to the same phrases",
        [
            *("pruner, positions", "ratios", "answers", "differing"),
            *("right in PyTorch only", "right in exported only"),
        ],
        rows,
    )


def tabulate_pairs(tables: Tables, kind: str) -> str:
    """Comparisons of one kind, each with its test."""
    rows = [
        [
            f"{pair.pruner}, {pair.positions}",
            f"{found.ratio:g}",
            str(found.phrases),
            f"{percent(found.accuracy)}",
            f"{percent(found.other_accuracy)}",
            str(found.only_this),
            str(found.only_other),
            f"{found.p:.2g}",
        ]
        for pair in list_pairs(tables, kind)
        for found in [pair.comparison]
    ]
    other = "GAP" if kind == "positions" else "unpruned"
    return make_table(
        f"Against {other} on the same phrases; p is McNemar's, exact and two-sided",
        [
            *("pruner, positions", "ratio", "phrases", "Acc@0.5 in %", f"{other} in %"),
            *("right here only", f"right {other} only", "p"),
        ],
        rows,
    )


def tabulate_protocols(tables: Tables) -> str:
    """The unpruned model and the main mode under every protocol and set of labels."""
    shown = [c for c in tables.cells if c.side != PYTORCH and c.positions == MAIN_MODE]
    columns = list(dict.fromkeys((c.score.protocol, c.score.labels) for c in shown))
    if len(columns) < 2:
        return ""
    names = list(dict.fromkeys((c.pruner, c.ratio) for c in shown))
    by_key = {(c.pruner, c.ratio, c.score.protocol, c.score.labels): c for c in shown}
    return make_table(
        "Accuracy in % of the same answers under every protocol and set of labels, GAP",
        ["pruner, ratio", *(_name_column(*column) for column in columns)],
        [
            [
                f"{pruner}, {ratio:g}",
                *(percent(by_key[pruner, ratio, p, k].score.accuracy) for p, k in columns),
            ]
            for pruner, ratio in names
        ],
    )


def _name_column(protocol: str, labels: str) -> str:
    return protocol if labels == PUBLISHED else f"{protocol}, {labels}"


def tabulate_basis(tables: Tables, data: Data) -> str:
    """What each protocol's figures are of, and beside which published ones they may be put."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in tables.cells:
        groups.setdefault((cell.score.protocol, cell.score.labels), []).append(cell)
    rows = []
    for (protocol, labels), cells in groups.items():
        # The one that compares least.
        cell = max(cells, key=lambda each: each.score.unasked)
        compares, differs = describe_standings(cell.standings)
        rows.append(
            [
                _name_column(protocol, labels),
                cell.score.frame,
                labels,
                data.describe(),
                f"{cell.score.phrases:,}",
                f"{cell.score.left_out:,}",
                compares or "none",
                differs or "nobody is known to publish figures on it",
            ]
        )
    return make_table(
        "What the figures are of, and which published ones they compare with",
        [
            *("protocol", "frame", "labels", "data", "phrases asked", "left out by the review"),
            *("compares with", "does not compare with (theirs)"),
        ],
        rows,
        wrapped=7,
    )


def tabulate_parts(tables: Tables) -> str:
    """The main mode by part of the data; nothing where the data have none."""
    shown = [c for c in tables.cells if is_main(c, tables) and c.side != PYTORCH]
    shown = [c for c in shown if c.positions == MAIN_MODE and c.score.parts]
    if not shown:
        return ""
    names = [part.part for part in shown[0].score.parts]
    return make_table(
        "Accuracy in % by part of the data, GAP",
        ["pruner, ratio", *names],
        [
            [
                f"{cell.pruner}, {cell.ratio:g}",
                *(percent(accuracies.get(name)) for name in names),
            ]
            for cell in shown
            for accuracies in [{part.part: part.accuracy for part in cell.score.parts}]
        ],
    )
