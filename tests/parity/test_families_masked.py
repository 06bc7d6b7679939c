"""Exported graphs of every family against float64 on the full sequence, pruned keys masked.

The same as test_llava_masked.py, for every family and every pruner that only selects: with GAP,
the pruned bundle answers as the unpruned model does when no row may look at a pruned token. Which
tokens are pruned is compared with tests/truths/pruners.py on the same independent towers. For
pruners that merge, tokens, slots, IDs and logits are compared with the formulas.
"""

import numpy as np
import pytest
import torch
from makers.families import (
    ARCHITECTURES,
    DIAGONAL,
    EVERY_FAMILY,
    PHRASE,
    WITHOUT_CLS,
    export,
    find_family,
    serves,
)
from makers.scenes import CONFIG, SCENES
from PIL import Image
from truths import placing
from truths.families import find_truth
from truths.formulas import FORMULAS
from truths.pruners import Truth

from gap_export.config.records import POSITION_MODES
from gap_runtime import Bundle, Grounder
from gap_runtime.registry import list_plugins

PRUNERS = sorted(list_plugins("gap_export.pruners"))


def make_choice(pruner):
    """What the formula of a pruner makes of a picture; nothing yet of one without a formula."""
    if pruner in FORMULAS:
        return FORMULAS[pruner](SCENES["odd"], 9, CONFIG)
    return Truth(order=[])


CHOICES = {pruner: make_choice(pruner) for pruner in PRUNERS}
MAKING = {pruner for pruner, choice in CHOICES.items() if choice.extra is not None}
"""Those that make an extra token."""
MERGING = [p for p in PRUNERS if CHOICES[p].rows is not None or p in MAKING]
SELECTING = [p for p in PRUNERS if CHOICES[p].rows is None]
"""One that only makes an extra token selects too, without it."""
RATIO = 0.5
STEPS = 4


def pairs(pruners):
    """Every family with every pruner that it serves, or with every mode; some by default."""
    return [
        pytest.param(
            family, pruner, marks=() if _is_usual(family, pruner, k) else pytest.mark.matrix
        )
        for family in EVERY_FAMILY
        for k, pruner in enumerate(pruners)
        if pruner in POSITION_MODES or serves(family, pruner)
    ]


