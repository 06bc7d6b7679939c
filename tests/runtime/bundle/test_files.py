"""A file is there whole or not at all."""

import pytest

from gap_runtime.bundle.files import write_whole


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
