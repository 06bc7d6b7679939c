"""Every pruner at every ratio in three position modes: accuracy of the exported graphs.

    python refshapes/pruners.py [--expressions 500] [--out build/pruners.json]

The exported graphs answer expressions of the held-out test split on onnxruntime. An answer counts
when it holds exactly one usable box whose IoU with the true one is at least 0.5. Results are
written after each bundle; a second run goes on where the first one stopped. Pruners that read the
phrase compare it with patches by the language model's embeddings: this model has no CLIP.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Final

from effect import ask_all, is_hit
from rich.progress import Progress

from gap_export.config import load_config
from gap_export.pipeline import export
from gap_export.plan import ExportRequest, plan_export
from gap_runtime import Bundle, Grounder
from gap_runtime.display import Display
from gap_runtime.registry import list_plugins

RATIOS: Final = (0.25, 0.5, 0.75, 0.9)
MODES: Final = ("gap", "compact", "permuted")


def measure(
    strategy: str, mode: str, ratios: tuple[float, ...], expressions: int, progress: Progress
) -> dict[str, float]:
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
    grounder = Grounder(Bundle.open(folder), "onnxruntime:cpu")
    hits = dict.fromkeys(ratios, 0)
    asked = ask_all(expressions)
    for scene, question in progress.track(asked, description=f"{strategy}, {mode}"):
        for ratio in ratios:
            answer = grounder.ground(scene.image, question.phrase, ratio=ratio).answer
            hits[ratio] += is_hit(answer, scene, question, plan.spec)
    shutil.rmtree(folder)
    return {f"{ratio:g}": hits[ratio] / len(asked) for ratio in ratios}


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
    with Progress() as progress:
        for strategy, mode, ratios in cells:
            key = f"{strategy} {mode}"
            if key in results:
                continue
            name = "spatial" if strategy == "unpruned" else strategy
            results[key] = measure(name, mode, ratios, options.expressions, progress)
            options.out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    unpruned = results["unpruned gap"]["0"]
    print(f"Acc@0.5 in % on {options.expressions} expressions, GAP / compact / permuted; ", end="")
    print(f"unpruned {100 * unpruned:.1f}\n")
    print_table(results, strategies)


if __name__ == "__main__":
    main()
