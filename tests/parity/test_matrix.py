"""Every family with every pruner, exported for real and checked against PyTorch without excuses.

A row of the check may pass on a near tie; none does here. By default every pruner is exported with
one family in one position mode, in rotation; `make matrix` (`pytest -m matrix`) runs all of them.
"""

import itertools

import numpy as np
import pytest
from makers.families import (
    ARCHITECTURES,
    DIAGONAL,
    EVERY_FAMILY,
    export,
    find_family,
    serves,
)
from truths import placing

from gap_export.config.records import EXTRA_RULES, GRID_MODE, POSITION_MODES
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.registry import list_plugins, load_plugin

PRUNERS = tuple(sorted(list_plugins("gap_export.pruners")))
EXTRA = tuple(p for p in PRUNERS if load_plugin("gap_export.pruners", p, "pruner").EXTRA)
"""Pruners that make an extra token."""
MODES = tuple(mode for mode in POSITION_MODES if mode != GRID_MODE)
"""Of tokens with one ID, which all families here have."""
RATIOS = (0, 0.9)
"""The more a greedy pruner keeps, the longer its graph; test_families_masked.py keeps half."""
MORE_RATIOS = (0, 0.25, 0.5, 0.9)
"""Of `make matrix`."""
ALL = tuple(
    (family, pruner, mode)
    for family, pruner, mode in itertools.product(EVERY_FAMILY, PRUNERS, MODES)
    if serves(family, pruner)
)
ROTATED = tuple((family, p, MODES[k % len(MODES)]) for k, (family, p) in enumerate(DIAGONAL))
"""Every family and every mode; `make matrix` has all combinations.

Every pruner is exported in test_families_masked.py, models of tiles in test_tiled_targets.py.
"""
EXTRA_FAMILY = "llava-next-mistral"
"""Its newlines stand between the tokens that an extra one can be made of."""
ALL_RULES = tuple(itertools.product(EXTRA_RULES, EXTRA, MODES))
ROTATED_RULES = tuple(
    (rule, pruner, MODES[(i + j + 2) % len(MODES)])
    for i, rule in enumerate(EXTRA_RULES)
    for j, pruner in enumerate(EXTRA)
    if j == i % len(EXTRA)
)


@pytest.fixture
def case(family, tmp_path_factory):
    return find_family(family, tmp_path_factory)


def require_equal(case, out, pruner, mode, ratios=RATIOS, **overrides):
    """Export with the reference, and see that PyTorch and ONNX Runtime agree in all."""
    plan = case.plan(
        out,
        pruner=pruner,
        reference=True,
        prune__positions=mode,
        prune__ratios=list(ratios),
        **overrides,
    )
    report = export(plan).report
    assert report is not None
    assert report.passed
    assert len(report.rows) == len(ratios) * len(case.buckets)
    for row in report.rows:
        where = f"{row.sample} at {row.ratio}"
        assert row.kept_equal, where
        assert not row.near_tie, where
        assert row.positions_equal, where
        assert row.same_prompt, where
        assert row.same_tokens, where
        assert row.answer == row.reference_answer, where
        assert row.visual_error <= 1e-4, where
        assert row.relative_logit_error <= 1e-4, where
    require_places(out, case, pruner, mode, ratios)


def require_places(out, case, pruner, mode, ratios):
    """The reference's own slots and IDs, by tests/truths/pruners.py."""
    manifest = read_manifest(out)
    arrays = np.load(out / manifest.reference.arrays)
    samples = [sample for sample in manifest.reference.samples if sample.ratio is not None]
    assert len(samples) == len(ratios) * len(case.buckets)
    for sample in samples:
        entry = next(
            entry
            for entry in manifest.ratios
            if (entry.ratio, entry.bucket) == (sample.ratio, sample.bucket)
        )
        bucket = next(bucket for bucket in manifest.buckets if bucket.name == entry.bucket)
        prefix, total = manifest.layout.prefix, entry.patches
        assert (total, len(bucket.fixed)) in case.buckets
        kept = arrays[f"{sample.key}/kept_index"][0].tolist()
        assert len(set(kept)) == len(kept) == entry.kept
        assert set(bucket.fixed) <= set(kept) <= set(range(total))
        if mode in {"gap", "compact"}:
            assert kept == sorted(kept)
        rule = manifest.pruning.extra_token if entry.extra else None
        wanted = pruner in EXTRA and entry.kept < total and manifest.pruning.extra_token != "drop"
        assert entry.extra == int(wanted)
        if rule == "centroid":
            # Its place depends on weights, which tests/export/pruners/test_choices.py looks at.
            continue
        suffix = len(sample.prompt_ids) - prefix
        slots, ids, _ = placing.place(prefix, total, suffix, kept, mode, rule)
        assert [slot for slot in slots if slot != placing.EXTRA] == kept
        assert arrays[f"{sample.key}/position_ids"][0].tolist() == ids


def test_no_mode_family_pruner_or_rule_is_left_out():
    assert {f for f, _, _ in ROTATED} == set(ARCHITECTURES)
    assert {m for _, _, m in ROTATED} == set(MODES)
    assert len({p for _, p, _ in ROTATED}) == len(ROTATED)
    assert {p for _, p, _ in ALL} == set(PRUNERS)
    assert {r for r, _, _ in ROTATED_RULES} == set(EXTRA_RULES)
    assert {p for _, p, _ in ROTATED_RULES} == set(EXTRA)


def test_there_are_pruners_with_an_extra_token_and_without():
    assert 0 < len(EXTRA) < len(PRUNERS)


@pytest.mark.parametrize(("family", "pruner", "mode"), ROTATED)
def test_pytorch_and_onnxruntime_agree(case, tmp_path, pruner, mode):
    require_equal(case, tmp_path / "b", pruner, mode)


@pytest.mark.parametrize("family", [EXTRA_FAMILY])
@pytest.mark.parametrize(("rule", "pruner", "mode"), ROTATED_RULES)
def test_they_agree_on_the_extra_token(case, tmp_path, rule, pruner, mode):
    require_equal(case, tmp_path / "b", pruner, mode, prune__extra_token=rule)


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "pruner", "mode"), ALL)
def test_they_agree_in_every_mode(case, tmp_path, pruner, mode):
    require_equal(case, tmp_path / "b", pruner, mode, MORE_RATIOS)


@pytest.mark.matrix
@pytest.mark.parametrize("family", [EXTRA_FAMILY])
@pytest.mark.parametrize(("rule", "pruner", "mode"), ALL_RULES)
def test_they_agree_on_the_extra_token_in_every_mode(case, tmp_path, rule, pruner, mode):
    out = tmp_path / "b"
    require_equal(case, out, pruner, mode, MORE_RATIOS, prune__extra_token=rule)
