"""The figures of README.md and docs/why-positions.md.

python refshapes/figures.py [--sweep build/keeps] [--ablations build/ablations] [--out docs]

kept-tokens.svg      accuracy against kept tokens, GAP and compact, of a sweep's report.json
why-exact.svg        accuracy against how far IDs are off, of the ablations' summary.json
why-order.svg        order and value, of the same
why-positions.png    one picture, its kept tokens, and where the answers lie
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablations import MODEL, choose, read_asked
from arrangements import APART, EXACT, MAIN, TOKENS, WHOLE
from demo import draw_panels
from gap_export.pipeline.asking import open_reference
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_runtime.cli.options import ArgumentParser, run_command
from gap_runtime.errors import InputError
from gap_runtime.evaluation.data import open_data
from gap_runtime.pictures.boxes import parse_boxes
from gap_runtime.pictures.drawing import draw_grounding
from gap_runtime.pictures.load import frame_picture
from gap_runtime.records.files import exists, is_folder
from tables import open_report

GREEN, RED, BLUE, GREY = "#11754c", "#b3302a", "#2457a6", "#6b7280"
PANELS: Final = (
    (f"{APART}: right IDs, right order (GAP)", "GAP"),
    (f"{EXACT}: all off by 4 to the right", "all IDs 4 columns off"),
    (f"{APART}: counted anew, right order (compact)", "compact"),
    (f"{APART}: right IDs, any order", "right IDs, any order"),
    (f"{APART}: IDs dealt anew, right order", "IDs dealt anew"),
    (f"{WHOLE}: IDs in compact's range", "all tokens, compact's range of IDs"),
)


def make_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty plot with quiet borders."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """The same figure is the same file."""
    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    # matplotlib leaves blanks at the ends of lines.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def find_lines(
    data: dict[str, Any], mode: str
) -> dict[str, list[tuple[int, float, float, float]]]:
    """Kept tokens, accuracy and interval in percent by pruner; draws pooled over seeds."""
    found: dict[str, list[tuple[int, float, float, float]]] = {}
    rows = [
        *(
            cell
            for cell in data["cells"]
            if cell["side"] == "exported"
            and cell["protocol"] == data["protocols"][0]
            and cell["pruner"] != "unpruned"
            and not re.search(r" \(seed \d+\)$", cell["pruner"])
        ),
        *data["draws"],
    ]
    for row in rows:
        if row["positions"] == mode:
            values = (100 * row[name] for name in ("accuracy", "low", "high"))
            found.setdefault(row["pruner"], []).append((row["kept"], *values))
    return {name: sorted(points) for name, points in found.items()}


def plot_kept(data: dict[str, Any]) -> Figure:
    """Accuracy against kept tokens: every pruner twice, with GAP and with compact IDs."""
    figure, axes = make_axes(6.4, 3.6)
    unpruned = next(cell for cell in data["cells"] if cell["pruner"] == "unpruned")
    axes.axhline(100 * unpruned["accuracy"], color=GREY, linewidth=1, linestyle=(0, (3, 3)))
    counts = sorted({cell["kept"] for cell in data["cells"] if cell["ratio"]})
    for mode, colour in (("compact", RED), ("gap", GREEN)):
        lines = find_lines(data, mode)
        ranked = sorted(lines, key=lambda name: -sum(value for _, value, *_ in lines[name]))
        for name in reversed(ranked):
            places, values, low, high = zip(*lines[name], strict=True)
            named = name in ranked[:1]
            axes.plot(
                places,
                values,
                color=colour,
                alpha=1.0 if named else 0.35,
                linewidth=2 if named else 1,
                marker="o",
                markersize=5 if named else 3,
            )
            if named:
                axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        shown = {"gap": "GAP", "compact": "compact IDs"}[mode]
        label = f"{shown}, {len(lines)} pruners; bold: `{ranked[0]}`"
        axes.plot([], [], color=colour, marker="o", linewidth=2, label=label)
    axes.plot([], [], color=GREY, linestyle=(0, (3, 3)), label="unpruned, 256 tokens")
    axes.set_xticks(counts)
    axes.set_xlim(min(counts) - 8, max(counts) + 8)
    axes.set_ylim(-3, 104)
    axes.set_xlabel("visual tokens kept of 256")
    axes.set_ylabel("Acc@0.5 in %")
    axes.legend(frameon=False, loc="center right", fontsize=9)
    return figure


def find_figures(summary: dict[str, Any], group: str) -> dict[str, dict[str, Any]]:
    """Figures of a group by label."""
    return {each["label"]: each for each in summary["figures"] if each["group"] == group}


def plot_exact(summary: dict[str, Any]) -> Figure:
    """Accuracy against how many cells IDs are off."""
    figure, axes = make_axes(6.4, 3.3)
    exact = find_figures(summary, EXACT)
    right = find_figures(summary, APART)["right IDs, right order (GAP)"]
    cells = (1, 2, 4, 8)
    for pattern, colour, marker, label in (
        ("each off by {}, to any side", RED, "o", "each ID off, to any side"),
        ("all off by {} to the right", BLUE, "s", "all IDs off to the right"),
    ):
        rows = [right, *(exact[pattern.format(n)] for n in cells)]
        values = [100 * row["accuracy"] for row in rows]
        axes.plot((0, *cells), values, color=colour, marker=marker, label=label)
        axes.fill_between(
            (0, *cells),
            [100 * row["low"] for row in rows],
            [100 * row["high"] for row in rows],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    moved = [100 * exact[f"all off by {n} to the right"]["at_shifted"] for n in cells]
    axes.plot(
        (0, *cells),
        [100 * right["accuracy"], *moved],
        color=GREEN,
        marker="^",
        linestyle="--",
        label="the same answers, held against the box moved as the IDs were",
    )
    axes.set_xticks((0, *cells))
    axes.set_ylim(-3, 104)
    axes.set_xlabel("cells that IDs are off")
    axes.set_ylabel("Acc@0.5 in %")
    axes.legend(frameon=False, loc="center right", fontsize=9, bbox_to_anchor=(1, 0.62))
    return figure


def plot_order(summary: dict[str, Any]) -> Figure:
    """Order and value: a bar for each arrangement."""
    rows = list(reversed(find_figures(summary, APART).values()))
    figure, axes = make_axes(6.4, 0.34 * len(rows) + 0.7)
    axes.grid(visible=False)
    for place, row in enumerate(rows):
        value = 100 * row["accuracy"]
        colour = GREEN if row["label"].startswith("right IDs") else RED
        spread = [[max(value - 100 * row["low"], 0)], [max(100 * row["high"] - value, 0)]]
        axes.barh(place, value, color=colour, height=0.62, alpha=0.85)
        axes.errorbar(value, place, xerr=spread, color="#111827", linewidth=1, capsize=2)
        axes.text(100 * row["high"] + 2, place, f"{value:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axes.set_xlim(0, 108)
    axes.set_xlabel("Acc@0.5 in %; green: every token has its own ID")
    return figure


def draw_picture(ablations: Path, summary: dict[str, Any], number: int) -> Any:
    """One phrase: the kept tokens, and the answers under several arrangements."""
    each = open_data(f"{MODEL}:test", limit=summary["phrases"]).expressions[number]
    request = make_request(
        MODEL, keep=summary["keep"], pruner=MAIN, out=ablations, reference=False
    )
    plan = plan_export(request)
    reference = open_reference(plan)
    picture = each.picture.load()
    bucket = reference.find_bucket(picture)
    question = reference.ask(picture, each.phrase, bucket)
    kept = sorted(choose(reference, question, plan, MAIN).order)
    answers = {
        asked.variant: asked.answer
        for asked in read_asked(ablations / "answers.jsonl")
        if asked.key == each.key and asked.seed == 0
    }
    frame = frame_picture(picture.size, plan.spec.preprocess, bucket)
    panels = []
    for variant, title in PANELS:
        found = parse_boxes(answers[variant], plan.spec.box, frame).boxes
        panel = draw_grounding(
            picture,
            plan.spec.preprocess,
            plan.spec.buckets,
            phrase=each.phrase,
            boxes=found,
            kept_index=list(range(TOKENS)) if variant.startswith(WHOLE) else kept,
        )
        panels.append((title, panel))
    return draw_panels(panels, columns=3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = ArgumentParser(description="figures of the sweep and the ablations")
    parser.add_argument("--sweep", type=Path, default=Path("build/keeps"))
    parser.add_argument("--ablations", type=Path, default=Path("build/ablations"))
    parser.add_argument("--phrase", type=int, default=0, help="number of the drawn phrase")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sweep, summary = options.sweep / "report.json", options.ablations / "summary.json"
    if not is_folder(options.out):
        raise InputError(f"{options.out}: no folder, expected one to write to")
    if not (exists(sweep) or exists(summary)):
        raise InputError(f"{sweep}, {summary}: neither is there; see make keeps and make why")
    if exists(sweep):
        with open_report(sweep) as data:
            save(plot_kept(data), options.out / "kept-tokens.svg")
    if exists(summary):
        with open_report(summary) as data:
            if not 0 <= options.phrase < data["phrases"]:
                parser.error(f"--phrase {options.phrase}: there are {data['phrases']}, from 0 on")
            save(plot_exact(data), options.out / "why-exact.svg")
            save(plot_order(data), options.out / "why-order.svg")
            sheet = draw_picture(options.ablations, data, options.phrase)
        sheet.convert("P", palette=1, colors=128).save(
            options.out / "why-positions.png", optimize=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None))
