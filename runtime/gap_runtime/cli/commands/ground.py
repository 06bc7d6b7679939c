"""`gap-runtime ground`: say where phrases are in a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gap_runtime.cli.options import (
    add_backend,
    add_bundle,
    add_count,
    add_draft,
    add_kept_pictures,
    open_bundle,
    print_json,
)
from gap_runtime.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.display import Display
    from gap_runtime.grounding.view import Grounding

SUMMARY: Final = "say where phrases are in a picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument(
        "phrases",
        nargs="+",
        metavar="PHRASE",
        help="what to look for, each in quotes: 'the red mug' 'the spoon'",
    )
    add_count(parser)
    parser.add_argument("--draw", metavar="OUT.png", type=Path, help="paint the result")
    add_backend(parser)
    add_draft(parser)
    add_kept_pictures(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries only when a command runs
    from gap_runtime.grounding.grounder import Grounder  # noqa: PLC0415
    from gap_runtime.pictures.load import load_picture  # noqa: PLC0415

    picture = load_picture(options.image)
    bundle = open_bundle(options)
    if options.draw is not None:
        _require_drawable(options.draw, Path(options.image))
    grounder = Grounder(
        bundle,
        options.backend,
        ratio=options.ratio,
        keep=options.keep,
        draft=options.draft,
        keep_pictures=options.keep_pictures,
    )
    view = grounder.look(picture)
    found = [view.ground(phrase) for phrase in options.phrases]
    if options.draw is not None:
        _draw(options.draw, picture, bundle, found)
    if options.json:
        dumped = [_dump(grounding) for grounding in found]
        print_json(dumped[0] if len(dumped) == 1 else dumped)
        return 0
    display = Display()
    for grounding in found:
        _show(display, grounding, named=len(found) > 1)
    return 0


def _dump(grounding: Grounding) -> dict[str, Any]:
    """A grounding as plain data."""
    return {
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


def _show(display: Display, grounding: Grounding, *, named: bool) -> None:
    """A line for every box, which begins with the phrase where there are several."""
    start = f"{grounding.phrase}: " if named else ""
    for box in grounding.boxes:
        print(start + " ".join(f"{value:.1f}" for value in box))
    for problem in grounding.problems:
        display.say(f"{start}no usable box: {problem} (answer: {grounding.answer!r})")
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in grounding.milliseconds.items())
    display.say(
        f"{start}{grounding.answer}  kept {grounding.kept} of {grounding.patches}; {times}"
    )


def _require_drawable(path: Path, image: Path) -> None:
    """Refuse a drawing of another kind, and one over the picture itself."""
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise InputError(f"{path}: --draw writes .png or .jpg files")
    if path.exists() and path.samefile(image):
        raise InputError(f"{path}: is the picture itself; give --draw another file")


def _draw(path: Path, picture: Image.Image, bundle: Bundle, found: list[Grounding]) -> None:
    from gap_runtime.pictures.drawing import draw_groundings  # noqa: PLC0415

    kept = {grounding.kept_index for grounding in found}
    if len(kept) > 1:
        raise InputError(
            f"{path}: each phrase kept other patches, which one drawing cannot show; ask for one "
            "phrase at a time"
        )
    painted = draw_groundings(
        picture,
        bundle.manifest.preprocess,
        bundle.manifest.buckets,
        [(grounding.phrase, grounding.boxes) for grounding in found],
        kept_index=kept.pop(),
    )
    try:
        painted.save(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
