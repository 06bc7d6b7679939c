"""`gap-runtime ground`: say where phrases are in pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

from gap_runtime.cli.options import (
    ErrorReport,
    add_backend,
    add_bundle,
    add_count,
    add_draft,
    add_kept_pictures,
    add_least_score,
    describe_error,
    open_bundle,
    print_json,
)
from gap_runtime.cli.requests import STDIN, PictureRequest, find_pictures, read_requests
from gap_runtime.errors import ConfigError, InputError, NoBoxError, show_line
from gap_runtime.records.files import resolve

if TYPE_CHECKING:
    from PIL import Image

    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.display import Display
    from gap_runtime.grounding.grounder import Grounder
    from gap_runtime.grounding.view import Grounding


class PictureName(TypedDict, total=False):
    """The picture that was asked, and what stdin's `id` had."""

    image: str
    id: Any


SUMMARY: Final = "say where phrases are in a picture, or in many"
_DRAWN: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Formats of drawings by how their names end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a picture and phrases, each in quotes: photo.png 'the red mug' 'the spoon'. With "
        "--phrase: pictures and folders of them. Or - for JSON lines on stdin, one picture each: "
        '{"image": "photo.png", "phrase": "the red mug"}',
    )
    parser.add_argument(
        "--phrase",
        action="append",
        metavar="TEXT",
        help="what to look for in every picture; give it again for more",
    )
    add_count(parser)
    add_least_score(parser)
    parser.add_argument(
        "--draw",
        metavar="OUT.png",
        type=Path,
        help="paint the result; with several pictures the name of a folder",
    )
    parser.add_argument(
        "--jsonl", action="store_true", help="print a JSON line for every phrase as it is there"
    )
    add_backend(parser)
    add_draft(parser)
    add_kept_pictures(parser)


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.grounding.view import GroundingFacts  # noqa: PLC0415 - numpy at first need

    class PictureGrounding(PictureName, GroundingFacts):
        """What was found for a phrase, as for one picture, and the picture that was asked."""

    class PictureProblem(PictureName):
        """What is wrong with a picture or a line of stdin, which then may have no name."""

        error: ErrorReport

    line = PictureGrounding | PictureProblem
    return {
        "--json, one picture": GroundingFacts | list[GroundingFacts],
        "--json, several pictures": list[line],
        "--jsonl, a line": line,
    }


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    if options.inputs == [STDIN]:
        if options.draw is not None:
            raise ConfigError("--draw: goes with pictures that are named, not with stdin")
        return _ground_all(options, read_requests(sys.stdin.buffer, options.phrase or ()))
    pictures, phrases = _read_inputs(options)
    if len(pictures) == 1:
        return _ground_one(options, pictures[0], phrases)
    if options.draw is not None:
        _require_folder(options.draw, pictures)
    return _ground_all(
        options, [PictureRequest(image=picture, phrases=phrases) for picture in pictures]
    )


def _read_inputs(options: argparse.Namespace) -> tuple[list[str], tuple[str, ...]]:
    """Pictures and phrases."""
    if options.phrase:
        return find_pictures(options.inputs), tuple(options.phrase)
    picture, *phrases = options.inputs
    if not phrases:
        raise ConfigError(
            f"{picture}: which phrase? put it behind the picture in quotes, or give --phrase"
        )
    if len(phrases) > 1 and all(len(phrase.split()) == 1 for phrase in phrases):
        print(
            f"note: {len(phrases)} phrases of one word each; a phrase of several words is put in "
            f"quotes: '{' '.join(phrases)}'",
            file=sys.stderr,
        )
    return find_pictures([picture]), tuple(phrases)


def _ground_one(options: argparse.Namespace, name: str, phrases: Sequence[str]) -> int:
    """One picture: what is wrong with it ends the command."""
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries only when a command runs
    from gap_runtime.pictures.load import load_picture  # noqa: PLC0415

    picture = load_picture(name)
    bundle = open_bundle(options)
    if options.draw is not None:
        _require_drawable(options.draw, Path(name))
    with _open_grounder(options, bundle) as grounder:
        view = grounder.look(picture)
        found = [view.ground(phrase).reject_below(options.least_score) for phrase in phrases]
    if options.draw is not None:
        _draw(options.draw, picture, grounder, found)
    display = Display()
    if options.jsonl:
        for each in found:
            _print_line({"image": name, **each.dump()})
    elif options.json:
        dumped = [each.dump() for each in found]
        print_json(dumped[0] if len(dumped) == 1 else dumped)
    for each in found:
        start = f"{each.phrase}: " if len(found) > 1 else ""
        _show(display, each, start, quiet=options.json or options.jsonl)
    if options.draw is None and not options.json and not options.jsonl:
        _show_picture(grounder.bundle, picture, found)
    return 0 if all(each.boxes for each in found) else NoBoxError.exit_code


def _show_picture(bundle: Bundle, picture: Image.Image, found: list[Grounding]) -> None:
    """The drawing in the terminal itself, where that can show it."""
    from gap_runtime.display import can_show_pictures, show_picture  # noqa: PLC0415

    if can_show_pictures():
        from gap_runtime.grounding.api import draw  # noqa: PLC0415

        show_picture(draw(bundle, picture, found))


