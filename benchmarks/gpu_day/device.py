"""On the machine with the GPU: what matters most first, every step on its own.

    python3 device.py [--installed] [--minutes 12]

Lies beside what `python -m benchmarks.gpu_day` prepared, and needs nothing but Python and the
driver; `--installed` takes the gap-runtime and onnxruntime-gpu that this Python has. A step that
fails or takes too long stops none that follows. All that is printed is in report.txt too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HOME: Final = Path(__file__).resolve().parent
_LINES: Final = 40
SHORT, LONG = 60, 150
"""Seconds that a step may take."""


class Day:
    """What is run, one after the other, until the time is up."""

    def __init__(self, environment: dict[str, str], minutes: float) -> None:
        """Begin."""
        self._environment, self._began, self._limit = environment, time.monotonic(), 60 * minutes
        self.report: list[str] = []

    def say(self, text: str) -> None:
        """Print a line, and keep it."""
        print(text, flush=True)
        self.report.append(text)
        (HOME / "report.txt").write_text("\n".join(self.report) + "\n", encoding="utf-8")

    def run(self, title: str, *command: str, limit: float = SHORT) -> None:
        """Run a command; its last lines and its exit code."""
        spent = time.monotonic() - self._began
        self.say(f"== {spent:.0f} s: {title}")
        limit = min(limit, self._limit - spent)
        if limit <= 1:
            self.say("   left out: the time is up")
            return
        try:
            done = subprocess.run(
                command,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
            self.say(text.decode(errors="replace") if isinstance(text, bytes) else text)
            self.say(f"   stopped after {limit:.0f} s")
        except OSError as error:
            self.say(f"   {error}")
        else:
            self.say("\n".join(done.stdout.splitlines()[-_LINES:]))
            self.say(f"   exit code {done.returncode}")

    def runtime(self, title: str, *arguments: str) -> None:
        """Run gap-runtime."""
        code = "import sys; from gap_runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
        self.run(title, sys.executable, "-c", code, *arguments)

    def part(self, title: str, name: str, *folders: str) -> None:
        """Run a part of parts.py."""
        self.run(title, sys.executable, str(HOME / "parts.py"), name, *folders, limit=LONG)


@contextlib.contextmanager
def installed(*, has_it: bool) -> Iterator[dict[str, str]]:
    """The environment in which gap-runtime and onnxruntime-gpu are found."""
    with tempfile.TemporaryDirectory() as home:
        site = Path(home) / "site"
        if not has_it:
            wheels = Path(home) / "wheels"
            wheels.mkdir()
            for path in sorted((HOME / "wheels").iterdir()):
                name = path.name.partition(".part")[0]
                with (wheels / name).open("ab") as file:
                    file.write(path.read_bytes())
            command = [
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-index",
                "--no-deps",
                "--no-compile",
            ]
            command += ["--target", str(site), *map(str, sorted(wheels.iterdir()))]
            subprocess.run([sys.executable, *command], check=True)
        yield dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
            "LD_LIBRARY_PATH": os.pathsep.join(
                [*find_libraries(), os.environ.get("LD_LIBRARY_PATH", "")]
            ),
        }


def find_libraries() -> list[str]:
    """Folders of CUDA's libraries that came as Python packages, with torch for example."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcublas.so.13")
        return []
    return sorted(
        {str(path) for base in sys.path for path in Path(base or ".").glob("nvidia/*/lib")}
    )


def spend(day: Day) -> None:
    """All of it, what matters most first."""
    small = sorted((HOME / "small").iterdir())
    wide = sorted((HOME / "wide").iterdir()) if (HOME / "wide").is_dir() else []
    # What answers nonsense where it is wrong comes before what is only slow.
    first = {"cuda-float16": 0, "cpu-float32": 1}
    small.sort(key=lambda path: (first.get(path.name, len(first)), path.name))
    day.run("the machine", "nvidia-smi")
    day.runtime("doctor", "doctor")
    day.part("memory and copies", "device")
    for folder in small:
        day.runtime(
            f"{folder.name} against PyTorch", "check", str(folder), "--backend", "onnxruntime:cuda"
        )
    for folder in wide:
        day.part(f"speed of {folder.name} at LLaVA-1.5-7B's widths", "steps", str(folder))
    for folder in small[:1]:
        day.part("steps of the small model", "steps", str(folder))
        day.part("first and further phrases", "phrases", str(folder))
        day.part("where a step's time goes", "profile", str((wide or small)[0]))
    day.say("== done")


def main() -> None:
    """The day."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--minutes", type=float, default=12)
    options = parser.parse_args()
    if not 0 < options.minutes < 1e6:  # NaN is neither
        parser.error(f"--minutes {options.minutes}: expected minutes, more than 0")
    if not (HOME / "small").is_dir():
        parser.error(f"{HOME}: nothing was prepared here; see python -m benchmarks.gpu_day")
    with installed(has_it=options.installed) as environment:
        spend(Day(environment, options.minutes))


if __name__ == "__main__":
    main()
