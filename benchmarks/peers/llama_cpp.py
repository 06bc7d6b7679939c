"""llama.cpp, built here for this processor: the language model by its own llama-bench."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).resolve().parent))

from measure import run

NAME: Final = "llama.cpp"
SCOPE: Final = "decoder"
PRECISIONS: Final = ("fp32", "int4")
_VERSION: Final = "0.3.36"
"""Of llama-cpp-python, whose source distribution contains llama.cpp."""
_BUILD: Final = Path("build/benchmarks/tools")
_OPTIONS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
_PROGRAMS: Final = ("llama-bench", "llama-quantize")


def build_tools(folder: Path) -> Path:
    """The folder of llama.cpp's source and programs, made if it is not there as a whole.

    Args:
        folder: Of tools that are kept; a build that was cut off goes on.
    """
    home = folder.resolve() / f"llama.cpp-{_VERSION}"
    mark = home / "whole"
    if mark.is_file():
        return home
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "source").is_dir():
        _unpack(home)
    binaries = Path(sys.executable).parent
    command = [str(binaries / "cmake"), "-G", "Ninja", *_OPTIONS]
    command += [f"-DCMAKE_MAKE_PROGRAM={binaries / 'ninja'}"]
    subprocess.run([*command, "-S", str(home / "source"), "-B", str(home / "build")], check=True)
    command = [str(binaries / "cmake"), "--build", str(home / "build"), "--target", *_PROGRAMS]
    subprocess.run([*command, "--parallel", str(os.cpu_count() or 1)], check=True)
    mark.touch()
    return home


def _unpack(home: Path) -> None:
    """Put llama.cpp's source into the folder `source`."""
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        name = "llama-cpp-python"
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", name, f"{name}=={_VERSION}", "--dest", scratch]
        subprocess.run(command, check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(scratch, filter="data")
        (source,) = Path(scratch).glob("*/vendor/llama.cpp")
        source.rename(home / "source")


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """A GGUF file in f32 or Q4_0; seconds of a build that had to be made are told apart."""
    began = time.perf_counter()
    home = build_tools(options.build or _BUILD)
    build_s = time.perf_counter() - began
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.out / "model.gguf"
    kind, note = "f32", ""
    if options.precision == "int4":
        # The checkpoint is in float16, so nothing is lost before the quantization.
        kind, note = "f16", "layers and embeddings in Q4_0 (groups of 32), head in Q6_K"
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        whole = model if kind == "f32" else Path(scratch) / "whole.gguf"
        command = [sys.executable, str(home / "source" / "convert_hf_to_gguf.py")]
        command += [str(options.checkpoint / "decoder"), "--outtype", kind]
        subprocess.run([*command, "--outfile", str(whole)], check=True)
        if whole != model:
            program = home / "build" / "bin" / "llama-quantize"
            subprocess.run([str(program), str(whole), str(model), "Q4_0"], check=True)
    link = options.out / "llama-bench"
    link.unlink(missing_ok=True)
    link.symlink_to(home / "build" / "bin" / "llama-bench")
    return {"note": note, "build_s": build_s}


def bench(folder: Path, threads: int, runs: int, extra: list[str]) -> dict[str, Any]:
    """A run of llama-bench, which warms up before every test.

    Args:
        folder: Of the model.
        threads: As many, each on a core of its own.
        runs: Samples of each test.
        extra: Which tests.

    Returns:
        `tests`: what llama-bench tells of each; `load_s`: from the start of loading until the
        context is ready; `resident_mb`: when the first test is warm.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    command = [str(folder / "llama-bench"), "-m", str(folder / "model.gguf"), "-t", str(threads)]
    command += ["-C", hex(sum(1 << core for core in cores)), "--cpu-strict", "1"]
    command += ["-r", str(runs), "-o", "json", "--progress", *extra]
    moments: dict[str, float] = {}
    resident = 0.0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        with subprocess.Popen(
            command, stdout=output, stderr=subprocess.PIPE, text=True, bufsize=1
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                what = line.rpartition(": ")[2].strip()
                moments.setdefault(what.split(" run")[0], time.perf_counter())
                if not resident and " run 1/" in line:
                    resident = _resident_mb(process.pid)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        tests = json.load(output)
    warm = next(moment for what, moment in moments.items() if what.startswith("warmup"))
    return {"tests": tests, "load_s": warm - moments["starting"], "resident_mb": resident}


def _resident_mb(process: int) -> float:
    """Memory of another process that is in RAM now, in MB of 10^6 bytes."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of llama-bench."""
    if shutil.which(str(options.out / "llama-bench")) is None:
        raise SystemExit("llama-bench is gone: prepare again")
    counts = ",".join(str(count) for count in options.prompts)
    given = (options.out, options.threads, options.runs)
    prompts = bench(*given, ["-p", counts, "-n", "0"])
    answers = bench(*given, ["-p", "0", "-n", str(options.tokens), "-d", counts])
    first = prompts["tests"][0]
    return {
        "load_s": prompts["load_s"],
        "resident_mb": prompts["resident_mb"],
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
        "vision_ms": None,
        "prefill_ms": {
            str(test["n_prompt"]): [sample / 1e6 for sample in test["samples_ns"]]
            for test in prompts["tests"]
        },
        "token_ms": {
            str(test["n_depth"]): [sample / 1e6 / options.tokens for sample in test["samples_ns"]]
            for test in answers["tests"]
        },
        "versions": {"llama.cpp": f"of llama-cpp-python {_VERSION}"},
        "note": f"llama-bench, no argmax; cache {first['type_k']}, batches of {first['n_ubatch']}",
    }


if __name__ == "__main__":
    run(prepare, measure)
