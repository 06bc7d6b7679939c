"""What killed exports leave is told from what living ones make, said and removed."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from gap_export.cli.main import main
from gap_export.pipeline import remains, staging
from gap_export.pipeline.remains import clear, find_remains, find_writer, lock
from gap_export.pipeline.staging import folder_aside, move_into_place
from gap_runtime.bundle.files import host_name
from gap_runtime.errors import ConfigError


def make(path, size=10):
    path.mkdir()
    (path / "decoder.onnx").write_bytes(bytes(size))
    (path / "export.json").write_text("{}", encoding="utf-8")
    return path


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_dead_folders_are_found_whatever_lives_under_their_number(tmp_path):
    dead = make(tmp_path / f".one.partial-{host_name()}-{dead_process()}")
    # A number that came to another process, which never locked it.
    again = make(tmp_path / f".two.partial-{host_name()}-{os.getppid()}", size=20)
    living = make(tmp_path / f".three.partial-{host_name()}-{os.getppid()}")
    make(tmp_path / ".four.partial-x-y")
    make(tmp_path / "five.partial-x-1")
    (tmp_path / f".six.partial-{host_name()}-1").write_bytes(b"a file of somebody")
    with contextlib.ExitStack() as locks:
        assert lock(living, locks) == "here"
        found = find_remains(tmp_path)
        assert [(each.folder, each.measure()) for each in found] == [(dead, 12), (again, 22)]
        assert [each.bundle.name for each in found] == ["one", "two"]
        assert find_writer(tmp_path / "three") == str(os.getppid())
    assert find_writer(tmp_path / "three") is None
    for each in find_remains(tmp_path):
        clear(each)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".four.partial-x-y", "five.partial-x-1", f".six.partial-{host_name()}-1"}


def test_an_export_sweeps_what_others_left(tmp_path):
    dead = make(tmp_path / f".another.partial-{host_name()}-{dead_process()}")
    with folder_aside(tmp_path / "new") as folder:
        assert folder.is_dir()
        assert not dead.exists()


def test_a_bundle_that_had_given_way_comes_back(tmp_path):
    make(tmp_path / f".old.replaced-{host_name()}-{dead_process()}")
    (left,) = find_remains(tmp_path)
    assert left.is_whole
    clear(left)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_it_stays_while_its_export_lives(tmp_path):
    with folder_aside(tmp_path / "old"):
        old = make(tmp_path / f".old.replaced-{host_name()}-{os.getpid()}")
        assert find_remains(tmp_path) == []
        assert old.is_dir()


def test_clean_says_and_removes(tmp_path, capsys):
    dead = make(tmp_path / f".one.partial-{host_name()}-{dead_process()}", size=2_000_000 - 2)
    assert main(["clean", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{dead}  2.0 MB, an export that was stopped: one\n"
    assert "gap-export clean --remove removes it" in printed.err
    assert dead.is_dir()
    assert main(["clean", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "folder": str(dead),
            "bundle": str(tmp_path / "one"),
            "host": host_name(),
            "is_ours": True,
            "is_whole": False,
            "size": 2_000_000,
        }
    ]
    assert main(["clean", str(tmp_path), "--remove"]) == 0
    assert not dead.exists()
    assert main(["clean", str(tmp_path)]) == 0
    assert "nothing is left" in capsys.readouterr().err
    assert main(["clean", str(tmp_path / "none")]) == 2


def test_what_another_machine_left_is_said_and_never_removed(tmp_path, capsys):
    """Its processes and locks cannot be seen from here."""
    away = make(tmp_path / f".one.partial-box-7.lan-{dead_process()}")
    with folder_aside(tmp_path / "new"):
        assert away.is_dir()
    assert main(["clean", str(tmp_path), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["host"], said["is_ours"]) == ("box-7.lan", False)
    assert main(["clean", str(tmp_path), "--remove"]) == 0
    printed = capsys.readouterr()
    assert "an export that was stopped on box-7.lan: one" in printed.out
    assert "is removed there, or by hand" in printed.err
    assert away.is_dir()
    with contextlib.ExitStack() as locks:
        assert lock(away, locks) == "here"
        # Where locks reach over the network, a living one is told.
        assert find_writer(tmp_path / "one").endswith(" on box-7.lan")


def test_what_cannot_be_removed_is_said_when_the_rest_is(tmp_path, capsys, monkeypatch):
    stuck = make(tmp_path / f".one.partial-{host_name()}-{dead_process()}")
    other = make(tmp_path / f".two.partial-{host_name()}-{dead_process()}")
    remove = remains.shutil.rmtree

    def fail(path, *rest, **options):
        if path == stuck:
            raise OSError(13, "Permission denied")
        remove(path, *rest, **options)

    monkeypatch.setattr(remains.shutil, "rmtree", fail)
    assert main(["clean", str(tmp_path), "--remove"]) == 2
    assert f"{stuck}: cannot be removed (Permission denied)" in capsys.readouterr().err
    assert stuck.is_dir()
    assert not other.exists()
    # An export goes on beside it.
    with folder_aside(tmp_path / "new"):
        assert stuck.is_dir()


def test_clean_waits_where_an_export_begins(tmp_path):
    dead = make(tmp_path / f".one.partial-{host_name()}-{dead_process()}")
    script = "import sys; from gap_export.cli.main import main; sys.exit(main(sys.argv[1:]))"
    with contextlib.ExitStack() as door:
        assert lock(tmp_path, door) == "here"
        process = subprocess.Popen([sys.executable, "-c", script, "clean", tmp_path, "--remove"])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.7)
        assert dead.is_dir()
    assert process.wait(60) == 0
    assert not dead.exists()


def test_a_folder_that_another_process_took_hold_of_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(
        staging, "lock", lambda folder, *_, **__: "elsewhere" if folder != tmp_path else "here"
    )
    with (
        pytest.raises(ConfigError, match="another process took hold of it"),
        folder_aside(tmp_path / "new"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def describe(folder):
    (folder / "manifest.json").write_text(
        json.dumps({"files": {path.name: {} for path in folder.iterdir()}}), encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_bundle_is_replaced(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    old = describe(make(tmp_path / "old", size=1))
    with folder_aside(old) as folder:
        (folder / "decoder.onnx").write_bytes(bytes(2))
        move_into_place(folder, old)
        assert (old / "decoder.onnx").stat().st_size == 2
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_in_the_place_gives_way_and_its_bundle_stays(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    elsewhere = describe(make(tmp_path / "elsewhere", size=1))
    place = tmp_path / "place"
    place.mkdir()
    (place / "old").symlink_to(elsewhere)
    with folder_aside(place / "old") as folder:
        (folder / "decoder.onnx").write_bytes(bytes(2))
        move_into_place(folder, place / "old")
    assert [path.name for path in place.iterdir()] == ["old"]
    assert not (place / "old").is_symlink()
    assert (place / "old" / "decoder.onnx").stat().st_size == 2
    assert (elsewhere / "decoder.onnx").stat().st_size == 1


def test_the_older_bundle_is_never_away(tmp_path):
    """While one process replaces it over and over, another always finds a whole one."""
    old = describe(make(tmp_path / "old", size=1))
    script = (
        "import pathlib, sys; path = pathlib.Path(sys.argv[1]) / 'decoder.onnx'\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    try: path.stat()\n"
        "    except FileNotFoundError: print('away', flush=True)\n"
    )
    looker = subprocess.Popen([sys.executable, "-c", script, str(old)], stdout=subprocess.PIPE)
    assert looker.stdout.readline() == b"ready\n"
    for size in range(30):
        with folder_aside(old) as folder:
            (folder / "decoder.onnx").write_bytes(bytes(size))
            describe(folder)
            move_into_place(folder, old)
    looker.kill()
    assert looker.stdout.read() == b""
    looker.stdout.close()
    looker.wait()


def test_a_folder_that_cannot_be_locked_is_not_left(tmp_path, monkeypatch):
    """Found by letting every call to the system fail."""

    def fail(folder, *_, **__):
        if ".partial-" in folder.name:
            raise OSError(5, "Input/output error")
        return "here"

    monkeypatch.setattr(staging, "lock", fail)
    with (
        pytest.raises(ConfigError, match=r"cannot be written \(Input/output error\)"),
        folder_aside(tmp_path / "new"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="cannot be written"),
        folder_aside(tmp_path / "file" / "new"),
    ):
        pass
