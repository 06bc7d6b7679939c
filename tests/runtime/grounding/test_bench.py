"""What is timed, how often and on which pictures; the times are those of fake graphs."""

import dataclasses
import json
import os
import re
from collections import Counter

import pytest

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.cli.main import main
from gap_runtime.grounding.bench import bench_bundle
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.machines.gauges import DevicePeak, Meter, Power

BOX_TOKEN = 11


@pytest.fixture
def backend(answer_with):
    return answer_with(BOX_TOKEN)


def test_every_ratio_has_a_row(make_bundle, backend):
    report = bench_bundle(Bundle.open(make_bundle()), runs=3, warmup=1)
    found = [(row.ratio, row.bucket, row.kept, row.patches, row.prompt) for row in report.rows]
    assert found == [(0.5, "", 8, 16, 16), (0.75, "", 4, 16, 12)]
    assert Counter(name for name, _ in backend.calls) == {"vision-8": 4, "vision-4": 4}
    assert report.runs == 3


@pytest.mark.usefixtures("backend")
def test_every_run_is_shown_with_the_time_that_is_left(make_bundle, capsys, monkeypatch):
    monkeypatch.setattr("gap_runtime.display._LINE_SECONDS", 0)
    assert main(["bench", str(make_bundle()), "--runs", "3", "--warmup", "1"]) == 0
    said = capsys.readouterr().err.splitlines()
    # Four times two ratios, and how long it took.
    assert len(said) == 9
    assert re.fullmatch(r"timing: 38%, 3 of 8 runs, [\d.,]+/s, \d+ s left", said[2])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], [8, 4]),
        (["--ratio", "0.75"], [4]),
        (["--ratio", "0.5,0.75"], [8, 4]),
        (["--keep", "8"], [8]),
        (["--keep", "4", "--keep", "8"], [8, 4]),
    ],
)
def test_what_is_asked_for_is_timed(make_bundle, capsys, arguments, kept):
    assert main(["bench", str(make_bundle()), "--runs", "1", "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["kept"] for row in report["rows"]] == kept


@pytest.mark.usefixtures("backend")
def test_a_system_that_counts_no_load(make_bundle, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 2.0, 3.0), raising=False)
    bundle = Bundle.open(make_bundle())
    assert bench_bundle(bundle, runs=1).load_average == 1.5
    monkeypatch.delattr(os, "getloadavg")
    assert bench_bundle(bundle, runs=1).load_average is None


def test_every_ratio_of_every_bucket_has_a_row(make_bundle, backend, tiled):
    report = bench_bundle(Bundle.open(make_bundle(**tiled)), runs=2, warmup=1)
    found = [(row.ratio, row.bucket, row.kept, row.patches, row.prompt) for row in report.rows]
    assert found == [
        (0.5, "wide", 7, 14, 15),
        (0.25, "wide", 11, 14, 19),
        (0.5, "tall", 8, 16, 16),
        (0.25, "tall", 12, 16, 20),
    ]
    turn = ["vision-wide-7", "vision-wide-11", "vision-tall-8", "vision-tall-12"]
    assert [name for name, _ in backend.calls] == turn * 3
    assert all(row.prefill_ms > 0 and row.vision_ms > 0 for row in report.rows)


@pytest.mark.usefixtures("backend")
def test_rows_of_two_buckets_have_their_own_times(make_bundle, tiled, monkeypatch):
    run = Grounder.run_stages
    took = {"wide": 10.0, "tall": 20.0}

    def run_slowly(self, picture, phrase, entry, **options):
        values = run(self, picture, phrase, entry, **options)
        times = dict.fromkeys(values.milliseconds, took[entry.bucket] + entry.kept)
        return dataclasses.replace(values, milliseconds=times)

    monkeypatch.setattr(Grounder, "run_stages", run_slowly)
    report = bench_bundle(Bundle.open(make_bundle(**tiled)), runs=3, warmup=0)
    assert [row.vision_ms for row in report.rows] == [17, 21, 28, 32]


def test_pictures_are_noise_that_fits_the_bucket(make_bundle, backend, tiled):
    bench_bundle(Bundle.open(make_bundle(**tiled)), runs=1, warmup=0)
    for _, inputs in backend.calls:
        pixels = inputs["pixels"]
        assert pixels.shape == (1, 3, 3, 8, 8)
        # Noise in the whole view and in both tiles, and no row or column of the canvas's black.
        assert (pixels[0].std(axis=(1, 2, 3)) > 0.2).all()
        assert (pixels[0].max(axis=(1, 2)) > -0.9).all()
        assert (pixels[0].max(axis=(1, 3)) > -0.9).all()


def test_extra_token_counts_in_the_prompt(make_bundle, backend, with_extra):
    assert backend.opened == []
    report = bench_bundle(Bundle.open(make_bundle(**with_extra)), runs=1, warmup=0)
    assert [(row.kept, row.prompt) for row in report.rows] == [(8, 17), (4, 12)]


def test_phrase_is_told_where_it_is_read(make_bundle, backend, told_by_clip):
    bench_bundle(Bundle.open(make_bundle(**told_by_clip)), runs=2, warmup=0)
    # The second ratio's pruner reads each of the three phrases of a run.
    turn = ["vision-8", *["text", "vision-4"] * 3]
    assert [name for name, _ in backend.calls] == turn * 2


def test_answers_are_decoded_past_the_stop_token(make_bundle, backend):
    bench_bundle(Bundle.open(make_bundle()), runs=1, warmup=0)
    # The layout has room for five; the fake would stop after one, as the answer before does. The
    # further phrase between them is only prefilled.
    assert len(backend.decoded) == 2 * (2 + 1 + 5)


def test_a_further_phrase_computes_only_what_differs(make_bundle, backend):
    (row, _) = bench_bundle(Bundle.open(make_bundle()), runs=1, warmup=0).rows
    rows = [embeddings.shape[1] for embeddings, *_ in backend.decoded]
    # 1 token before the picture, 8 of it, 7 behind it, of which "Where is" is there; rows are
    # taken in pairs.
    assert rows[:8] == [16, 1, 6, 6, 1, 1, 1, 1]
    assert rows[8:] == [12, 1, 6, 6, 1, 1, 1, 1]
    assert (row.tokens, row.calls, row.drafted, row.accepted) == (1, 2, 0, 0)
    assert row.further_ms > 0


def test_bench_for_people_names_the_buckets(make_bundle, tiled, answer_with, capsys):
    answer_with(BOX_TOKEN)
    assert main(["bench", str(make_bundle(**tiled)), "--runs", "1"]) == 0
    *lines, memory = capsys.readouterr().out.splitlines()
    assert memory.startswith("peak memory ")
    assert [line.partition(":")[0] for line in lines] == [
        "ratio 0.5 (wide, 7 of 14)",
        "ratio 0.25 (wide, 11 of 14)",
        "ratio 0.5 (tall, 8 of 16)",
        "ratio 0.25 (tall, 12 of 16)",
    ]


def test_bench_for_people_without_buckets(make_bundle, answer_with, capsys):
    answer_with(BOX_TOKEN)
    assert main(["bench", str(make_bundle()), "--runs", "1"]) == 0
    assert capsys.readouterr().out.startswith("ratio 0.5 (8 of 16): vision ")


def test_bench_as_json_has_the_bucket_of_each_row(make_bundle, tiled, answer_with, capsys):
    answer_with(BOX_TOKEN)
    assert main(["bench", str(make_bundle(**tiled)), "--runs", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["bucket"], row["ratio"]) for row in rows] == [
        ("wide", 0.5),
        ("wide", 0.25),
        ("tall", 0.5),
        ("tall", 0.25),
    ]


@pytest.mark.usefixtures("backend")
def test_watts_and_memory_of_a_device_are_shown_where_there_are_some(
    make_bundle, capsys, monkeypatch
):
    """From the moment that timed runs begin; a system without sensors has no line."""
    bundle = str(make_bundle())
    power = (Power(source="ina", name="VDD_IN", watts=7.4),)
    memory = (DevicePeak(source="nvml", name="NVIDIA H", peak_mib=900.0),)
    begun = []

    class Told(Meter):
        def begin(self):
            begun.append(self)

        def __exit__(self, *raised):
            super().__exit__(*raised)
            self.power, self.memory = power, memory

    monkeypatch.setattr("gap_runtime.grounding.bench.Meter", Told)
    assert main(["bench", bundle, "--runs", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "peak memory of NVIDIA H (nvml) 900 MiB",
        "power of VDD_IN (ina) 7.40 W",
    ]
    assert len(begun) == 1
    assert main(["bench", bundle, "--runs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["power"] == [{"source": "ina", "name": "VDD_IN", "watts": 7.4}]
    assert report["device_memory"][0]["peak_mib"] == 900
    power = memory = ()
    assert main(["bench", bundle, "--runs", "1"]) == 0
    assert "of" not in capsys.readouterr().out.splitlines()[-1]
