"""What a draft of the last answer saves where pictures are frames of a video.

    python -m benchmarks.follow BUNDLE [--backends onnxruntime openvino] [--pixels 0 1 4 12]
                                [--scenes 20] [--threads 1]

Held-out scenes of refshapes-256 move to the right by so many of their 224 pixels a frame, and down
by half of them, for twelve frames. Two phrases of each are asked with the drafts that every answer
gets and with the last answer's, by turns. The first scenes, in which OpenVINO compiles, and first
frames, which follow another scene, are not counted.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from PIL import Image

from benchmarks.command import read_count, read_number, read_threads, run_benchmark
from benchmarks.suite import format_table
from gap_runtime import Bundle, Grounder
from gap_runtime.cli.options import ArgumentParser
from gap_runtime.evaluation.refshapes256 import draw_scene

_FRAMES: Final = 12
_PHRASES: Final = 2
_FIRST_SCENES: Final = 8


@dataclass(slots=True)
class Answers:
    """Of one way to draft: tokens of all; calls and milliseconds of decoding that count."""

    tokens: list[tuple[int, ...]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


def move(picture: Image.Image, pixels: int, frame: int) -> Image.Image:
    """A frame of the picture on its way to the right and down."""
    moved = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    moved.paste(picture, (frame * pixels, frame * pixels // 2))
    return moved


def watch(bundle: Bundle, backend: str, pixels: int, scenes: int) -> tuple[Answers, Answers]:
    """Answers with the drafts that every one gets, and with the last answer's too."""
    plain, followed = Answers(), Answers()
    with (
        Grounder(bundle, backend, keep_pictures=0) as one,
        Grounder(bundle, backend, keep_pictures=0, follow=True) as other,
    ):
        for number in range(_FIRST_SCENES + scenes):
            scene = draw_scene("test", number)
            for frame in range(_FRAMES):
                picture = move(scene.image, pixels, frame)
                for question in scene.questions[:_PHRASES]:
                    for grounder, answers in ((one, plain), (other, followed)):
                        found = grounder.ground(picture, question.phrase)
                        answers.tokens.append(found.token_ids)
                        if frame and number >= _FIRST_SCENES:
                            answers.calls.append(found.calls)
                            answers.milliseconds.append(found.milliseconds["decode"])
    return plain, followed


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="drafts of the last answer, in a video")
    parser.add_argument("bundle", type=Path, help="of the embedded model refshapes-256")
    parser.add_argument("--backends", nargs="+", default=["onnxruntime"])
    parser.add_argument("--pixels", type=read_count, nargs="+", default=[0, 1, 4, 12])
    parser.add_argument("--scenes", type=read_number, default=20)
    parser.add_argument("--threads", type=read_threads, default=1)
    options = parser.parse_args()
    os.environ["GAP_RUNTIME_THREADS"] = str(options.threads)
    bundle = Bundle.open(options.bundle)
    rows = [["backend", "pixels a frame", "calls", "decode", "answers that differ"]]
    for backend in options.backends:
        for pixels in options.pixels:
            plain, followed = watch(bundle, backend, pixels, options.scenes)
            calls = [statistics.mean(each.calls) for each in (plain, followed)]
            times = [statistics.mean(each.milliseconds) for each in (plain, followed)]
            pairs = zip(plain.tokens, followed.tokens, strict=True)
            differ = sum(before != now for before, now in pairs)
            rows.append(
                [
                    backend,
                    str(pixels),
                    f"{calls[1]:.1f} of {calls[0]:.1f}",
                    f"{times[1] / times[0]:.2f}",
                    f"{differ} of {len(plain.tokens)}",
                ]
            )
    print(format_table(rows))
    print(f"\n- load average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    run_benchmark(main)
