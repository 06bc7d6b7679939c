"""Watts and memory of devices while work runs, where the system says them.

    ina       rails of a board that current sensors of Texas Instruments watch, as on a Jetson
              (/sys/class/hwmon)
    rapl      processor packages and their memory (/sys/class/powercap), which most systems let
              root alone read
    nvml      NVIDIA GPUs, through the package nvidia-ml-py
    unified   the memory that GPU and processor of a Jetson share

`Meter` reads them in a thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

from gap_runtime.machines.memory import read_memory

_ROOT: Final = Path("/")
_PERIOD: Final = 0.1
_MIB: Final = 2**20
_CHANNELS: Final = (1, 2, 3)
"""Of an INA3221. What its driver numbers beyond them are shunts and sums."""
_WITHIN_PACKAGE: Final = ("core", "uncore")
"""Zones whose energy is in their package's already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Mean watts of a rail, a processor package or a GPU. `source` is `ina`, `rapl` or `nvml`."""

    source: str
    name: str
    watts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePeak:
    """The most memory that was taken on a device. `source` is `nvml` or `unified`."""

    source: str
    name: str
    peak_mib: float


class Gauge(Protocol):
    """Something whose power or memory can be read. What it cannot say is None."""

    source: str
    name: str

    def read_watts(self) -> float | None:
        """Watts now."""

    def read_joules(self) -> float | None:
        """Joules since some moment; where there is this, nobody asks for watts."""

    def read_bytes(self) -> int | None:
        """Bytes that this process holds there."""


class Meter:
    """Reads gauges while work runs.

    with Meter() as meter:
        ...                # memory counts from here on
        meter.begin()      # power counts from here on
        ...
    meter.power, meter.memory
    """

    def __init__(self, root: Path = _ROOT, *, period: float = _PERIOD) -> None:
        """Find what there is to read.

        Args:
            root: Folder that holds sys/, proc/ and etc/.
            period: Seconds from one reading to the next.
        """
        self.power: tuple[Power, ...] = ()
        self.memory: tuple[DevicePeak, ...] = ()
        self._tallies = [_Tally(gauge) for gauge in find_gauges(root)]
        self._period = period
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    # Self is not in Python 3.10.
    def __enter__(self) -> Meter:  # noqa: PYI034
        """Begin to read."""
        if self._tallies:
            self._thread = threading.Thread(target=self._watch, name="gauges", daemon=True)
            self._thread.start()
        return self

    def begin(self) -> None:
        """Count power from now on."""
        with self._lock:
            for tally in self._tallies:
                tally.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Read a last time, and say what was found."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        for tally in self._tallies:
            tally.read()
        # A GPU on which nothing was taken did not do the work.
        used = [tally for tally in self._tallies if tally.peak != 0]
        self.power = tuple(
            Power(source=tally.gauge.source, name=tally.gauge.name, watts=watts)
            for tally in used
            if (watts := tally.mean_watts()) is not None
        )
        self.memory = tuple(
            DevicePeak(
                source=tally.gauge.source, name=tally.gauge.name, peak_mib=tally.peak / _MIB
            )
            for tally in used
            if tally.peak is not None
        )

    def _watch(self) -> None:
        while not self._done.wait(self._period):
            with self._lock:
                for tally in self._tallies:
                    tally.read()


