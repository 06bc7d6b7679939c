"""What the tools of a machine say, and which targets it then fits."""

import dataclasses
import json
from importlib import metadata
from types import SimpleNamespace

import pytest

from gap_runtime.backends import open_backend
from gap_runtime.cli.main import main
from gap_runtime.machines import survey as facts
from gap_runtime.machines.fit import fit_target, fit_targets
from gap_runtime.machines.memory import Memory
from gap_runtime.machines.survey import Gpu, Jetson, Machine
from gap_runtime.machines.target import list_targets, load_target

SMI = """\
Fri Nov 20 10:11:12 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |
|-----------------------------------------+------------------------+----------------------+
"""
H100 = "NVIDIA H100 80GB HBM3, 9.0, 580.95.05, 81559, 80994\n"
TWO_RTX = (
    "NVIDIA GeForce RTX 4090, 8.9, 570.86.10, 24564, 23900\n"
    "NVIDIA GeForce RTX 3060, 8.6, 570.86.10, 12288, 11000\n"
)
SHARED = Memory(total=7620 * 2**20, free=5120 * 2**20, free_with_swap=6000 * 2**20)
ORIN = "Orin (nvgpu), [N/A], 540.4.0, [N/A], [N/A]\n"
TEGRA_36 = (
    "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, "
    "DATE: Thu Sep 18 22:54:44 UTC 2025\n# KERNEL_VARIANT: oot\n"
)
TEGRA_39 = "# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Mon\n"
DPKG = """\
Package: nvidia-jetpack
Status: install ok installed
Priority: standard
Version: 6.2.1+b38
Depends: nvidia-jetpack-runtime (= 6.2.1+b38)
Description: NVIDIA Jetpack Meta Package
 Version: 9.9 is no field but a line of the text

Package: nvidia-l4t-core
Status: install ok installed
Version: 36.4.7-20250918154033

Package: libnvinfer10
Status: deinstall ok config-files
Version: 10.3.0.30-1+cuda12.5

Package: python3-libnvinfer
Status: install ok installed
Version: 10.3.0.30-1+cuda12.5
"""
ORIN_NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"


def make_machine(**changes):
    """A workstation without a GPU and with onnxruntime, fields replaced."""
    machine = Machine(
        system="Linux x86_64",
        python="3.12.3",
        memory_mib=24000,
        free_mib=20000,
        disk_free_mib=90000,
        driver=None,
        cuda=None,
        gpus=(),
        jetson=None,
        engines={},
        engine_cudas={},
        cuda_python=None,
        debian={},
        onnxruntimes={"onnxruntime": "1.31.1"},
        onnxruntime_cuda=None,
        onnxruntime_kernels=(),
        providers=("CPUExecutionProvider",),
        problems=(),
    )
    return dataclasses.replace(machine, **changes)


def make_gpu(capability="8.9", memory=24564):
    return Gpu(name="a GPU", compute_capability=capability, memory_mib=memory, free_mib=None)


def make_orin(**changes):
    """An Orin Nano with JetPack 6.2.1, whose TensorRT this Python sees."""
    return make_machine(
        **{
            "system": "Linux aarch64",
            "python": "3.10.12",
            "memory_mib": 7620,
            "cuda": "12.6",
            "gpus": (make_gpu("8.7", 7620),),
            "jetson": Jetson(model="NVIDIA Jetson Orin Nano", linux="36.4.7", jetpack="6.2.1"),
            "engines": {"tensorrt": "10.3.0"},
            "cuda_python": "12.6.2.post1",
            "debian": {"libnvinfer10": "10.3.0.30-1", "python3-libnvinfer": "10.3.0.30-1"},
            "onnxruntimes": {},
            "providers": (),
            **changes,
        }
    )


def find_missing(machine, target):
    """What the target's own backend says, as `doctor` asks it."""
    return open_backend(target.backend)[0].find_missing(machine, target)


def fit(machine, target):
    return fit_target(machine, load_target(target), find_missing)


def missing(machine, target):
    """The one line that stands against a target."""
    found = fit(machine, target)
    assert not found.fits
    assert len(found.missing) == 1, found.missing
    assert not found.notes
    return found.missing[0]


def test_gpus_of_a_datacenter():
    gpus, driver = facts.read_gpus(H100)
    assert driver == "580.95.05"
    assert gpus == (
        Gpu(
            name="NVIDIA H100 80GB HBM3",
            compute_capability="9.0",
            memory_mib=81559,
            free_mib=80994,
        ),
    )


def test_two_gpus():
    gpus, driver = facts.read_gpus(TWO_RTX)
    assert [gpu.compute_capability for gpu in gpus] == ["8.9", "8.6"]
    assert driver == "570.86.10"


