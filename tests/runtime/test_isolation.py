"""The runtime imports where none of the workstation's libraries are."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import gap_runtime
from gap_runtime.machines.target import list_targets, load_target

MASKED = {
    *("torch", "transformers", "onnx", "gap_export", "onnxruntime"),
    *(package for name in list_targets() for package in load_target(name).packages),
}
"""The exporter's libraries, and those of all backends, as their targets name them."""
# Python's modules that Windows does not have: targets/rtx.toml is for Windows too.
UNIX_ALONE = ("fcntl", "grp", "pwd", "resource", "termios")
SURVEYING = ("gap_runtime.machines.survey", "importlib.metadata", "packaging")
"""What looks for libraries on a machine."""
IMPORT_ALL = """
import importlib, pkgutil, sys
for name in {masked!r}:
    sys.modules[name] = None
import gap_runtime
names = [found.name for found in pkgutil.walk_packages(gap_runtime.__path__, "gap_runtime.")]
from importlib.util import find_spec
served = find_spec("starlette") is not None
for name in names:
    # The service alone stands on libraries that the base install has not.
    if served or not name.startswith("gap_runtime.service."):
        importlib.import_module(name)
print(*names)
"""


def run_python(code):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_module_imports_with_the_workstations_libraries_masked():
    done = run_python(IMPORT_ALL.format(masked=MASKED))
    assert done.returncode == 0, done.stderr
    done = run_python(IMPORT_ALL.format(masked=(*MASKED, *UNIX_ALONE)))
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    folder = Path(gap_runtime.__file__).parent
    stems = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert found >= {f"gap_runtime.{stem}" for stem in stems}
    assert "gap_runtime.backends.onnxruntime.session" in found
    assert {
        "gap_runtime.cli.main",
        "gap_runtime.grounding.grounder",
        "gap_runtime.grounding.check",
    } <= found


def test_the_mask_works():
    done = run_python("import sys\nsys.modules['onnxruntime'] = None\nimport onnxruntime")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_missing_onnxruntime_says_what_to_install():
    code = """
import sys
sys.modules["onnxruntime"] = None
from gap_runtime.backends import onnxruntime
from gap_runtime.errors import BackendMissingError
try:
    onnxruntime.open_stage(None, None, "")
except BackendMissingError as error:
    print(error)
"""
    done = run_python(code)
    assert "pip install 'gap-runtime[cpu]'" in done.stdout, done.stderr


def test_public_names_are_those_of_their_modules():
    for name in gap_runtime.__all__:
        assert getattr(gap_runtime, name) is not None
    assert gap_runtime.Bundle.__module__ == "gap_runtime.bundle.bundle"
    assert gap_runtime.Grounder.__module__ == "gap_runtime.grounding.grounder"
    assert not hasattr(gap_runtime, "Exporter")
    assert {*gap_runtime.__all__} <= {*dir(gap_runtime)}


def test_importing_the_package_loads_no_library():
    code = "import sys, gap_runtime\nprint('numpy' in sys.modules, 'PIL' in sys.modules)"
    assert run_python(code).stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("gap_runtime.grounding.grounder", ("rich", "gap_runtime.bundle.engines")),
        ("gap_runtime.backends.tensorrt", ("rich", "gap_runtime.backends.tensorrt.builder")),
        ("gap_runtime.backends.onnxruntime", SURVEYING),
        ("gap_runtime.backends.openvino", SURVEYING),
        ("gap_runtime.display", ("rich",)),
    ],
)
def test_what_runs_graphs_loads_nothing_that_shows_or_builds(module, names):
    assert all(map(importlib.util.find_spec, names))
    code = f"import sys, {module}\nprint(*(name in sys.modules for name in {names!r}))"
    assert run_python(code).stdout.split() == ["False"] * len(names)


def test_the_package_is_typed():
    assert importlib.util.find_spec("gap_runtime").origin.endswith("__init__.py")
    assert (Path(gap_runtime.__file__).parent / "py.typed").is_file()
