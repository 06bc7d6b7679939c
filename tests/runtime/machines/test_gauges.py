"""Watts and memory from made-up trees of /sys and /proc, and from a made-up driver of NVIDIA's."""

import ctypes
import os
import sys
import time

import pytest

from gap_runtime.machines import gauges
from gap_runtime.machines.gauges import DevicePeak, Meter, Power, find_gauges

MIB = 2**20


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes files below a made-up root, which has no GPU, and gives the root."""
    monkeypatch.setattr(gauges, "_find_gpus", lambda: iter(()))

    def put(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n", encoding="utf-8")
        return tmp_path

    return put


def chip(number, name, **files):
    return {
        f"sys/class/hwmon/hwmon{number}/{file}": value
        for file, value in {"name": name, **files}.items()
    }


# As on an Orin Nano: three rails; in4 to in6 are shunts in microvolts, in7 and curr4 are sums.
ORIN = chip(
    10,
    "ina3221",
    in1_label="VDD_IN",
    in1_input=5000,
    curr1_input=1480,
    in2_label="VDD_CPU_GPU_CV",
    in2_input=5008,
    curr2_input=400,
    in3_label="VDD_SOC",
    in3_input=5016,
    curr3_input=250,
    in3_enable=1,
    in4_input=7400,
    in7_input=10650,
    in7_label="sum of shunt voltages",
    curr4_input=2130,
)
NO_POWER = chip(0, "nvme", temp1_input=35850) | chip(1, "cpu_thermal", temp1_input=51000)


def test_the_rails_of_a_board(write):
    root = write(ORIN | NO_POWER)
    found = {gauge.name: gauge.read_watts() for gauge in find_gauges(root)}
    assert found == pytest.approx(
        {"VDD_IN": 7.4, "VDD_CPU_GPU_CV": 2.0032, "VDD_SOC": 1.254}, rel=1e-9
    )


def test_chips_that_compute_watts_themselves_and_switched_off_rails(write):
    off = {"in1_label": "OFF", "in1_enable": 0, "in1_input": 0, "curr1_input": 0}
    one = {"in1_input": 12000, "curr1_input": 900, "power1_input": 11_250_000}
    root = write(chip(9, "ina238", label="VIN", **one) | chip(10, "ina238", **one))
    write(chip(11, "ina3221", **off))
    found = [(gauge.name, gauge.read_watts()) for gauge in find_gauges(root)]
    assert found == [("VIN", 11.25), ("ina238 channel 1", 11.25)]


def test_a_rail_is_averaged_over_what_is_timed(write):
    root = write(ORIN)
    current = root / "sys/class/hwmon/hwmon10/curr1_input"
    with Meter(root, period=0.005) as meter:
        current.write_text("9000\n")
        time.sleep(0.03)
        current.write_text("1000\n")
        meter.begin()
        time.sleep(0.05)
        # A sensor that says nothing for a while.
        current.write_text("")
        time.sleep(0.02)
        current.write_text("1000\n")
    assert Power(source="ina", name="VDD_IN", watts=pytest.approx(5.0)) in meter.power
    assert len(meter.power) == 3
    assert meter.memory == ()


def zone(path, name, energy, most=262143328850):
    home = f"sys/class/powercap/{path}"
    return {
        f"{home}/name": name,
        f"{home}/energy_uj": energy,
        f"{home}/max_energy_range_uj": most,
    }


PACKAGE = (
    zone("intel-rapl:0", "package-0", 9_000_000, 9_999_999)
    | zone("intel-rapl:0:0", "core", 10)
    | zone("intel-rapl:0:1", "dram", 1_000_000)
    | {"sys/class/powercap/intel-rapl/enabled": 1}
)


def test_the_counter_of_a_package_begins_anew_at_its_end(write):
    root = write(PACKAGE)
    found = {gauge.name: gauge for gauge in find_gauges(root)}
    # Cores are in their package.
    assert set(found) == {"package-0", "package-0 dram"}
    package = found["package-0"]
    first = package.read_joules()
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    seen = []
    for value in (9_500_000, 0, 4_000_000):
        counter.write_text(f"{value}\n")
        seen.append(package.read_joules() - first)
    assert seen == pytest.approx([0.5, 1.0, 5.0])


def test_watts_of_a_package_are_joules_by_seconds(write, monkeypatch):
    root = write(PACKAGE)
    now = [100.0]
    monkeypatch.setattr(gauges.time, "monotonic", lambda: now[0])
    with Meter(root, period=30) as meter:
        (root / "sys/class/powercap/intel-rapl:0:1/energy_uj").write_text("2000000")
        meter.begin()
        (root / "sys/class/powercap/intel-rapl:0:1/energy_uj").write_text("8000000")
        now[0] = 102.0
    assert {each.name: each.watts for each in meter.power}["package-0 dram"] == pytest.approx(3)


def test_a_counter_that_this_user_may_not_read_is_left_out(write, monkeypatch):
    read = gauges._read
    monkeypatch.setattr(
        gauges, "_read", lambda path: "" if path.name == "energy_uj" else read(path)
    )
    assert find_gauges(write(PACKAGE)) == []


def meminfo(free_mib):
    return {"proc/meminfo": f"MemTotal: 7802880 kB\nMemAvailable: {free_mib * 1024} kB"}


def test_memory_that_a_jetson_shares(write):
    root = write(meminfo(5000))
    assert find_gauges(root) == []
    write({"etc/nv_tegra_release": "# R36 (release), REVISION: 4.7"})
    with Meter(root, period=0.005) as meter:
        write(meminfo(3500))
        time.sleep(0.04)
        write(meminfo(4800))
    assert meter.memory == (DevicePeak(source="unified", name="machine", peak_mib=1500.0),)


def test_a_system_that_says_nothing(write):
    with Meter(write(NO_POWER)) as meter:
        meter.begin()
    assert (meter.power, meter.memory) == ((), ())


class Driver:
    """libnvidia-ml as the package nvidia-ml-py calls it: C functions that fill what they point to.

    `gpus` are dicts: `used` in bytes, `mine` the bytes of this process or None, `energy` in
    millijoules or None, `watts`.
    """

    def __init__(self, *gpus):
        self.gpus = gpus

    def nvmlInitWithFlags(self, _):  # noqa: N802 - the library's names
        return 0

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):  # noqa: N802
        address = ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))
        # Null is no handle.
        address[0] = index.value + 1
        return 0

    def _find(self, handle):
        return self.gpus[ctypes.cast(handle, ctypes.c_void_p).value - 1]

    def nvmlDeviceGetName(self, handle, name, _):  # noqa: N802
        name.value = self._find(handle)["name"].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):  # noqa: N802
        used = self._find(handle)["used"]
        if used is None:
            return 3
        memory._obj.used = used
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, found):  # noqa: N802
        mine = self._find(handle)["mine"]
        if mine is None:
            return 3
        if found is None:
            count._obj.value = 2
            return 7
        count._obj.value = 2
        found[0].pid, found[0].usedGpuMemory = 1, 77 * MIB
        found[1].pid, found[1].usedGpuMemory = os.getpid(), mine
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, energy):  # noqa: N802
        value = self._find(handle)["energy"]
        if value is None:
            return 3
        energy._obj.value = value
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, power):  # noqa: N802
        power._obj.value = self._find(handle)["power"]
        return 0


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """A function that puts a driver under the real package and gives a root without sensors."""
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def put(*gpus):
        monkeypatch.setattr(pynvml, "nvmlLib", Driver(*gpus))
        return tmp_path

    return put


def gpu(name="NVIDIA H", **changes):
    return {"name": name, "used": 500 * MIB, "mine": None, "energy": None, "power": 0} | changes


def test_a_gpu_that_tells_processes_apart_and_counts_energy(drive, monkeypatch):
    card = gpu(mine=100 * MIB, energy=7_000_000, power=1)
    other = gpu("NVIDIA I", mine=0, energy=1)
    now = [100.0]
    monkeypatch.setattr(gauges.time, "monotonic", lambda: now[0])
    with Meter(drive(card, other), period=30) as meter:
        card["mine"] = 900 * MIB
        meter.begin()
        card["energy"] += 600_000
        now[0] = 104.0
    assert meter.power == (Power(source="nvml", name="NVIDIA H", watts=pytest.approx(150)),)
    assert meter.memory == (DevicePeak(source="nvml", name="NVIDIA H", peak_mib=900.0),)


def test_a_gpu_that_tells_less(drive):
    card = gpu(power=61_500)
    with Meter(drive(card), period=0.005) as meter:
        card["used"] += 250 * MIB
        meter.begin()
        time.sleep(0.03)
        card["used"] -= 200 * MIB
    assert meter.power == (Power(source="nvml", name="NVIDIA H", watts=pytest.approx(61.5)),)
    assert meter.memory == (DevicePeak(source="nvml", name="NVIDIA H", peak_mib=250.0),)


def test_a_gpu_that_says_nothing_of_memory_still_draws_watts(drive):
    with Meter(drive(gpu(used=None, power=9_000))) as meter:
        meter.begin()
    assert [each.watts for each in meter.power] == [9.0]
    assert meter.memory == ()


def test_a_package_without_a_driver(monkeypatch, tmp_path):
    pynvml = pytest.importorskip("pynvml")

    def fail():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert find_gauges(tmp_path) == []


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_gauges(tmp_path) == []
