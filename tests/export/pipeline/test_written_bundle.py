"""A finished export of a small random checkpoint: what its bundle and its graphs hold."""

import json
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from makers import checkpoints
from tokenizers import Tokenizer
from transformers import LlavaForConditionalGeneration

from gap_export.pipeline.stages import trace_decoder
from gap_runtime.bundle.hashes import hash_bytes
from gap_runtime.bundle.manifest import SCHEMA
from gap_runtime.bundle.validation import read_manifest

# The tiny checkpoint: 5x5 patches, so that 0.5 keeps 13 (rounded half up) and 0.75 keeps 6.
PATCHES, WIDTH, VOCABULARY, LAYERS, KV_HEADS, HEAD_DIM = 25, 64, 416, 2, 2, 16
KEPT = {0.5: 13, 0.75: 6}
SUFFIX, ANSWER = 24, 8
IMAGE_ID = 3


@pytest.fixture(scope="module")
def prefix_ids(tiny_llava):
    """Tokens before the image, by the tokenizer alone."""
    tokenizer = Tokenizer.from_file(str(tiny_llava / "tokenizer.json"))
    ids = tokenizer.encode("USER: <image>\nWhere is x? ASSISTANT:").ids
    return ids[: ids.index(IMAGE_ID)]


@pytest.fixture(scope="module")
def decoder(bundle):
    """The decoder graph without its weights."""
    return onnx.load(bundle / "decoder.onnx", load_external_data=False).graph


@pytest.fixture(scope="module")
def native(tiny_llava, make_plan):
    """The decoder graph for targets that have standard operators alone."""
    return ir.to_proto(trace_decoder(make_plan(tiny_llava, None, target="standard")).model).graph


@pytest.fixture(scope="module")
def graphs(bundle):
    """Every graph of the bundle by file name."""
    return {
        path.name: onnx.load(path, load_external_data=False).graph
        for path in sorted(bundle.glob("*.onnx"))
    }