@pytest.mark.parametrize(
    "text", ["", "No devices were found\n", "NVIDIA-SMI has failed, because\n"]
)
def test_no_gpus(text):
    assert facts.read_gpus(text) == ((), None)


@pytest.mark.parametrize(
    ("text", "version"),
    [(SMI, "13.0"), ("| KMD Version: 610.1  CUDA UMD Version: 13.2 |", "13.2"), ("", None)],
)
def test_cuda_version(text, version):
    assert facts.read_cuda_version(text) == version


@pytest.mark.parametrize(
    ("text", "version"), [(TEGRA_36, "36.4.7"), (TEGRA_39, "39.2.0"), ("", None)]
)
def test_jetson_linux(text, version):
    assert facts.read_jetson_linux(text) == version


def test_debian_packages_that_are_installed():
    names = ("nvidia-jetpack", "nvidia-l4t-core", "libnvinfer10", "python3-libnvinfer", "nano")
    assert facts.read_debian_versions(DPKG, names) == {
        "nvidia-jetpack": "6.2.1+b38",
        "nvidia-l4t-core": "36.4.7-20250918154033",
        "python3-libnvinfer": "10.3.0.30-1+cuda12.5",
    }


def test_a_version_is_read_without_running_the_module():
    assert facts.read_source_version('import os\n__version__ = "10.3.0"\nboom()\n') == "10.3.0"
    assert facts.read_source_version("from .version import __version__\n") is None


@pytest.mark.parametrize(
    ("model", "release", "debian", "expected"),
    [
        (
            ORIN_NANO,
            TEGRA_36,
            {"nvidia-jetpack": "6.2.1+b38"},
            (ORIN_NANO.strip("\0"), "36.4.7", "6.2.1"),
        ),
        (ORIN_NANO, TEGRA_36, {}, (ORIN_NANO.strip("\0"), "36.4.7", "6")),
        ("NVIDIA Jetson AGX Thor\0", TEGRA_39, {}, ("NVIDIA Jetson AGX Thor", "39.2.0", "7")),
        ("", "", {"nvidia-l4t-core": "39.2.0-2026"}, ("Jetson", "39.2.0", "7")),
    ],
)
def test_jetsons(model, release, debian, expected):
    jetson = facts.read_jetson(model, release, debian)
    assert (jetson.model, jetson.linux, jetson.jetpack) == expected


@pytest.mark.parametrize("model", ["", "Raspberry Pi 5 Model B Rev 1.0\0"])
def test_what_is_no_jetson(model):
    assert facts.read_jetson(model, "", {}) is None


def test_a_jetson_completes_what_its_tools_leave_out():
    gpus, _ = facts.read_gpus(ORIN)
    assert gpus[0].compute_capability is None
    jetson = Jetson(model="NVIDIA Jetson Orin Nano", linux=None, jetpack=None)
    for found in (gpus, ()):
        (gpu,) = facts.complete_gpus(found, jetson, SHARED)
        assert (gpu.compute_capability, gpu.memory_mib, gpu.free_mib) == ("8.7", 7620, 5120)
    assert facts.complete_gpus((), None, SHARED) == ()


def make_driver(start=0):
    """libcuda with one GPU; functions write through pointers and return an error code."""

    def writes(value):
        def write(*arguments):
            arguments[0]._obj.value = value
            return 0

        return write

    def name_device(name, _size, _handle):
        name.value = b"Orin"
        return 0

    def tell_capability(value, attribute, _handle):
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0

    return SimpleNamespace(
        cuInit=lambda _flags: start,
        cuDeviceGetCount=writes(1),
        cuDriverGetVersion=writes(12060),
        cuDeviceGet=writes(0),
        cuDeviceGetName=name_device,
        cuDeviceTotalMem_v2=writes(7620 * 2**20),
        cuDeviceGetAttribute=tell_capability,
    )


def test_the_drivers_own_library():
    (gpu,), cuda = facts.ask_driver(make_driver())
    assert cuda == "12.6"
    assert (gpu.name, gpu.compute_capability, gpu.memory_mib) == ("Orin", "8.7", 7620)


def test_a_driver_that_does_not_start():
    assert facts.ask_driver(make_driver(start=100)) == ((), None)


def test_every_target_is_judged():
    assert [each.target for each in fit_targets(make_machine(), find_missing)] == list_targets()


