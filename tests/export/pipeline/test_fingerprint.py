"""An export that was made before is recognised, without torch, and only then."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from makers import checkpoints

from gap_export.cli import main as cli
from gap_export.pipeline import fingerprint as identity
from gap_export.pipeline.fingerprint import IDENTITY_FILE, find_finished, identify
from gap_export.pipeline.request import make_request

OPTIONS = ["--no-reference", "--set", "prompt.answer=8"]


@pytest.fixture(autouse=True)
def code_is_still(monkeypatch):
    """No source file changes while these tests run."""
    monkeypatch.setattr(identity, "_CODE", ())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a checkpoint and its bundle under the usual name. Changed and put back."""
    home = tmp_path_factory.mktemp("finished")
    checkpoints.make_llava_checkpoint(home / "small", image_size=70)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(identity, "_CODE", ())
        assert cli.main(["./small", *OPTIONS]) == 0
    assert (home / "small-13of25" / IDENTITY_FILE).is_file()
    return home


@pytest.fixture
def home(finished, monkeypatch):
    monkeypatch.chdir(finished)
    return finished


def request(*, target="cpu", bring="copy", reference=False, out=None, **overrides):
    """Of the finished export, or of another one; overrides have `__` for the dot."""
    settings = {"prompt.answer": 8}
    return make_request(
        "./small",
        settings=settings | {key.replace("__", "."): value for key, value in overrides.items()},
        target=target,
        bring=bring,
        reference=reference,
        out=out,
    )


def find(**changes):
    return find_finished(request(**changes))


@pytest.mark.usefixtures("home")
def test_the_same_export_is_found_under_its_usual_name():
    found = find()
    assert found.folder == Path("small-13of25")
    assert (found.plan, found.report, found.note) == (None, None, "no reference was recorded")
    assert found.summarize()["bundle"] == "small-13of25"
    assert found.summarize()["ratios"][0]["kept"] == 13


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("json_too", [False, True])
def test_nothing_is_loaded_and_the_same_is_printed(capsys, monkeypatch, json_too):
    monkeypatch.setitem(sys.modules, "gap_export.pipeline.run", None)
    arguments = ["./small", *OPTIONS, *(["--json"] if json_too else [])]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    if json_too:
        result = json.loads(captured.out)
        assert result["bundle"] == "small-13of25"
        assert result["not_checked_because"] == "no reference was recorded"
    else:
        assert captured.out == "small-13of25\n"
    assert captured.err.startswith("small-13of25: exported before")
    assert "--force" in captured.err


@pytest.mark.usefixtures("home")
def test_a_process_that_finds_it_loads_no_large_library():
    code = (
        "import sys; from gap_export.cli import main as cli; "
        "from gap_export.pipeline import fingerprint; fingerprint._CODE = ();"
        f"assert cli.main(['./small', *{OPTIONS!r}]) == 0;"
        "print([n for n in ('torch', 'transformers', 'onnx', 'huggingface_hub.hf_api') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["small-13of25", "[]"]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "changes",
    [
        {"prune__ratios": [0.75]},
        {"prune__strategy": "random"},
        {"prune__positions": "compact"},
        {"prompt__answer": 9},
        {"dtype": "float16"},
        {"quantize__weights": "int8"},
    ],
)
def test_other_settings_are_another_export(changes):
    assert find(**changes) is None


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "changes",
    [{"target": "jetson-orin-jp7"}, {"bring": "link"}, {"reference": True}],
)
def test_other_options_are_another_export(changes):
    assert find(**changes) is None


@pytest.mark.usefixtures("home")
def test_other_versions_are_another_export(monkeypatch):
    monkeypatch.setattr(identity, "_find_version", lambda _: "0")
    assert find() is None


def test_changed_code_is_another_export(home, monkeypatch):
    (home / "package").mkdir()
    (home / "package" / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(home)
    monkeypatch.setattr(identity, "_CODE", ("package",))
    first = identify(request(), {})
    (home / "package" / "__init__.py").write_text("1\n", encoding="utf-8")
    second = identify(request(), {})
    assert None not in {first, second}
    assert first != second


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_file_is_another_export(home, name):
    path = home / "small" / name
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        assert find() is None
    finally:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find() is not None


def test_a_new_file_is_another_export(home):
    path = home / "small" / "another.json"
    assert not path.exists()
    path.write_text("{}", encoding="utf-8")
    try:
        assert find() is None
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["decoder.onnx", "manifest.json", IDENTITY_FILE])
@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_a_bundle_that_is_not_whole_is_made_again(home, name, change):
    path = home / "small-13of25" / name
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-3])
    try:
        assert find() is None
    finally:
        path.write_bytes(data)
    assert find() is not None


def test_a_bundle_that_was_renamed_is_not_the_one(home):
    (home / "small-13of25").rename(home / "other")
    try:
        assert find(out=Path("other")) is None
        assert find() is None
    finally:
        (home / "other").rename(home / "small-13of25")


@pytest.mark.usefixtures("home")
def test_another_out_is_not_the_one():
    assert find(out=Path("elsewhere")) is None
    assert find(out=Path("small-13of25")) is not None


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("option", ["--force", "--dry-run"])
def test_force_and_dry_run_look_at_the_checkpoint(monkeypatch, option):
    class AskedError(Exception):
        pass

    def plan_export(*_):
        raise AskedError

    monkeypatch.setattr("gap_export.pipeline.plan.plan_export", plan_export)
    with pytest.raises(AskedError):
        cli.main(["./small", *OPTIONS, option])


def test_a_part_is_looked_for_where_it_was_found(home):
    asked = request(parts__clip="clip")
    assert identify(asked, {}) is None
    (home / "clip").mkdir()
    (home / "clip" / "config.json").write_text("{}", encoding="utf-8")
    first = identify(asked, {})
    assert first is not None
    (home / "clip" / "config.json").write_text("{ }", encoding="utf-8")
    assert identify(asked, {}) not in {None, first}
    assert identify(request(), {"clip": "clip"}) is not None


@pytest.mark.parametrize("revision", [None, "main", "0" * 40])
def test_a_hub_id_needs_its_snapshot(tmp_path, monkeypatch, revision):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    settings = {} if revision is None else {"revision": revision}
    asked = make_request("someone/model", settings=settings, reference=False)
    assert identify(asked, {}) is None
    home = tmp_path / "models--someone--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    assert identify(asked, {}) is None
    (home / "snapshots" / ("0" * 40)).mkdir(parents=True)
    config = home / "snapshots" / ("0" * 40) / "config.json"
    config.write_text('{"model_type": "llava"}', encoding="utf-8")
    assert identify(asked, {}) is not None


def test_samples_belong_to_an_export_with_a_reference(home):
    folder = home / "samples"
    folder.mkdir(exist_ok=True)
    entries = [{"image": "picture.png", "phrase": "the cup"}]
    (folder / "samples.json").write_text(json.dumps(entries), encoding="utf-8")
    (folder / "picture.png").write_bytes(b"1")
    asked = request(check__samples=str(folder), reference=True)
    found = []
    for data in (b"1", b"22"):
        (folder / "picture.png").write_bytes(data)
        found.append(identify(asked, {}))
    assert None not in found
    assert found[0] != found[1]
