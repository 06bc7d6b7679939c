"""Figures over seeds against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest

from gap_export.analysis.report.draws import pool_draws, tabulate_draws
from gap_runtime.evaluation.results import Row
from gap_runtime.pictures.boxes import Box, BoxFormat

BOX = BoxFormat(
    attempt=r"\[[^\]]*\]",
    pattern=r"\[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]",
    scale=1.0,
    frame="original",
)
RIGHT, WRONG = "[0.10, 0.10, 0.50, 0.50]", "[0.60, 0.60, 0.90, 0.90]"


def make_swept(draw, hits):
    """Answers of one seed to as many phrases as there are hits, at ratio 0.5."""
    rows = [
        Row(
            key=str(k),
            ratio=0.5,
            picture=str(k),
            phrase="it",
            size=(100, 100),
            box=Box(10, 10, 50, 50),
            answer=RIGHT if hit else WRONG,
        )
        for k, hit in enumerate(hits)
    ]
    rows.append(Row(key="bad", ratio=0.5, picture="bad", phrase="it", problem="no picture"))
    entry = SimpleNamespace(ratio=0.5, kept=8)
    return SimpleNamespace(
        variant=SimpleNamespace(
            draw=draw, positions="gap", ratios=(0.5,), plan=SimpleNamespace(entries=[entry])
        ),
        exported=SimpleNamespace(rows=rows, header=SimpleNamespace(box=BOX)),
    )


def test_a_phrase_counts_once_however_many_seeds_there_are():
    sweep = SimpleNamespace(
        swept=[
            make_swept(None, [1, 1, 1, 1]),
            make_swept(("random", 3), [1, 1, 0, 0]),
            make_swept(("random", 5), [1, 0, 0, 0]),
        ]
    )
    (found,) = pool_draws(sweep, "frame")
    assert (found.pruner, found.seeds, found.kept, found.phrases) == ("random", (3, 5), 8, 4)
    assert (found.accuracy, found.least, found.most) == (0.375, 0.25, 0.5)
    # Shares 1, 0.5, 0, 0: their variance is 0.6875 / 3.
    spread = 1.959963984540054 * math.sqrt(0.6875 / 3 / 4)
    assert found.low == 0.0
    assert found.high == pytest.approx(0.375 + spread)
    shares, counts = (tabulate_draws([found], by_count=by_count) for by_count in (False, True))
    assert "random, gap</th><td>0.5</td>" in shares.replace("\n", "")
    assert "random, gap</th><td>8</td>" in counts.replace("\n", "")
    assert ("tokens kept" in shares, "tokens kept" in counts) == (False, True)
    assert tabulate_draws([], by_count=False) == ""