def test_without_a_gpu_the_cpu_fits():
    machine = make_machine()
    fitting = {each.target for each in fit_targets(machine, find_missing) if each.fits}
    plain = [each for each in map(load_target, list_targets()) if each.backend == "onnxruntime"]
    assert fitting == {each.name for each in plain if each.provider is None}
    assert {"cpu", "portable", "standard"} <= fitting
    found = fit(machine, "datacenter-hopper")
    assert "no NVIDIA GPU found, needs one of compute capability 9.0" in found.missing[0]
    assert (
        "needs tensorrt >=10.16,<12, found none; pip install 'gap-runtime[tensorrt]'"
        in (found.missing[1])
    )
    assert "pip install 'cuda-python>=13,<14'" in found.missing[2]


def test_older_onnxruntime_fits_portable_alone():
    machine = make_machine(onnxruntimes={"onnxruntime": "1.23.2"}, python="3.10.12")
    assert fit(machine, "portable").fits
    text = missing(machine, "cpu")
    assert "needs onnxruntime >=1.24, found onnxruntime 1.23.2" in text
    assert "--target portable" in text


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"onnxruntimes": {}, "providers": ()}, "pip install 'gap-runtime[cpu]'"),
        ({"providers": ()}, "does not work"),
    ],
)
def test_no_working_onnxruntime(changes, part):
    machine = make_machine(**changes)
    assert part in missing(machine, "cpu")
    assert not any(each.fits for each in fit_targets(machine, find_missing))


def test_a_workstation_with_tensorrt_rtx():
    machine = make_machine(
        gpus=(make_gpu("8.9"),),
        cuda="13.0",
        engines={"tensorrt_rtx": "1.7.1.116"},
        cuda_python="13.4.4",
    )
    assert fit(machine, "rtx").fits
    text = missing(machine, "datacenter-ada")
    assert text == "needs tensorrt >=10.16,<12, found none; pip install 'gap-runtime[tensorrt]'"


def test_another_gpu():
    machine = make_machine(
        gpus=(make_gpu("9.0"),), engines={"tensorrt": "10.16.2"}, cuda_python="13.4.4"
    )
    assert fit(machine, "datacenter-hopper").fits
    text = missing(machine, "datacenter-ampere")
    assert text.startswith("needs a GPU of compute capability 8.0 or 8.6, found a GPU (9.0)")


def make_rtx(**changes):
    """A workstation with an RTX card and all that engines need; its driver runs CUDA 13.0."""
    machine = make_machine(
        gpus=(make_gpu(),),
        cuda="13.0",
        engines={"tensorrt_rtx": "1.7.1.116"},
        engine_cudas={"tensorrt_rtx": 13},
        cuda_python="13.4.4",
    )
    return dataclasses.replace(machine, **changes)


X86_64 = ("7.5", "8.0", "8.6", "8.9", "9.0a", "12.0a")
AARCH64 = ("8.9", "9.0a", "12.0a", "12.1a")
GPU_WHEEL = {
    "gpus": (make_gpu(),),
    "cuda": "13.0",
    "onnxruntimes": {"onnxruntime-gpu": "1.31.1"},
    "onnxruntime_cuda": "13.0",
    "providers": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, ()),
        ({"gpus": ()}, ("no NVIDIA GPU found",)),
        (
            {"onnxruntimes": {"onnxruntime": "1.31.1"}, "providers": ("CPUExecutionProvider",)},
            ("needs CUDAExecutionProvider, onnxruntime 1.31.1 has none", "'gap-runtime[gpu]'"),
        ),
        (
            {"onnxruntimes": {"onnxruntime-gpu": "1.29.0"}},
            ("needs onnxruntime-gpu >=1.30",),
        ),
        ({"cuda": "12.8"}, ("is made for CUDA 13.0, this driver runs CUDA 12.8; update",)),
        ({"cuda": None}, ()),
        # What its wheels for x86-64 and for aarch64 have kernels for.
        ({"onnxruntime_kernels": X86_64, "gpus": (make_gpu("8.9"),)}, ()),
        ({"onnxruntime_kernels": X86_64, "gpus": (make_gpu("12.0"),)}, ()),
        (
            {"onnxruntime_kernels": X86_64, "gpus": (make_gpu("10.0"),)},
            ("of 10.0; export with --target datacenter-blackwell, whose engines run on it",),
        ),
        (
            {"onnxruntime_kernels": X86_64, "gpus": (make_gpu("7.0"),)},
            (
                "onnxruntime-gpu 1.31.1 has kernels for compute capability 7.5, 8.0, 8.6, ",
                "9.0 and 12.0 alone, the GPU here is of 7.0; export with --target cpu",
            ),
        ),
        # One of two is enough, and what nobody tells is not held against it.
        (
            {"onnxruntime_kernels": X86_64, "gpus": (make_gpu("7.0"), make_gpu("8.9"))},
            (),
        ),
        ({"onnxruntime_kernels": X86_64, "gpus": (make_gpu(None),)}, ()),
        ({"onnxruntime_kernels": AARCH64, "gpus": (make_gpu("12.1"),)}, ()),
        (
            {"onnxruntime_kernels": AARCH64, "gpus": (make_gpu("8.7"),)},
            ("of 8.7; export with --target jetson-orin-jp6 or jetson-orin-jp7, whose engines",),
        ),
        (
            {"onnxruntime_kernels": AARCH64, "gpus": (make_gpu("11.0"),)},
            ("of 11.0; export with --target jetson-thor, whose engines",),
        ),
    ],
)
def test_what_onnxruntimes_cuda_needs(changes, parts):
    found = fit(make_machine(**(GPU_WHEEL | changes)), "cuda")
    assert found.fits == (not parts)
    for part in parts:
        assert part in " ".join(found.missing)


