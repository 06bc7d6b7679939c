"""A file is there whole or not at all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gap_runtime.bundle import files
from gap_runtime.bundle.engines import new_engine
from gap_runtime.bundle.files import user_cache, write_whole
from gap_runtime.errors import EngineError, InputError
from gap_runtime.report.page import require_writable


def test_what_was_written_takes_the_place(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with write_whole(path) as aside:
        assert aside.parent == tmp_path
        aside.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def write():
        with write_whole(path) as aside:
            aside.write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text(encoding="utf-8") == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_before_anything_was_written(tmp_path):
    with pytest.raises(FileNotFoundError), write_whole(tmp_path / "no" / "a.txt") as aside:
        aside.write_text("x", encoding="utf-8")
    with pytest.raises(FileNotFoundError), write_whole(tmp_path / "a.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    path, stored = tmp_path / "a.txt", []
    monkeypatch.setattr(files, "store", lambda each: stored.append((each, path.exists())))
    with write_whole(path) as aside:
        aside.write_text("new", encoding="utf-8")
    assert stored == [(aside, False), (tmp_path, True)]


def test_a_folder_that_cannot_be_stored_is_no_failure(tmp_path, monkeypatch):
    """The file is in its place by then."""

    def fail(path, store=files.store):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        store(path)

    monkeypatch.setattr(files, "store", fail)
    with write_whole(tmp_path / "a.txt") as aside:
        aside.write_text("new", encoding="utf-8")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("name", ["box-1", "a.b", "a/b\n", "", "ü" * 300])
def test_any_name_of_a_machine_is_part_of_a_files(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files.socket, "gethostname", lambda: name)
    with write_whole(tmp_path / "a.txt") as aside:
        aside.write_text("new", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_killed_processes_left_is_removed(tmp_path):
    path = tmp_path / "a.txt"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = tmp_path / f".a.txt.partial-{files.host_name()}-{process.pid}"
    living = tmp_path / f".a.txt.partial-{files.host_name()}-{os.getppid()}"
    other = tmp_path / ".a.txt.partial-x"
    # Of another machine, where a process of that number may well live.
    away = tmp_path / f".a.txt.partial-elsewhere-{process.pid}"
    for each in (dead, living, other, away):
        each.write_text("half", encoding="utf-8")
    with write_whole(path) as aside:
        aside.write_text("new", encoding="utf-8")
    assert sorted(tmp_path.iterdir()) == sorted([living, other, away, path])


def test_an_engine_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(EngineError, match=r"decoder\.engine: cannot be written \(Not a directory"),
        new_engine(tmp_path / "file" / "engines" / "rtx", "decoder"),
    ):
        pass
    folder = tmp_path / "engines" / "rtx"
    with (
        pytest.raises(EngineError, match=r"cannot be written \(No space left on device\)"),
        new_engine(folder, "decoder"),
    ):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("named", "home", "expected"),
    [
        ("/var/cache", "/home/a", "/var/cache/gap-runtime"),
        ("", "/home/a", "/home/a/.cache/gap-runtime"),
        # XDG's own rule: a path that is relative is none.
        ("cache", "/home/a", "/home/a/.cache/gap-runtime"),
    ],
)
def test_the_users_cache(monkeypatch, named, home, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", home)
    assert user_cache() == Path(expected)


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    """As in a container that is run by a number, where nothing may be written beside `/`."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(OSError, match="no home folder; set XDG_CACHE_HOME"):
        user_cache()


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket"])
def test_no_device_pipe_or_socket_gives_way_to_a_file(tmp_path, kind):
    """As root could make it: `--html /dev/full` once took the device's place."""
    path = tmp_path / "out.html"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    else:
        os.mkfifo(tmp_path / "pipe" if kind == "link to a pipe" else path)
        if kind == "link to a pipe":
            path.symlink_to("pipe")
    before = os.lstat(path)
    with pytest.raises(OSError, match="a pipe, socket or device"), write_whole(path) as aside:
        aside.write_text("x", encoding="utf-8")
    assert os.path.samestat(os.lstat(path), before)
    with pytest.raises(InputError, match="cannot be written"):
        require_writable(path)


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(OSError, match="no name of a file"), write_whole(tmp_path / "a\0.txt"):
        pytest.fail("it begins to write")
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_gives_way(tmp_path):
    path = tmp_path / "out.html"
    path.symlink_to("nowhere")
    with write_whole(path) as aside:
        aside.write_text("x", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "x"
    assert not path.is_symlink()
