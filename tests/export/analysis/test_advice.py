"""Which ratio a sweep recommends, worked out by hand."""

from types import SimpleNamespace

import pytest

from gap_export.analysis.report.tables import Pair, Tables, advise
from gap_export.cli.main import main
from gap_runtime.evaluation.compare import Comparison


def make_pair(pruner, ratio, lost, gained=0, **changes):
    """`lost` of 1,000 phrases are right without pruning only, `gained` with it only."""
    values = {
        "protocol": "shikra",
        "labels": "published",
        "ratio": ratio,
        "other_ratio": 0.0,
        "other": "unpruned",
        "phrases": 1000,
        "accuracy": 0.5,
        "other_accuracy": 0.5,
        "only_this": gained,
        "only_other": lost,
        "p": 1.0,
        "differing": lost + gained,
    }
    kind = changes.pop("kind", "pruning")
    positions = changes.pop("positions", "gap")
    return Pair(
        kind=kind,
        pruner=pruner,
        positions=positions,
        against="unpruned",
        comparison=Comparison(**{**values, **changes}),
    )


def advise_on(*pairs, within=2.0, kept=None):
    """`kept` are counts by ratio, where those were asked for."""
    cells = [
        SimpleNamespace(
            pruner=pair.pruner, positions="gap", ratio=ratio, size=SimpleNamespace(kept=n)
        )
        for pair in pairs[:1]
        for ratio, n in (kept or {}).items()
    ]
    tables = Tables(
        protocols=("shikra",),
        cells=tuple(cells),
        pairs=pairs,
        published=(),
        by_count=kept is not None,
    )
    return advise(tables, within)


def test_the_largest_ratio_within_the_points():
    (found,) = advise_on(make_pair("a", 0.5, 5), make_pair("a", 0.75, 20), make_pair("a", 0.9, 21))
    # 2.0 points lost are within 2; the interval is not: 20 +- 1.96 * sqrt(20 - 0.4), of 1,000.
    assert (found.ratio, found.lost) == (0.75, 2.0)
    assert found.high == pytest.approx(2.868, abs=1e-3)
    assert found.describe() == (
        "a, gap: 0.75 removed is the most within 2 points of the unpruned model (2.0 lost, 95 % "
        "up to 2.9; ask more phrases to be sure)"
    )
    (found,) = advise_on(make_pair("a", 0.5, 5), make_pair("a", 0.75, 50))
    assert found.ratio == 0.5
    assert found.describe().endswith("(0.5 lost, 95 % up to 0.9)")


def test_counts_are_told_where_they_were_asked_for():
    pairs = make_pair("a", 0.5, 5), make_pair("a", 0.75, 50)
    (found,) = advise_on(*pairs, kept={0.5: 128, 0.75: 64})
    assert found.describe().startswith("a, gap: 128 tokens kept are the fewest within 2 points")
    (found,) = advise_on(*pairs, within=0.1, kept={0.5: 128, 0.75: 64})
    assert found.describe() == "a, gap: every count loses more than 0.1 points, at least 0.5"


def test_what_is_gained_counts_and_the_best_pruner_comes_first():
    found = advise_on(
        make_pair("a", 0.5, 40), make_pair("b", 0.9, 40, 30), make_pair("c", 0.75, 0)
    )
    assert [(each.pruner, each.ratio) for each in found] == [("b", 0.9), ("c", 0.75), ("a", None)]
    assert found[2].describe() == "a, gap: every ratio loses more than 2 points, at least 4.0"


def test_only_the_main_rows_count():
    others = (
        make_pair("a", 0.9, 0, kind="parity"),
        make_pair("a", 0.9, 0, positions="compact"),
        make_pair("a", 0.9, 0, protocol="point"),
        make_pair("a", 0.9, 0, labels="reviewed"),
    )
    (found,) = advise_on(make_pair("a", 0.5, 1), *others)
    assert found.ratio == 0.5
    assert advise_on(*others) == []


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--within", "2", "--ratio", "0.5"], "compares with no pruning; add 0 to --ratio"),
        (["--within", "nan"], "--within nan: expected points"),
        (["--within", "101"], "--within 101: expected points"),
    ],
)
def test_refused_before_any_work(capsys, more, part):
    assert main(["sweep", "refshapes", "--data", "refshapes:test", *more]) == 2
    assert part in capsys.readouterr().err
