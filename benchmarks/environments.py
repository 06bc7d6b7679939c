"""Environments of the peers: one for each, made from its pinned requirements when first used.

    python -m benchmarks.environments [PEER ...]

makes them beforehand. Peers with the same requirements share an environment. None is ever put
into the project's own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.command import require_known, run_benchmark
from gap_runtime.cli.options import ArgumentParser

REQUIREMENTS: Final = Path(__file__).resolve().parent / "requirements"
HOME: Final = Path("build/benchmarks/environments")
_MARK: Final = "whole"


class UnavailableError(Exception):
    """A peer that cannot be had here; the message is one line."""


def read_requirements(path: Path) -> list[str]:
    """Lines of a requirements file and of those that it names, without comments."""
    lines = []
    for raw in path.read_text(encoding="utf-8").splitlines():
        line = raw.partition("#")[0].strip()
        if line.startswith("-r "):
            lines += read_requirements(path.parent / line[3:].strip())
        elif line:
            lines.append(line)
    return lines


def find_python(peer: str, *, requirements: Path = REQUIREMENTS, home: Path = HOME) -> Path:
    """The python of a peer's environment, which is made if there is none.

    Args:
        peer: Name of the requirements file without its suffix.
        requirements: Folder of the requirements files.
        home: Folder of the environments.

    Raises:
        UnavailableError: pip cannot install it.
    """
    path = requirements / f"{peer}.txt"
    if not path.is_file():
        raise UnavailableError(f"no requirements file {path.name}")
    digest = hashlib.sha256("\n".join(sorted(read_requirements(path))).encode()).hexdigest()[:8]
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in sorted(home.glob(f"*-{digest}")):
            if (folder / _MARK).is_file():
                return folder / "bin" / "python"
        return _make(home / f"{peer}-{digest}", path)


def _make(folder: Path, requirements: Path) -> Path:
    """A new environment, with a mark in it once it is whole.

    It cannot be made elsewhere and renamed, because the commands in it hold its path.
    """
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    # The bare environment has the pip of the standard library.
    _run([sys.executable, "-m", "venv", str(folder)], folder)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    _run([*command, "--requirement", str(requirements)], folder)
    (folder / _MARK).touch()
    return python


def _run(command: list[str], folder: Path) -> None:
    # pip must not see the packages of the python that runs the suite.
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise UnavailableError(last_line(f"{done.stdout}\n{done.stderr}"))


def last_line(text: str) -> str:
    """The last line that says something; of pip's, the last error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR: ")[:200]


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="make the environments of peers")
    known = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))
    parser.add_argument("peers", nargs="*", default=known, metavar="PEER")
    peers = parser.parse_args().peers
    require_known("peer", peers, known)
    for peer in peers:
        try:
            print(f"{peer}: {find_python(peer)}")
        except UnavailableError as error:
            print(f"{peer}: {error}")


if __name__ == "__main__":
    run_benchmark(main)