@pytest.fixture(scope="module")
def model(tiny_llava):
    """The library's own model."""
    return LlavaForConditionalGeneration.from_pretrained(
        tiny_llava, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def canonical_tensors(folder):
    """The checkpoint's tensors under names that do not depend on the layout."""
    tensors = checkpoints.read_tensors(folder).items()
    return {checkpoints.stored_name(key, "legacy"): value for key, value in tensors}


def external(tensor):
    """Where an initializer lies, or None where its values are in the graph file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return {entry.key: entry.value for entry in tensor.external_data}


def parameter_name(tensor):
    """An initializer's name in the checkpoint's legacy layout."""
    return checkpoints.stored_name(tensor.name.partition(".")[2], "legacy")


def test_files_of_the_bundle(bundle):
    assert sorted(path.name for path in bundle.iterdir()) == [
        "decoder.onnx",
        "export.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "vision-13of25.onnx",
        "vision-6of25.onnx",
    ]
    assert not list(bundle.parent.glob(".*"))


def test_weights_and_tokenizer_are_the_checkpoints_own(bundle, tiny_llava):
    for name in ("model.safetensors", "tokenizer.json"):
        assert (bundle / name).read_bytes() == (tiny_llava / name).read_bytes()


def test_manifest_lists_every_other_file_with_size_and_hash(bundle):
    listed = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["files"]
    found = {
        path.name: {
            "size": path.stat().st_size,
            "blake3": hash_bytes(path.read_bytes()),
        }
        for path in bundle.iterdir()
        if path.name != "manifest.json"
    }
    assert listed == found


def test_manifest_facts(bundle, prefix_ids):
    data = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    prefix = len(prefix_ids)
    assert data["schema"] == SCHEMA
    assert data["layout"] == {
        "prefix": prefix,
        "suffix": SUFFIX,
        "answer": ANSWER,
        "capacity": prefix + 13 + SUFFIX + ANSWER,
    }
    assert data["buckets"] == [
        {"name": "", "canvas": None, "grids": [[5, 5]], "strip": 1, "fixed": []}
    ]
    assert data["ratios"] == [
        {"ratio": ratio, "bucket": "", "patches": PATCHES, "kept": kept, "extra": 0}
        for ratio, kept in KEPT.items()
    ]
    assert data["cache"] == {
        "layers": LAYERS,
        "heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
    }
    assert data["pruning"] == {
        "strategy": "cls_attention",
        "positions": "gap",
        "seed": 0,
        "extra_token": None,
    }
    assert data["phrase"] is None
    assert (data["family"], data["dtype"], data["target"]["name"]) == ("llava", "float32", "cpu")
    assert (data["target"]["opset"], data["name"], data["reference"]) == (24, "tiny", None)
    assert data["prompt"]["stop_ids"] == [2]
    assert data["source"]["checkpoint"] == "tiny-llava"
    assert {"gap-export", "torch", "transformers", "onnx"} <= set(data["versions"])
    assert [stage["file"] for stage in data["stages"]] == [
        "vision-13of25.onnx",
        "vision-6of25.onnx",
        "decoder.onnx",
    ]
    assert [(stage["ratio"], stage["kept"], stage["bucket"]) for stage in data["stages"]] == [
        (0.5, 13, ""),
        (0.75, 6, ""),
        (None, None, None),
    ]
    assert [stage["role"] for stage in data["stages"]] == ["vision", "vision", "decoder"]


def test_manifest_describes_the_graphs_as_they_are(bundle, graphs):
    for stage in read_manifest(bundle).stages:
        graph = graphs[stage.file]
        for specs, values in ((stage.inputs, graph.input), (stage.outputs, graph.output)):
            found = [
                (
                    value.name,
                    value.type.tensor_type.elem_type,
                    tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
                )
                for value in values
            ]
            kinds = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
            assert found == [(spec.name, kinds[spec.dtype], spec.shape) for spec in specs]


def test_the_embedding_table_is_where_the_manifest_says(bundle, tiny_llava):
    place = read_manifest(bundle).embedding
    assert place.shape == (VOCABULARY, WIDTH)
    table = np.memmap(
        bundle / place.file, dtype=place.dtype, mode="r", offset=place.offset, shape=place.shape
    )
    expected = canonical_tensors(tiny_llava)["language_model.model.embed_tokens.weight"]
    assert np.array_equal(table, expected.numpy())


def test_the_decoder_has_exactly_onnxruntimes_operators(decoder):
    """Counts per layer: a node more would be run at every token."""
    assert Counter(node.op_type for node in decoder.node) == {
        # q, k, v, o, gate, up, down and the head.
        "Gemm": 7 * LAYERS + 1,
        "GroupQueryAttention": LAYERS,
        # Queries, keys and values get their batch of one, what attention gives loses it.
        "Unsqueeze": 3 * LAYERS,
        "Squeeze": LAYERS + 2,
        "RMSNormalization": 2 * LAYERS + 1,
        "Sigmoid": LAYERS,
        "Mul": 2 * LAYERS,
        "Add": 2 * LAYERS + 2,
        # The wanted rows, and the slots in use for two inputs of attention.
        "Gather": 2,
        "Shape": 1,
        "Clip": 1,
        "Cast": 2,
        "Sub": 1,
    }
    for node in decoder.node:
        own = node.op_type == "GroupQueryAttention"
        assert node.domain == ("com.microsoft" if own else "")


def test_the_decoder_has_exactly_the_native_operators(native):
    counts = Counter(node.op_type for node in native.node)
    assert counts["RotaryEmbedding"] == 2 * LAYERS
    assert counts["TensorScatter"] == 2 * LAYERS
    assert counts["Attention"] == LAYERS
    assert counts["RMSNormalization"] == 2 * LAYERS + 1
    assert counts["Gemm"] == 7 * LAYERS + 1
    assert counts["MatMul"] == 0
    assert {node.domain for node in native.node} == {""}


@pytest.mark.parametrize("file", ["decoder.onnx", "vision-13of25.onnx"])
def test_no_weight_is_transposed_cast_or_multiplied_as_a_matrix(graphs, file):
    graph = graphs[file]
    weights = {tensor.name for tensor in graph.initializer if external(tensor)}
    for node in graph.node:
        used = weights & set(node.input)
        if used:
            assert node.op_type in {"Gemm", "RMSNormalization", "LayerNormalization", "Conv"} or (
                # CLS and position embeddings of the tower
                node.op_type in {"Expand", "Gather", "Concat", "Reshape", "Add"}
                and all("embedding" in name for name in used)
            ), (node.op_type, used)
        if node.op_type == "Gemm":
            assert node.input[1] in weights
            assert {a.name: a.i for a in node.attribute}["transB"] == 1


def test_attention_has_an_explicit_mask_and_the_cache_is_written_in_slots(native):
    attention = [node for node in native.node if node.op_type == "Attention"]
    masks = {node.input[3] for node in attention}
    assert len(masks) == 1
    assert all(masks)
    scatters = [node for node in native.node if node.op_type == "TensorScatter"]
    assert {node.input[2] for node in scatters} == {"write_slot"}
    assert [node.input[0] for node in scatters] == [
        f"cache_{part}_{layer:02d}" for layer in range(LAYERS) for part in ("key", "value")
    ]


def chooser(graph, name):
    """The Gather that makes a value."""
    (node,) = [each for each in graph.node if name in each.output]
    assert node.op_type == "Gather"
    return node


def test_queries_and_keys_are_turned_by_explicit_positions(decoder, native):
    rotations = [node for node in native.node if node.op_type == "RotaryEmbedding"]
    # The same rows of cosines and sines for all layers.
    ((_, *rows),) = {("", *node.input[1:]) for node in rotations}
    assert [chooser(native, name).input[1] for name in rows] == ["position_ids"] * 2
    for node in decoder.node:
        if node.op_type == "GroupQueryAttention":
            assert {a.name: a.i for a in node.attribute}["do_rotary"] == 1
            assert node.input[9] == "position_ids"


def test_only_rows_are_free_and_only_in_the_decoder(graphs):
    for name, graph in graphs.items():
        free = set()
        for value in [*graph.input, *graph.output, *graph.value_info]:
            assert value.type.tensor_type.HasField("shape"), value.name
            for dim in value.type.tensor_type.shape.dim:
                assert dim.HasField("dim_value") or dim.dim_param, value.name
                free.add(dim.dim_param or None)
        assert free - {None} == ({"rows", "wanted_rows"} if name == "decoder.onnx" else set())


def test_rotary_tables_cover_the_unpruned_sequence(decoder, native, prefix_ids):
    positions = len(prefix_ids) + PATCHES + SUFFIX + ANSWER
    rotation = next(node for node in native.node if node.op_type == "RotaryEmbedding")
    attention = next(node for node in decoder.node if node.op_type == "GroupQueryAttention")
    chosen = [chooser(native, name).input[0] for name in rotation.input[1:]]
    for graph, tables in ((native, chosen), (decoder, attention.input[7:9])):
        shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        assert [shapes[name] for name in tables] == [[positions, HEAD_DIM // 2]] * 2


def test_every_weight_is_external_inside_and_the_checkpoints_own_bytes(graphs, bundle, tiny_llava):
    tensors = canonical_tensors(tiny_llava)
    used = set()
    for graph in graphs.values():
        for initializer in graph.initializer:
            place = external(initializer)
            if place is None:
                # Constants of the graph, none of them a tensor of the checkpoint.
                assert parameter_name(initializer) not in tensors
                assert onnx.numpy_helper.to_array(initializer).nbytes < 20_000
                continue
            expected = tensors[parameter_name(initializer)]
            offset, length = int(place["offset"]), int(place["length"])
            stored = (bundle / place["location"]).read_bytes()
            assert place["location"] == "model.safetensors"
            assert offset + length <= len(stored)
            assert stored[offset : offset + length] == expected.numpy().tobytes()
            assert list(initializer.dims) == list(expected.shape)
            used.add(parameter_name(initializer))
    # Left out: the table that the host reads, and the tower's part that nothing looks at.
    left_out = set(tensors) - used
    assert "language_model.model.embed_tokens.weight" in left_out
    assert all(
        "embed_tokens" in name or ".layers.2." in name or "post_layernorm" in name
        for name in left_out
    )


def test_graph_files_stay_small(bundle):
    assert all(path.stat().st_size < 100_000 for path in bundle.glob("*.onnx"))


@pytest.mark.parametrize(("ratio", "kept"), KEPT.items())
def test_the_vision_graph_keeps_what_the_library_attends_to(
    bundle, model, prefix_ids, ratio, kept
):
    del ratio
    session = onnxruntime.InferenceSession(bundle / f"vision-{kept}of25.onnx")
    for seed in range(3):
        pixels = torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(seed))
        visual, index, position_ids = session.run(
            ["visual_tokens", "kept_index", "position_ids"], {"pixels": pixels.numpy()}
        )
        with torch.no_grad():
            vision = model.model.vision_tower(
                pixels, output_hidden_states=True, output_attentions=True
            )
            tokens = model.model.multi_modal_projector(vision.hidden_states[-2][:, 1:])[0]
        # Three blocks; the features come out of the second.
        scores = vision.attentions[1][0, :, 0, 1:].mean(0)
        expected = sorted(scores.argsort(descending=True)[:kept].tolist())
        start = len(prefix_ids)
        assert index.tolist() == [expected]
        assert position_ids[0].tolist() == [
            *range(start),
            *(start + patch for patch in expected),
            *range(start + PATCHES, start + PATCHES + SUFFIX),
        ]
        assert np.abs(visual[0] - tokens[expected].numpy()).max() < 1e-4


def test_the_decoder_under_gap_ids_is_the_library_under_a_mask(bundle, model):
    """The oracle of the whole idea, on the exported graph: pruning is masking."""
    session = onnxruntime.InferenceSession(bundle / "decoder.onnx")
    draw = torch.Generator().manual_seed(5)
    before, after, steps = 4, 9, 3
    length = before + PATCHES + after + steps
    rows = torch.randn(1, length, WIDTH, generator=draw)
    kept = sorted(torch.randperm(PATCHES, generator=draw)[:13].tolist())
    text = before + PATCHES
    real = [*range(before), *(before + k for k in kept), *range(text, length)]
    visible = torch.zeros(length, dtype=torch.bool)
    visible[real] = True
    allowed = visible & torch.ones(length, length).tril().bool() | torch.eye(length).bool()
    mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo().min)
    with torch.no_grad():
        hidden = model.model.language_model(
            inputs_embeds=rows, attention_mask=mask, position_ids=torch.arange(length)[None]
        ).last_hidden_state[0]
        truth = model.lm_head(hidden).numpy()

    cache = {
        value.name: np.zeros(value.shape, np.float32)
        for value in session.get_inputs()
        if value.name.startswith("cache_")
    }
    names = ["logits", *(f"next_{name}" for name in cache)]

    def run(first, last, row):
        some = real[first:last]
        logits, *written = session.run(
            names,
            {
                "embeddings": rows[:, some].numpy(),
                "position_ids": np.array([some]),
                "write_slot": np.array([first]),
                "logits_rows": np.array([row]),
                **cache,
            },
        )
        cache.update(zip(cache, written, strict=True))
        return logits[0]

    prompt = len(real) - steps
    scale = np.abs(truth).max()
    for row in (prompt - 1, before + 5):
        logits = run(0, prompt, row)
        assert np.abs(logits - truth[real[row]]).max() < 1e-4 * scale
    for step in range(steps):
        logits = run(prompt + step, prompt + step + 1, 0)
        assert np.abs(logits - truth[real[prompt + step]]).max() < 1e-4 * scale


@pytest.mark.usefixtures("traced_anew")
def test_more_ratios_do_not_change_the_decoder(
    bundle, tiny_llava, tmp_path, make_plan, run_export
):
    run_export(make_plan(tiny_llava, tmp_path / "one", ratios=(0.5,), bring="link"))
    assert (tmp_path / "one" / "decoder.onnx").read_bytes() == (
        bundle / "decoder.onnx"
    ).read_bytes()
    assert (tmp_path / "one" / "vision-13of25.onnx").read_bytes() == (
        bundle / "vision-13of25.onnx"
    ).read_bytes()
    linked = (tmp_path / "one" / "model.safetensors").stat().st_ino
    assert linked == (tiny_llava / "model.safetensors").stat().st_ino


def test_other_names_shards_ties_and_dtypes(tmp_path, make_plan, run_export):
    folder = checkpoints.make_llava_checkpoint(
        tmp_path / "other",
        names="modern",
        tied=True,
        max_shard_size="100KB",
        head_dim=24,
        kv_heads=1,
        layers=1,
    )
    out = tmp_path / "bundle"
    result = run_export(make_plan(folder, out, ratios=(0,), dtype="float16"))
    manifest = result.manifest
    assert [(entry.ratio, entry.kept) for entry in manifest.ratios] == [(0, 16)]
    assert (manifest.dtype, manifest.cache.heads, manifest.cache.head_dim) == ("float16", 1, 24)
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "weights-float16.safetensors"
    ]
    graph = onnx.load(out / "decoder.onnx", load_external_data=False).graph
    head = next(tensor for tensor in graph.initializer if "lm_head" in tensor.name)
    assert int(external(head)["offset"]) == manifest.embedding.offset
    expected, stored = canonical_tensors(folder), canonical_tensors(out)
    expected["language_model.lm_head.weight"] = expected.pop(
        "language_model.model.embed_tokens.weight"
    )
    assert len(stored) > 40
    for name, value in stored.items():
        assert torch.equal(value, expected[name].half())
    # Left out: the tower's part that nothing looks at.
    left_out = set(expected) - set(stored)
    assert all(".layers.2." in name or "post_layernorm" in name for name in left_out)
