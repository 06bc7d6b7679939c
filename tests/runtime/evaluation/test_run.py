"""The run: order, shared work, bad pictures, going on, and the command line."""

import builtins
import dataclasses
import json
import re
from functools import partial

import pytest
from PIL import Image

from gap_runtime.cli import main as cli
from gap_runtime.display import Display, Pace, format_seconds
from gap_runtime.errors import ConfigError, EngineError, InputError
from gap_runtime.evaluation.answer import Answer, BundleAnswerer
from gap_runtime.evaluation.data import open_data
from gap_runtime.evaluation.protocol import list_protocols, load_protocol
from gap_runtime.evaluation.results import AnswerWriter, Header, Subject, read_answers
from gap_runtime.evaluation.run import describe_data, evaluate
from gap_runtime.evaluation.spread import RayCluster
from gap_runtime.pictures.boxes import PictureFrame

SUBJECT = Subject(
    name="fake", sha256="0", engine="here", strategy="none", positions="gap", dtype="float32"
)


class FakeAnswerer:
    """Answers with the phrase; writes down what it is asked."""

    def __init__(self, calls=None, stop_after=None):
        self.calls = [] if calls is None else calls
        self.stop_after = stop_after

    def look(self, picture):
        self.calls.append(("look", picture.size))
        return picture

    def answer(self, view, phrase, ratio):
        assert view is not None
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise EngineError("out of memory")
        if phrase == "too long":
            raise InputError("the phrase is too long")
        self.calls.append((phrase, ratio))
        return Answer(text=f"{phrase} {ratio:g}", token_ids=(1,), milliseconds={"total": 1.0})


