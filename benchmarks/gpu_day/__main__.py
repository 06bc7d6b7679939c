"""Prepare what a GPU machine without a network needs, and run it where a GPU is here.

    python -m benchmarks.gpu_day FOLDER [--python 3.12] [--layers 8] [--small] [--stay]

FOLDER gets small bundles with PyTorch's answers in every form of graph, bundles of LLaVA-1.5-7B's
widths without their weights (zeros, made on the device: what kernels take does not depend on
values), wheels, and `device.py`. No file is larger than 60 MiB. Carried over, it is run with
`python3 FOLDER/device.py`, which takes about twelve minutes and writes FOLDER/report.txt. CUDA
(and cuDNN, for bundles of other targets than `cuda`) is that of that machine, or what its torch
brought.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import gap_export
from benchmarks import checkpoints
from benchmarks.command import read_home, read_number, run_benchmark
from gap_runtime.cli.options import ArgumentParser
from gap_runtime.errors import ConfigError
from gap_runtime.records.files import exists, is_file

HOME: Final = Path(__file__).resolve().parents[2]
SMALL: Final[dict[str, dict[str, Any]]] = {
    "cuda-float16": {"target": "cuda"},
    "cuda-int4": {"target": "cuda", "quantize": "int4"},
    "cuda-int8": {"target": "cuda", "quantize": "int8"},
    "cuda-int8-cache": {"target": "cuda", "kv_cache": "int8"},
    "standard-float32": {"target": "standard", "dtype": "float32"},
    "standard-float16": {"target": "standard", "dtype": "float16"},
    "cpu-float16": {"target": "cpu", "dtype": "float16"},
    "cpu-float32": {"target": "cpu", "dtype": "float32"},
    "portable-float32": {"target": "portable", "dtype": "float32"},
}
"""Bundles of the embedded model, which are checked."""
WIDE: Final[dict[str, dict[str, Any]]] = {
    "cuda-float16": {"target": "cuda"},
    "cuda-int4": {"target": "cuda", "quantize": "int4"},
    "standard-float16": {"target": "standard", "dtype": "float16"},
}
"""Bundles of LLaVA-1.5-7B's widths, which are timed."""
WHEELS: Final = ("onnxruntime-gpu>=1.31", "blake3", "flatbuffers", "regex", "rich", "tokenizers")
_SCRIPTS: Final = ("device.py", "parts.py")
_TOWER_LAYERS: Final = 4
_PIECE_BYTES: Final = 52 * 2**20


def export_small(folder: Path, names: Iterable[str]) -> None:
    """Bundles of the embedded model, without pruning and at half of the tokens."""
    for name in names:
        gap_export.export("refshapes", ratios=[0, 0.5], out=folder / name, **SMALL[name])


def export_wide(folder: Path, names: Iterable[str], layers: int) -> None:
    """Bundles of the true widths and few layers; weights are left out, their sizes written."""
    true = checkpoints.vision_config
    checkpoints.vision_config = lambda side: true(side) | {"num_hidden_layers": _TOWER_LAYERS}
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            text = checkpoints.LLAMA_7B | {"num_hidden_layers": layers}
            checkpoints.write_library(Path(made), "llava", text, sparse=True)
            for name in names:
                bundle = gap_export.export(
                    "llava-1.5-7b",
                    checkpoint=made,
                    ratios=[0, 0.5],
                    out=folder / name,
                    bring="link",
                    reference=False,
                    settings={"quantize.method": "nearest"} if "quantize" in WIDE[name] else {},
                    **WIDE[name],
                ).folder
                _leave_weights_out(bundle)
    finally:
        checkpoints.vision_config = true


def _leave_weights_out(bundle: Path) -> None:
    weights = sorted(bundle.glob("*.safetensors"))
    sizes = {path.name: path.stat().st_size for path in weights}
    (bundle / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    for path in weights:
        path.unlink()


def fetch_wheels(folder: Path, python: str) -> None:
    """The runtime's wheel, and what it needs there, large ones in pieces."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, HOME / "runtime"], check=True)
    platforms = [f"manylinux_2_{k}_x86_64" for k in (17, 24, 27, 28, 31, 34)]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--python-version", python]
    for platform in (*platforms, "manylinux2014_x86_64"):
        command += ["--platform", platform]
    subprocess.run([*command, "-d", folder, *WHEELS], check=True)
    for wheel in folder.glob("*.whl"):
        if wheel.stat().st_size > _PIECE_BYTES:
            _split(wheel)


def _split(path: Path) -> None:
    with path.open("rb") as file:
        for k in range(1000):
            piece = file.read(_PIECE_BYTES)
            if not piece:
                break
            path.with_name(f"{path.name}.part{k:03d}").write_bytes(piece)
    path.unlink()


def prepare(folder: Path, *, python: str, layers: int, is_small: bool) -> None:
    """Make the folder anew.

    Args:
        folder: What is carried over.
        python: Version of Python there.
        layers: Of the wide decoders.
        is_small: Only two small bundles and no wide ones or wheels, to rehearse.

    Raises:
        ConfigError: Something else is there.
    """
    if exists(folder) and any(folder.iterdir()) and not is_file(folder / _SCRIPTS[0]):
        raise ConfigError(f"{folder}: holds something else; give a folder that is new or empty")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _SCRIPTS:
        shutil.copy2(Path(__file__).with_name(name), folder)
    export_small(folder / "small", ("cuda-float16", "cpu-float32") if is_small else SMALL)
    if not is_small:
        (folder / "wide").mkdir()
        export_wide(folder / "wide", WIDE, layers)
        fetch_wheels(folder / "wheels", python)


def main() -> None:
    """Do it."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=read_home)
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    parser.add_argument("--layers", type=read_number, default=8, help="of the wide decoders")
    parser.add_argument("--small", action="store_true", help="two bundles alone, to rehearse")
    parser.add_argument("--stay", action="store_true", help="do not run it on a GPU that is here")
    options = parser.parse_args()
    prepare(options.folder, python=options.python, layers=options.layers, is_small=options.small)
    print(f"{options.folder}: carry it to the machine with the GPU, then")
    print(f"    python3 {options.folder.name}/device.py")
    if shutil.which("nvidia-smi") and not options.stay:
        command = [sys.executable, options.folder / "device.py", "--installed"]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    run_benchmark(main)
