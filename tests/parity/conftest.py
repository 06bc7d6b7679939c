"""Bundles that several parity tests read; made once."""

import pytest
from tools.places import load_runtime_helper

import gap_export
from gap_export.cli import main as cli


def export_bundle(
    model, out, *, reference=True, checkpoint=None, bring="copy", target="cpu", **overrides
):
    """Export as a script would; overrides are dotted keys with `__` for the dot."""
    return gap_export.export(
        model,
        settings={key.replace("__", "."): value for key, value in overrides.items()},
        out=out,
        reference=reference,
        checkpoint=checkpoint,
        bring=bring,
        target=target,
    ).folder


@pytest.fixture(scope="session", autouse=True)
def trace_once(graphs_traced_once):
    """Tests here look at what graphs answer, not at how they were traced."""


@pytest.fixture(scope="session", name="export")
def export_fixture():
    return export_bundle


@pytest.fixture(scope="session")
def refshapes_bundle(tmp_path_factory):
    """refshapes unpruned and at three ratios, GAP, with PyTorch's answers."""
    out = tmp_path_factory.mktemp("refshapes") / "gap"
    return export_bundle("refshapes", out, prune__ratios=[0.0, 0.25, 0.5, 0.75])


SWEEP = (
    *("sweep", "refshapes", "--data", "refshapes:test", "--limit", "6", "--ratios", "0", "0.5"),
    *("0.75", "--positions", "gap", "compact", "--pytorch", "--protocol", "frame"),
    *("--protocol", "shikra", "--gallery", "2", "--backend", "onnxruntime:cpu"),
    *("--within", "100"),
)


@pytest.fixture(scope="session")
def sweep_arguments():
    """A small sweep of refshapes but for its folder."""
    return SWEEP


@pytest.fixture(scope="session")
def swept(tmp_path_factory):
    """The folder of that sweep. Read only."""
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    assert cli.main([*SWEEP, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def pages():
    """The module page_reader.py of the runtime's tests."""
    return load_runtime_helper("page_reader")