@pytest.fixture
def mine(tmp_path):
    """Phrases on three pictures, in mixed order, one of them broken and one of another size."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    records = [
        ("a.png", "one", {}),
        ("b.png", "two", {}),
        ("a.png", "three", {}),
        ("broken.png", "four", {}),
        ("c.png", "five", {"width": 10, "height": 20}),
        ("b.png", "too long", {}),
        ("nowhere.png", "six", {}),
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(
            json.dumps({"image": image, "phrase": phrase, "box": [0, 0, 5, 5], **more}) + "\n"
            for image, phrase, more in records
        )
    )
    return open_data(str(path))


@pytest.fixture
def header(mine, llava_box):
    return Header(subject=SUBJECT, data=describe_data(mine), box=llava_box)


def test_pictures_are_looked_at_once_and_bad_ones_are_named(mine, header):
    calls = []
    found = evaluate(mine, header, partial(FakeAnswerer, calls), ratios=(0.5, 0.0))
    asked = [call for call in calls if call[0] != "look"]
    assert asked == [
        *(("one", 0.5), ("three", 0.5), ("one", 0.0), ("three", 0.0)),
        *(("two", 0.5), ("two", 0.0)),
    ]
    assert len(calls) - len(asked) == 3
    # By ratio as given, then in the order of the data.
    assert [(row.key, row.ratio) for row in found.rows] == [
        (str(k), ratio) for ratio in (0.5, 0.0) for k in range(1, 8)
    ]
    problems = [row.problem for row in found.rows[:7]]
    assert [problem is None for problem in problems] == [True, True, True, *[False] * 4]
    assert "broken.png: not a picture" in problems[3]
    assert "c.png: the picture is 20x10, the data say 10x20" in problems[4]
    assert problems[5] == "the phrase is too long"
    assert "nowhere.png: no such file" in problems[6]
    assert found.rows[0].answer == "one 0.5"
    assert (found.rows[0].size, found.rows[0].picture) == ((20, 10), "a.png")


def test_going_on_asks_what_is_missing(mine, header, tmp_path):
    out = tmp_path / "out.jsonl"
    run = partial(evaluate, mine, header, ratios=(0.5, 0.0), path=out)
    with pytest.raises(EngineError):
        run(partial(FakeAnswerer, stop_after=4))
    first = read_answers(out).rows
    assert 0 < len(first) < 14
    calls, left = [], []
    found = run(
        partial(FakeAnswerer, calls), resume=True, begin=lambda n: left.append(n) or left.append
    )
    assert left[0] == 14 - len(first) == len(left) - 1
    whole = evaluate(mine, header, FakeAnswerer, ratios=(0.5, 0.0))
    assert found.rows == whole.rows
    assert len(read_answers(out).rows) == 14
    # Nothing left: no model is loaded, the bad pictures are not asked again.
    before = out.read_bytes()
    assert run(None, resume=True).rows == whole.rows
    assert out.read_bytes() == before
    # A further ratio adds to the file; what is given is what was asked for.
    more = evaluate(mine, header, FakeAnswerer, ratios=(0.25,), path=out, resume=True)
    assert {row.ratio for row in more.rows} == {0.25}
    assert len(read_answers(out).rows) == 21


def test_a_decompression_bomb_is_a_bad_picture(tmp_path, header, monkeypatch):
    from gap_runtime.pictures import limits

    monkeypatch.setattr(limits, "MAX_PIXELS", 150)
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "phrase": "b", "box": [0, 0, 1, 1]}\n')
    data = open_data(str(tmp_path / "x.jsonl"))
    (row,) = evaluate(data, header, FakeAnswerer, ratios=(0.0,)).rows
    assert "at most 150 in all are read" in row.problem


@pytest.mark.parametrize("frame", ["resized", "original"])
def test_boxes_in_pixels_of_a_resized_picture_are_scored_from_the_file(
    tmp_path, llava_box, mine, frame
):
    """The file knows no manifest: what was shown is kept where the boxes depend on it."""

    class Resizer(FakeAnswerer):
        def answer(self, view, _phrase, _ratio):
            width, height = view.size
            shown = (0, 0, width, height)
            return Answer(
                text=f"[{width}, 0, {2 * width}, {height / 2}]",
                frame=PictureFrame(size=view.size, shown=shown, resized=(2 * width, height)),
                token_ids=(1,),
                milliseconds={"total": 1.0},
            )

    box = dataclasses.replace(llava_box, frame=frame, scale=1.0)
    header = Header(subject=SUBJECT, data=describe_data(mine), box=box)
    out = tmp_path / "answers.jsonl"
    given = evaluate(mine, header, Resizer, ratios=(0.5,), path=out)
    rows = [row for row in read_answers(out).rows if row.problem is None]
    assert rows
    assert {row.key: row for row in rows}.items() <= {row.key: row for row in given.rows}.items()
    if frame == "original":
        assert all(row.frame is None for row in rows)
        return
    for row in rows:
        width, height = row.size
        assert list(row.found) == [(width / 2, 0, width, height / 2)]
        judged = load_protocol("frame").judge(row.answer, row.frame, row.found[0], box)
        assert judged.iou == 1.0


SQUARE = {"image": "a.png", "box": [4, 4, 12, 8]}


@pytest.fixture
def pictures(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    path = tmp_path / "x.jsonl"
    lines = [{**SQUARE, "phrase": "the red mug"}, {**SQUARE, "phrase": "the mug"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(capsys):
    def run_in_process(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run_in_process


def test_the_command(run, make_bundle, answer_with, pictures, tmp_path):
    backend = answer_with(11)
    out = tmp_path / "out.jsonl"
    command = ("evaluate", make_bundle(), "--data", pictures, "--out", out)
    code, text, err = run(*command, "--json")
    found = json.loads(text)
    assert code == 0
    assert [score["ratio"] for score in found["scores"]] == [0.5, 0.75]
    assert [score["accuracy"] for score in found["scores"]] == [1.0, 1.0]
    assert found["subject"]["name"] == "tiny-8of16"
    assert found["data"]["phrases"] == 2
    # Two ratios of one picture: two runs, not four.
    assert sorted(name for name, _ in backend.calls) == ["vision-4", "vision-8"]
    assert len(backend.decoded) == 4 * 2
    assert read_answers(out).rows[0].found == ((4.0, 4.0, 12.0, 8.0),)
    # It is there, so that only --resume goes on; nothing is asked again.
    assert run(*command)[0] == 2
    code, text, err = run(
        *command, "--resume", "--protocol", "frame", "--protocol", "lmms-eval", "--compare", out
    )
    assert code == 0
    assert "4 of 4 answers were there already" in err
    assert len(backend.decoded) == 4 * 2
    for part in ("lmms-eval", "100.0 %", "McNemar p", "95 %", "medium"):
        assert part in text
    # The old name of a protocol, with a line that says the new one.
    code, text, err = run(*command, "--resume", "--protocol", "ours", "--json")
    assert {score["protocol"] for score in json.loads(text)["scores"]} == {"frame"}
    assert "note: --protocol ours is now --protocol frame" in err
    code, text, _ = run(*command[:-2], "--ratio", "0.75", "--limit", "1", "--json")
    assert [(s["ratio"], s["phrases"]) for s in json.loads(text)["scores"]] == [(0.75, 1)]


def test_a_pruner_that_reads_the_phrase_looks_again(
    run, make_bundle, answer_with, pictures, told_by_embeddings
):
    backend = answer_with(11)
    folder = make_bundle(**told_by_embeddings)
    assert run("evaluate", folder, "--data", pictures, "--json")[0] == 0
    names = [name for name, _ in backend.calls]
    assert (names.count("vision-8"), names.count("vision-4")) == (1, 2)
    pixels = [inputs["pixels"] for _, inputs in backend.calls]
    assert all(each is pixels[0] for each in pixels)


def test_a_bad_picture_does_not_stop_the_command(run, make_bundle, answer_with, pictures):
    answer_with(11)
    with pictures.open("a") as file:
        file.write(json.dumps({**SQUARE, "image": "nowhere.png", "phrase": "it"}) + "\n")
        file.write(json.dumps({**SQUARE, "phrase": "the red mug " * 9}) + "\n")
    code, text, err = run("evaluate", make_bundle(), "--data", pictures, "--json")
    found = json.loads(text)
    assert code == 0
    assert [(s["phrases"], s["unasked"]) for s in found["scores"]] == [(2, 2), (2, 2)]
    assert "nowhere.png: no such file" in err
    assert "answers that could not be had, in no figure: 4" in err
    assert {each["key"] for each in found["unasked"]} == {"3", "4"}


def test_what_there_is_to_choose_from(capsys):
    for option in ("--list", "--help"):
        with pytest.raises(SystemExit) as end:
            cli.main(["evaluate", option])
        assert not end.value.code
        text = capsys.readouterr().out
        for name in (*list_protocols(), "ref-l4", "reviewed", "screenspot-v2", "minigpt-v2"):
            assert name in text
        for name in list_protocols() if option == "--list" else ():
            assert re.search(
                rf"^  {name} +{re.escape(load_protocol(name).SUMMARY)}$", text, re.MULTILINE
            )


ERRORS = [
    (["--data", "nowhere.jsonl"], "input", "no such file"),
    (["--data", "refshapes:test", "--protocol", "mine"], "unknown-name", "have frame"),
    (["--data", "refshapes:test", "--ratio", "0.1"], "config", "no ratio 0.1; have 0.5, 0.75"),
    (["--data", "refshapes:test", "--resume"], "config", "name it with --out"),
    (["--data", "refshapes:test", "--workers", "2"], "config", "goes with --ray"),
    (["--data", "refshapes:test", "--limit", "0"], "config", "--limit 0"),
    (["--data", "refshapes:test", "--compare", "no.jsonl"], "input", "no.jsonl: no such file"),
    (["--data", "refshapes:test", "--backend", "abacus"], "unknown-name", "backend 'abacus'"),
    ([], "config", "--data"),
]


@pytest.mark.parametrize(("arguments", "kind", "part"), ERRORS)
def test_errors(run, make_bundle, arguments, kind, part):
    code, text, _ = run("evaluate", make_bundle(), *arguments, "--json")
    assert code == 2
    assert json.loads(text)["error"]["kind"] == kind
    assert part in json.loads(text)["error"]["message"]


def test_without_ray_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def block(name, *rest):
        if name == "ray":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", block)
    with pytest.raises(ConfigError, match=r"pip install 'gap-runtime\[ray\]'"):
        RayCluster(2)


def make_answerers():
    """Two kinds; inside a function, so that they travel to workers that lack this file."""

    class Parrot:
        def look(self, picture):
            return picture.size

        def answer(self, view, phrase, ratio):
            if phrase == "too long":
                raise InputError("the phrase is too long")
            return Answer(text=f"{phrase} {view}", token_ids=(1,), milliseconds={"total": ratio})

    class Failing(Parrot):
        def look(self, picture):
            raise EngineError(f"out of memory at {picture.size}")

    return Parrot, Failing


def test_two_workers_give_what_one_process_gives(mine, header, tmp_path):
    ray = pytest.importorskip("ray")
    parrot, failing = make_answerers()
    out = tmp_path / "out.jsonl"
    whole = evaluate(mine, header, parrot, ratios=(0.5, 0.0))
    try:
        cluster = RayCluster(2)
        run = partial(evaluate, mine, header, ratios=(0.5, 0.0), path=out, spread=cluster)
        found = run(parrot)
        assert found.rows == whole.rows
        # Killed on the way: the first lines only.
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:6]) + lines[6][:9])
        assert run(parrot, resume=True).rows == whole.rows
        assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(lines)
        out.unlink()
        with pytest.raises(EngineError, match="out of memory") as caught:
            run(failing)
        assert type(caught.value) is EngineError
        with pytest.raises(ConfigError, match="--workers 99: the cluster has 2 cores"):
            RayCluster(99)
    finally:
        ray.shutdown()


def test_progress_tells_rate_and_time_left(capsys, monkeypatch):
    from gap_runtime import display as display_module

    monkeypatch.setattr(display_module, "_LINE_SECONDS", 0)
    with Display().progress("asking") as show:
        pace = Pace(show, 10, "answers")
        pace(4)
    err = capsys.readouterr().err
    assert re.search(r"asking: 40%, 4 of 10 answers, [\d.]+/s, \d+ s left", err)
    with Display().progress("bringing") as show:
        Pace(show, 4_000_000, "bytes")(1_000_000)
    err = capsys.readouterr().err
    assert re.search(r"bringing: 25%, 1.0 MB of 4.0 MB, [\d.]+ [kMGT]?B/s, \d+ s left", err)
    assert format_seconds(7503) == "2 h 05 min"
    assert format_seconds(65.4) == "1 min 05 s"


def test_a_bundle_answers_as_it_grounds(make_bundle, answer_with):
    answer_with(11)
    answerer = BundleAnswerer(make_bundle(), "onnxruntime")
    view = answerer.look(Image.new("RGB", (16, 16)))
    answer = answerer.answer(view, "the red mug", 0.5)
    assert answer.text == "[0.25,0.25,0.75,0.50]"
    assert set(answer.milliseconds) == {"preprocess", "vision", "prefill", "decode", "total"}
    assert (answer.calls, answer.drafted, answer.accepted) == (2, 0, 0)
    with pytest.raises(InputError, match="use a shorter phrase"):
        answerer.answer(view, "mug " * 30, 0.5)
    with pytest.raises(ConfigError):
        answerer.answer(view, "mug", 0.25)


def test_a_header_tells_everything_apart(header):
    other = dataclasses.replace(header.subject, positions="compact")
    assert dataclasses.replace(header, subject=other) != header


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phrase": "another"}, "is no phrase of the data"),
        ({"picture": "z.png"}, "is no phrase of the data"),
        ({"key": "99"}, "is no phrase of the data"),
        ({"box": (0.0, 0.0, 5.0, 6.0)}, "has another box or size than the data"),
    ],
)
def test_rows_are_held_to_what_the_data_ask(mine, header, tmp_path, change, said):
    """Also rows whose proof is right, for anybody can make one."""
    path = tmp_path / "out.jsonl"
    whole = evaluate(mine, header, FakeAnswerer, ratios=(0.5,), path=path)
    row = next(row for row in whole.rows if row.problem is None)
    path.unlink()
    with AnswerWriter(header, path, resume=False) as writer:
        writer.add(dataclasses.replace(row, **change))
    with pytest.raises(InputError, match=said):
        evaluate(mine, header, FakeAnswerer, ratios=(0.5,), path=path, resume=True)


def test_a_true_box_outside_its_picture_is_in_no_figure(tmp_path, header):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    path = tmp_path / "mine.jsonl"
    record = {"image": "a.png", "phrase": "one", "box": [20, 0, 25, 5]}
    path.write_text(json.dumps(record), encoding="utf-8")
    found = evaluate(open_data(str(path)), header, FakeAnswerer, ratios=(0.5,))
    assert [row.problem for row in found.rows] == ["a.png: the true box lies outside the picture"]
