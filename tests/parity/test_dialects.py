"""The portable dialect: the same answers with plain operators, and engines for older TensorRT."""

import numpy as np
import onnx
import pytest
import torch
from tools.engines import build

from gap_export.dialects import native, portable
from gap_export.interfaces.dialect import Rows
from gap_runtime import Bundle, Grounder
from gap_runtime.grounding.check import check_bundle
from gap_runtime.machines.target import list_targets, load_target
from gap_runtime.pictures.load import load_picture
from gap_runtime.registry import list_plugins

FOUND = [load_target(name) for name in list_targets()]
TARGETS = {
    each.dialect: each.name
    for each in FOUND
    if each.backend == "onnxruntime" and each.provider is None
}
"""A target of each dialect. The others run on other backends or devices, and are tested there."""


def test_a_target_names_every_dialect():
    named = {each.dialect for each in FOUND}
    for dialect in list_plugins("gap_export.dialects"):
        assert dialect in named, (
            f"no target in runtime/gap_runtime/machines/targets/ has dialect = '{dialect}': "
            "nobody can export in it"
        )
    assert {"native", "onnxruntime", "portable"} <= set(TARGETS)


@pytest.fixture(scope="module")
def bundles(export, refshapes_bundle, tmp_path_factory):
    """One model in all dialects that onnxruntime runs anywhere, with its reference.

    One ratio of them is looked at.
    """
    home = tmp_path_factory.mktemp("dialects")
    return {"onnxruntime": Bundle.open(refshapes_bundle)} | {
        dialect: Bundle.open(
            export("refshapes", home / dialect, target=target, prune__ratios=[0.75])
        )
        for dialect, target in TARGETS.items()
        if dialect != "onnxruntime"
    }


def test_a_portable_graph_has_plain_operators_alone(bundles):
    manifest = bundles["portable"].manifest
    assert manifest.target.opset == 18
    for stage in manifest.stages:
        graph = onnx.load(bundles["portable"].folder / stage.file, load_external_data=False)
        assert [(each.domain, each.version) for each in graph.opset_import] == [("", 18)]
        kinds = {node.op_type for node in graph.graph.node}
        assert kinds <= portable.OPERATORS
        assert not kinds & {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"}


def test_all_dialects_pass_the_check_with_the_same_numbers(bundles):
    values = {}
    for dialect, bundle in bundles.items():
        assert check_bundle(bundle, "onnxruntime:cpu").passed
        sample = bundle.manifest.reference.samples[0]
        grounder = Grounder(bundle, "onnxruntime:cpu")
        picture = load_picture(bundle.folder / sample.image)
        entry = next(each for each in bundle.manifest.ratios if each.ratio == 0.75)
        values[dialect] = grounder.run_stages(picture, sample.phrase, entry)
    one = values.pop("native")
    scale = np.abs(one.decoded.prefill_logits).max()
    for other in values.values():
        assert np.array_equal(one.kept_index, other.kept_index)
        assert one.decoded.token_ids == other.decoded.token_ids
        difference = np.abs(one.decoded.prefill_logits - other.decoded.prefill_logits).max()
        assert difference <= 1e-5 * scale


def test_onnxruntimes_own_attention_is_there_for_the_cpu(bundles):
    """And not in standard graphs."""
    counts = {}
    for dialect, bundle in bundles.items():
        stage = bundle.manifest.stage("decoder")
        graph = onnx.load(bundle.folder / stage.file, load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        counts[dialect] = kinds.count("GroupQueryAttention"), kinds.count("Attention")
    layers = bundles["native"].manifest.cache.layers
    known = {"onnxruntime": (layers, 0), "native": (0, layers), "portable": (0, 0)}
    assert counts | known == counts


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_functions_are_those_of_the_published_model(groups):
    """Rotary embedding, cache and attention against a loop in float64."""
    generator = torch.Generator().manual_seed(groups)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    heads, rows, slots, width, start = 4, 3, 9, 6, 2
    query, key, value = (
        draw(1, heads, rows, width),
        draw(1, groups, slots, width),
        draw(1, groups, slots, width),
    )
    update = draw(1, groups, rows, width)
    written = portable.write_cache(key, update, torch.tensor([start]))
    expected = key.clone()
    expected[:, :, start : start + rows] = update
    assert torch.equal(written, expected)

    mask = torch.arange(slots)[None] <= (start + torch.arange(rows))[:, None]
    mixed = portable.mix(query, key, value, mask[None, None])
    for head in range(heads):
        group = head // (heads // groups)
        for row in range(rows):
            seen = [slot for slot in range(slots) if mask[row, slot]]
            scores = [query[0, head, row].double() @ key[0, group, s].double() for s in seen]
            weights = torch.softmax(torch.stack(scores) * width**-0.5, dim=0)
            wanted = sum(
                w * value[0, group, s].double() for w, s in zip(weights, seen, strict=True)
            )
            assert torch.allclose(mixed[0, head, row].double(), wanted, atol=1e-5)

    angles = draw(rows, width // 2)
    turns = Rows(
        cosine_BSd=angles.cos()[None],
        sine_BSd=angles.sin()[None],
        write_slot_B=torch.tensor([start]),
    )
    turned = portable.rotate(query, turns)
    for row in range(rows):
        pairs = torch.complex(query[0, :, row, : width // 2], query[0, :, row, width // 2 :])
        spun = pairs * torch.polar(torch.ones(width // 2), angles[row])
        wanted = torch.cat([spun.real, spun.imag], dim=-1)
        assert torch.allclose(turned[0, :, row], wanted, atol=1e-5)


def test_dialects_share_no_opset():
    assert not native.OPSETS & portable.OPSETS


@pytest.mark.matrix
def test_a_portable_decoder_builds_for_tensorrt(export, tmp_path):
    bundle = Bundle.open(
        export(
            "refshapes",
            tmp_path / "b",
            target="portable",
            reference=False,
            dtype="float16",
            prune__ratios=[0.5],
        )
    )
    manifest = bundle.manifest
    entry, width = manifest.ratios[0], manifest.embedding.shape[1]
    profiles = [
        {"embeddings": (1, rows, width), "position_ids": (1, rows), "logits_rows": (min(rows, 8),)}
        for rows in (manifest.layout.at(entry).prompt, 8, 1)
    ]
    stage = manifest.stage("decoder")
    layers, inputs, size = build(bundle.folder / stage.file, profiles)
    assert set(inputs) == {spec.name for spec in stage.inputs}
    assert not layers["ATTENTION_OUTPUT"]
    assert size > 3_000_000
    layers, inputs, size = build(bundle.folder / manifest.stage("vision", entry).file, [])
    assert inputs == ["pixels"]
    assert size > 1_000_000
