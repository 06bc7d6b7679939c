"""Every pruner at every ratio in three position modes: accuracy of the exported graphs.

    python refshapes/pruners.py [--expressions 500] [--out build/pruners.json]

The exported graphs answer expressions of the held-out test split on onnxruntime, scored by the
protocol `ours`. Results are
written after each bundle; a second run goes on where the first one stopped. Pruners that read the
phrase compare it with patches by the language model's embeddings: this model has no CLIP.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Final

from gap_export.config import load_config
from gap_export.pipeline.plan import ExportRequest, plan_export
from gap_export.pipeline.run import export
from gap_runtime import Bundle
from gap_runtime.display import Display, Pace
from gap_runtime.evaluation.answer import BundleAnswerer, describe_bundle
from gap_runtime.evaluation.data import Data, open_data
from gap_runtime.evaluation.protocol import DEFAULT_PROTOCOL, load_protocol
from gap_runtime.evaluation.results import Header
from gap_runtime.evaluation.run import describe_data, evaluate
from gap_runtime.evaluation.score import score_rows
from gap_runtime.registry import list_plugins

RATIOS: Final = (0.25, 0.5, 0.75, 0.9)
MODES: Final = ("gap", "compact", "permuted")


BACKEND: Final = "onnxruntime:cpu"


def measure(strategy: str, mode: str, ratios: tuple[float, ...], data: Data) -> dict[str, float]:
    """Accuracy by ratio of one pruner in one mode."""
    named = load_config(
        "refshapes",
        {
            "prune.strategy": strategy,
            "prune.positions": mode,
            "prune.ratios": list(ratios),
            "prune.phrase": "embeddings",
        },
    )
    folder = Path("build/pruners") / f"{strategy}-{mode}"
    plan = plan_export(
        ExportRequest(named=named, target="cpu", out=folder, weights="link", reference=False)
    )
    export(plan, Display(quiet=True))
    header = Header(
        subject=describe_bundle(Bundle.open(folder), BACKEND),
        data=describe_data(data),
        box=plan.spec.box,
    )
    with Display().progress(f"{strategy}, {mode}") as show:
        answers = evaluate(
            data,
            header,
            partial(BundleAnswerer, folder, BACKEND),
            ratios=ratios,
            begin=lambda left: Pace(show, left, "answers"),
        )
    shutil.rmtree(folder)
    scores = score_rows(
        answers.rows, DEFAULT_PROTOCOL, load_protocol(DEFAULT_PROTOCOL), plan.spec.box
    )
    return {f"{score.ratio:g}": score.accuracy for score in scores}


def print_table(results: dict[str, dict[str, float]], strategies: list[str]) -> None:
    """The results as Markdown: a row for each pruner, GAP / compact / permuted by ratio."""
    print("| pruner | " + " | ".join(f"{ratio:g} removed" for ratio in RATIOS) + " |")
    print("|---|" + "---|" * len(RATIOS))
    for strategy in strategies:
        cells = [
            " / ".join(f"{100 * results[f'{strategy} {m}'][f'{ratio:g}']:.1f}" for m in MODES)
            for ratio in RATIOS
        ]
        print(f"| `{strategy}` | " + " | ".join(cells) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="accuracy by pruner, ratio and position mode")
    parser.add_argument("--expressions", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("build/pruners.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if data.get("expressions") != options.expressions:
        data = {"expressions": options.expressions, "accuracy": {}}
    results: dict[str, dict[str, float]] = data["accuracy"]
    strategies = list_plugins("gap_export.pruners")
    cells = [("unpruned", "gap", (0.0,))] + [(s, m, RATIOS) for s in strategies for m in MODES]
    asked = open_data("refshapes:test", limit=options.expressions)
    for strategy, mode, ratios in cells:
        key = f"{strategy} {mode}"
        if key in results:
            continue
        name = "spatial" if strategy == "unpruned" else strategy
        results[key] = measure(name, mode, ratios, asked)
        options.out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    unpruned = results["unpruned gap"]["0"]
    print(f"Acc@0.5 in % on {options.expressions} expressions, GAP / compact / permuted; ", end="")
    print(f"unpruned {100 * unpruned:.1f}\n")
    print_table(results, strategies)


if __name__ == "__main__":
    main()
