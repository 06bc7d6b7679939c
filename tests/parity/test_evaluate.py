"""PyTorch and ONNX in one evaluation: the same answers, killed or not, spread or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gap_export.cli import main as exporter
from gap_runtime.cli import main as runtime
from gap_runtime.evaluation.results import read_answers

DATA = ("--data", "refshapes:val")


@pytest.fixture
def run(capsys):
    """Run a command line with --json; gives what it prints."""

    def run_in_process(main, *arguments):
        code = main([str(argument) for argument in (*arguments, "--json")])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)

    return run_in_process


def read_what_is_found(path):
    """Rows by key and ratio, but for the time and the calls that they took."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        # Who goes on drafts by the boxes since then. The proof is of all of these, too.
        for key in ("milliseconds", "calls", "drafted", "accepted", "proof"):
            row.pop(key, None)
    return rows[0], sorted(rows[1:], key=lambda row: (row["key"], row["ratio"]))


def test_no_answer_differs(run, refshapes_bundle, tmp_path):
    ratios = ("--ratio", 0, 0.25, 0.5, 0.75)
    eager, exported = tmp_path / "eager.jsonl", tmp_path / "onnx.jsonl"
    found = run(
        exporter.main,
        *("evaluate", "refshapes", *ratios, *DATA, "--limit", 14, "--out", eager),
    )
    assert [score["phrases"] for score in found["scores"]] == [14] * 4
    assert found["subject"]["engine"] == "pytorch:float32"
    assert found["scores"][0]["accuracy"] > 0.8
    found = run(
        runtime.main,
        *("evaluate", refshapes_bundle, *ratios, *DATA, "--limit", 14, "--out", exported),
        *("--compare", eager, "--backend", "onnxruntime:cpu"),
    )
    assert [each["ratio"] for each in found["comparisons"]] == [0, 0.25, 0.5, 0.75]
    for each in found["comparisons"]:
        assert (each["phrases"], each["differing"]) == (14, 0)
        assert (each["only_this"], each["only_other"], each["p"]) == (0, 0, 1.0)
    pairs = zip(read_answers(eager).rows, read_answers(exported).rows, strict=True)
    for mine, theirs in pairs:
        assert mine.token_ids == theirs.token_ids


@pytest.mark.parametrize(
    ("pruner", "positions"),
    [
        pytest.param("text_similarity", "gap", marks=pytest.mark.matrix),
        ("visionzip", "permuted"),
    ],
)
def test_no_answer_differs_in_other_modes(run, export, tmp_path, pruner, positions):
    bundle = export(
        "refshapes",
        tmp_path / "bundle",
        reference=False,
        prune__strategy=pruner,
        prune__positions=positions,
        prune__phrase="embeddings",
        prune__ratios=[0.5],
    )
    exported = tmp_path / "onnx.jsonl"
    run(runtime.main, "evaluate", bundle, *DATA, "--limit", 8, "--out", exported)
    found = run(
        exporter.main,
        *("evaluate", "refshapes", "--ratio", 0.5, "--pruner", pruner, *DATA, "--limit", 8),
        *("--positions", positions, "--set", "prune.phrase=embeddings", "--compare", exported),
    )
    assert found["subject"]["positions"] == positions
    assert [(c["phrases"], c["differing"]) for c in found["comparisons"]] == [(8, 0)]


def test_killed_and_gone_on_with(run, refshapes_bundle, tmp_path):
    command = ["evaluate", str(refshapes_bundle), *DATA, "--limit", "40", "--ratio", "0.5"]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(runtime.main, *command, "--out", whole)
    program = Path(sys.executable).parent / "gap-runtime"
    for _ in range(2):
        with subprocess.Popen(
            [program, *command, "--out", cut, "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            before = cut.read_bytes().count(b"\n") if cut.exists() else 0
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                if cut.exists() and cut.read_bytes().count(b"\n") > before + 4:
                    break
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
    with cut.open("ab") as file:
        file.write(b'{"key": "val/')
    assert 8 < cut.read_bytes().count(b"\n") < 41
    found = run(runtime.main, *command, "--out", cut, "--resume")
    assert found["scores"][0]["phrases"] == 40
    assert read_what_is_found(cut) == read_what_is_found(whole)
    # In the same order too: what was done is not done again.
    keys = [row.key for row in read_answers(cut).rows]
    assert keys == [row.key for row in read_answers(whole).rows]


def test_another_bundle_does_not_go_on(run, refshapes_bundle, export, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(runtime.main, "evaluate", refshapes_bundle, *DATA, "--limit", 2, "--out", out)
    other = export("refshapes", tmp_path / "other", reference=False, prune__ratios=[0.5])
    arguments = ["evaluate", str(other), *DATA, "--limit", "2", "--out", str(out), "--resume"]
    assert runtime.main(arguments) == 2
    assert "holds answers of another model or bundle" in capsys.readouterr().err
    arguments = ["evaluate", str(refshapes_bundle), *DATA, "--limit", "3", "--out", str(out)]
    assert runtime.main([*arguments, "--resume"]) == 2
    assert "holds answers of another data: its phrases is '2'" in capsys.readouterr().err


@pytest.mark.matrix
def test_two_workers_answer_as_one_process(run, refshapes_bundle, tmp_path):
    ray = pytest.importorskip("ray")
    command = ["evaluate", refshapes_bundle, *DATA, "--limit", 9, "--ratio", 0, 0.5]
    alone, spread = tmp_path / "alone.jsonl", tmp_path / "spread.jsonl"
    run(runtime.main, *command, "--out", alone)
    try:
        run(runtime.main, *command, "--out", spread, "--ray", "--workers", 2)
    finally:
        ray.shutdown()
    assert read_what_is_found(spread) == read_what_is_found(alone)
