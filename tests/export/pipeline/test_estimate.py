"""Memory and disk from the index alone, compared with bundles that were made."""

import dataclasses
import json
import math

import pytest
import torch
from makers.families import FAMILIES, find_family
from tools.places import ROOT
from torch import nn

from benchmarks import checkpoints, memory
from gap_export.cli import main as cli
from gap_export.pipeline.estimate import _LiveBytes, estimate, is_tight, stored_bytes
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.pipeline.run import export
from gap_export.quantization.scheme import choose_scheme
from gap_runtime.display import Display
from gap_runtime.machines.target import load_target

TEMPLATE = "USER: <image>\nWhere is {phrase}? ASSISTANT:"


@pytest.fixture
def make_plan(tiny_llava, tmp_path):
    def make(target="cpu", **overrides):
        values = {key.replace("__", "."): value for key, value in overrides.items()}
        return plan_export(
            make_request(
                tiny_llava,
                settings={"prompt.template": TEMPLATE, **values},
                target=target,
                out=tmp_path / "bundle",
                bring="link",
                reference=False,
            )
        )

    return make


@pytest.mark.parametrize(
    ("quantized", "size"),
    [
        (None, 256 * 512 * 2),
        # Values, and one scale in float16 for each output.
        ("int8", 256 * 512 + 256 * 2),
        # Two values in a byte, and a scale for every block of 128.
        ("int4", 256 * 512 // 2 + 256 * 4 * 2),
    ],
)
def test_bytes_of_a_weight(quantized, size):
    scheme = quantized and choose_scheme(quantized, (256, 512))
    assert stored_bytes((256, 512), "float16", scheme) == size


def test_what_cannot_be_quantized_stays():
    for shape in ((256,), (256, 9)):
        assert choose_scheme("int4", shape) is None
        assert stored_bytes(shape, "float16", None) == math.prod(shape) * 2


def count_tables(plan):
    """Bytes of the rotary tables, which lie in the graph: positions decide their size."""
    positions = max(plan.layout.at(entry).positions for entry in plan.entries)
    return 2 * positions * plan.spec.decoder.head_dim // 2 * 4


@pytest.mark.parametrize("ratios", [[0.5], [0.5, 0.75]])
def test_files_that_are_taken_as_they_are_count_whole(make_plan, ratios):
    plan = make_plan(prune__ratios=ratios)
    found = estimate(plan)
    export(plan, Display(quiet=True))
    written = sum(path.stat().st_size for path in plan.out.glob("*.safetensors"))
    assert found.bundle_bytes - count_tables(plan) == written


@pytest.mark.parametrize(
    "overrides", [{}, {"quantize__weights": "int8"}, {"quantize__weights": "int4"}]
)
def test_weights_that_are_made_are_as_many_bytes_as_estimated(make_plan, overrides):
    plan = make_plan(dtype="float16", quantize__vision=True, **overrides)
    found = estimate(plan)
    export(plan, Display(quiet=True))
    written = sum(path.stat().st_size for path in plan.out.glob("*.safetensors"))
    # The header has each tensor's place in decimals, in the order of the graphs.
    assert found.bundle_bytes - count_tables(plan) == pytest.approx(written, rel=0.002)


@pytest.mark.parametrize(
    ("family", "pruner"),
    [
        pytest.param(family, pruner, marks=() if (i + j) % 2 == 0 else pytest.mark.matrix)
        for i, family in enumerate(FAMILIES)
        for j, pruner in enumerate(["cls_attention", "trim"])
    ],
)
def test_every_family_is_estimated(family, pruner, tmp_path, tmp_path_factory):
    """Tiles, tokens that stay, tensors made of several, phrases."""
    plan = find_family(family, tmp_path_factory).plan(tmp_path / "bundle", pruner=pruner)
    found = estimate(plan)
    assert (found.text_weights_bytes > 0) == plan.reads_clip
    smallest = min(found.vision_weights_bytes, found.decoder_weights_bytes, found.cache_bytes)
    assert min(smallest, found.vision_activations_bytes, found.prefill_activations_bytes) > 0


@pytest.mark.parametrize(
    ("family", "pruner"), [("llava-next-mistral", "cls_attention"), ("shikra", "trim")]
)
def test_families_of_several_files(family, pruner, tmp_path, tmp_path_factory):
    plan = find_family(family, tmp_path_factory).plan(tmp_path / "bundle", pruner=pruner)
    found = estimate(plan)
    export(plan, Display(quiet=True))
    patterns = ("*.safetensors", "*.bin", "*.pt*")
    written = sum(path.stat().st_size for name in patterns for path in plan.out.glob(name))
    assert found.bundle_bytes - count_tables(plan) == pytest.approx(written, rel=0.002)


def test_the_page_has_what_the_command_says(tmp_path):
    """One row; `python -m benchmarks.memory` makes all of them."""
    checkpoints.write_library(tmp_path, "llava", checkpoints.LLAMA_7B, sparse=True)
    plan = plan_export(
        make_request(
            "llava-1.5-7b",
            checkpoint=tmp_path,
            ratios=0.5,
            quantize="int4",
            target="jetson-orin-jp7",
            reference=False,
        )
    )
    row = memory.make_row("LLaVA-1.5-7B", "int4", dataclasses.asdict(estimate(plan)))
    assert row in (ROOT / "docs" / "targets.md").read_text(encoding="utf-8").splitlines()
    assert sum(path.stat().st_blocks for path in tmp_path.rglob("*")) * 512 < 2**20


def test_fewer_bits_are_fewer_bytes(make_plan):
    sizes = [
        estimate(make_plan(dtype="float16", **more)).decoder_weights_bytes
        for more in ({}, {"quantize__weights": "int8"}, {"quantize__weights": "int4"})
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.5 * sizes[0]


def test_only_what_is_switched_on_is_quantized(make_plan):
    whole = estimate(make_plan(dtype="float16"))
    some = estimate(make_plan(dtype="float16", quantize__weights="int8"))
    all_of_it = estimate(
        make_plan(dtype="float16", quantize__weights="int8", quantize__vision=True)
    )
    assert some.vision_weights_bytes == whole.vision_weights_bytes
    assert all_of_it.vision_weights_bytes < whole.vision_weights_bytes
    assert all_of_it.embedding_bytes == whole.embedding_bytes


def test_more_patches_take_more(make_plan):
    few, many = (estimate(make_plan(prune__ratios=[ratio])) for ratio in (0.75, 0.0))
    assert few.cache_bytes < many.cache_bytes
    assert few.prefill_activations_bytes < many.prefill_activations_bytes
    assert few.decoder_weights_bytes == many.decoder_weights_bytes


def test_the_total_is_the_sum(make_plan):
    found = estimate(make_plan("jetson-orin-jp7"))
    parts = (
        *(found.vision_weights_bytes, found.text_weights_bytes, found.decoder_weights_bytes),
        *(found.cache_bytes, found.embedding_bytes, found.reserve_bytes),
        max(found.vision_activations_bytes, found.prefill_activations_bytes),
    )
    assert found.total_bytes == sum(parts)
    assert (found.memory_bytes, found.fits) == (8 * 2**30, True)


def test_a_target_that_is_too_small(make_plan):
    plan = make_plan("jetson-orin-jp7")
    small = dataclasses.replace(plan, target=dataclasses.replace(plan.target, memory_mib=2048))
    assert estimate(small).fits is False


def test_a_target_without_a_limit(make_plan):
    found = estimate(make_plan())
    assert (found.memory_bytes, found.fits) == (None, None)


def test_engines_of_plain_graphs_have_two_caches(make_plan):
    """Nothing promises that they can be written in place."""
    new, old = (estimate(make_plan(name)) for name in ("jetson-orin-jp7", "jetson-orin-jp6"))
    assert old.cache_bytes == 2 * new.cache_bytes
    assert load_target("jetson-orin-jp6").opset < 24 <= load_target("jetson-orin-jp7").opset
    # And attention scores, which older runtimes write out.
    assert old.prefill_activations_bytes > new.prefill_activations_bytes


def test_a_cache_of_int8_saves_what_the_dtype_has_more(make_plan):
    half, single = make_plan(dtype="float16", kv_cache="int8"), make_plan(kv_cache="int8")
    small, whole = estimate(half), estimate(make_plan(dtype="float16"))
    assert (whole.cache_saved_bytes, estimate(make_plan()).cache_saved_bytes) == (0, 0)
    assert small.cache_saved_bytes == small.cache_bytes == whole.cache_bytes / 2
    assert estimate(single).cache_saved_bytes == 3 * estimate(single).cache_bytes
    # A scale of four bytes by layer, part, head and channel: as many as a slot has values.
    scales = small.decoder_weights_bytes - whole.decoder_weights_bytes
    assert scales == 4 * small.cache_bytes / half.layout.capacity
    assert whole.total_bytes - small.total_bytes == small.cache_saved_bytes - scales


def test_the_text_tower_counts_where_phrases_go_through_it(make_plan):
    assert estimate(make_plan()).text_weights_bytes == 0


def test_the_peak_is_of_what_is_alive_at_once():
    layer = nn.Linear(4, 4)
    with torch.no_grad(), _LiveBytes(layer) as live:
        first = torch.zeros(100)
        del first
        second = torch.zeros(60)
        third = second + 1
        assert live.now == 2 * 60 * 4
        del third
        assert layer.weight.t().shape == (4, 4)
        assert second.view(6, 10).shape == (6, 10)
    assert live.most == 2 * 60 * 4
    assert live.now == 60 * 4


@pytest.mark.parametrize(
    ("total", "found"), [(89, False), (90, False), (91, True), (100, True), (101, False)]
)
def test_what_leaves_little_is_tight(total, found):
    assert is_tight(total, 100) is found


def test_the_command_shows_it(tiny_llava, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(tiny_llava), "--dry-run", "--set", f"prompt.template={TEMPLATE}"]
    arguments += ["--target", "jetson-orin-jp7", "--no-reference"]
    assert cli.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    memory = json.loads(captured.out)["memory"]
    assert (memory["fits"], memory["is_tight"]) == (True, False)
    assert memory["total_bytes"] > memory["reserve_bytes"] > 0
    assert "fits: needs 2.0 GiB to run" in captured.err
    assert "KV cache" in captured.err
    assert not list(tmp_path.iterdir())


def test_the_command_shows_what_a_cache_of_int8_saves(tiny_llava, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(tiny_llava), "--dry-run", "--json", "--set", f"prompt.template={TEMPLATE}"]
    arguments += ["--dtype", "float16", "--kv-cache", "int8"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["cache_dtype"] == facts["config"]["kv_cache"] == "int8"
    assert facts["memory"]["cache_saved_bytes"] == facts["cache_bytes"]
    assert "KV cache in int8: " in captured.err
    assert " in float16, " in captured.err
    assert cli.main([*arguments, "--no-reference"]) == 2
    assert "not asked for with --no-reference" in capsys.readouterr().err
