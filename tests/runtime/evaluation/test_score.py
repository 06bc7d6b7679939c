"""Figures against numbers worked out by hand or by plain loops."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from gap_runtime.errors import ConfigError, InputError
from gap_runtime.evaluation.compare import Comparison, compare_rows
from gap_runtime.evaluation.protocol import load_protocol
from gap_runtime.evaluation.results import (
    Answers,
    AnswerWriter,
    DataFacts,
    Header,
    Row,
    Subject,
    dump_row,
    mark_file,
    read_answers,
)
from gap_runtime.evaluation.score import score_rows
from gap_runtime.evaluation.statistics import mcnemar_p, wilson_interval

FRAME = load_protocol("frame")


@pytest.fixture
def header(llava_box):
    return Header(
        subject=Subject(
            name="tiny",
            sha256="0" * 64,
            engine="onnxruntime",
            strategy="cls_attention",
            positions="gap",
            dtype="float32",
        ),
        data=DataFacts(name="mine", format="plain", phrases=3, sha256="1" * 64),
        box=llava_box,
    )


def make_row(key, answer="[0.1, 0.1, 0.3, 0.3]", *, ratio=0.5, box=(10.0, 10.0, 30.0, 30.0)):
    return Row(
        key=str(key),
        ratio=ratio,
        picture="a.png",
        phrase="the red mug",
        size=(100, 100),
        box=box,
        answer=answer,
        token_ids=(1, 2, 3),
        milliseconds={"vision": 1.0, "total": 4.0},
        found=(),
        calls=2,
        drafted=4,
        accepted=1,
    )


def failed(key, *, ratio=0.5):
    return Row(key=str(key), ratio=ratio, picture="b.png", phrase="it", problem="b.png: broken")


def test_figures(llava_box):
    rows = [
        make_row(1),
        # Half of it: counts at 0.5, for ours has >=.
        make_row(2, "[0.1, 0.1, 0.3, 0.2]"),
        make_row(3, "nothing"),
        make_row(4, "[0.3, 0.1, 0.1, 0.3]"),
        # 400 of 100 * 100 is 4 %: medium; 200 is small, 5000 large.
        make_row(5, box=(10.0, 10.0, 30.0, 20.0)),
        make_row(6, "[0, 0, 1, 0.5]", box=(0.0, 0.0, 100.0, 50.0)),
        failed(7),
        make_row(8, ratio=0.0),
    ]
    unpruned, pruned = score_rows(rows, "frame", FRAME, llava_box)
    assert (unpruned.ratio, unpruned.phrases, unpruned.accuracy) == (0.0, 1, 1.0)
    assert (pruned.protocol, pruned.ratio) == ("frame", 0.5)
    assert (pruned.phrases, pruned.unasked, pruned.hits) == (6, 1, 4)
    assert pruned.accuracy == pytest.approx(4 / 6)
    assert (pruned.accuracy_25, pruned.accuracy_75) == pytest.approx((4 / 6, 2 / 6))
    assert pruned.mean_iou == pytest.approx((1 + 0.5 + 0 + 0 + 0.5 + 1) / 6)
    assert (pruned.unparsable, pruned.degenerate) == (1, 1)
    assert (pruned.tokens, pruned.median_ms) == (3, 4)
    assert (pruned.calls, pruned.drafted, pruned.accepted) == (2, 4, 1)
    assert pruned.milliseconds == {"vision": 1.0, "total": 4.0}
    assert (pruned.low, pruned.high) == wilson_interval(4, 6)
    sizes = {size.size: size for size in pruned.sizes}
    assert {name: size.phrases for name, size in sizes.items()} == {
        "small": 1,
        "medium": 4,
        "large": 1,
    }
    assert [sizes[name].accuracy for name in ("small", "medium", "large")] == [1.0, 0.5, 1.0]


def test_nothing_asked_gives_no_numbers(llava_box):
    (score,) = score_rows([failed(1)], "frame", FRAME, llava_box)
    assert (score.phrases, score.unasked, score.hits) == (0, 1, 0)
    assert math.isnan(score.accuracy)
    assert (score.low, score.high, score.sizes) == (0.0, 1.0, ())


def test_wilson_intervals():
    # R: prop.test(8, 10, correct = FALSE), binom::binom.wilson(0, 20).
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611252), abs=1e-6)
    assert wilson_interval(20, 20)[1] == 1.0


def test_mcnemar():
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5, 5) == 1.0
    assert mcnemar_p(1, 7) == mcnemar_p(7, 1) == pytest.approx(2 * (1 + 8) / 256)
    assert mcnemar_p(0, 10) == pytest.approx(2 / 1024)
    by_sum = sum(math.comb(300, k) for k in range(121)) * 2 / 2**300
    assert mcnemar_p(120, 180) == pytest.approx(by_sum)
    assert 0 <= mcnemar_p(20_000, 21_000) < 1e-5


def make_comparison(only_this, only_other, *, phrases=100, differing=20):
    return Comparison(
        protocol="shikra",
        labels="published",
        ratio=0.5,
        other_ratio=0.0,
        other="o",
        phrases=phrases,
        accuracy=0.5,
        other_accuracy=0.5,
        only_this=only_this,
        only_other=only_other,
        p=mcnemar_p(only_this, only_other),
        differing=differing,
    )


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        (
            make_comparison(0, 8),
            "8.0 points worse (0 right here only, 8 right there only): significant",
        ),
        (make_comparison(9, 1), "8.0 points better"),
        (make_comparison(1, 3), "2.0 points worse (1 right here only, 3 right there only): not"),
        (make_comparison(3, 3), "as many right (3 right here only, 3 right there only): no diff"),
        (make_comparison(0, 0, differing=0), "the same answers to all 100 phrases: no difference"),
        (make_comparison(0, 0, phrases=0), "no phrase to compare"),
    ],
)
def test_a_comparison_in_words(comparison, words):
    assert comparison.describe().startswith(words)


def test_significance_is_that_of_the_test():
    # Six to none is p = 0.03, five to none 0.06.
    assert ": significant, p = 0.031" in make_comparison(6, 0).describe()
    assert "not significant, p = 0.062; it may be chance" in make_comparison(5, 0).describe()


def test_what_is_lost_and_its_interval():
    # By hand: 8 of 100 lost; the deviation is the root of 12 - 64 / 100, by 100.
    lost, low, high = make_comparison(2, 10).find_loss()
    assert (lost, low, high) == pytest.approx((8.0, 1.394, 14.606), abs=1e-3)
    assert make_comparison(0, 0).find_loss() == (0.0, 0.0, 0.0)
    assert all(map(math.isnan, make_comparison(0, 0, phrases=0).find_loss()))


def test_two_files_phrase_by_phrase(header):
    wrong = "[0.5, 0.5, 0.6, 0.6]"
    this = [make_row(1), make_row(2), make_row(3, wrong), make_row(4, wrong), failed(5)]
    other = [make_row(1, "[0.10, 0.1, 0.3, 0.3]"), make_row(2, wrong), make_row(3), make_row(4)]
    other += [make_row(5), make_row(6)]
    (found,) = compare_rows(
        Answers(header=header, rows=tuple(this)),
        Answers(header=header, rows=tuple(other)),
        "other.jsonl",
        "frame",
        FRAME,
    )
    assert (found.phrases, found.only_this, found.only_other) == (4, 1, 2)
    assert (found.accuracy, found.other_accuracy) == (0.5, 0.75)
    assert found.p == mcnemar_p(1, 2)
    # The same box in another text is another answer.
    assert found.differing == 4


def test_ratios_are_paired(header):
    def answers(*ratios):
        return Answers(header=header, rows=tuple(make_row(1, ratio=r) for r in ratios))

    def pairs(this, other):
        found = compare_rows(this, other, "other.jsonl", "frame", FRAME)
        return [(each.ratio, each.other_ratio) for each in found]

    assert pairs(answers(0.0, 0.5), answers(0.5, 0.25, 0.0)) == [(0.0, 0.0), (0.5, 0.5)]
    assert pairs(answers(0.25, 0.5), answers(0.0)) == [(0.25, 0.0), (0.5, 0.0)]
    with pytest.raises(InputError, match=r"other.jsonl: has none of these ratios; have 0, 0.5"):
        pairs(answers(0.25), answers(0.0, 0.5))


def test_answers_to_other_phrases_are_not_compared(header):
    this = Answers(header=header, rows=(make_row(1),))
    other = Answers(header=header, rows=(make_row(1, box=(0.0, 0.0, 5.0, 5.0)),))
    with pytest.raises(InputError, match="'1' is another phrase or box there"):
        compare_rows(this, other, "other.jsonl", "frame", FRAME)
    other = Answers(header=header, rows=(make_row(2),))
    with pytest.raises(InputError, match="no phrase in common"):
        compare_rows(this, other, "other.jsonl", "frame", FRAME)


def write(path, header, *rows, resume=False):
    with AnswerWriter(header, path, resume=resume) as writer:
        for row in rows:
            writer.add(row)
        return list(writer.rows)


def test_a_file_is_read_as_it_was_written(tmp_path, header):
    path = tmp_path / "deep" / "out.jsonl"
    odd = make_row("3", 'a "quote" \u00e9 \ud83d [0.1, 0.1, 0.3, 0.3]\n')
    rows = [make_row(1), failed(2), odd]
    write(path, header, *rows)
    found = read_answers(path)
    assert found.header == header
    assert found.rows[:2] == tuple(rows[:2])
    assert found.rows[2].answer.startswith('a "quote" \u00e9')
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    assert set(json.loads(lines[2])) == {"key", "ratio", "picture", "phrase", "problem", "proof"}


@pytest.mark.parametrize("torn", ["", '{"key', "\0\0\0\n", '{"key": "4"}\x00\n'])
def test_going_on_drops_a_torn_line_only(tmp_path, header, torn):
    path = tmp_path / "out.jsonl"
    write(path, header, make_row(1), make_row(2))
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert [row.key for row in write(path, header, make_row(3), resume=True)] == ["1", "2", "3"]
    mark = mark_file(whole.splitlines(keepends=True)[0])
    assert path.read_bytes() == whole + dump_row(make_row(3), mark)


def test_a_row_that_was_changed_is_found(tmp_path, header):
    """By its proof, whatever of it was changed; the last line too, for it is whole."""
    path = tmp_path / "out.jsonl"
    write(path, header, make_row(1), failed(2), make_row(3))
    lines = path.read_bytes().splitlines(keepends=True)
    tried = 0
    for number in (1, 2, 3):
        for old, new in (
            (b'"a.png"', b'"b.png"'),
            (b"0.5", b"0.6"),
            (b"mug", b"cup"),
            (b'"proof": "', b'"proof": "0'),
            (b'"proof"', b'"prove"'),
        ):
            changed = list(lines)
            changed[number] = changed[number].replace(old, new)
            if changed == lines:
                continue
            tried += 1
            path.write_bytes(b"".join(changed))
            with pytest.raises(InputError, match=rf"jsonl:{number + 1}: not as it was written"):
                read_answers(path)
            with pytest.raises(InputError, match="not as it was written"):
                AnswerWriter(header, path, resume=True)
    assert tried > 10


def test_a_row_of_another_file_is_found(tmp_path, header):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write(one, header, make_row(1))
    subject = dataclasses.replace(header.subject, name="another")
    write(other, dataclasses.replace(header, subject=subject), make_row(2))
    one.write_bytes(one.read_bytes() + other.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(InputError, match=r"one\.jsonl:3: not as it was written"):
        read_answers(one)


def test_files_from_before_rows_were_proven_are_read_and_gone_on_with(tmp_path, header):
    path = tmp_path / "out.jsonl"
    write(path, header, make_row(1), make_row(2))
    old = without_proofs(path)
    path.write_text("".join(f"{line}\n" for line in old), encoding="utf-8")
    assert [row.key for row in write(path, header, make_row(3), resume=True)] == ["1", "2", "3"]
    assert "proof" not in path.read_text(encoding="utf-8")
    assert len(read_answers(path).rows) == 3


def test_going_on_after_any_byte(tmp_path, header):
    """Killed wherever it may be: no line is lost, none comes twice."""
    path = tmp_path / "out.jsonl"
    rows = [make_row(1), failed(2), make_row(3)]
    write(path, header, *rows)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with AnswerWriter(header, path, resume=True) as writer:
            done = len(writer.rows)
            for row in rows[done:]:
                writer.add(row)
        assert path.read_bytes() == whole
        assert done == max(whole[:length].count(b"\n") - 1, 0)


def test_a_file_is_not_written_over(tmp_path, header):
    path = tmp_path / "out.jsonl"
    write(path, header, make_row(1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists; go on with it by --resume"):
        AnswerWriter(header, path, resume=False)
    others = [
        ("data", {"sha256": "2" * 64}, "another data: its sha256 is '1111"),
        ("subject", {"engine": "pytorch"}, "its engine is 'onnxruntime', now 'pytorch'"),
        ("subject", {"sha256": "3" * 64}, "another model or bundle"),
        ("box", {"frame": "original"}, "another box format"),
    ]
    import dataclasses

    for name, changes, part in others:
        changed = dataclasses.replace(getattr(header, name), **changes)
        with pytest.raises(InputError, match=part):
            AnswerWriter(dataclasses.replace(header, **{name: changed}), path, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"photo", b"\x89PNG\r\n", b'{"a": 1}\n', b"x" * 3_000_000])
def test_a_file_of_something_else_is_left_alone(tmp_path, header, content):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"out\.jsonl"):
        AnswerWriter(header, path, resume=True)
    assert path.read_bytes() == content
    with pytest.raises(InputError):
        read_answers(path)


def test_two_runs_do_not_write_to_one_file(tmp_path, header):
    pytest.importorskip("fcntl")
    path = tmp_path / "out.jsonl"
    with (
        AnswerWriter(header, path, resume=False),
        pytest.raises(InputError, match="another run is writing to it"),
    ):
        AnswerWriter(header, path, resume=True)


def without_proofs(path):
    """The lines of a file as version 1 had them, whose values are all that can be checked."""
    first, *rows = path.read_text(encoding="utf-8").splitlines()
    plain = [re.sub(r', "proof": "\w+"', "", row) for row in rows]
    return [first.replace('{"gap_answers": 2', '{"gap_answers": 1'), *plain]


def change(**fields):
    def edit(line):
        return json.dumps({**json.loads(line), **fields})

    return edit


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda _: "oops", r"not valid JSON \(.*\); the file was changed"),
        (lambda _: "[]", "expected the fields accepted, answer, box"),
        (change(more=1), "expected the fields"),
        (change(box=[1, 2, 3]), "wrong kind"),
        (change(box=[3, 2, 1, 4]), "spans no area"),
        (change(size=[0, 5]), "lies outside its picture"),
        (change(size=[100, -1]), "is no count"),
        (change(box=[200, 0, 210, 10]), "lies outside its picture"),
        (change(box=[0, 0, 1e308, 10]), "spans no area"),
        (change(found=[[1, 2, float("nan"), 4]]), "spans no area"),
        (change(ratio=7), "no share"),
        (change(token_ids=["1"]), "is no count"),
        (change(answer=None), "wrong kind"),
        (change(milliseconds=[]), "wrong kind"),
        (change(key="2"), "comes twice"),
    ],
)
def test_a_changed_file_names_the_line(tmp_path, header, edit, part):
    path = tmp_path / "out.jsonl"
    write(path, header, make_row(1), make_row(2))
    first, second, third = without_proofs(path)
    path.write_text("\n".join([first, edit(second), third, ""]), encoding="utf-8")
    with pytest.raises(InputError, match=part) as caught:
        read_answers(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)


def test_answers_from_before_calls_were_counted(tmp_path, header):
    path = tmp_path / "out.jsonl"
    write(path, header, make_row(1))
    first, line = without_proofs(path)
    older = {
        k: v for k, v in json.loads(line).items() if k not in {"calls", "drafted", "accepted"}
    }
    path.write_text("\n".join([first, json.dumps(older), ""]), encoding="utf-8")
    (row,) = read_answers(path).rows
    assert row == dataclasses.replace(make_row(1), calls=0, drafted=0, accepted=0)


def test_a_file_of_another_version(tmp_path, header):
    path = tmp_path / "out.jsonl"
    write(path, header)
    path.write_text(path.read_text(encoding="utf-8").replace('answers": 2', 'answers": 3'))
    with pytest.raises(InputError, match="answers of version 3, this version reads 2"):
        read_answers(path)
    path.write_text("")
    with pytest.raises(InputError, match="empty"):
        read_answers(path)
    with pytest.raises(InputError, match="no such file"):
        read_answers(Path(tmp_path) / "nowhere.jsonl")


def test_classes_of_size_are_by_share(llava_box):
    shares = [0.0299, 0.03, 0.1499, 0.15, 1.0]
    rows = [
        make_row(k, box=(0.0, 0.0, 100.0, 100 * share), answer="x")
        for k, share in enumerate(shares)
    ]
    (score,) = score_rows(rows, "frame", FRAME, llava_box)
    assert [(s.size, s.phrases) for s in score.sizes] == [
        ("small", 1),
        ("medium", 2),
        ("large", 2),
    ]
    assert np.isfinite(score.mean_iou)
