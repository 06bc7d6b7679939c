"""What position IDs do to a pruned model: accuracy on the held-out split, PyTorch and ONNX.

    python refshapes/effect.py [--expressions 1000] [--ratio 0.5] [--pruner cls_attention]
                               [--out build/effect.json]

Every expression is put to the checkpoint in PyTorch and to exported graphs in onnxruntime:
without pruning, and pruned with GAP, compact and permuted position IDs. An answer counts when it
holds exactly one usable box whose IoU with the true one is at least 0.5.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import torch
from rich.progress import track

from gap_export.config import NamedConfig, load_config
from gap_export.pipeline import export
from gap_export.plan import ExportPlan, ExportRequest, plan_export
from gap_export.reference import answer_eagerly, ask
from gap_runtime import Bundle, Grounder
from gap_runtime.boxes import Box, iou, parse_boxes
from gap_runtime.display import Display
from gap_runtime.refshapes import Question, Scene, draw_scene

MODES: Final = ("unpruned", "gap", "compact", "permuted")


def ask_all(expressions: int) -> list[tuple[Scene, Question]]:
    """The first expressions of the test split, scene by scene."""
    asked: list[tuple[Scene, Question]] = []
    index = 0
    while len(asked) < expressions:
        scene = draw_scene("test", index)
        asked += [(scene, question) for question in scene.questions]
        index += 1
    return asked[:expressions]


def is_hit(answer: str, scene: Scene, question: Question, spec: Any) -> bool:
    """Whether the answer's one box meets the true one."""
    boxes = parse_boxes(answer, spec.box, *scene.image.size).boxes
    x0, y0, x1, y1 = question.box
    return len(boxes) == 1 and iou(boxes[0], Box(x0=x0, y0=y0, x1=x1, y1=y1)) >= 0.5


def export_mode(named: NamedConfig, mode: str, ratio: float, folder: Path) -> ExportPlan:
    """Export one mode's bundle; `unpruned` is ratio 0."""
    prune = dataclasses.replace(
        named.config.prune,
        ratios=(0.0,) if mode == "unpruned" else (ratio,),
        positions="gap" if mode == "unpruned" else mode,
    )
    request = ExportRequest(
        named=dataclasses.replace(named, config=dataclasses.replace(named.config, prune=prune)),
        target="cpu",
        out=folder / mode,
        weights="clone",
        reference=False,
    )
    plan = plan_export(request)
    export(plan, Display(quiet=True))
    return plan


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="accuracy by position mode, PyTorch and ONNX")
    parser.add_argument("--expressions", type=int, default=1000)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--pruner", default="cls_attention")
    parser.add_argument("--out", type=Path, default=Path("build/effect.json"))
    options = parser.parse_args()
    # One short sequence at a time gains nothing from more threads.
    torch.set_num_threads(1)
    # Pruners that read the phrase compare it with the model's own embeddings: it has no CLIP.
    named = load_config(
        "refshapes", {"prune.strategy": options.pruner, "prune.phrase": "embeddings"}
    )
    folder = options.out.parent / "effect"
    plans = {mode: export_mode(named, mode, options.ratio, folder) for mode in MODES}
    grounders = {mode: Grounder(Bundle.open(folder / mode), "onnxruntime:cpu") for mode in MODES}
    first = plans["unpruned"]
    model = first.family.load_eager(first.checkpoint, first.spec, "float32")
    asked = ask_all(options.expressions)
    hits = {side: dict.fromkeys(MODES, 0) for side in ("pytorch", "onnxruntime")}
    differing = dict.fromkeys(MODES, 0)
    for scene, question in track(asked, description="asking"):
        put = ask(
            model,
            scene.image,
            question.phrase,
            bucket=first.spec.buckets[0],
            template=first.prompt.template,
            reads=first.phrase,
        )
        for mode, plan in plans.items():
            eager = answer_eagerly(
                model,
                put,
                entry=None if mode == "unpruned" else plan.entries[0],
                pruner=plan.pruner,
                config=plan.request.named.config.prune,
                most=plan.layout.answer,
                stop_ids=plan.prompt.stop_ids,
            )
            exported = grounders[mode].ground(scene.image, question.phrase)
            hits["pytorch"][mode] += is_hit(eager.text, scene, question, plan.spec)
            hits["onnxruntime"][mode] += is_hit(exported.answer, scene, question, plan.spec)
            differing[mode] += eager.text != exported.answer
    result = {
        "n": len(asked),
        "ratio": options.ratio,
        "pruner": options.pruner,
        **{side: {mode: hits[side][mode] / len(asked) for mode in MODES} for side in hits},
        "differing_answers": differing,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"| Acc@0.5, {len(asked)} expressions | " + " | ".join(MODES) + " |")
    print("|---|" + "---|" * len(MODES))
    for side, label in (("pytorch", "PyTorch"), ("onnxruntime", "exported ONNX")):
        row = " | ".join(f"{result[side][mode]:.1%}" for mode in MODES)
        print(f"| {label} | {row} |")


if __name__ == "__main__":
    main()
