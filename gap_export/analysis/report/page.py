"""`report.html` of a sweep, and its tables as CSV and JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

from gap_export.analysis.report.draws import Draws, pool_draws, tabulate_draws
from gap_export.analysis.report.gallery import Shown, choose_random, choose_worst, draw_choices
from gap_export.analysis.report.plots import (
    draw_key,
    require_matplotlib,
)
from gap_export.analysis.report.sections import (
    compare_with_paper,
    is_main,
    list_facts,
    list_pairs,
    percent,
    plot_costs,
    plot_pruners,
    tabulate_accuracy,
    tabulate_basis,
    tabulate_costs,
    tabulate_pairs,
    tabulate_parity,
    tabulate_parts,
    tabulate_protocols,
)
from gap_export.analysis.report.tables import (
    Advice,
    CellRow,
    PairRow,
    PartRow,
    Published,
    SizeRow,
    Tables,
    advise,
    flatten_cells,
    flatten_pairs,
    flatten_parts,
    flatten_sizes,
    make_tables,
    write_csv,
)
from gap_export.analysis.sweep import UNPRUNED, Sweep, SweepFacts, describe_sweep
from gap_runtime.errors import ConfigError
from gap_runtime.records import dump_record, extend_record
from gap_runtime.report.page import encode_picture, make_page, write_page

REPORT_FILE: Final = "report.html"
_TEMPLATE: Final = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class WordedAdvice(Advice):
    """A recommendation and the words for it."""

    words: str


class Figures(TypedDict):
    """All figures of a sweep, as `report.json` has them.

    `sweep` is what was asked for. `cells` has a row for each pruner, mode, ratio, side and
    protocol, `sizes` and `parts` the same by size of the true box and by part of the data;
    `comparisons` are phrase by phrase. `published` is the paper's table, `draws` are pruners that
    draw over several seeds, `left_out` says what was not done and why, `advice` is what
    `--within` recommends.
    """

    sweep: SweepFacts
    protocols: list[str]
    cells: list[CellRow]
    sizes: list[SizeRow]
    parts: list[PartRow]
    comparisons: list[PairRow]
    published: list[Published]
    draws: list[Draws]
    left_out: list[str]
    advice: list[WordedAdvice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A written report: the page, what it recommends, and all figures as plain data."""

    path: Path
    advice: tuple[WordedAdvice, ...]
    figures: Figures


def require_libraries() -> None:
    """Say what to install where something is missing.

    Raises:
        ConfigError: A library of the extra `report` is not installed.
    """
    require_matplotlib()
    _import_jinja()


def write_report(
    sweep: Sweep, protocols: Sequence[str], *, pictures: int, within: float | None = None
) -> Report:
    """Write the page and the tables into the sweep's folder.

    Args:
        sweep: Finished.
        protocols: How answers are scored; the plots show the first.
        pictures: Of the worst disagreements, and as many random ones.
        within: Points of accuracy that may be lost, to recommend ratios by.
    """
    tables = make_tables(sweep, protocols)
    data = sweep.plan.request.data
    cells, pairs = flatten_cells(tables.cells, data), flatten_pairs(tables.pairs)
    advice = () if within is None else advise(tables, within)
    worded = tuple(
        extend_record(WordedAdvice, each, {"words": each.describe()}) for each in advice
    )
    draws = pool_draws(sweep, protocols[0])
    figures: Figures = {
        "sweep": describe_sweep(sweep.plan),
        "protocols": list(protocols),
        "cells": cells,
        "sizes": flatten_sizes(tables.cells),
        "parts": flatten_parts(tables.cells),
        "comparisons": pairs,
        "published": dump_record(tables.published),
        "draws": dump_record(tuple(draws)),
        "left_out": list(sweep.plan.left_out),
        "advice": dump_record(worded),
    }
    out = sweep.plan.request.out
    tables_by_file: dict[str, Sequence[Mapping[str, Any]]] = {
        "cells.csv": cells,
        "sizes.csv": figures["sizes"],
        **({"parts.csv": figures["parts"]} if figures["parts"] else {}),
        "comparisons.csv": pairs,
    }
    for name, rows in tables_by_file.items():
        write_page(out / name, write_csv(rows))
    text = json.dumps(_finite(figures), indent=1, allow_nan=False)
    write_page(out / "report.json", text + "\n")
    path = out / REPORT_FILE
    write_page(path, make_page(_title(sweep), _render(sweep, tables, pictures, advice, draws)))
    return Report(path=path, advice=worded, figures=figures)


