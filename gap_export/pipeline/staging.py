"""Where a bundle is put: written into a hidden folder aside, shown by one rename when whole."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_export.errors import ExportError
from gap_export.pipeline.remains import clear, find_remains, find_writer, lock
from gap_runtime.bundle.files import name_aside, store
from gap_runtime.bundle.manifest import MANIFEST_FILE
from gap_runtime.errors import ConfigError
from gap_runtime.records.files import exists, resolve
from gap_runtime.records.plain import read_json

_HERE: Final = -100
_RENAME_EXCHANGE: Final = 2
"""Linux's numbers: paths from the working folder, and both names at once."""


def require_replaceable(out: Path) -> str | None:
    """Refuse to write over anything but an empty folder or a bundle and nothing else.

    Returns:
        What the bundle is that will be replaced, for people; None where there is none.

    Raises:
        ConfigError: There is something else.
    """
    if resolve(out) == Path.cwd():
        raise ConfigError(f"{out}: is the folder that you are in; give --out a folder in it")
    if out.is_symlink() and not exists(out):
        raise ConfigError(f"{out}: is a link that leads nowhere; remove it or give another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise ConfigError(f"{out}: exists and is no bundle; choose another --out")
    try:
        # Read loosely: a bundle of another schema may be replaced too.
        data = read_json(out / MANIFEST_FILE, ConfigError)
        known = {MANIFEST_FILE, *data["files"]}
    except (ConfigError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{out}: its {MANIFEST_FILE} cannot be read; remove it or choose another --out"
        ) from error
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and name not in known:
            raise ConfigError(
                f"{out}: holds '{name}', which is no part of the bundle and would be lost; "
                "move it away or choose another --out"
            )
    return _describe(data)


def _describe(manifest: dict[str, Any]) -> str:
    """A manifest of any schema in a few words, as far as it has them."""
    try:
        pruning = manifest["pruning"]
        ratios = dict.fromkeys(f"{entry['ratio']:g}" for entry in manifest["ratios"])
        return (
            f"{manifest['source']['checkpoint']}, {pruning['strategy']}, {pruning['positions']}, "
            f"ratios {', '.join(ratios)}, {manifest['dtype']} for target "
            f"{manifest['target']['name']}"
        )
    except (LookupError, TypeError, ValueError):
        return "a bundle of another version"


@contextlib.contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """A hidden folder beside the bundle, removed whatever happens.

    What killed exports have left there is removed, whatever their bundle was to be.

    Raises:
        ConfigError: It cannot be made, or another export writes the same bundle.
    """
    with contextlib.ExitStack() as locks:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            # Held only meanwhile, so that of two exports one is the first.
            with contextlib.ExitStack() as door:
                lock(out.parent, door, wait=True)
                _require_alone(out)
                _sweep(out.parent)
                folder = out.parent / name_aside(out.name, "partial")
                folder.mkdir()
                try:
                    if lock(folder, locks) == "elsewhere":
                        raise ConfigError(
                            f"{folder}: another process took hold of it; export once more"
                        )
                finally:
                    # Before the lock is let go, or where there is none.
                    locks.callback(_remove, folder)
        except OSError as error:
            raise ConfigError(
                f"{out.parent}: cannot be written ({error.strerror or error})"
            ) from error
        try:
            yield folder
        except OSError as error:
            raise ExportError(
                f"{out}: {error.strerror or error}; the export was undone"
            ) from error


def _sweep(home: Path) -> None:
    """Remove what killed exports of this machine have left, as far as the system lets it."""
    for left in find_remains(home):
        if left.is_ours:
            with contextlib.suppress(OSError):
                clear(left)


def _remove(folder: Path) -> None:
    """Remove what is in the hidden folder's place, as far as the system lets it."""
    # Twice, as a call may fail that would not fail again.
    for _ in range(2):
        with contextlib.suppress(OSError):
            if folder.is_symlink():
                # The bundle's place was one, to a bundle elsewhere, which stays as it is.
                folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return


def _require_alone(out: Path) -> None:
    """Refuse to export where another export is at work, by the lock that it holds."""
    process = find_writer(out)
    if process is not None:
        raise ConfigError(
            f"{out}: another export is writing it (process {process}); wait for its end, or give "
            "another --out"
        )


def move_into_place(folder: Path, out: Path) -> None:
    """Make the folder the bundle, when all of it is on the disk; an older one gives way only now.

    The two are exchanged in one step, so that at every moment there is a whole bundle, of which
    the older one is left in the folder. Where the system cannot, two renames follow each other.

    Raises:
        ConfigError: Something appeared in the place meanwhile that would be lost.
        OSError: It cannot be done; the older bundle is in its place.
    """
    for path in sorted(folder.rglob("*")):
        store(path)
    store(folder)
    # Minutes may have gone by since it was asked first.
    require_replaceable(out)
    if not out.exists():
        folder.rename(out)
    elif not _exchange(folder, out):
        _replace(folder, out)
    # The bundle is there; whether its name is on the disk is not worth undoing it.
    with contextlib.suppress(OSError):
        store(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's names in one step; False where the system has no such step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (_HERE, os.fsencode(one), _HERE, os.fsencode(other))
    return bool(rename(*names, _RENAME_EXCHANGE) == 0)


def _replace(folder: Path, out: Path) -> None:
    """Two renames, the first undone where the second fails."""
    old = out.parent / name_aside(out.name, "replaced")
    out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        old.rename(out)
        raise
    _remove(old)
