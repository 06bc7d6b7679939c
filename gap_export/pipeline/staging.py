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
from typing import Final

import psutil

from gap_export.errors import ExportError
from gap_runtime.bundle.manifest import MANIFEST_FILE
from gap_runtime.errors import ConfigError

_REMAINS: Final = re.compile(r"\.(partial|replaced)-(\d+)$")


def require_replaceable(out: Path) -> None:
    """Refuse to write over anything but an empty folder or a bundle and nothing else."""
    if out.resolve() == Path.cwd():
        raise ConfigError(f"{out}: is the folder that you are in; give --out a folder in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
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


@contextlib.contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """A hidden folder beside the bundle, removed whatever happens."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(out)
        folder = out.parent / f".{out.name}.partial-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise ConfigError(f"{out.parent}: cannot be written ({error.strerror})") from error
    try:
        yield folder
    except OSError as error:
        raise ExportError(f"{out}: {error.strerror or error}; the export was undone") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
