"""Where things lie in the checkout."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_runtime_helper(name):
    """A helper module of tests/runtime, which is no package: those tests run alone too."""
    path = ROOT / "tests" / "runtime" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