def test_a_driver_that_is_too_old_for_the_packages():
    """CUDA runs what was made for its own major version and those before."""
    assert fit(make_rtx(), "rtx").fits
    found = fit(make_rtx(cuda="12.4"), "rtx")
    assert not found.fits
    engine, cuda_python = found.missing
    assert "tensorrt_rtx 1.7.1.116 is made for CUDA 13, this driver runs CUDA 12.4" in engine
    assert "and pip install 'gap-runtime[rtx-cu12]'" in engine
    assert cuda_python.startswith("cuda-python 13.4.4 does not start with this driver, which runs")
    assert "pip install 'cuda-python>=12,<13'" in cuda_python
    fitting = make_rtx(cuda="12.4", engine_cudas={"tensorrt_rtx": 12}, cuda_python="12.9.10")
    assert fit(fitting, "rtx").fits


@pytest.mark.parametrize(
    ("cuda", "version", "fits"),
    [
        ("12.6", "12.6.2.post1", True),
        ("12.6", "12.9.10", False),
        ("13.2", "13.2.1", True),
        ("13.2", "13.4.4", False),
    ],
)
def test_a_jetsons_driver_takes_no_later_minor_version(cuda, version, fits):
    assert fit(make_orin(cuda=cuda, cuda_python=version), "jetson-orin-jp6").fits == fits
    # A workstation's does.
    assert fit(make_rtx(cuda="13.0", cuda_python="13.4.4"), "rtx").fits


@pytest.mark.parametrize(
    ("version", "fits"),
    [("10.16.2", True), ("11.0.0.114", False), ("11.4.0.106", False), ("11.4.1.5", True)],
)
def test_tensorrt_11_on_a_jetson_begins_with_the_first_that_jetpack_has(version, fits):
    machine = make_orin(cuda="13.2", cuda_python="13.2.1", engines={"tensorrt": version})
    assert fit(machine, "jetson-orin-jp7").fits == fits


def test_what_onnxruntime_was_built_for():
    text = "package_name = 'onnxruntime-gpu'\n__version__ = '1.31.1'\ncuda_version = '13.0'\n"
    assert facts.read_built_for(text) == "13.0"
    assert facts.read_built_for("package_name = 'onnxruntime'\n") is None
    assert facts.is_newer("13.0", "12.4")
    assert not facts.is_newer("12.8", "12.4")
    assert not facts.is_newer(None, "12.4")
    assert not facts.is_newer("13.0", None)


def test_cuda_python_of_the_machines_cuda():
    machine = make_orin(cuda_python=None)
    assert "pip install 'cuda-python==12.6.*'" in missing(machine, "jetson-orin-jp6")


def test_a_jetson_with_jetpack_6_fits_its_own_target_alone():
    machine = make_orin()
    fitting = [each.target for each in fit_targets(machine, find_missing) if each.fits]
    assert fitting == ["jetson-orin-jp6"]
    assert not fit(machine, "jetson-orin-jp6").notes
    text = missing(machine, "jetson-orin-jp7")
    assert text.startswith("needs tensorrt >=10.16,<12,")
    assert ", found tensorrt 10.3.0; it comes with JetPack: install the one" in text


@pytest.mark.parametrize(
    ("debian", "part"),
    [
        ({}, "sudo apt install nvidia-jetpack"),
        ({"libnvinfer10": "10.3.0.30-1"}, "sudo apt install python3-libnvinfer"),
        (
            {"libnvinfer10": "10.3.0.30-1", "python3-libnvinfer": "10.3.0.30-1"},
            "python3 -m venv --system-site-packages",
        ),
    ],
)
def test_how_to_get_jetpacks_tensorrt(debian, part):
    assert part in missing(make_orin(engines={}, debian=debian), "jetson-orin-jp6")


