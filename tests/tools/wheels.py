"""Wheels from the package registry, unpacked beside each other and not installed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "build" / "wheels"
"""Kept from run to run; `make clean` removes it."""
_PATIENCE = 900


def unpack(*requirements):
    """A folder with the wheels of these requirements in it, without what they depend on.

    Where the registry cannot be reached the test is skipped, with what pip says.
    """
    name = "+".join(each.replace("=", "").replace("*", "x") for each in requirements)
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    place = FOLDER / f"{name}-{version}"
    if place.is_dir():
        return place
    aside = place.with_name(f"{place.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    command = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run(
        [sys.executable, *command, "--disable-pip-version-check", "-d", aside, *requirements],
        capture_output=True,
        text=True,
        check=False,
        timeout=_PATIENCE,
    )
    if done.returncode:
        shutil.rmtree(aside)
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(f"the package registry gives no {name}: {' '.join(lines[-1:])}")
    for wheel in sorted(aside.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(aside)
        wheel.unlink()
    aside.rename(place)
    return place
