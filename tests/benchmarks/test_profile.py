"""What is read out of onnxruntime's profile."""

import pytest

from benchmarks.profile import Kernel, fold, main, read_kernels
from gap_export.cli.main import main as gap_export


def kernel(name, operator, at, duration):
    """An event of a node as onnxruntime writes it."""
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": at,
        "dur": duration,
        "args": {"op_name": operator},
    }


EVENTS = [
    {"cat": "Session", "name": "model_run", "ts": 0, "dur": 90},
    kernel("decoder.layers.0/Add", "Add", 10, 70),
    {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50},
    {"cat": "Session", "name": "SequentialExecutor::Execute", "ts": 101, "dur": 45},
    kernel("decoder.layers.0/Add", "Add", 110, 7),
    kernel("decoder.layers.1.mlp/Gemm_2", "Gemm", 120, 20),
    kernel("Shape", "Shape", 130, 1),
]


def test_kernels_are_those_of_the_last_runs():
    kernels, inside = read_kernels(EVENTS, 1)
    assert inside == 50
    assert [(each.operator, each.module, each.microseconds) for each in kernels] == [
        ("Add", "decoder.layers.0", 7),
        ("Gemm", "decoder.layers.1.mlp", 20),
        ("Shape", "", 1),
    ]


def test_stacks_go_from_the_run_to_the_operator():
    kernels = [
        Kernel(name="decoder.layers.1.mlp/Gemm", operator="Gemm", microseconds=20),
        Kernel(name="decoder.layers.1.mlp/Gemm_2", operator="Gemm", microseconds=5),
        Kernel(name="Shape", operator="Shape", microseconds=1),
    ]
    assert fold(kernels, 3.0, 4.4) == [
        "run;onnxruntime;Shape 1",
        "run;onnxruntime;between nodes 3",
        "run;onnxruntime;decoder;layers 1;mlp;Gemm 25",
        "run;outside onnxruntime 4",
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The embedded model."""
    out = tmp_path_factory.mktemp("profiled") / "b"
    assert gap_export(["refshapes", "--no-reference", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("rows", ["1", "5"])
def test_a_bundle_s_shares_add_up(rows, bundle, tmp_path, monkeypatch, capsys):
    folded = tmp_path / "stacks.txt"
    arguments = [str(bundle), "--rows", rows, "--slots", "9", "--runs", "4"]
    arguments += ["--out", str(tmp_path / "profile.json"), "--folded", str(folded)]
    monkeypatch.setattr("sys.argv", ["profile", *arguments])
    # Put back afterwards.
    monkeypatch.setenv("GAP_RUNTIME_THREADS", "1")
    main()
    *lines, total, _, _ = capsys.readouterr().out.splitlines()
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert min(shares) >= 0
    assert total.split()[-1] == "100%"
    # Every one of its layers is a frame of its own.
    stacks = folded.read_text(encoding="utf-8")
    assert all(f";layers {k};" in stacks for k in range(4))
