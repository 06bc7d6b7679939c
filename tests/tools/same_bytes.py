"""Are the exported files still the same, byte by byte? For whoever rebuilds the exporter.

    python tests/tools/same_bytes.py record BEFORE.json
    python tests/tools/same_bytes.py compare BEFORE.json     # exit code 1 if a file differs

Exports the small random checkpoint of every family and the embedded model for each target and
precision with the command itself, Qwen-VL for a canvas upright and lying, and writes the BLAKE3 of
each file of each bundle.
`export.json` is left out: it holds a hash of the exporter's code. A change that is meant to
change graphs is compared by answers instead (`gap-runtime check`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from makers.families import EVERY_FAMILY, FamilyCase, find_family, make_picture, make_samples
from makers.qwen import TEMPLATE, make_qwen3_checkpoint, make_qwen_checkpoint

TARGETS = ("cpu", "standard", "portable")
PRECISIONS = {
    "plain": (),
    "int8": ("--quantize", "int8"),
    "int4": ("--quantize", "int4"),
    "int4-whole": (
        *("--quantize", "int4", "--no-reference"),
        *("--set", "quantize.vision=true", "--set", "quantize.head=true"),
    ),
}
LEFT_OUT = {"export.json"}
QWENS = {
    "qwen2.5-vl": (make_qwen_checkpoint, "168x112,112x168"),
    "qwen3-vl": (make_qwen3_checkpoint, "96x64,64x96"),
}
"""How a checkpoint is made, and the canvases."""
EMBEDDED = "refshapes"
"""Trained, so that its activation-aware int4 passes the check."""


class _Folders:
    """What `find_family` asks for: folders that go when the script ends."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def mktemp(self, name: str) -> Path:
        """A new folder."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.home))


def ask_for(family: str, home: Path) -> list[str]:
    """The arguments that name a family's files, which are made below a folder."""
    if family == EMBEDDED:
        return [EMBEDDED]
    if family in QWENS:
        make, canvases = QWENS[family]
        checkpoint = make(home / family / "model", seed=11)
        make_samples(home / family / "samples", make_picture(90, 61))
        named = [str(checkpoint)]
        settings = {"check.samples": home / family / "samples", "prompt.template": TEMPLATE}
        settings["image.canvas"] = canvases
    else:
        # Heads of 16 make most weights a multiple of 16 wide, which is what is quantized.
        case: FamilyCase = find_family(family, _Folders(home), head_dim=16)
        named = [case.model]
        named += ["--checkpoint", str(case.checkpoint)] if case.checkpoint else []
        settings = case.overrides | {"check.samples": case.samples}
    settings |= {"prompt.answer": 5}
    said = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [*named, "--dtype", "float32", *said]


def export_hashes(asked: list[str], target: str, precision: str, out: Path) -> dict[str, str]:
    """BLAKE3 of every file of one bundle; the error's line where there is none."""
    from gap_export.cli.main import main

    arguments = [
        *asked,
        *("--ratio", "0", "--ratio", "0.5", "--target", target),
        *PRECISIONS[precision],
        *("--out", str(out)),
    ]
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main(arguments)
    if code:
        return {"exit code": f"{code}: {said.getvalue().strip().splitlines()[-1]}"}
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return {
        name: entry["blake3"]
        for name, entry in sorted(manifest["files"].items())
        if name not in LEFT_OUT
    }


def export_all(
    families: list[str], targets: list[str], precisions: list[str]
) -> dict[str, dict[str, str]]:
    """The hashes of all bundles, by family, target and precision."""
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for family in families:
            asked = ask_for(family, Path(home))
            for target in targets:
                for precision in precisions:
                    name = f"{family} {target} {precision}"
                    found[name] = export_hashes(asked, target, precision, Path(home) / "bundle")
                    print(f"{name}: {len(found[name])} files", file=sys.stderr)
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--families", nargs="+", default=[*EVERY_FAMILY, *QWENS, EMBEDDED])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument(
        "--precisions", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS)
    )
    options = parser.parse_args()
    found = export_all(options.families, options.targets, options.precisions)
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return 0
    before = json.loads(options.file.read_text(encoding="utf-8"))
    differing = 0
    for bundle, files in found.items():
        for name in sorted(files.keys() | before[bundle].keys()):
            if files.get(name) != before[bundle].get(name):
                differing += 1
                print(f"{bundle}: {name}: {before[bundle].get(name)} -> {files.get(name)}")
    print(f"{len(found)} bundles, {differing} differing files")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
