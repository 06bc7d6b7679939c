"""A whole export: what failure, a kill and an older bundle leave."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools.commands import dry_run

from gap_export.errors import ExportError, GraphError
from gap_export.pipeline import run as pipeline
from gap_export.pipeline import stages, staging
from gap_export.pipeline.remains import lock
from gap_export.pipeline.run import export
from gap_export.pipeline.staging import folder_aside
from gap_runtime.bundle.files import host_name
from gap_runtime.bundle.manifest import SCHEMA
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.display import Display
from gap_runtime.errors import CheckError, ConfigError, GapError


def snapshot(folder):
    """Bytes and inode of every file."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_ino)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def no_work(*_):
    """Stands for what must not be begun."""
    raise AssertionError("work was begun")


def dead_process():
    """The ID of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def failing(monkeypatch):
    """Make every proof of a graph fail."""

    def fail(path, **promise):
        del promise
        raise GraphError(f"{path.name}: planted")

    monkeypatch.setattr(stages, "prove_graph", fail)


@pytest.mark.usefixtures("failing")
def test_a_failed_export_leaves_nothing(tiny_llava, tmp_path, make_plan, run_export):
    with pytest.raises(GraphError, match="planted"):
        run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("failing")
def test_a_failed_export_leaves_an_older_bundle_alone(
    bundle, tiny_llava, tmp_path, make_plan, run_export
):
    old = tmp_path / "old"
    shutil.copytree(bundle, old)
    before = snapshot(old)
    with pytest.raises(GraphError, match="planted"):
        run_export(make_plan(tiny_llava, old))
    assert snapshot(old) == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.fixture
def old(bundle, tmp_path):
    """A bundle that an export would replace; nothing else lies beside it."""
    return shutil.copytree(bundle, tmp_path / "old")


@pytest.mark.usefixtures("quick")
def test_a_finished_export_replaces_an_older_bundle_whole(
    old, tiny_llava, tmp_path, make_plan, run_export
):
    run_export(make_plan(tiny_llava, old))
    assert sorted(path.name for path in old.iterdir()) == ["manifest.json", "tokenizer.json"]
    assert (old / "manifest.json").read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.usefixtures("quick")
def test_what_is_replaced_is_said(old, tiny_llava, make_plan, capsys):
    export(make_plan(tiny_llava, old), Display())
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"note: {old} holds a bundle, which is replaced: tiny-llava, cls_attention, gap, " in said
    )
    assert "ratios 0.5, 0.75, float32 for target cpu" in said


@pytest.mark.usefixtures("quick")
def test_of_two_exports_to_one_folder_the_second_is_refused(
    tiny_llava, tmp_path, make_plan, run_export
):
    plan = make_plan(tiny_llava, tmp_path / "new")
    with folder_aside(tmp_path / "new") as folder:
        with pytest.raises(ConfigError, match=r"another export is writing it \(process \d+\)"):
            run_export(plan)
        assert folder.is_dir()
        # Another folder beside it is free.
        run_export(make_plan(tiny_llava, tmp_path / "newer"))
    run_export(plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "newer"]


@pytest.mark.usefixtures("quick")
def test_a_move_that_fails_halfway_leaves_the_older_bundle(
    old, tiny_llava, tmp_path, make_plan, run_export, monkeypatch
):
    before, rename = snapshot(old), type(old).rename

    def refuse(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    # As where the system cannot exchange two folders.
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    monkeypatch.setattr(type(old), "rename", refuse)
    with pytest.raises(ExportError, match="Input/output error"):
        run_export(make_plan(tiny_llava, old))
    assert snapshot(old) == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.usefixtures("failing")
def test_a_bundle_that_a_killed_export_had_moved_away_is_put_back(
    old, tiny_llava, tmp_path, make_plan, run_export
):
    before = snapshot(old)
    old.rename(tmp_path / f".old.replaced-{host_name()}-{dead_process()}")
    with pytest.raises(GraphError, match="planted"):
        run_export(make_plan(tiny_llava, old))
    assert snapshot(old) == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.usefixtures("quick")
def test_an_export_that_differs_from_pytorch_is_not_kept(
    old, tiny_llava, tmp_path, make_plan, run_export, monkeypatch
):
    def differ(*_):
        raise CheckError("planted")

    before = snapshot(old)
    monkeypatch.setattr(pipeline, "_check", differ)
    with pytest.raises(CheckError, match="planted"):
        run_export(make_plan(tiny_llava, old))
    assert snapshot(old) == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["thesis.txt", "samples/thesis.txt", ".hidden"])
def test_a_file_that_is_no_part_of_the_older_bundle_is_not_lost(
    old, tiny_llava, make_plan, run_export, name
):
    (old / name).parent.mkdir(exist_ok=True)
    (old / name).write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"thesis|hidden"):
        run_export(make_plan(tiny_llava, old))
    assert (old / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("schema", [0, 1, SCHEMA + 1])
def test_a_bundle_of_another_schema_may_be_replaced(
    old, tiny_llava, make_plan, run_export, schema
):
    path = old / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8")) | {"schema": schema, "unknown": 1}
    path.write_text(json.dumps(data), encoding="utf-8")
    run_export(make_plan(tiny_llava, old))
    assert path.read_text(encoding="utf-8") == "new"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text", ['{"schema": 0}', "{", '{"files": {}}'])
def test_a_bundle_that_cannot_be_read_is_kept_with_advice_that_helps(
    old, tiny_llava, make_plan, run_export, text
):
    """`export again` would lead in a circle here."""
    (old / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(GapError, match="choose another --out") as caught:
        run_export(make_plan(tiny_llava, old))
    assert "export again" not in str(caught.value)
    assert (old / "manifest.json").read_text(encoding="utf-8") == text


@pytest.mark.usefixtures("quick")
def test_a_full_disk_is_one_clear_error(tiny_llava, tmp_path, make_plan, run_export, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "bring_weights", full)
    with pytest.raises(ExportError, match="No space left on device"):
        run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("pid", ["dead", "own"])
def test_a_stale_partial_folder_is_cleaned(tiny_llava, tmp_path, make_plan, run_export, pid):
    """Also where it has this process's ID, as in a container that numbers from 1 each time."""
    number = os.getpid() if pid == "own" else dead_process()
    stale = tmp_path / f".new.partial-{host_name()}-{number}"
    stale.mkdir()
    (stale / "decoder.onnx").write_text("half", encoding="utf-8")
    run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    assert not (tmp_path / "new" / "decoder.onnx").exists()


