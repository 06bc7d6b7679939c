"""Whole bundles checked on a fake backend: every ratio and bucket, the page, drafts."""

import dataclasses
import hashlib
import json
import platform

import pytest

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.cli.main import main
from gap_runtime.errors import CheckError
from gap_runtime.grounding.check import check_bundle


def test_a_bundle_that_answers_as_the_reference_passes(
    make_samples, make_bundle, manifest, answer_with
):
    answer_with(11)
    report = check_bundle(Bundle.open(make_bundle(**make_samples(manifest))))
    assert [row.reasons for row in report.rows] == [(), ()]
    assert report.passed
    assert [row.ratio for row in report.rows] == [0.5, 0.75]


def test_a_bundle_with_an_extra_token_is_checked_with_it(
    make_samples, make_bundle, manifest, with_extra, answer_with
):
    answer_with(11)
    changes = {**with_extra, **make_samples(dataclasses.replace(manifest, **with_extra))}
    report = check_bundle(Bundle.open(make_bundle(**changes)))
    assert [row.reasons for row in report.rows] == [(), ()]


class EndDrafter:
    """Drafts the end of the answer behind its first token."""

    def about(self, phrase):
        assert phrase == " ".join(phrase.split())
        return self

    def propose(self, token_ids, most):
        return [10][:most] if len(token_ids) == 1 else []

    def learn(self, token_ids, accepted):
        assert (len(token_ids), accepted) == (1, 0)

    def keep(self, token_ids):
        assert len(token_ids) > 1


@pytest.fixture
def answer_otherwise(answer_with, monkeypatch):
    """A backend whose calls of several rows choose another second token, which nearly ties."""
    backend = answer_with(11)
    open_decoder = backend.open_decoder
    monkeypatch.setattr(
        "gap_runtime.grounding.prompt.PromptEncoder.make_drafter", lambda *_, **__: EndDrafter()
    )

    def open_unlike(*arguments):
        decoder = open_decoder(*arguments)
        run = decoder.run

        def run_unlike(embeddings, position_ids, write_slot, logits_rows):
            logits = run(embeddings, position_ids, write_slot, logits_rows)
            if write_slot in {16, 12}:
                # The token that stops leads token 8 by 0.25 of 2.
                logits[:] = 0
                logits[:, 10], logits[:, 8] = 2, 1.75
                if len(logits_rows) > 1:
                    logits[:, 8] = 2.25
            return logits

        decoder.run = run_unlike
        return decoder

    backend.open_decoder = open_unlike
    return backend


@pytest.mark.usefixtures("answer_otherwise")
def test_other_answers_with_drafts_fail_in_float32(make_samples, make_bundle, manifest):
    report = check_bundle(Bundle.open(make_bundle(**make_samples(manifest))))
    assert [row.reasons for row in report.rows] == [
        ("answers with and without drafts part at token 1",)
    ] * 2
    assert (report.draft_differences, report.passed) == (2, False)


@pytest.mark.usefixtures("answer_otherwise")
def test_other_answers_with_drafts_are_counted_in_float16(
    make_samples, make_bundle, manifest, capsys
):
    folder = make_bundle(**make_samples(manifest), dtype="float16")
    report = check_bundle(Bundle.open(folder))
    assert report.passed
    assert report.draft_differences == 2
    assert [(row.draft_divergence, row.draft_margin) for row in report.rows] == [(1, 0.125)] * 2
    assert main(["check", str(folder)]) == 0
    assert "2 of 2 answers are others with drafts" in capsys.readouterr().err


TILE_SIZES = ((16, 8), (8, 16))


def test_every_bucket_is_checked_with_its_own_samples(
    make_samples, make_bundle, manifest, tiled, answer_with
):
    backend = answer_with(11)
    samples = make_samples(dataclasses.replace(manifest, **tiled), sizes=TILE_SIZES)
    report = check_bundle(Bundle.open(make_bundle(**tiled, **samples)))
    assert [row.reasons for row in report.rows] == [()] * 4
    assert report.passed
    assert [(row.ratio, row.sample) for row in report.rows] == [
        (0.5, "00-wide"),
        (0.25, "00-wide"),
        (0.5, "00-tall"),
        (0.25, "00-tall"),
    ]
    assert [name for name, _ in backend.calls] == [
        "vision-wide-7",
        "vision-wide-11",
        "vision-tall-8",
        "vision-tall-12",
    ]


def test_a_difference_in_one_bucket_is_told_of_it_alone(
    make_samples, make_bundle, manifest, tiled, answer_with
):
    answer_with(11)
    changed_manifest = dataclasses.replace(manifest, **tiled)
    samples = make_samples(changed_manifest, sizes=TILE_SIZES, wrong=[(0.25, "tall")])
    report = check_bundle(Bundle.open(make_bundle(**tiled, **samples)))
    assert [row.passed for row in report.rows] == [True, True, True, False]
    assert report.rows[3].reasons == ("answers part at token 0",)


def test_a_bucket_without_samples_cannot_be_checked(
    make_samples, make_bundle, manifest, tiled, answer_with
):
    answer_with(11)
    samples = make_samples(dataclasses.replace(manifest, **tiled), sizes=TILE_SIZES)
    known = samples["reference"].samples
    samples["reference"] = dataclasses.replace(
        samples["reference"], samples=tuple(each for each in known if each.key != "00-tall/kept-8")
    )
    bundle = Bundle.open(make_bundle(**tiled, **samples))
    with pytest.raises(CheckError, match=r"at ratio 0\.5 for pictures of tall; export again"):
        check_bundle(bundle)


def test_check_as_json_has_a_row_for_every_bucket_and_ratio(
    make_samples, make_bundle, manifest, tiled, answer_with, capsys
):
    answer_with(11)
    samples = make_samples(dataclasses.replace(manifest, **tiled), sizes=TILE_SIZES)
    assert main(["check", str(make_bundle(**tiled, **samples)), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["sample"], row["ratio"], row["passed"]) for row in rows] == [
        ("00-wide", 0.5, True),
        ("00-wide", 0.25, True),
        ("00-tall", 0.5, True),
        ("00-tall", 0.25, True),
    ]


@pytest.mark.parametrize("wrong", [(), [(0.25, "tall")]])
def test_check_writes_its_page(
    make_samples, make_bundle, manifest, tiled, answer_with, tmp_path, pages, wrong
):
    answer_with(11)
    samples = make_samples(dataclasses.replace(manifest, **tiled), sizes=TILE_SIZES, wrong=wrong)
    out = tmp_path / "report.html"
    bundle = make_bundle(**tiled, **samples)
    code = main(["check", str(bundle), "--html", str(out)])
    assert code == (6 if wrong else 0)
    page = pages.Page(out.read_text(encoding="utf-8"))
    pages.require_sound(page)
    # One for each row, and what the ratios of each sample keep.
    assert len(page.images) == 4 + 2
    assert [table["rows"] for table in page.tables] == [1 + 4, 4, 7]
    manifest_hash = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert [part for part in (manifest_hash, platform.node()) if part not in page.words] == []
    assert ("answers part at token 0" in page.words) == bool(wrong)
    assert ("token 0" in page.words) == bool(wrong)


def test_a_page_that_cannot_be_written_is_told_before_the_work(
    make_samples, make_bundle, manifest, answer_with, tmp_path, capsys
):
    backend = answer_with(11)
    bundle = make_bundle(**make_samples(manifest))
    for place in (tmp_path, tmp_path / "nowhere" / "report.html"):
        assert main(["check", str(bundle), "--html", str(place)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {place}: cannot be written (")
        assert len(error.splitlines()) == 1
    assert backend.calls == []
