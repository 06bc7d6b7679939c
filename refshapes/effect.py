"""What position IDs do to a pruned model: accuracy on the held-out split, PyTorch and ONNX.

    python refshapes/effect.py [--model refshapes-256] [--expressions 1000] [--ratio 0.75]
                               [--pruner NAME] [--out build/effect.json]
                               [--bundles build/effect]

Every expression is put to the checkpoint in PyTorch and to exported graphs in onnxruntime:
without pruning, and pruned with GAP, compact and permuted position IDs, both in one thread: with
more, products are summed in another order, and where two tokens tie another one may win. Scored by
the protocol `frame`. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from gap_export.analysis.evaluation import EagerAnswerer, describe_plan
from gap_export.pipeline.plan import ExportPlan, plan_export
from gap_export.pipeline.request import ExportRequest, make_request
from gap_export.pipeline.run import export
from gap_runtime import Bundle
from gap_runtime.cli.options import ArgumentParser, run_command
from gap_runtime.display import Display, Pace
from gap_runtime.evaluation.answer import BundleAnswerer, describe_bundle
from gap_runtime.evaluation.compare import compare_rows
from gap_runtime.evaluation.data import Data, open_data
from gap_runtime.evaluation.protocol import DEFAULT_PROTOCOL, load_protocol
from gap_runtime.evaluation.results import Answers, Header, Subject
from gap_runtime.evaluation.run import Open, describe_data, evaluate
from gap_runtime.evaluation.score import score_rows
from gap_runtime.machines.environment import THREADS
from gap_runtime.report.page import require_writable

MODES: Final = ("unpruned", "gap", "compact", "permuted")
BACKEND: Final = "onnxruntime:cpu"


def ask(name: str, data: Data, subject: Subject, request: ExportRequest, who: Open) -> Answers:
    """All answers of one side in one mode; those that a stopped run left are there already."""
    assert request.out is not None
    path = request.out.parent / "answers" / f"{name.replace(', ', '-')}.jsonl"
    path.parent.mkdir(exist_ok=True)
    header = Header(
        subject=subject,
        data=describe_data(data),
        box=Bundle.open(request.out).manifest.box,
    )
    with Display().progress(name) as show:
        return evaluate(
            data,
            header,
            who,
            ratios=request.named.config.prune.ratios,
            path=path,
            resume=True,
            begin=lambda left: Pace(show, left, "expressions"),
        )


def plan_mode(mode: str, options: argparse.Namespace, out: Path) -> ExportPlan:
    """The export of a mode."""
    # Pruners that read the phrase compare it with the model's own embeddings: it has no CLIP.
    return plan_export(
        make_request(
            options.model,
            ratios=0.0 if mode == "unpruned" else options.ratio,
            pruner=options.pruner,
            positions="gap" if mode == "unpruned" else mode,
            settings={"prune.phrase": "embeddings"},
            out=out,
            reference=False,
        )
    )


def main(arguments: Sequence[str]) -> int:
    """Command line."""
    parser = ArgumentParser(description="accuracy by position mode, PyTorch and ONNX")
    parser.add_argument("--model", choices=("refshapes-256", "refshapes"), default="refshapes-256")
    parser.add_argument("--expressions", type=int, default=1000)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--pruner", help="by default the model's own")
    parser.add_argument("--out", type=Path, default=Path("build/effect.json"))
    parser.add_argument("--bundles", type=Path, default=Path("build/effect"))
    options = parser.parse_args(arguments)
    os.environ[THREADS] = "1"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    require_writable(options.out)
    folder = options.bundles / options.out.stem
    data = open_data(f"{options.model}:test", limit=options.expressions)
    protocol = load_protocol(DEFAULT_PROTOCOL)
    accuracy: dict[str, dict[str, float]] = {"pytorch": {}, "onnxruntime": {}}
    differing: dict[str, int] = {}
    # What is wrong with one of them is said before the work on those in front of it.
    plans = {mode: plan_mode(mode, options, folder / mode) for mode in MODES}
    for mode, plan in plans.items():
        request = plan.request
        export(plan)
        eager = ask(
            f"PyTorch, {mode}",
            data,
            describe_plan(plan),
            request,
            partial(EagerAnswerer, plan, threads=1),
        )
        exported = ask(
            f"onnxruntime, {mode}",
            data,
            describe_bundle(Bundle.open(plan.out), BACKEND),
            request,
            partial(BundleAnswerer, plan.out, BACKEND),
        )
        for side, answers in (("pytorch", eager), ("onnxruntime", exported)):
            (score,) = score_rows(answers.rows, DEFAULT_PROTOCOL, protocol, plan.spec.box)
            accuracy[side][mode] = score.accuracy
        (compared,) = compare_rows(eager, exported, "onnxruntime", DEFAULT_PROTOCOL, protocol)
        differing[mode] = compared.differing
    result = {
        "n": len(data.expressions),
        "model": options.model,
        "ratio": options.ratio,
        "pruner": plan.config.prune.strategy,
        **accuracy,
        "differing_answers": differing,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"| Acc@0.5, {len(data.expressions)} expressions | " + " | ".join(MODES) + " |")
    print("|---|" + "---|" * len(MODES))
    for side, label in (("pytorch", "PyTorch"), ("onnxruntime", "exported ONNX")):
        row = " | ".join(f"{accuracy[side][mode]:.1%}" for mode in MODES)
        print(f"| {label} | {row} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None))