def test_jetpacks_tensorrt_is_for_jetsons():
    found = fit(make_machine(), "jetson-thor")
    assert any("on the Jetson itself" in text for text in found.missing)
    assert not any("pip install 'gap-runtime[tensorrt]'" in text for text in found.missing)


def test_a_smaller_machine_of_the_kind_is_noted():
    found = fit(make_orin(gpus=(make_gpu("8.7", 3800),)), "jetson-orin-jp6")
    assert found.fits
    assert "counts on 8192 MiB, this machine has 3800" in found.notes[0]


def test_every_line_is_one_line():
    for machine in (make_machine(), make_orin(engines={}), make_machine(onnxruntimes={})):
        for each in fit_targets(machine, find_missing):
            for text in (*each.missing, *each.notes):
                assert "\n" not in text
                assert not text.endswith(".")


@pytest.fixture
def alone(monkeypatch):
    """No tool answers and no file is there."""
    monkeypatch.setattr(facts, "_ask", lambda *_: "")
    monkeypatch.setattr(facts, "_read", lambda _: "")
    monkeypatch.setattr(facts, "read_memory", lambda: None)

    def refuse(_):
        raise OSError

    monkeypatch.setattr(facts.ctypes, "CDLL", refuse)


@pytest.mark.usefixtures("alone")
def test_a_machine_that_tells_nothing(tmp_path):
    machine = facts.survey_machine(tmp_path)
    assert (machine.memory_mib, machine.gpus, machine.driver, machine.cuda) == (
        None,
        (),
        None,
        None,
    )
    assert machine.jetson is None
    assert machine.disk_free_mib > 0


@pytest.mark.usefixtures("alone")
def test_two_onnxruntimes_are_a_problem(tmp_path, monkeypatch):
    class Found:
        version = "1.31.1"

    monkeypatch.setattr(
        metadata, "distributions", lambda name: [Found()] if "onnx" in name else []
    )
    monkeypatch.setattr(facts, "_ask_providers", lambda: ((), "ImportError: no symbol"))
    machine = facts.survey_machine(tmp_path)
    assert machine.onnxruntimes == {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    both, broken = machine.problems
    assert "pip uninstall onnxruntime onnxruntime-gpu" in both
    assert "ImportError: no symbol" in broken


@pytest.mark.usefixtures("alone")
def test_an_engine_package_without_metadata(tmp_path, monkeypatch):
    """As on JetPack, where TensorRT comes as a Debian package."""
    module = tmp_path / "tensorrt" / "__init__.py"
    module.parent.mkdir()
    module.write_text('__version__ = "10.3.0"\nraise RuntimeError("not to be run")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(metadata, "distributions", lambda name: [])  # noqa: ARG005
    monkeypatch.setattr(facts, "_read", lambda path: path.read_text() if path == module else "")
    assert facts.survey_machine(tmp_path).engines["tensorrt"] == "10.3.0"


def run(capsys, *arguments):
    code = main(["doctor", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.fixture
def put_machine(monkeypatch):
    def put(machine):
        monkeypatch.setattr(facts, "survey_machine", lambda _: machine)

    return put


def test_the_command_on_this_machine(capsys):
    code, out, _ = run(capsys, "--json")
    found = json.loads(out)
    assert [each["target"] for each in found["targets"]] == list_targets()
    assert code == (0 if any(each["fits"] for each in found["targets"]) else 5)


def test_the_command_for_people(capsys, put_machine):
    put_machine(make_orin(problems=("something is wrong",)))
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    for part in (
        "JetPack 6.2.1, Jetson Linux 36.4.7",
        "compute capability 8.7, 7.4 GiB",
        "something is wrong",
        "not installed",
    ):
        assert part in out
    # What fits comes first, a line for each of the others, how to mend it only where asked for.
    lines = [line for line in out.splitlines() if line.startswith("target ")]
    assert len(lines) == len(list_targets())
    assert lines[0] == "target jetson-orin-jp6       fits"
    assert all("  does not fit: " in line for line in lines[1:])
    assert "it comes with JetPack" not in out
    assert out.endswith("gap-runtime doctor --all says how to get what is missing\n")
    _, out, _ = run(capsys, "--all")
    assert "it comes with JetPack" in out
    assert "doctor --all" not in out


def test_no_target_fits(capsys, put_machine):
    put_machine(make_machine(onnxruntimes={}, providers=()))
    code, out, err = run(capsys)
    assert code == 5
    assert "does not fit" in out
    assert err.startswith("error: no target fits this machine; ")
    assert err.count("\n") == 1
