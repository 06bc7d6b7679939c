"""One gate for files: regular, readable, of a size that is expected; else one line."""

import os

import pytest

from gap_runtime.errors import BundleError, InputError
from gap_runtime.records.files import (
    exists,
    is_file,
    is_folder,
    open_file,
    read_bytes,
    read_text,
    resolve,
)


def make_pipe(path):
    os.mkfifo(path)


def make_loop(path):
    path.symlink_to(path.name)


hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


WAYS = {
    "folder": (lambda path: path.mkdir(), "a folder, expected a file"),
    "pipe": (make_pipe, "a pipe, socket or device, expected a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a pipe, socket or device"),
    "gone": (lambda _: None, "no such file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "loop": (make_loop, "cannot be read"),
    "large": (lambda path: path.write_bytes(bytes(101)), "101 bytes, at most 100 are read"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [BundleError, InputError])
def test_what_is_no_file_of_use_is_one_line(tmp_path, way, kind):
    path = tmp_path / "x"
    make, said = WAYS[way]
    make(path)
    with pytest.raises(kind, match=said) as caught:
        read_bytes(path, kind, limit=100, advice="do this")
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; do this")


@hypothesis.given(data=st.binary(max_size=200))
def test_a_file_is_read_as_it_is(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("read") / "x"
    path.write_bytes(data)
    assert read_bytes(path, InputError) == data
    with open_file(path, InputError) as file:
        assert file.read() == data


@hypothesis.given(name=st.text(max_size=300))
def test_no_name_is_too_odd(tmp_path_factory, name):
    """Names that are too long, that hold a zero, or that no text can hold."""
    path = f"{tmp_path_factory.getbasetemp()}/none-such/{name}"
    assert not exists(path)
    assert not is_file(path)
    assert not is_folder(path)
    with pytest.raises(InputError) as caught:
        read_bytes(path, InputError)
    assert str(caught.value).isprintable()


def test_what_fails_while_it_is_read_is_the_same_error(tmp_path):
    path = tmp_path / "x"
    path.touch()
    with pytest.raises(InputError, match="x: cannot be read"), open_file(path, InputError):
        raise OSError(5, "Input/output error")


def test_text_has_to_be_utf8(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfwith a mark")
    assert read_text(path, InputError) == "with a mark"
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_text(path, InputError)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody and come back")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"x")
    path.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            read_bytes(path, InputError)
    finally:
        os.seteuid(0)


def test_a_circle_of_links_leads_nowhere(tmp_path):
    """Python's own `resolve` raises what is no OSError."""
    circle = tmp_path / "circle"
    make_loop(circle)
    (tmp_path / "way").symlink_to("circle")
    assert resolve(tmp_path / "way" / "on").parent in {circle, tmp_path / "way"}
    assert resolve("a\0b").name == "a\0b"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert resolve(tmp_path / "link" / ".." / "link") == (tmp_path / "folder").resolve()
