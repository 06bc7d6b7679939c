"""Decoders that differ from Llama's, in graphs, against Hugging Face's own.

An export with a reference compares its graphs with the library's model and fails where they
differ, so that one that ends has passed.
"""

import json

import onnx
import pytest
from makers.checkpoints import make_llava_checkpoint, read_tensors
from makers.families import make_picture, make_samples

from gap_export.errors import CheckpointError
from gap_runtime import Bundle
from gap_runtime.grounding.check import check_bundle

TEMPLATE = "USER: <image>\n Where is {phrase} ? ASSISTANT:"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a checkpoint with a decoder of that type; its folder, and settings of its exports."""

    def make_checkpoint(text, **sizes):
        home = tmp_path_factory.mktemp("decoders")
        make_samples(home / "samples", make_picture(90, 61))
        folder = make_llava_checkpoint(
            home / text,
            text=text,
            width=66,
            heads=6,
            kv_heads=2,
            layers=3,
            **{"head_dim": 16, "seed": 4, **sizes},
        )
        settings = {
            "check__samples": str(home / "samples"),
            "prompt__template": TEMPLATE,
            "prompt__answer": 5,
            "prune__ratios": [0.0, 0.5],
        }
        return folder, settings

    return make_checkpoint


def parameters(bundle, part):
    """Names behind the layer of the last layer's weights that the decoder reads."""
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    names = [each.name for each in graph.initializer]
    return {name.rpartition(".layers.2.")[2] for name in names if f".layers.2.{part}" in name}


@pytest.mark.parametrize(
    "target",
    ["cpu", *(pytest.param(t, marks=pytest.mark.matrix) for t in ("standard", "portable"))],
)
def test_biases_of_queries_keys_and_values_alone(make, export, tmp_path, target):
    folder, settings = make("qwen2")
    bundle = export(folder, tmp_path / "b", target=target, **settings)
    found = parameters(bundle, "self_attn.")
    biases = {f"self_attn.{name}_proj.bias" for name in "qkv"}
    assert found == biases | {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert not parameters(bundle, "mlp.") & {"mlp.gate_proj.bias", "mlp.down_proj.bias"}


@pytest.mark.parametrize(
    ("target", "head_dim"),
    [
        ("cpu", 14),
        # Such norms are exported in the standard dialect by test_axes.py.
        pytest.param("standard", 16, marks=pytest.mark.matrix),
        pytest.param("portable", 14, marks=pytest.mark.matrix),
        pytest.param("cpu", 16, marks=pytest.mark.matrix),
        pytest.param("standard", 14, marks=pytest.mark.matrix),
        pytest.param("portable", 16, marks=pytest.mark.matrix),
    ],
)
def test_norms_of_queries_and_keys(make, export, tmp_path, target, head_dim):
    folder, settings = make("qwen3", head_dim=head_dim)
    bundle = export(folder, tmp_path / "b", target=target, **settings)
    norms = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert norms <= parameters(bundle, "self_attn.")


@pytest.mark.parametrize(
    ("text", "weights"),
    [("qwen2", "int4"), pytest.param("qwen3", "int8", marks=pytest.mark.matrix)],
)
def test_quantized_layers(make, export, tmp_path, text, weights):
    # Smaller weights, whose errors do not grow from layer to layer.
    folder, settings = make(text, spread=0.08)
    bundle = export(folder, tmp_path / "b", quantize__weights=weights, **settings)
    assert check_bundle(Bundle.open(bundle), "onnxruntime:cpu").passed


def test_a_head_that_is_the_embedding_table(make, export, tmp_path):
    folder, settings = make("qwen2", tied=True)
    assert not any("lm_head" in name for name in read_tensors(folder))
    bundle = Bundle.open(export(folder, tmp_path / "b", **settings))
    table, rows = bundle.manifest.embedding, bundle.map_embedding().shape[0]
    size = sum(bundle.manifest.files[name].size for name in {table.file})
    # The bytes of the table are there once.
    assert size < sum(path.stat().st_size for path in folder.glob("*.safetensors")) + rows


def test_a_window_is_refused(make, export, tmp_path):
    folder, settings = make("qwen2")
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    data["text_config"] |= {"use_sliding_window": True, "sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match="sliding_window 64, expected none"):
        export(folder, tmp_path / "b", **settings)


def test_a_prompt_that_nobody_knows_is_asked_for(make, export, tmp_path):
    folder, settings = make("qwen2")
    del settings["prompt__template"]
    with pytest.raises(CheckpointError, match="no prompt is known for a language model of type"):
        export(folder, tmp_path / "b", **settings)