def _finite(data: Any) -> Any:
    """JSON has no NaN: a mean of nothing becomes null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    # NaN alone differs from itself.
    return None if isinstance(data, float) and data != data else data  # noqa: PLR0124


def _import_jinja() -> Any:
    try:
        import jinja2  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError("a report needs jinja2: pip install 'gap-export[report]'") from error
    return jinja2


def _title(sweep: Sweep) -> str:
    request = sweep.plan.request
    return f"{request.named.name}: accuracy after pruning"


def _render(
    sweep: Sweep,
    tables: Tables,
    pictures: int,
    advice: Sequence[Advice],
    draws: Sequence[Draws],
) -> str:
    """The page's body."""
    jinja2 = _import_jinja()
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    safe: Callable[[str], str] = jinja2.utils.markupsafe.Markup
    request = sweep.plan.request
    seed = request.named.config.prune.seed
    reason, worst = choose_worst(sweep, pictures)
    text: str = template.render(
        title=_title(sweep),
        request=request,
        data=request.data,
        settings=describe_sweep(sweep.plan),
        versions=sweep.swept[0].bundle.manifest.versions,
        tables=tables,
        left_out=sweep.plan.left_out,
        unasked=sum(cell.score.unasked for cell in tables.cells if is_main(cell, tables)),
        facts=list_facts(tables),
        legend=[(safe(draw_key(k)), mode) for k, mode in enumerate(tables.modes)],
        has_eager=request.eager,
        plots=[safe(plot) for plot in plot_pruners(tables)],
        accuracy=safe(tabulate_accuracy(tables)),
        draws=safe(tabulate_draws(draws, by_count=tables.by_count)),
        papers=compare_with_paper(tables),
        costs=[safe(plot) for plot in plot_costs(tables)],
        cost_table=safe(tabulate_costs(tables)),
        parity=safe(tabulate_parity(tables)),
        differing=sum(pair.comparison.differing for pair in list_pairs(tables, "parity")),
        compared=sum(pair.comparison.phrases for pair in list_pairs(tables, "parity")),
        positions=safe(tabulate_pairs(tables, "positions")),
        pruning=safe(tabulate_pairs(tables, "pruning")),
        protocols=safe(tabulate_protocols(tables)),
        advice=[each.describe() for each in advice],
        basis=safe(tabulate_basis(tables, request.data)),
        parts=safe(tabulate_parts(tables)),
        reason=reason,
        seed=seed,
        galleries=[
            (name, [_describe(shown) for shown in draw_choices(sweep, choices)])
            for name, choices in (
                ("worst", worst),
                ("random", choose_random(sweep, pictures, seed)),
            )
        ],
    )
    return text


def _describe(shown: Shown) -> dict[str, Any]:
    """A picture of the gallery for the template."""
    row, variant = shown.choice.row, shown.choice.swept.variant
    what = (
        UNPRUNED
        if variant.name == UNPRUNED
        else f"{variant.pruner}, {variant.positions}, {row.ratio:g} removed"
    )
    eager = shown.choice.eager
    return {
        "phrase": row.phrase,
        "what": what,
        "kept": shown.kept,
        "overlap": f"{shown.overlap:.2f}",
        "eager_overlap": None if shown.eager_overlap is None else f"{shown.eager_overlap:.2f}",
        "answer": row.answer,
        "eager_answer": eager.answer if eager is not None and eager.answer != row.answer else None,
        "picture": encode_picture(shown.picture),
        "size": shown.picture.size,
    }
