"""Where a bundle is put: written into a hidden folder aside, shown by one rename when whole."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

from gap_export.errors import ExportError
from gap_runtime.bundle.manifest import MANIFEST_FILE
from gap_runtime.errors import ConfigError

_REMAINS: Final = re.compile(r"\.(partial|replaced)-(\d+)$")


def require_replaceable(out: Path) -> str | None:
    """Refuse to write over anything but an empty folder or a bundle and nothing else.

    Returns:
        What the bundle is that will be replaced, for people; None where there is none.

    Raises:
        ConfigError: There is something else.
    """
    if out.resolve() == Path.cwd():
        raise ConfigError(f"{out}: is the folder that you are in; give --out a folder in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise ConfigError(f"{out}: exists and is no bundle; choose another --out")
    try:
        # Read loosely: a bundle of another schema may be replaced too.
        data = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        known = {MANIFEST_FILE, *data["files"]}
    except (ValueError, LookupError, TypeError) as error:
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

    Raises:
        ConfigError: It cannot be made, or another export writes the same bundle.
    """
    with contextlib.ExitStack() as locks:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            # Held only meanwhile, so that of two exports one is the first.
            with contextlib.ExitStack() as door:
                _lock(out.parent, door, wait=True)
                _require_alone(out)
                _clear_remains(out)
                folder = out.parent / f".{out.name}.partial-{os.getpid()}"
                folder.mkdir()
                _lock(folder, locks)
        except OSError as error:
            raise ConfigError(f"{out.parent}: cannot be written ({error.strerror})") from error
        try:
            yield folder
        except OSError as error:
            raise ExportError(
                f"{out}: {error.strerror or error}; the export was undone"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _require_alone(out: Path) -> None:
    """Refuse to export where another export is at work, by the lock that it holds."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with contextlib.ExitStack() as trial:
            if not _lock(path, trial):
                process = path.name.rpartition("-")[2]
                raise ConfigError(
                    f"{out}: another export is writing it (process {process}); wait for its end, "
                    "or give another --out"
                )


def _lock(folder: Path, locks: contextlib.ExitStack, *, wait: bool = False) -> bool:
    """Lock a folder until the stack is left; whether nobody else holds it.

    It goes with its process, however that ends. True as well where there are no such locks.
    """
    try:
        import fcntl  # noqa: PLC0415 - Windows has none
    except ImportError:
        return True
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    locks.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        # A filesystem without locks.
        return True
    return True


def move_into_place(folder: Path, out: Path) -> None:
    """Make the folder the bundle; an older one gives way only now."""
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_remains(out: Path) -> None:
    """Remove what killed exports left, and put back a bundle that one had just moved away."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*"):
        found = _REMAINS.search(path.name)
        if found is None:
            continue
        # In a container each run may get the ID of the one that was killed.
        process = int(found.group(2))
        if process != os.getpid() and psutil.pid_exists(process):
            continue
        if found.group(1) == "replaced" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)
