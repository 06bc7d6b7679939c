"""Do the built distributions hold what they should, and nothing else? Run by tests/dist.sh.

python tests/tools/dist_files.py FOLDER
"""

from __future__ import annotations

import os
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).resolve().parents[2]
PLACES: Final = {
    # A folder here, and where its files are in the wheel.
    "gap_export": {
        "gap_export": "gap_export",
        "optimum": "optimum",
        "export_configs": "gap_export/export_configs",
        **{
            f"refshapes/{name}": f"gap_export/refshapes/{name}"
            for name in ("checkpoint", "checkpoint-256", "samples", "samples-256")
        },
    },
    "gap_runtime": {"runtime/gap_runtime": "gap_runtime"},
}


def list_expected(name: str) -> set[str]:
    """What the wheel has to hold, beside its own record: all files of its folders."""
    return {
        f"{inside}/{(Path(folder) / file).relative_to(TOP / here).as_posix()}"
        for here, inside in PLACES[name].items()
        # The targets' folder is a link.
        for folder, _, files in os.walk(TOP / here, followlinks=True)
        for file in files
        if not folder.endswith("__pycache__")
    }


def main(folder: Path) -> int:
    """The number of distributions that are wrong."""
    wrong = 0
    for name in PLACES:
        (wheel,) = folder.glob(f"{name}-*.whl")
        with zipfile.ZipFile(wheel) as file:
            held = {each for each in file.namelist() if ".dist-info/" not in each}
            notes = {each.partition(".dist-info/")[2] for each in file.namelist()}
        expected = list_expected(name)
        for what, files in (("lacks", expected - held), ("holds besides", held - expected)):
            if files:
                print(f"{wheel.name} {what}: {', '.join(sorted(files)[:5])} ({len(files)})")
        has_licence = any(each.startswith("licenses/LICENSE") for each in notes)
        if not has_licence:
            print(f"{wheel.name} has no licence")
        (sdist,) = folder.glob(f"{name}-*.tar.gz")
        with tarfile.open(sdist) as file:
            inside = {each.partition("/")[2] for each in file.getnames()}
        missing = {"LICENSE", "README.md", "pyproject.toml"} - inside
        if missing:
            print(f"{sdist.name} lacks: {', '.join(sorted(missing))}")
        wrong += bool(held ^ expected) + bool(missing) + (not has_licence)
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
