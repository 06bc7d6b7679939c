"""Which weights are quantized, and that all others are looked at as they lie."""

from pathlib import Path

import onnx
import pytest
import torch
from makers.checkpoints import edit_tensors
from makers.families import ARCHITECTURES, export, find_family

from gap_export.blocks.clip import resolve_layer
from gap_export.errors import ExportError
from gap_export.pipeline import run as pipeline
from gap_export.pipeline import stages
from gap_export.quantization.joined import list_parts
from gap_export.quantization.scheme import VALUES
from gap_export.weights.bind import used_parameters
from gap_runtime.display import Display

DEFAULT = {("llava-next-mistral", "trim"), ("minigpt-v2", "divprune")}
BROKEN = {
    # Of towers that are read from files of their own, which are brought whole.
    "minigpt-v2": ("vision", "blocks.1.attn.qkv.weight", "float16"),
    "shikra": ("clip", "vision_model.encoder.layers.1.mlp.fc1.weight", "float32"),
    # CLIP's text tower is never quantized.
    "llava-next-vicuna": ("clip", "text_model.encoder.layers.1.mlp.fc1.weight", "float32"),
}


def spoil(place, key):
    """Put one NaN into a tensor of a file or folder."""

    def change(tensors):
        if key in tensors:
            tensors[key].view(-1)[3] = float("nan")
        return tensors

    if place.is_file():
        whole = torch.load(place, weights_only=True)
        change(whole.get("model", whole))
        torch.save(whole, place)
    else:
        edit_tensors(place, change)


@pytest.mark.parametrize(
    ("family", "vision"),
    [
        # With a quantized tower for one of them, without for another, in the default run.
        pytest.param(family, vision, marks=[] if k == 2 * (not vision) else [pytest.mark.matrix])
        for k, family in enumerate(BROKEN)
        for vision in (False, True)
    ],
)
def test_what_stays_as_it_lies_is_looked_through(family, vision, tmp_path, tmp_path_factory):
    """Also where other weights are quantized, and without a reference that would show it."""
    role, key, dtype = BROKEN[family]
    case = find_family(family, tmp_path_factory, head_dim=16).copy(tmp_path / "home")
    spoil(case.place(role), key)
    (tmp_path / "out").mkdir()
    plan = case.plan(
        tmp_path / "out" / "b",
        pruner="trim" if key.startswith("text") else "cls_attention",
        dtype=dtype,
        quantize__weights="int4",
        quantize__vision=vision,
    )
    with pytest.raises(ExportError) as caught:
        export(plan)
    said = str(caught.value)
    # What is quantized goes by its name in the model, which ends as that in the file.
    assert Path(said.partition(": ")[0]).name in {path.name for path in files(case.place(role))}
    assert key.rpartition("encoder.")[2] in said
    assert "holds values that are no finite numbers" in said
    assert "\n" not in said
    assert not list((tmp_path / "out").iterdir())


def files(place: Path) -> list[Path]:
    """A file itself, or those of a folder."""
    return [place] if place.is_file() else list(place.iterdir())


def linear_weights(traced):
    """Canonical names of the weights of a graph's linear layers, and of what stands for them."""
    places = {"Gemm": 1, "DequantizeLinear": 0, "MatMulNBits": 1}
    inputs = {
        node.inputs[places[node.op_type]].name
        for node in traced.model.graph
        if node.op_type in places
    }
    return {name.partition(".")[2].removesuffix(VALUES) for name in inputs & traced.parameters}


@pytest.mark.parametrize(
    ("family", "pruner"),
    [
        pytest.param(
            family, pruner, marks=[] if (family, pruner) in DEFAULT else [pytest.mark.matrix]
        )
        for family in ARCHITECTURES
        for pruner in ("divprune", "prumerge", "trim", "vispruner")
    ],
)
def test_what_graphs_use_is_known_before_they_are_traced(
    family, pruner, tmp_path, tmp_path_factory
):
    """The one table of weights against the graphs themselves, plain and quantized."""
    case = find_family(family, tmp_path_factory, head_dim=16)

    def make(**overrides):
        plan = case.plan(tmp_path / "b", pruner=pruner, prune__ratios=[0.0, 0.5], **overrides)
        return plan, pipeline._trace(plan, Display(quiet=True), pipeline.GraphCache(), None)

    plan, graphs = make()
    text = [graphs.text] if graphs.text else []
    for known, traced in (
        (plan.parameters.vision, graphs.visions),
        (plan.parameters.decoder, [graphs.decoder]),
        (plan.parameters.text, text),
    ):
        assert sorted(known) == sorted(used_parameters(traced))
    parts = {part: set() for part in ("vision", "decoder", "head")}
    for name, part in plan.parameters.linear.items():
        parts[part].add(name)
    assert set.union(*map(linear_weights, graphs.visions)) == parts["vision"]
    assert linear_weights(graphs.decoder) == parts["decoder"] | parts["head"]
    assert parts["head"] == {"lm_head.weight"}

    plan, graphs = make(quantize__weights="int4", quantize__vision=True, quantize__head=False)
    quantized = stages.quantize_graphs(plan, graphs)
    found = {
        part.removesuffix(VALUES)
        for name in used_parameters(quantized.all)
        if VALUES in name
        for part in list_parts(name)
    }
    assert found == set(plan.schemes)
    assert found <= parts["vision"] | parts["decoder"]
    # Of widths in sixteens, as most of these are.
    assert len(found & parts["vision"]) >= 4
    assert len(found & parts["decoder"]) >= 3


@pytest.mark.parametrize("pruner", ["prumerge", "trim"])
def test_what_no_ratio_asks_for_is_not_used(pruner, tmp_path, tmp_path_factory):
    """By-products of the tower, where nothing is removed."""
    case = find_family("llava-next-mistral", tmp_path_factory)
    plan = case.plan(tmp_path / "b", pruner=pruner, prune__ratios=[0.0])
    assert "visual_projection.weight" not in plan.parameters.all
    config = plan.spec.library_config
    layer = resolve_layer(config.vision_config, config.vision_feature_layer, "config.json")
    behind = f"{plan.family.TOWER_LAYERS}.{layer}."
    assert not any(name.startswith(behind) for name in plan.parameters.all)
    export(plan)
    used = {
        tensor.name.partition(".")[2]
        for path in plan.out.glob("*.onnx")
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.external_data
    }
    assert used == set(plan.parameters.all)
