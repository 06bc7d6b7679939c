"""What the scripts of all subjects share. Imports only the standard library and numpy.

A script beside this file is run by the python of its own environment, with two subcommands:

    SCRIPT prepare CHECKPOINT OUT --precision fp32|int4 [--build DIR]
    SCRIPT measure OUT --precision P --threads N --prompts 624 336 --tokens 32 --runs 5
        [--checkpoint CHECKPOINT]

Each prints one JSON object as the last line on stdout. The constants of a script: NAME is shown in
tables, SCOPE is "whole" (vision too) or "decoder", PRECISIONS are those that it can.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np

CAPACITY: Final = 1024
"""Tokens that a cache has room for where its size has to be said."""
_FIRST_TOKEN: Final = 259
_LAST_TOKEN: Final = 32000
"""Below and from here on are tokens that some libraries treat in their own way."""


class Session(Protocol):
    """A loaded model, batch 1."""

    def prefill(self, token_ids: np.ndarray) -> int:
        """Forget everything, read a prompt int64 [S]; the most likely next token."""

    def step(self, token: int, position: int) -> int:
        """Read one token at a position; the most likely next token."""


S = TypeVar("S", bound=Session)


def make_tokens(count: int, vocabulary: int = _LAST_TOKEN, seed: int = 0) -> np.ndarray:
    """Random token IDs int64 [count], plain words of the vocabulary; always the same ones."""
    high = min(vocabulary, _LAST_TOKEN)
    return np.random.default_rng(seed).integers(min(_FIRST_TOKEN, high - 1), high, count)


def make_pixels(side: int = 336, seed: int = 0) -> np.ndarray:
    """A random normalized picture float32 [1, 3, side, side]."""
    return np.random.default_rng(seed).standard_normal((1, 3, side, side), dtype=np.float32)


def resident_mb() -> float:
    """Memory of this process that is in RAM now (VmRSS), in MB of 10^6 bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmRSS")


def peak_mb() -> float:
    """The most memory in RAM that this process has had, in MB of 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def read_vocabulary(checkpoint: Path) -> int:
    """Rows of a checkpoint's embedding table, of a LLaVA or a Llama."""
    data = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return int(data.get("text_config", data)["vocab_size"])