def _is_usual(family, pruner, k):
    """One family of each pruner and mode, in turns; of a tower without CLS its usual pruner.

    But for the pruners that test_matrix.py exports by default.
    """
    if pruner in {each for _, each in DIAGONAL}:
        return family in WITHOUT_CLS and pruner == "column_attention"
    if family in WITHOUT_CLS:
        return pruner == "column_attention"
    return family in ARCHITECTURES and (ARCHITECTURES.index(family) + k) % len(ARCHITECTURES) == 0


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    return find_family(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def oracle(case):
    return find_truth(case)


@pytest.fixture(scope="module")
def seen(oracle):
    """What the independent towers see of pixels; computed once for each bucket."""
    found = {}

    def look(bucket, pixels, size):
        if bucket not in found:
            found[bucket] = (pixels, oracle.look(pixels, size, PHRASE))
        assert np.array_equal(found[bucket][0], pixels)
        return found[bucket][1]

    return look


def answer(grounder, picture, entry):
    """Logits [STEPS, V] of the graphs, and the inputs that led to them."""
    recorded = []
    decoder = grounder._open_cache().session

    class Recorder:
        fit = staticmethod(decoder.fit)

        def run(self, *arguments):
            recorded.append(decoder.run(*arguments).copy())
            return recorded[-1]

    grounder._open_cache().session = Recorder()
    values = grounder.run_stages(picture, PHRASE, entry, most=STEPS, draft=False)
    grounder._decoder = decoder
    return np.concatenate(recorded), values


def ask_all(case, out, pruner, **overrides):
    """Export; every bucket's entry with its answer and what led to it."""
    export(case.plan(out, pruner=pruner, prune__ratios=[RATIO], **overrides))
    bundle = Bundle.open(out)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    assert len(bundle.manifest.ratios) == len(case.sizes)
    for entry, size in zip(bundle.manifest.ratios, case.sizes, strict=True):
        with Image.open(case.picture) as opened:
            picture = opened.convert("RGB").resize(size)
        yield (bundle.manifest, entry, size, *answer(grounder, picture, entry))


def expect(oracle, seen, manifest, values):
    """Logits [STEPS, V] of the full sequence, teacher-forced with the bundle's tokens."""
    before = manifest.layout.prefix
    return oracle.answer(
        values.prompt_ids[:before],
        seen.tokens,
        values.prompt_ids[before:],
        values.decoded.token_ids[: STEPS - 1],
        values.kept_index[0],
    ).numpy()


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_there_are_pruners_that_select_and_that_merge():
    assert {"cls_attention", "spatial", "trim"} <= set(SELECTING)
    assert {"nuwa", "prumerge", "trim", "visionzip"} <= set(MERGING)
    assert {"prumerge", "trim"} <= MAKING


@pytest.mark.parametrize(("case", "pruner"), pairs(SELECTING), indirect=["case"])
def test_gap_equals_the_full_sequence_with_pruned_keys_masked(
    case, oracle, seen, tmp_path, pruner
):
    drop = {"prune__extra_token": "drop"} if pruner in MAKING else {}
    for manifest, entry, size, found, values in ask_all(case, tmp_path / "b", pruner, **drop):
        bucket = manifest.bucket(entry.bucket)
        look = seen(entry.bucket, values.pixels, size)
        fixed = sorted(set(range(entry.patches)) - set(look.removable))
        assert tuple(fixed) == bucket.fixed
        assert (entry.patches, len(fixed)) in case.buckets
        assert entry.extra == 0
        kept = values.kept_index[0].tolist()
        chosen = look.prune(pruner, entry.kept - len(fixed), bucket.grids).order
        assert kept == sorted([*(look.removable[index] for index in chosen), *fixed])
        assert relative(values.visual_tokens[0], look.tokens[kept].numpy()) < 1e-4
        expected = expect(oracle, look, manifest, values)
        for step in range(STEPS):
            assert relative(found[step], expected[step]) < 1e-4, step
        assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()


@pytest.mark.parametrize(("case", "pruner"), pairs(MERGING), indirect=["case"])
def test_merged_tokens_and_their_answers_are_those_of_the_formulas(
    case, oracle, seen, tmp_path, pruner
):
    """There is no masked sequence to compare with; slots, IDs and logits are made in float64."""
    for manifest, entry, size, found, values in ask_all(case, tmp_path / "b", pruner):
        bucket = manifest.bucket(entry.bucket)
        look = seen(entry.bucket, values.pixels, size)
        made = look.prune(pruner, entry.kept - len(bucket.fixed), bucket.grids)
        tokens = {index: look.tokens[index] for index in bucket.fixed}
        rows = look.patches[made.order] if made.rows is None else torch.tensor(made.rows)
        with torch.no_grad():
            merged = oracle.project(rows)
            tokens |= {look.removable[k]: row for k, row in zip(made.order, merged, strict=True)}
            if entry.extra:
                tokens[placing.EXTRA] = oracle.project(torch.tensor(made.extra)[None])[0]
        assert entry.extra == int(pruner in MAKING)
        order = [index for index in tokens if index != placing.EXTRA]
        prefix, rule = manifest.layout.prefix, "last-visual" if entry.extra else None
        before, after = values.prompt_ids[:prefix], values.prompt_ids[prefix:]
        slots, ids, first = placing.place(prefix, entry.patches, len(after), order, "gap", rule)
        assert values.kept_index[0].tolist() == [k for k in slots if k != placing.EXTRA]
        assert values.position_ids[0, : len(ids)].tolist() == ids
        visual = torch.stack([tokens[slot] for slot in slots])
        assert relative(values.visual_tokens[0], visual.numpy()) < 1e-4
        answer = values.decoded.token_ids[: STEPS - 1]
        rows = torch.cat([oracle.embed(before), visual, oracle.embed(after + answer)])
        ids += [first + step for step in range(len(answer))]
        expected = oracle.logits(rows, torch.tensor(ids))[-STEPS:].numpy()
        for step in range(STEPS):
            assert relative(found[step], expected[step]) < 1e-4, step


@pytest.mark.parametrize(
    ("case", "mode"), pairs(["compact", "permuted", "permuted-compact"]), indirect=["case"]
)
def test_other_position_ids_do_not(case, oracle, seen, tmp_path, mode):
    asked = ask_all(case, tmp_path / "b", case.pruner, prune__positions=mode)
    for manifest, entry, size, found, values in asked:
        expected = expect(oracle, seen(entry.bucket, values.pixels, size), manifest, values)
        for step in range(STEPS):
            assert relative(found[step], expected[step]) > 1e-2, step
