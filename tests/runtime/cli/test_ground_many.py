"""`gap-runtime ground` on several pictures, on folders and in a pipe."""

import io
import json

import pytest
from PIL import Image

from gap_runtime.cli.main import main


@pytest.fixture
def folder(tmp_path):
    """Two pictures, a broken one and a file that is none."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (40, 20), (200, 200, 200)).save(pictures / "a.png")
    Image.new("RGB", (40, 40), (200, 200, 200)).save(pictures / "b.jpg")
    (pictures / "notes.txt").write_text("no picture", encoding="utf-8")
    return pictures


@pytest.fixture
def ground(make_bundle, answer_with, capsys):
    """A function that runs the command on one bundle: exit code, stdout, stderr."""
    backend = answer_with(11)
    bundle = str(make_bundle())

    def run(*arguments):
        code = main(["ground", bundle, *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    run.backend = backend
    return run


def test_a_folder_and_phrases(ground, folder):
    code, out, _ = ground(folder, "--phrase", "the mug", "--phrase", "the red mug")
    assert code == 0
    assert out.splitlines() == [
        f"{folder}/a.png: the mug: 10.0 0.0 30.0 10.0",
        f"{folder}/a.png: the red mug: 10.0 0.0 30.0 10.0",
        f"{folder}/b.jpg: the mug: 10.0 10.0 30.0 20.0",
        f"{folder}/b.jpg: the red mug: 10.0 10.0 30.0 20.0",
    ]
    # Loaded once.
    assert ground.backend.opened == ["vision-8", "decoder"]


def test_a_broken_picture_does_not_stop_the_others(ground, folder):
    (folder / "aa.png").write_bytes(b"no picture")
    code, out, err = ground(folder, "--phrase", "the mug", "--json")
    assert code == 2
    found = json.loads(out)
    assert [each["image"] for each in found] == [
        f"{folder}/{n}" for n in ("a.png", "aa.png", "b.jpg")
    ]
    assert found[1]["error"]["kind"] == "input"
    assert found[2]["boxes"] == [[10, 10, 30, 20]]
    assert err.count("error: ") == 1


def pipe_in(monkeypatch, data):
    """Bytes on standard input, which is read strictly as in most locales."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8", "strict"))


def test_json_lines_in_a_pipe(ground, folder, monkeypatch):
    lines = [
        {"image": f"{folder}/a.png", "phrase": "the mug", "id": 7},
        {"image": f"{folder}/b.jpg", "phrase": ["the mug", "the red mug"], "ratio": 0.75},
        {"image": f"{folder}/nowhere.png", "phrase": "the mug", "id": "x"},
        {"image": f"{folder}/a.png", "keep": 4},
        {"picture": f"{folder}/a.png"},
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines) + "\nno json\n"
    pipe_in(monkeypatch, text.encode())
    code, out, err = ground("-", "--phrase", "the mug")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 2
    assert [each.get("kept") for each in found] == [8, 4, 4, None, 4, None, None]
    assert [each.get("id") for each in found] == [7, None, None, "x", None, None, None]
    assert "nowhere.png: no such file" in found[3]["error"]["message"]
    assert "line 5: unknown key 'picture'; " in found[5]["error"]["message"]
    assert "line 7: not valid JSON" in found[6]["error"]["message"]
    assert err.count("error: ") == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 1000, "nested over 64 deep"),
        (b"[]", "list where an object"),
        (b'{"image": 7, "phrase": "x"}', "path of a picture"),
        (b'{"image": "a.png", "phrase": []}', "a text or a list of texts"),
        (b'{"image": "a.png", "phrase": "x", "ratio": "half"}', "'ratio' has to be a number"),
        (b'{"image": "a.png", "phrase": "x", "keep": true}', "'keep' has to be a count"),
        (b'{"image": "a.png", "phrase": "x", "id": [NaN]}', "'id' holds NaN or an infinity"),
        (b'{"image": "a.png", "phrase": "x", "id": 1e999}', "'id' holds NaN or an infinity"),
    ],
)
def test_a_line_that_says_nothing_useful_is_told(ground, monkeypatch, line, said):
    pipe_in(monkeypatch, line)
    code, out, _ = ground("-")
    assert code == 2
    assert said in json.loads(out)["error"]["message"]


def test_no_box_is_exit_code_7_and_a_line(ground, folder):
    code, out, err = ground(folder / "a.png", "the mug", "--least-score", "0.5", "--json")
    assert code == 7
    found = json.loads(out)
    assert found["boxes"] == []
    problem = f"score {found['score']:.3f} is under 0.5"
    assert err == f"error: no usable box: {problem} (answer: {found['answer']!r})\n"
    assert ground(folder, "--phrase", "the mug", "--least-score", "0.5")[0] == 7
    assert ground(folder, "--phrase", "the mug", "--least-score", "0.1")[0] == 0


def test_drawings_of_several_pictures_go_to_a_folder(ground, folder, tmp_path):
    out = tmp_path / "drawn" / "here"
    assert ground(folder, "--phrase", "the mug", "--draw", out)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    (folder / "a.jpg").write_bytes((folder / "b.jpg").read_bytes())
    code, _, err = ground(folder, "--phrase", "the mug", "--draw", out)
    assert (code, "would both be drawn to a.png" in err) == (2, True)
    code, _, err = ground(folder, "--phrase", "the mug", "--draw", folder)
    assert code == 2
    code, _, err = ground(folder, "--phrase", "the mug", "--draw", "out.png")
    assert (code, "give --draw a folder" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photo.png"], "which phrase?"),
        (["-", "--draw", "out.png"], "not with stdin"),
        (["photo.png", "x", "--least-score", "2"], "no number in [0, 1]"),
    ],
)
def test_what_does_not_go_together_is_told(ground, arguments, said):
    code, _, err = ground(*arguments)
    assert (code, said in err) == (2, True)


def test_an_empty_folder_is_told(ground, tmp_path):
    code, _, err = ground(tmp_path / "bundle", "--phrase", "the mug")
    assert (code, "no picture in this folder" in err) == (2, True)


def test_an_unquoted_phrase_is_noticed(ground, folder):
    code, _, err = ground(folder / "a.png", "the", "mug")
    assert code == 0
    assert "in quotes: 'the mug'" in err