def time_session(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each prefill and of a token, by prompt length; the lengths take turns.

    Args:
        session: A warm session.
        options: Of the subcommand `measure`.

    Returns:
        `prefill_ms`, `token_ms`, and `token_ids`: what was decoded, which tells whether two
        subjects compute the same.
    """
    answers: dict[str, list[int]] = {}
    prefills: dict[str, list[float]] = {str(count): [] for count in options.prompts}
    tokens: dict[str, list[float]] = {str(count): [] for count in options.prompts}
    for _ in range(options.runs):
        for count in options.prompts:
            token_ids = make_tokens(count)
            began = time.perf_counter()
            token = session.prefill(token_ids)
            prefilled = time.perf_counter()
            decoded = [token]
            for step in range(options.tokens):
                decoded.append(session.step(decoded[-1], count + step))
            ended = time.perf_counter()
            answers[str(count)] = decoded
            prefills[str(count)].append((prefilled - began) * 1e3)
            tokens[str(count)].append((ended - prefilled) * 1e3 / options.tokens)
    return {"prefill_ms": prefills, "token_ms": tokens, "token_ids": answers}


def time_calls(call: Callable[[], object], runs: int) -> list[float]:
    """Milliseconds of each of some calls."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return times


def measure_session(
    open_session: Callable[[], S],
    options: argparse.Namespace,
    *,
    open_vision: Callable[[S], object] | None = None,
    see: Callable[[S], object] | None = None,
    versions: dict[str, str],
    note: str = "",
) -> dict[str, Any]:
    """The whole answer of `measure`: load, warm up, look at memory, then time.

    Args:
        open_session: Loads the model; libraries should be imported before.
        options: Of the subcommand `measure`.
        open_vision: Loads the vision model where that is not done before, so that the decoder's
            own load time and memory are known too.
        see: Runs the vision model on a picture; None where there is none.
        versions: Of the libraries, by name.
        note: What a reader of the table has to know.
    """
    answer: dict[str, Any] = {}
    began = time.perf_counter()
    session = open_session()
    load_s = time.perf_counter() - began
    for count in options.prompts:
        token = session.prefill(make_tokens(count))
        for step in range(2):
            token = session.step(token, count + step)
    if open_vision is not None:
        answer |= {"decoder_load_s": load_s, "decoder_resident_mb": resident_mb()}
        began = time.perf_counter()
        open_vision(session)
        load_s += time.perf_counter() - began
    if see is not None:
        see(session)
    answer |= {"load_s": load_s, "resident_mb": resident_mb()}
    answer["vision_ms"] = None if see is None else time_calls(lambda: see(session), options.runs)
    answer |= time_session(session, options)
    return answer | {"peak_mb": peak_mb(), "versions": versions, "note": note}


class OnnxDecoder:
    """A decoder graph that gives a longer cache at every call, on onnxruntime's CPU provider.

    `past` and `present` are what the names of cache inputs and outputs begin with; the rest of a
    name is the same on both sides. The cache stays in onnxruntime's own memory.
    """

    def __init__(self, path: Path, threads: int, *, past: str, present: str) -> None:
        """Load the graph."""
        import onnxruntime

        self._ort = onnxruntime
        self._session = open_onnx(path, threads)
        self._inputs = [each.name for each in self._session.get_inputs()]
        caches = [each for each in self._session.get_inputs() if each.name.startswith(past)]
        self._names = {present + each.name.removeprefix(past): each.name for each in caches}
        self._outputs = [each.name for each in self._session.get_outputs()]
        # Heads and their width are numbers (or numbers as text); batch and length are not.
        shape = [int(size) if str(size).isdigit() else 0 for size in caches[0].shape]
        self._empty = np.zeros((1, shape[1], 0, shape[3]), np.float32)
        self._caches: dict[str, Any] = {}

    def prefill(self, token_ids: np.ndarray) -> int:
        """See Session."""
        empty = self._ort.OrtValue.ortvalue_from_numpy(self._empty)
        self._caches = dict.fromkeys(self._names.values(), empty)
        return self._run(token_ids[None], 0)

    def step(self, token: int, position: int) -> int:
        """See Session."""
        return self._run(np.array([[token]]), position)

    def _run(self, token_ids: np.ndarray, start: int) -> int:
        end = start + token_ids.shape[1]
        values = {
            "input_ids": token_ids,
            "position_ids": np.arange(start, end)[None],
            "attention_mask": np.ones((1, end), np.int64),
        }
        binding = self._session.io_binding()
        for name, value in values.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        given = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._caches = {past: given[present] for present, past in self._names.items()}
        return int(given["logits"].numpy()[0, -1].argmax())


def open_onnx(path: Path, threads: int) -> Any:
    """A session of onnxruntime on the CPU with its defaults and a number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def find_versions(*names: str) -> dict[str, str]:
    """Versions of installed distributions by name."""
    return {name: metadata.version(name) for name in names}


def run(
    prepare: Callable[[argparse.Namespace], dict[str, Any]],
    measure: Callable[[argparse.Namespace], dict[str, Any]],
) -> None:
    """Command line of a script; what it prints goes to stderr, all but the answer."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare")
    making.add_argument("checkpoint", type=Path)
    making.add_argument("out", type=Path)
    making.add_argument("--build", type=Path)
    timing = commands.add_parser("measure")
    timing.add_argument("out", type=Path)
    timing.add_argument("--checkpoint", type=Path)
    timing.add_argument("--threads", type=int, required=True)
    timing.add_argument("--prompts", type=int, nargs="+", required=True)
    timing.add_argument("--tokens", type=int, required=True)
    timing.add_argument("--runs", type=int, required=True)
    for each in (making, timing):
        each.add_argument("--precision", required=True)
    options = parser.parse_args()
    # Libraries print to descriptor 1, some of them from C++.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer = (prepare if options.command == "prepare" else measure)(options)
    sys.stdout.flush()
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