def _ground_all(
    options: argparse.Namespace, requests: Iterable[PictureRequest | InputError]
) -> int:
    """Many pictures: what is wrong with one of them is said, and the next one comes.

    The exit code is that of the first picture or line that could not be used, else that of an
    answer without a box, else 0.
    """
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries only when a command runs
    from gap_runtime.pictures.load import load_picture  # noqa: PLC0415

    display = Display()
    in_lines = options.jsonl or options.inputs == [STDIN]
    collected: list[dict[str, Any]] = []
    failed = boxless = 0
    bundle = open_bundle(options)
    _make_folder(options.draw)
    with _open_grounder(options, bundle) as grounder:
        for request in requests:
            named: dict[str, Any] = {}
            try:
                if isinstance(request, InputError):
                    raise request
                named = {"image": request.image}
                named |= {} if request.id is None else {"id": request.id}
                picture = load_picture(request.image)
                view = grounder.look(picture)
                found = [
                    view.ground(phrase, ratio=request.ratio, keep=request.keep).reject_below(
                        options.least_score
                    )
                    for phrase in request.phrases
                ]
                if options.draw is not None:
                    path = options.draw / f"{Path(request.image).stem}.png"
                    _draw(path, picture, grounder, found)
            except ConfigError as error:
                failed = failed or error.exit_code
                print(f"error: {error}", file=sys.stderr)
                lines = [{**named, "error": describe_error(error)}]
            else:
                boxless += sum(not each.boxes for each in found)
                lines = [{**named, **each.dump()} for each in found]
                for each in found:
                    start = f"{request.image}: {each.phrase}: "
                    _show(display, each, start, quiet=in_lines or options.json)
            if in_lines:
                for line in lines:
                    _print_line(line)
            else:
                collected += lines
    if options.json and not in_lines:
        print_json(collected)
    return failed or (NoBoxError.exit_code if boxless else 0)


def _open_grounder(options: argparse.Namespace, bundle: Any) -> Grounder:
    from gap_runtime.grounding.grounder import Grounder  # noqa: PLC0415

    return Grounder(
        bundle,
        options.backend,
        ratio=options.ratio,
        keep=options.keep,
        draft=options.draft,
        keep_pictures=options.keep_pictures,
    )


def _print_line(data: dict[str, Any]) -> None:
    """A result on one line, at once: the reader may be waiting for it."""
    print(json.dumps(data, sort_keys=True), flush=True)


def _show(display: Display, grounding: Grounding, start: str, *, quiet: bool) -> None:
    """A line for every box; on stderr what is no box, and unless quiet the times."""
    start = show_line(start)
    if not quiet:
        for box in grounding.boxes:
            print(start + " ".join(f"{value:.1f}" for value in box))
    if not grounding.boxes:
        said = show_line("; ".join(grounding.problems))
        print(
            f"error: {start}no usable box: {said} (answer: {grounding.answer!r})", file=sys.stderr
        )
    if quiet:
        return
    if grounding.boxes:
        for problem in grounding.problems:
            display.say(f"{start}no usable box: {problem} (answer: {grounding.answer!r})")
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in grounding.milliseconds.items())
    display.say(
        f"{start}{grounding.answer}  score {grounding.score:.2f}, kept {grounding.kept} of "
        f"{grounding.patches}; {times}"
    )


def _require_drawable(path: Path, image: Path) -> None:
    """Refuse a drawing of another kind, and one over the picture itself."""
    from gap_runtime.bundle.files import require_apart  # noqa: PLC0415

    if path.suffix.lower() not in _DRAWN:
        raise InputError(f"{path}: --draw writes .png or .jpg files")
    require_apart(path, [image], "--draw")


def _require_folder(folder: Path, pictures: Sequence[str]) -> None:
    """Refuse a folder of drawings that would write over pictures or other drawings."""
    if folder.suffix.lower() in _DRAWN:
        raise InputError(f"{folder}: there are {len(pictures)} pictures; give --draw a folder")
    stems: dict[str, str] = {}
    for picture in pictures:
        stem = Path(picture).stem
        if stem in stems:
            raise InputError(
                f"{folder}: {stems[stem]} and {picture} would both be drawn to {stem}.png"
            )
        stems[stem] = picture
        if resolve(folder) == resolve(picture).parent:
            raise InputError(f"{folder}: the pictures lie there; give --draw another folder")


def _make_folder(folder: Path | None) -> None:
    """Make the folder of drawings, where one is wanted."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror or error})") from error


def _draw(path: Path, picture: Image.Image, grounder: Grounder, found: list[Grounding]) -> None:
    from gap_runtime.bundle.files import write_whole  # noqa: PLC0415
    from gap_runtime.grounding.api import draw  # noqa: PLC0415

    try:
        painted = draw(grounder.bundle, picture, found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        with write_whole(path) as aside:
            painted.save(aside, format=_DRAWN[path.suffix.lower()])
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
