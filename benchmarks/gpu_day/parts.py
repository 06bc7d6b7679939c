"""Parts of the day that look into gap-runtime, each in a process of its own.

    python3 parts.py device|steps|phrases|profile [BUNDLE]

`device.py` runs them, in the environment that it makes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from gap_runtime import Grounder
from gap_runtime.backends import open_backend
from gap_runtime.backends._cuda import Device
from gap_runtime.backends.onnxruntime.cudart import find_cudart
from gap_runtime.backends.onnxruntime.loading import preload
from gap_runtime.backends.onnxruntime.session import OnnxDecoder
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER
from gap_runtime.bundle.onnx_file import read_onnx
from gap_runtime.errors import GapError

_STEPS: Final = 48
_COPY_BYTES: Final = 512 * 2**20
_PHRASES: Final = 4
_MOST_LINES: Final = 20
_PROFILED: Final = 24


def open_decoder(folder: Path, *, is_plain: bool = False) -> tuple[Any, Any, Any]:
    """A bundle, its decoder's stage and the loaded decoder; `is_plain`: without recorded steps."""
    bundle = Bundle.open(folder)
    stage = bundle.manifest.stage(DECODER)
    if is_plain:
        return bundle, stage, OnnxDecoder(bundle, stage, "cuda")
    backend, device = open_backend("onnxruntime:cuda")
    return bundle, stage, backend.open_decoder(bundle, stage, device)


def call_decoder(stage: Any, decoder: Any, rows: int, slot: int) -> float:
    """Milliseconds of a call of so many rows."""
    specs = {spec.name: spec for spec in stage.inputs}
    width, axes = int(specs["embeddings"].shape[-1]), int(specs["position_ids"].shape[0])
    embeddings = np.zeros((1, rows, width), np.float32)
    positions = np.broadcast_to(np.arange(slot, slot + rows), (axes, rows))
    wanted = np.arange(rows) if rows <= 8 else np.array([rows - 1])
    began = time.perf_counter()
    decoder.run(embeddings, positions, slot, wanted)
    return (time.perf_counter() - began) * 1e3


def look_at_device() -> None:
    """Memory, copies and the runtime's library as gap-runtime uses them."""
    preload(ort, "cuda")
    cuda = find_cudart(ort)
    assert cuda is not None, "the CUDA runtime is not found by its name"
    device = Device(cuda)
    memory, host = device.allocate(4096), device.pin((1024,), "float32")
    back = device.pin((1024,), "float32")
    host[:] = 1
    device.to_host(host, memory)
    device.synchronize()
    print("fresh memory is zero:", not host.any())
    host[:] = np.arange(1024)
    device.to_device(memory, host)
    device.to_host(back, memory)
    device.synchronize()
    print("what was copied in comes out:", bool((host == back).all()))
    print(f"memory is read and written at {measure_bandwidth(device):.0f} GB/s")


def measure_bandwidth(device: Any) -> float:
    """GB/s of a copy on the device, which reads and writes each byte."""
    one, other = device.allocate(_COPY_BYTES), device.allocate(_COPY_BYTES)
    row = 2**20
    times = []
    for _ in range(5):
        device.synchronize()
        began = time.perf_counter()
        device.copy_rows(one, row, other, row, width=row, rows=_COPY_BYTES // row)
        device.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * _COPY_BYTES / min(times) / 1e9


def fill(folder: Path) -> int:
    """Lay files of zeros where weights were left out; bytes of all weights."""
    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return sum(sizes.values())


def time_steps(folder: Path) -> None:
    """Prefill, steps and drafts of eight rows, recorded and kernel by kernel."""
    if (folder / "sizes.json").is_file():
        fill(folder)
    for is_plain in (False, True):
        began = time.perf_counter()
        bundle, stage, decoder = open_decoder(folder, is_plain=is_plain)
        loaded = time.perf_counter() - began
        weights = read_onnx(bundle.folder / stage.file).weight_bytes
        layout = bundle.manifest.layout
        rows = max(layout.at(entry).prompt for entry in bundle.manifest.ratios)
        prefill = [call_decoder(stage, decoder, rows, 0) for _ in range(3)]
        room = layout.capacity - rows - 8
        steps = [call_decoder(stage, decoder, 1, rows + k) for k in range(min(_STEPS, room))]
        many = decoder.fit(8)
        drafts = [call_decoder(stage, decoder, many, rows) for _ in range(12)]
        step = statistics.median(steps[3:])
        print(
            f"{folder.name} {type(decoder).__name__}: loaded in {loaded:.1f} s, prefill of {rows} "
            f"rows {min(prefill):.2f} ms, step {step:.3f} ms (fastest {min(steps):.3f}), draft of "
            f"{many} rows {statistics.median(drafts[3:]):.3f} ms; a step reads weights of "
            f"{weights / 1e9:.2f} GB at {weights / step / 1e6:.0f} GB/s",
            flush=True,
        )
        del decoder


def time_phrases(folder: Path) -> None:
    """The first phrase about a picture, and further ones."""
    bundle = Bundle.open(folder)
    grounder = Grounder(bundle, "onnxruntime:cuda")
    sample = bundle.manifest.reference.samples[0]
    for turn in ("with loading", "again"):
        view = grounder.look(folder / sample.image)
        times = []
        for _ in range(_PHRASES):
            began = time.perf_counter()
            view.ground(sample.phrase)
            times.append((time.perf_counter() - began) * 1e3)
        print(
            f"{folder.name} {turn}: first phrase {times[0]:.1f} ms, further ones "
            f"{min(times[1:]):.1f} ms",
            flush=True,
        )


def profile_steps(folder: Path) -> None:
    """Where a step's time goes, kernel by kernel, as onnxruntime tells it."""
    plain = ort.SessionOptions
    with tempfile.TemporaryDirectory() as home:

        def profiled() -> Any:
            options = plain()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(home) / "profile")
            return options

        ort.SessionOptions = profiled
        _, stage, decoder = open_decoder(folder, is_plain=True)
        for k in range(_PROFILED):
            call_decoder(stage, decoder, 1, k)
        path = Path(decoder._session.end_profiling())  # noqa: SLF001 - the profile is its
        events = json.loads(path.read_text(encoding="utf-8"))
    took: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ("Node", "Kernel") and event["name"].endswith("_kernel_time"):
            took[event["args"].get("op_name", event["name"])] += event["dur"]
        elif event.get("cat") == "Kernel":
            took[f"on the GPU: {event['name'][:60]}"] += event["dur"]
    for name, microseconds in took.most_common(_MOST_LINES):
        print(f"{microseconds / _PROFILED:10.1f} us a step  {name}")


PARTS: Final = {
    "device": look_at_device,
    "steps": time_steps,
    "phrases": time_phrases,
    "profile": profile_steps,
}


if __name__ == "__main__":
    try:
        PARTS[sys.argv[1]](*map(Path, sys.argv[2:]))
    except GapError as failure:
        sys.exit(f"error: {failure}")
