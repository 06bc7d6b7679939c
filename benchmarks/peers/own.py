"""What the scripts of gap-export itself share: a bundle's graphs, as gap_runtime runs them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from measure import find_versions, make_pixels, measure_session

_ANSWER: Final = 368
"""Tokens of an answer: with the longest prompt of 656 the cache has 1024 slots, as all have."""


def prepare_bundle(options: argparse.Namespace, target: str) -> dict[str, Any]:
    """A bundle with all visual tokens and one with half of them, which share their weights."""
    program = Path(sys.executable).parent / "gap-export"
    command = [str(program), str(options.checkpoint), "--ratio", "0", "--ratio", "0.5"]
    dtype = "float16" if options.precision == "fp16" else "float32"
    command += ["--no-reference", "--dtype", dtype, "--bring", "link", "--target", target]
    command += ["--set", f"prompt.answer={_ANSWER}", "--out", str(options.out)]
    note = "weights that need no conversion are hard links"
    if options.precision == "int4":
        command += ["--quantize", "int4", "--set", "quantize.vision=true"]
        note = "decoder in int4, vision in int8"
    done = subprocess.run(command, check=False)
    if done.returncode:
        # It has said why.
        raise SystemExit(done.returncode)
    return {"note": note}


class Bundled:
    """The sessions of a bundle, and its decode loop without a tokenizer."""

    def __init__(self, folder: Path, backend: str) -> None:
        """Load the decoder."""
        from gap_runtime.backends import open_backend
        from gap_runtime.bundle.bundle import Bundle
        from gap_runtime.bundle.manifest import DECODER

        self._bundle = Bundle.open(folder)
        self._backend, self._device = open_backend(backend)
        self._table = self._bundle.map_embedding()
        stage = self._bundle.manifest.stage(DECODER)
        self._decoder = self._backend.open_decoder(self._bundle, stage, self._device)
        self._vision: Any = None
        self._pixels = make_pixels(self._bundle.manifest.preprocess.side)

    def open_vision(self) -> None:
        """Load the vision graph that keeps all tokens."""
        from gap_runtime.bundle.manifest import VISION

        stage = self._bundle.manifest.stage(VISION, self._bundle.choose_ratio(0.0))
        self._vision = self._backend.open_stage(self._bundle, stage, self._device)

    def prefill(self, token_ids: np.ndarray) -> int:
        """See measure.Session."""
        from gap_runtime.bundle.bundle import embedding_rows

        rows = embedding_rows(self._table, token_ids.tolist())[None]
        positions = np.arange(len(token_ids))[None]
        return choose(self._decoder.run(rows, positions, 0, np.array([len(token_ids) - 1]))[0])

    def step(self, token: int, position: int) -> int:
        """See measure.Session."""
        from gap_runtime.bundle.bundle import embedding_rows

        row = embedding_rows(self._table, [token])[None]
        return choose(self._decoder.run(row, np.array([[position]]), position, np.array([0]))[0])

    def see(self) -> Any:
        """The visual tokens of a picture."""
        return self._vision.run({"pixels": self._pixels})["visual_tokens"]


def choose(logits: np.ndarray) -> int:
    """The most likely token, proved finite as gap_runtime.grounding.decode does."""
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        raise ValueError("logits are not finite")
    return token


def measure_bundle(options: argparse.Namespace, backend: str, library: str) -> dict[str, Any]:
    """Times of a bundle on a backend, which computes with a library."""
    # Loading libraries is not loading the model.
    import gap_runtime.grounding.grounder  # noqa: F401
    from gap_runtime.backends import open_backend
    from gap_runtime.machines.telemetry import silence_telemetry, without_reports

    silence_telemetry()
    with without_reports():
        import_module(library)
    open_backend(backend)
    os.environ["GAP_RUNTIME_THREADS"] = str(options.threads)
    return measure_session(
        lambda: Bundled(options.out, backend),
        options,
        open_vision=Bundled.open_vision,
        see=Bundled.see,
        versions=find_versions("gap-runtime", library, "numpy"),
    )
