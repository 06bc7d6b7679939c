"""A sweep: every cell once, killed at any place and gone on with, one copy of the weights."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from makers import families

from gap_export.analysis.sweep import share_files
from gap_export.cli import main as cli
from gap_export.config.load import load_config
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.evaluation.data import open_data

VARIANTS = ["cls_attention-compact", "cls_attention-gap", "unpruned"]


def read_rows(path):
    """Rows of a CSV file without what differs from run to run."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.endswith("_ms")}
            for row in csv.DictReader(file)
        ]


def read_answers(path):
    """Lines of a file of answers without times and what names the bundle."""
    header, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    del header["subject"]["sha256"]
    for row in rows:
        del row["milliseconds"], row["proof"]  # The proof is of the times, too.
    return header, rows


def test_every_cell_is_there_once(swept):
    assert sorted(path.name for path in (swept / "bundles").iterdir()) == VARIANTS
    rows = read_rows(swept / "cells.csv")
    keys = [(r["pruner"], r["positions"], r["ratio"], r["side"], r["protocol"]) for r in rows]
    cells = [("unpruned", "gap", "0.0")]
    cells += [("cls_attention", mode, r) for mode in ("gap", "compact") for r in ("0.5", "0.75")]
    assert sorted(keys) == sorted(
        (*cell, side, protocol)
        for cell in cells
        for side in ("exported", "pytorch")
        for protocol in ("frame", "shikra")
    )
    assert {row["phrases"] for row in rows} == {"6"}
    sizes = {(r["pruner"], r["ratio"]): (r["kept"], r["prompt_tokens"]) for r in rows}
    assert sizes == {
        ("unpruned", "0.0"): ("64", "100"),
        ("cls_attention", "0.5"): ("32", "68"),
        ("cls_attention", "0.75"): ("16", "52"),
    }


def test_no_answer_differs_from_pytorch(swept):
    rows = [r for r in read_rows(swept / "comparisons.csv") if r["kind"] == "parity"]
    assert len(rows) == 2 * (1 + 2 * 2)
    assert {(row["phrases"], row["differing"], row["p"]) for row in rows} == {("6", "0", "1.0")}


def test_the_json_holds_what_the_tables_hold(swept):
    data = json.loads((swept / "report.json").read_text(encoding="utf-8"))
    for key, name in (("cells", "cells"), ("sizes", "sizes"), ("comparisons", "comparisons")):
        assert len(data[key]) == len(read_rows(swept / f"{name}.csv"))
    assert {row["kind"] for row in data["comparisons"]} == {"parity", "positions", "pruning"}
    unpruned = next(row for row in data["cells"] if row["pruner"] == "unpruned")
    assert unpruned["accuracy"] == unpruned["hits"] / 6 > 0.6
    assert data["published"][0]["gap"] == 51.42
    # Nothing can lose more than 100 points.
    assert [(each["pruner"], each["ratio"]) for each in data["advice"]] == [
        ("cls_attention", 0.75)
    ]
    assert {cell["frame"] for cell in data["cells"]} == {"padded-square"}
    assert {(cell["set"], cell["split"]) for cell in data["cells"]} == {("refshapes", "test")}


def test_weights_lie_on_disk_once(swept):
    files = [path / "model.safetensors" for path in (swept / "bundles").iterdir()]
    assert len(files) == 3
    assert len({file.stat().st_ino for file in files}) == 1


def test_files_that_are_the_same_are_linked(swept, tmp_path):
    """As after an export that had to write the weights anew."""
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        shutil.copytree(swept / "bundles" / "cls_attention-gap", path)
    own = (two / "manifest.json").stat().st_ino
    share_files(two, [tmp_path / "nowhere", one])
    for name in Bundle.open(two).manifest.files:
        assert (one / name).samefile(two / name)
    assert (two / "manifest.json").stat().st_ino == own
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def kill_when(command, is_time):
    """Start a program and kill it, as a lost machine would, as soon as it is time."""
    program = Path(sys.executable).parent / "gap-export"
    with subprocess.Popen(
        [program, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and not is_time():
            time.sleep(0.004)
        assert process.poll() is None, "it was done before it was killed"
        os.kill(process.pid, signal.SIGKILL)


def test_answers_that_break_off_are_gone_on_with(swept, sweep_arguments, tmp_path, capsys):
    """As a kill leaves them: a line cut short, the variants behind it without any."""
    out = tmp_path / "cut"
    shutil.copytree(swept, out)
    answers = out / "answers"
    torn = answers / "cls_attention-gap.pytorch.jsonl"
    lines = torn.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:5]) + b'{"key": "te')
    later = [path for path in answers.iterdir() if path.name.startswith("cls_attention-compact")]
    assert later
    for path in (*later, *out.glob("*.csv"), out / "report.json"):
        path.unlink()
    made = (out / "bundles" / "cls_attention-gap" / "manifest.json").stat().st_mtime_ns

    command = [*sweep_arguments, "--out", str(out), "--resume"]
    # A disk that takes no byte more: a line that says where, and nothing that was there is lost.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(b"".join(lines[:5])) + 10, limits[1]))
    try:
        assert cli.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {torn}: cannot be written (File too large); make room and go")
    assert torn.read_bytes().splitlines(keepends=True)[:5] == lines[:5]

    assert cli.main(command) == 0
    assert torn.read_bytes().splitlines(keepends=True)[:5] == lines[:5]
    assert (out / "bundles" / "cls_attention-gap" / "manifest.json").stat().st_mtime_ns == made
    require_same_sweep(out, swept)