@pytest.mark.usefixtures("quick")
def test_the_partial_folder_of_a_living_export_is_left_alone(
    tiny_llava, tmp_path, make_plan, run_export
):
    living = tmp_path / f".other.partial-{host_name()}-{os.getppid()}"
    living.mkdir()
    with contextlib.ExitStack() as locks:
        assert lock(living, locks) == "here"
        run_export(make_plan(tiny_llava, tmp_path / "new"))
        assert living.is_dir()
    # Its number lives on, but nobody holds it any more.
    run_export(make_plan(tiny_llava, tmp_path / "newer"))
    assert not living.exists()


@pytest.mark.usefixtures("quick")
def test_what_appears_in_the_place_meanwhile_is_not_lost(
    old, tiny_llava, make_plan, run_export, monkeypatch
):
    before = snapshot(old)

    def appear(*_):
        (old / "thesis.txt").write_text("mine", encoding="utf-8")
        return None, "not checked"

    monkeypatch.setattr(pipeline, "_check", appear)
    with pytest.raises(ConfigError, match=r"'thesis\.txt', which is no part of the bundle"):
        run_export(make_plan(tiny_llava, old))
    assert (old / "thesis.txt").read_text(encoding="utf-8") == "mine"
    (old / "thesis.txt").unlink()
    assert snapshot(old) == before
    assert list(old.parent.iterdir()) == [old]


def test_a_bundle_that_would_be_refused_is_never_published(tmp_path, exported):
    (tmp_path / "manifest.json").write_bytes((exported.folder / "manifest.json").read_bytes())
    pipeline._require_readable(tmp_path)
    data = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    data["layout"]["answer"] = 2**40
    (tmp_path / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ExportError, match=r"would not be read again: .*nothing was") as at:
        pipeline._require_readable(tmp_path)
    assert "export again" not in str(at.value)
    assert str(tmp_path) not in str(at.value)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "x" * 201, "~nobody-of-that-name/x", "/"])
def test_a_place_whose_name_no_bundle_can_have(tiny_llava, make_plan, name):
    with pytest.raises(ConfigError, match="no place for a bundle"):
        make_plan(tiny_llava, Path(name))


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(
    tiny_llava, tmp_path, make_plan, run_export
):
    script = "import sys; from gap_export.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", script, str(tiny_llava), "--no-reference"),
            *("--out", str(tmp_path / "out")),
            *("--set", "prompt.template=<image>\n{phrase}", "--json"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    partial = tmp_path / f".out.partial-{host_name()}-{process.pid}"
    assert list(tmp_path.iterdir()) == [partial]
    assert not (partial / "manifest.json").exists()
    result = run_export(make_plan(tiny_llava, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert read_manifest(tmp_path / "out") == result.manifest


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_bundle_is_never_replaced(tiny_llava, tmp_path, make_plan, run_export, kind):
    out = tmp_path / "mine"
    if kind == "folder":
        out.mkdir()
    thesis = out / "thesis.txt" if kind == "folder" else out
    thesis.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="exists and is no bundle") as caught:
        run_export(make_plan(tiny_llava, out))
    assert str(out) in str(caught.value)
    assert thesis.read_text(encoding="utf-8") == "mine"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("quick")
def test_an_empty_folder_may_become_the_bundle(tiny_llava, tmp_path, make_plan, run_export):
    (tmp_path / "new").mkdir()
    run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert (tmp_path / "new" / "manifest.json").is_file()


def test_the_folder_that_one_stands_in_is_refused_at_once(
    tiny_llava, tmp_path, make_plan, run_export, monkeypatch
):
    """It could be moved only from under one's feet, and `.` names no bundle."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(pipeline, "_trace", no_work)
    with pytest.raises(ConfigError, match="--out"):
        run_export(make_plan(tiny_llava, pipeline.Path()))
    assert not list((tmp_path / "here").iterdir())
    assert dry_run(tiny_llava, "--out", ".") == 2


@pytest.mark.usefixtures("quick")
def test_missing_parents_of_the_bundle_are_made(tiny_llava, tmp_path, make_plan, run_export):
    run_export(make_plan(tiny_llava, tmp_path / "a" / "b" / "new"))
    assert (tmp_path / "a" / "b" / "new" / "manifest.json").is_file()


def test_a_parent_that_is_a_file(tiny_llava, tmp_path, make_plan, run_export):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_export(make_plan(tiny_llava, tmp_path / "file" / "new"))
