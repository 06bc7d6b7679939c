"""`gap-export clean`: what exports that were killed have left, and its removal."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

from gap_runtime.cli.options import print_json, print_line
from gap_runtime.errors import InputError
from gap_runtime.records.files import resolve

if TYPE_CHECKING:
    from gap_export.pipeline.remains import Remains


class RemainsFacts(TypedDict):
    """A folder that an export left, with what was to become of it: `bundle`.

    `host` is the machine that made it; `is_ours`: this one, which may remove it. `is_whole`: it is
    a bundle that gave way to another one, else an export that was stopped. `size` is in bytes.
    """

    folder: str
    bundle: str
    host: str
    is_ours: bool
    is_whole: bool
    size: int


SUMMARY: Final = "say what killed exports have left in a folder, and remove it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        default=[Path()],
        metavar="DIR",
        help="folders that bundles were exported to (default: this one)",
    )
    parser.add_argument("--remove", action="store_true", help="remove it, not only say it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    return {"--json": list[RemainsFacts]}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_export.pipeline.remains import find_remains, lock  # noqa: PLC0415
    from gap_runtime.display import Display  # noqa: PLC0415

    for folder in options.folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    found: list[Remains] = []
    with ExitStack() as doors:
        for folder in dict.fromkeys(resolve(folder) for folder in options.folders):
            try:
                # As an export does, so that none begins while what it leaves is judged.
                lock(folder, doors, wait=True)
                found += find_remains(folder)
            except OSError as error:
                raise InputError(
                    f"{folder}: cannot be read ({error.strerror or error})"
                ) from error
        _say(found, as_json=options.json)
        if options.remove:
            _remove([left for left in found if left.is_ours])
    display = Display()
    if not found:
        display.say("nothing is left of killed exports")
    elif not all(left.is_ours for left in found):
        display.say("what another machine left is removed there, or by hand")
    if not options.remove and any(left.is_ours for left in found):
        display.say("gap-export clean --remove removes it; so does the next export beside it")
    return 0


def _say(found: list[Remains], *, as_json: bool) -> None:
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    if as_json:
        print_json([_describe(each) for each in found])
        return
    for left in found:
        what = "a bundle that gave way" if left.is_whole else "an export that was stopped"
        where = "" if left.is_ours else f" on {left.host}"
        size = format_bytes(left.measure())
        print_line(f"{left.folder}  {size}, {what}{where}: {left.bundle.name}")


def _describe(left: Remains) -> RemainsFacts:
    return {
        "folder": str(left.folder),
        "bundle": str(left.bundle),
        "host": left.host,
        "is_ours": left.is_ours,
        "is_whole": left.is_whole,
        "size": left.measure(),
    }


def _remove(found: list[Remains]) -> None:
    """Remove all that can be.

    Raises:
        InputError: Something could not; with the first of it.
    """
    from gap_export.pipeline.remains import clear  # noqa: PLC0415

    failed: list[tuple[Path, OSError]] = []
    for left in found:
        try:
            clear(left)
        except OSError as error:
            failed.append((left.folder, error))
    if failed:
        folder, first = failed[0]
        raise InputError(f"{folder}: cannot be removed ({first.strerror or first})") from first