def require_same_sweep(out, swept):
    """The same tables and answers but for the times."""
    for name in ("cells.csv", "comparisons.csv", "sizes.csv"):
        assert read_rows(out / name) == read_rows(swept / name)
    for path in sorted((swept / "answers").iterdir()):
        assert read_answers(out / "answers" / path.name) == read_answers(path)


@pytest.mark.matrix
def test_killed_in_an_export_and_in_an_answer_and_gone_on_with(swept, sweep_arguments, tmp_path):
    out = tmp_path / "cut"
    command = [*sweep_arguments, "--out", str(out), "--resume"]
    bundles, answers = out / "bundles", out / "answers"
    # As if the first variant had been done before.
    shutil.copytree(swept / "bundles" / "unpruned", bundles / "unpruned")
    answers.mkdir()
    for name in ("sweep.json", "answers/unpruned.jsonl", "answers/unpruned.pytorch.jsonl"):
        shutil.copy(swept / name, out / name)
    kill_when(command, lambda: any(bundles.glob(".cls_attention-gap.partial-*/*.onnx")))
    assert not (bundles / "cls_attention-gap").exists()
    first = (answers / "unpruned.pytorch.jsonl").read_bytes()

    torn = answers / "cls_attention-gap.pytorch.jsonl"
    kill_when(command, lambda: torn.exists() and torn.read_bytes().count(b"\n") > 3)
    with torn.open("ab") as file:
        file.write(b'{"key": "te')
    before = torn.read_bytes().count(b"\n")
    assert 3 < before < 13
    made = (bundles / "cls_attention-gap" / "manifest.json").stat().st_mtime_ns

    assert cli.main(command) == 0
    assert (answers / "unpruned.pytorch.jsonl").read_bytes() == first
    assert (bundles / "cls_attention-gap" / "manifest.json").stat().st_mtime_ns == made
    assert sorted(path.name for path in bundles.iterdir()) == VARIANTS
    require_same_sweep(out, swept)


def test_a_folder_of_another_sweep_is_refused(swept, sweep_arguments, capsys):
    def run(*more):
        code = cli.main([*sweep_arguments, "--out", str(swept), *more])
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    before = (swept / "report.html").read_bytes()
    assert run() == (
        2,
        f"error: {swept}: exists; go on with it by --resume, or give another --out",
    )
    for more, what in (
        (["--limit", "5"], "another data"),
        (["--ratio", "0.25"], "another ratios"),
        (["--set", "prune.seed=3"], "another config"),
        (["--backend", "onnxruntime"], "another backend"),
    ):
        code, error = run("--resume", *more)
        assert code == 2
        assert f"is a sweep of {what}: " in error
        assert error.endswith("; give another --out")
    assert (swept / "report.html").read_bytes() == before


def test_all_pruners_are_those_that_the_model_can_serve(tmp_path, monkeypatch, capsys):
    """Planned only; without CLIP, those that read the phrase are left out and named."""
    import huggingface_hub

    from gap_export.analysis import sweep as module

    class Planned(Exception):  # noqa: N818 - no error
        pass

    seen = []

    def stop(plan, *_, **__):
        seen.append(plan)
        raise Planned

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(module, "run_sweep", stop)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    command = ["sweep", "refshapes", "--data", "refshapes:test", "--limit", "1"]
    command += ["--ratios", "0.5", "--positions", "gap", "--out", str(tmp_path / "out")]
    with pytest.raises(Planned):
        cli.main([*command, "--pruners", "all"])
    (plan,) = seen
    pruners = {variant.pruner for variant in plan.variants}
    assert {"cls_attention", "divprune", "spatial"} <= pruners
    assert not pruners & families.READ_PHRASE
    assert len(plan.left_out) == len(families.READ_PHRASE)
    error = capsys.readouterr().err
    for pruner in families.READ_PHRASE:
        assert f"note: {pruner} is left out: " in error
    assert not (tmp_path / "out").exists()
    # One that is asked for by name is not passed over.
    assert cli.main([*command, "--pruners", "spatial", "trim"]) == 3
    error = capsys.readouterr().err
    assert "openai/clip-vit" in error
    assert "--set prune.phrase=embeddings" in error


def test_pruners_that_draw_are_swept_with_every_seed(tmp_path):
    from gap_export.analysis.sweep import SweepRequest, describe_sweep, plan_sweep

    request = SweepRequest(
        named=load_config("refshapes", {}),
        target="cpu",
        pruners=("random+ivc", "spatial"),
        positions=("gap",),
        ratios=(),
        keep=(40, 20),
        seeds=(4, 7, 4),
        data=open_data("refshapes:test", limit=1),
        backend="onnxruntime:cpu",
        eager=False,
        out=tmp_path / "out",
        resume=False,
    )
    plan = plan_sweep(request)
    found = {v.name: (v.pruner, v.draw, v.plan.prune.seed) for v in plan.variants[1:]}
    assert found == {
        "random+ivc-gap-seed4": ("random+ivc (seed 4)", ("random+ivc", 4), 4),
        "random+ivc-gap-seed7": ("random+ivc (seed 7)", ("random+ivc", 7), 7),
        "spatial-gap": ("spatial", None, 4),
    }
    assert [entry.kept for entry in plan.variants[1].plan.entries] == [40, 20]
    assert describe_sweep(plan)["config"]["prune"]["seed"] == [4, 7, 4]


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_what_a_report_lacks_is_told_before_the_work(
    tmp_path, monkeypatch, capsys, missing, sweep_arguments
):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == missing else find(name, *rest),
    )
    monkeypatch.setitem(sys.modules, "jinja2" if missing == "jinja2" else "nothing", None)
    assert cli.main([*sweep_arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"error: a report needs {missing}: pip install 'gap-export[report]'"
    assert not (tmp_path / "out").exists()
