"""`gap-runtime ground`: say where a phrase is in a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gap_runtime.cli.options import (
    add_backend,
    add_bundle,
    add_count,
    add_draft,
    open_bundle,
    print_json,
)
from gap_runtime.errors import InputError

if TYPE_CHECKING:
    from gap_runtime.bundle.bundle import Bundle

SUMMARY: Final = "say where a phrase is in a picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument(
        "phrase", nargs="+", metavar="PHRASE", help="what to look for: 'the red mug'"
    )
    add_count(parser)
    parser.add_argument("--draw", metavar="OUT.png", type=Path, help="paint the result")
    add_backend(parser)
    add_draft(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries only when a command runs
    from gap_runtime.grounding.grounder import Grounder  # noqa: PLC0415
    from gap_runtime.pictures.load import load_picture  # noqa: PLC0415

    phrase = " ".join(options.phrase)
    if len(options.phrase) > 1:
        raise InputError(f"the phrase came as several words; quote the phrase: '{phrase}'")
    picture = load_picture(options.image)
    bundle = open_bundle(options)
    if options.draw is not None:
        _require_drawable(options.draw, Path(options.image))
    grounder = Grounder(
        bundle, options.backend, ratio=options.ratio, keep=options.keep, draft=options.draft
    )
    grounding = grounder.ground(picture, phrase)
    if options.draw is not None:
        _draw(options.draw, picture, bundle, grounding)
    if options.json:
        print_json(
            {
                "answer": grounding.answer,
                "boxes": [list(box) for box in grounding.boxes],
                "problems": list(grounding.problems),
                "phrase": grounding.phrase,
                "ratio": grounding.ratio,
                "kept": grounding.kept,
                "patches": grounding.patches,
                "kept_index": list(grounding.kept_index),
                "milliseconds": grounding.milliseconds,
                "calls": grounding.calls,
                "drafted": grounding.drafted,
                "accepted": grounding.accepted,
            }
        )
        return 0
    for box in grounding.boxes:
        print(" ".join(f"{value:.1f}" for value in box))
    display = Display()
    for problem in grounding.problems:
        display.say(f"no usable box: {problem} (answer: {grounding.answer!r})")
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in grounding.milliseconds.items())
    display.say(f"{grounding.answer}  kept {grounding.kept} of {grounding.patches}; {times}")
    return 0


def _require_drawable(path: Path, image: Path) -> None:
    """Refuse a drawing of another kind, and one over the picture itself."""
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise InputError(f"{path}: --draw writes .png or .jpg files")
    if path.exists() and path.samefile(image):
        raise InputError(f"{path}: is the picture itself; give --draw another file")


def _draw(path: Path, picture: Any, bundle: Bundle, grounding: Any) -> None:
    from gap_runtime.pictures.drawing import draw_grounding  # noqa: PLC0415

    painted = draw_grounding(
        picture,
        bundle.manifest.preprocess,
        bundle.manifest.buckets,
        phrase=grounding.phrase,
        boxes=grounding.boxes,
        kept_index=grounding.kept_index,
    )
    try:
        painted.save(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
