"""Inputs and outputs that graphs are traced with, against the tables of the bundle's format."""

import re
from pathlib import Path

import pytest
from makers.families import find_family

from gap_export.graph.decoder import decoder_inputs, decoder_outputs
from gap_export.graph.text import text_inputs, text_outputs
from gap_export.graph.vision import prune_outputs, tower_inputs, tower_outputs

PAGE = Path(__file__).parents[3] / "docs" / "bundle-format.md"


def read_table(title):
    """The rows of a graph's table: (side, names, dtype, list of shapes as text)."""
    text = PAGE.read_text(encoding="utf-8")
    table = text.split(f"\n{title} graph (")[1].split("\n\n")[1]
    rows = []
    for line in table.splitlines()[2:]:
        side, name, dtype, shape, _ = (cell.strip() for cell in line.strip("|").split("|"))
        if side:
            rows.append((side, re.findall("`([^`]+)`", name), dtype.strip("`"), [shape]))
        else:
            rows[-1][3].append(shape)
    return rows


def evaluate(shape, sizes):
    """A shape in the page's letters as numbers; free dimensions stay words."""
    return tuple(eval(part, {}, sizes) for part in shape.strip("[]").split(","))


def require_as_written(title, inputs, outputs, sizes, dtype):
    rows = read_table(title)
    for side, specs in (("in", inputs), ("out", outputs)):
        wanted = [row for row in rows if row[0] == side]
        assert [spec.name for spec in specs] == [name for _, names, *_ in wanted for name in names]
        for spec in specs:
            row = next(row for row in wanted if spec.name in row[1])
            assert spec.dtype == (dtype if row[2] == "cache.dtype" else row[2]), spec.name
            assert spec.shape in [evaluate(shape, sizes) for shape in row[3]], spec.name


@pytest.mark.parametrize("name", ["llava", "llava-next-vicuna", "minigpt-v2"])
def test_the_page_says_what_graphs_take_and_give(name, tmp_path, tmp_path_factory):
    """Letters get the sizes of a family, no two of which are alike."""
    family = find_family(name, tmp_path_factory)
    pruner = "prumerge" if name == "minigpt-v2" else "trim"
    plan = family.plan(tmp_path / "out", pruner=pruner, prune__ratios=[0.5])
    entry, spec = plan.entries[0], plan.spec
    decoder, bucket = spec.decoder, plan.bucket(entry)
    side = spec.preprocess.side
    width = spec.text.width if spec.text else 77
    views = 1 + (bucket.canvas[0] // side) * (bucket.canvas[1] // side) if bucket.canvas else 1
    sizes = {
        "side": side,
        "views": views,
        "K": entry.kept,
        "E": entry.extra,
        "D": decoder.width,
        "V": decoder.vocabulary,
        "G": decoder.cache_heads,
        "d": decoder.head_dim,
        "L": plan.layout.capacity,
        "axes": 1,
        "R": decoder.row_width,
        "W": width,
        "prefix": plan.layout.prefix,
        "suffix": plan.layout.suffix,
        "rows": "rows",
        "wanted_rows": "wanted_rows",
    }
    vision = [*tower_inputs(spec, bucket), *text_outputs(width)]
    layout = plan.layout.at(entry)
    require_as_written("Vision", vision, prune_outputs(decoder, layout), sizes, plan.dtype)
    # The page has the first layer; the others are counted on.
    inputs = decoder_inputs(decoder, plan.layout.capacity, "float16")
    outputs = decoder_outputs(decoder, plan.layout.capacity, "float16")
    more = 2 * (decoder.layers - 1)
    assert [spec.name for spec in outputs[3:]] == [f"next_{spec.name}" for spec in inputs[6:]]
    require_as_written("Decoder", inputs[:-more], outputs[:-more], sizes, "float16")
    if spec.text:
        sizes["T"] = spec.text.length
        require_as_written(
            "Text", text_inputs(spec.text), text_outputs(spec.text.width), sizes, plan.dtype
        )


def test_what_lies_between_is_by_feature_and_in_the_models_dtype(tmp_path, tmp_path_factory):
    plan = find_family("minigpt-v2", tmp_path_factory).plan(tmp_path / "out", pruner="vispruner")
    bucket = plan.spec.buckets[0]
    patches, *features = tower_outputs(plan.spec, bucket, plan.tower_needs, "bfloat16")
    assert (patches.name, patches.dtype) == ("patches", "bfloat16")
    # 8x8 patches of the tower, four to a token.
    assert patches.shape == (1, 16, plan.spec.vision_width)
    assert [each.name for each in features] == sorted(need.value for need in plan.tower_needs)
    assert {each.shape[:2] for each in features} == {(1, 64)}
    assert {each.dtype for each in features} == {"float32"}
