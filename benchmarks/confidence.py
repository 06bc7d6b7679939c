"""How well scores tell phrases that are in a picture from phrases that are not.

    python -m benchmarks.confidence BUNDLE [--scenes 300] [--ratio 0.5] [--precision 0.9]
                                    [--out FILE]

On refshapes' held-out pictures: every phrase of a picture, and as many of a colour that is not in
it. Printed are the area under the ROC curve, and the least score that keeps a precision.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.command import read_number, run_benchmark
from gap_runtime import Bundle, Grounder
from gap_runtime.bundle.files import require_apart
from gap_runtime.cli.options import ArgumentParser, read_share
from gap_runtime.evaluation.refshapes import COLOURS, SHAPES, Scene, draw_scene
from gap_runtime.pictures.boxes import Box, iou
from gap_runtime.report.page import require_writable

_RIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class Separation:
    """Of `present` and `absent` phrases at a ratio.

    `auc` is the share of pairs in which the present one has the higher score; `auc_right` the
    same with only those present ones whose box is right. At `threshold`, `precision` of the
    answers that stay are about phrases that are there, and `recall` of the phrases that are there
    keep their answer.
    """

    ratio: float
    present: int
    absent: int
    auc: float
    auc_right: float
    threshold: float
    precision: float
    recall: float


def absent_phrases(scene: Scene, count: int, rng: np.random.Generator) -> list[str]:
    """Phrases of the same form about colours that no object of a scene has."""
    colours = sorted(set(COLOURS) - {shape.colour for shape in scene.shapes})
    pairs = zip(rng.choice(colours, count), rng.choice(SHAPES, count), strict=True)
    return [f"the {colour} {shape}" for colour, shape in pairs]


def area(high: np.ndarray, low: np.ndarray) -> float:
    """Share of pairs whose first value is the higher one; ties count half."""
    differences = high[:, None] - low[None, :]
    return float((differences > 0).mean() + 0.5 * (differences == 0).mean())


def choose_threshold(
    high: np.ndarray, low: np.ndarray, wanted: float
) -> tuple[float, float, float]:
    """The least threshold with a precision, that precision, and the recall."""
    for threshold in np.unique(np.concatenate([high, low])):
        kept, wrong = int((high >= threshold).sum()), int((low >= threshold).sum())
        if kept and kept / (kept + wrong) >= wanted:
            return float(threshold), kept / (kept + wrong), kept / len(high)
    return 1.0, float("nan"), 0.0


def separate(grounder: Grounder, scenes: int, ratio: float, precision: float) -> Separation:
    """Ask and count."""
    rng = np.random.default_rng(0)
    present: list[float] = []
    right: list[float] = []
    absent: list[float] = []
    for index in range(scenes):
        scene = draw_scene("test", index)
        view = grounder.look(scene.image)
        for question in scene.questions:
            found = view.ground(question.phrase, ratio=ratio)
            present.append(found.score)
            if found.boxes and iou(found.boxes[0], Box(*map(float, question.box))) >= _RIGHT:
                right.append(found.score)
        others = absent_phrases(scene, len(scene.questions), rng)
        absent += [view.ground(phrase, ratio=ratio).score for phrase in others]
    high, low = np.array(present), np.array(absent)
    threshold, reached, recall = choose_threshold(high, low, precision)
    return Separation(
        ratio=ratio,
        present=len(high),
        absent=len(low),
        auc=area(high, low),
        auc_right=area(np.array(right), low),
        threshold=threshold,
        precision=reached,
        recall=recall,
    )


def main() -> None:
    """Measure, print, and write where that is wanted."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--scenes", type=read_number, default=300)
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--precision", type=read_share, default=0.9)
    parser.add_argument("--out", type=Path, help="a file for the figures")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    if options.out is not None:
        require_writable(options.out)
        require_apart(options.out, [bundle.folder], "--out")
    with Grounder(bundle) as grounder:
        found = [
            asdict(separate(grounder, options.scenes, ratio, options.precision))
            for ratio in bundle.choose_ratios(options.ratio)
        ]
    said = json.dumps(found, indent=2)
    print(said)
    if options.out is not None:
        options.out.write_text(said + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_benchmark(main)