class _Tally:
    """What a gauge said so far. `peak` is in bytes, None where it says nothing of memory."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.peak = gauge.read_bytes()
        self._began: tuple[float, float | None] | None = None
        self._joules = 0.0
        self._seconds = 0.0
        self._watts: list[float] = []

    def begin(self) -> None:
        """Power counts from now on."""
        self._began = time.monotonic(), self.gauge.read_joules()

    def read(self) -> None:
        held = self.gauge.read_bytes()
        if held is not None:
            self.peak = max(self.peak or 0, held)
        if self._began is None:
            return
        moment, joules = self._began
        if joules is None:
            watts = self.gauge.read_watts()
            if watts is not None:
                self._watts.append(watts)
            return
        now = self.gauge.read_joules()
        if now is not None:
            self._joules, self._seconds = now - joules, time.monotonic() - moment

    def mean_watts(self) -> float | None:
        """Since `begin`; None where there was no reading."""
        if self._seconds:
            return self._joules / self._seconds
        return sum(self._watts) / len(self._watts) if self._watts else None


def find_gauges(root: Path = _ROOT) -> list[Gauge]:
    """Everything here that says something now.

    Args:
        root: Folder that holds sys/, proc/ and etc/.
    """
    found: list[Gauge] = [*_find_rails(root), *_find_zones(root), *_find_gpus()]
    if (root / "etc" / "nv_tegra_release").exists():
        found.append(_UnifiedMemory(root))
    return [gauge for gauge in found if _says_something(gauge)]


def _says_something(gauge: Gauge) -> bool:
    return any(
        value is not None
        for value in (gauge.read_joules(), gauge.read_watts(), gauge.read_bytes())
    )


class _Rail:
    """A rail that an INA chip watches."""

    source = "ina"

    def __init__(self, name: str, read: Callable[[], float | None]) -> None:
        self.name = name
        self.read_watts = read

    def read_joules(self) -> float | None:
        """None: the chip knows the present alone."""
        return None

    def read_bytes(self) -> int | None:
        """None."""
        return None


def _find_rails(root: Path) -> Iterator[_Rail]:
    """Rails of every INA chip, by the names that the board gives them."""
    for chip in sorted((root / "sys" / "class" / "hwmon").glob("hwmon*"), key=_natural):
        kind = _read(chip / "name")
        if not kind.startswith("ina"):
            continue
        for channel in _CHANNELS:
            label = (
                _read(chip / f"in{channel}_label")
                or _read(chip / f"power{channel}_label")
                or _read(chip / "label")
                or f"{kind} channel {channel}"
            )
            if _read(chip / f"in{channel}_enable") == "0":
                continue
            if (chip / f"power{channel}_input").exists():
                yield _Rail(label, _make_reader(1e-6, chip / f"power{channel}_input"))
            elif (chip / f"curr{channel}_input").exists():
                # Millivolts and milliamperes.
                files = (chip / f"in{channel}_input", chip / f"curr{channel}_input")
                yield _Rail(label, _make_reader(1e-6, *files))


def _make_reader(unit: float, *files: Path) -> Callable[[], float | None]:
    """Gives the product of the numbers in some files, by a unit."""

    def read() -> float | None:
        product = unit
        for file in files:
            number = _read_number(file)
            if number is None:
                return None
            product *= number
        return product

    return read


class _Zone:
    """A zone of the processor whose energy is counted; the counter begins anew at its end."""

    source = "rapl"

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._file = folder / "energy_uj"
        self._range = (_read_number(folder / "max_energy_range_uj") or 0) + 1
        self._last = _read_number(self._file)
        self._sum = 0

    def read_joules(self) -> float | None:
        """Since this object is there."""
        now = _read_number(self._file)
        if now is None or self._last is None:
            return None
        self._sum += now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return self._sum * 1e-6

    def read_watts(self) -> float | None:
        """None: energy says more."""
        return None

    def read_bytes(self) -> int | None:
        """None."""
        return None


def _find_zones(root: Path) -> Iterator[_Zone]:
    """Packages, their memory, and the whole board where the processor counts it."""
    folders = (root / "sys" / "class" / "powercap").glob("intel-rapl:*")
    for folder in sorted(folders, key=_natural):
        name = _read(folder / "name")
        if not name or name in _WITHIN_PACKAGE:
            continue
        around = folder.parent / folder.name.rpartition(":")[0]
        inside = folder.name.count(":") > 1
        yield _Zone(folder, f"{_read(around / 'name')} {name}" if inside else name)


class _Gpu:
    """A GPU of NVIDIA's. `nvml` is the module that asks for it."""

    source = "nvml"

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self.name: str = nvml.nvmlDeviceGetName(self._handle)
        self._before = self._read_used()

    def read_joules(self) -> float | None:
        """Since the driver was loaded."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption", 1e-3)

    def read_watts(self) -> float | None:
        """Now."""
        return self._ask("nvmlDeviceGetPowerUsage", 1e-3)

    def read_bytes(self) -> int | None:
        """Of this process; where the driver does not tell processes apart, of all since then."""
        with suppress(self._nvml.NVMLError):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
        used = self._read_used()
        return None if used is None or self._before is None else max(used - self._before, 0)

    def _read_used(self) -> int | None:
        with suppress(self._nvml.NVMLError):
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        return None

    def _ask(self, name: str, unit: float) -> float | None:
        with suppress(self._nvml.NVMLError):
            return float(getattr(self._nvml, name)(self._handle)) * unit
        return None


def _find_gpus() -> Iterator[_Gpu]:
    """None where the package or the driver is not there."""
    try:
        import pynvml  # noqa: PLC0415 - where a GPU may be
    except ImportError:
        return
    with suppress(pynvml.NVMLError):
        # Until the process ends: another user of the library may have begun before.
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):
                yield _Gpu(pynvml, index)


class _UnifiedMemory:
    """Memory that went from what was free at first, on a machine whose GPU takes of the same."""

    source = "unified"
    name = "machine"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._free = self._read_free()

    def _read_free(self) -> int | None:
        memory = read_memory(self._root)
        return None if memory is None else memory.free

    def read_bytes(self) -> int | None:
        """Of all processes since then."""
        now = self._read_free()
        return None if now is None or self._free is None else max(self._free - now, 0)

    def read_watts(self) -> float | None:
        """None."""
        return None

    def read_joules(self) -> float | None:
        """None."""
        return None


def _natural(path: Path) -> tuple[int, ...]:
    """Sorts hwmon10 behind hwmon9, and intel-rapl:0:1 behind intel-rapl:0."""
    digits = "".join(letter if letter.isdecimal() else " " for letter in path.name)
    return tuple(int(number) for number in digits.split())


def _read_number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.lstrip("-").isdecimal() else None


def _read(path: Path) -> str:
    """What a file holds; empty where it cannot be read, as with sensors that sleep."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
