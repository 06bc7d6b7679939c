"""A whole export of a small random checkpoint: what is in the bundle, and what failure leaves."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
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

from gap_export.cli import main as cli
from gap_export.config import load_config
from gap_export.errors import CheckpointError, ExportError, GraphError
from gap_export.pipeline import run as pipeline
from gap_export.pipeline import stages
from gap_export.pipeline.plan import ExportRequest, plan_export
from gap_export.pipeline.stages import Graphs, trace_decoder
from gap_runtime.bundle.hashes import hash_bytes
from gap_runtime.bundle.manifest import read_manifest
from gap_runtime.errors import CheckError, ConfigError, GapError

# The tiny checkpoint: 5x5 patches, so that 0.5 keeps 13 (rounded half up) and 0.75 keeps 6.
PATCHES, WIDTH, VOCABULARY, LAYERS, KV_HEADS, HEAD_DIM = 25, 64, 416, 2, 2, 16
KEPT = {0.5: 13, 0.75: 6}
SUFFIX, ANSWER = 24, 8
IMAGE_ID = 3


@pytest.fixture(scope="module")
def bundle(exported):
    """The finished bundle's folder."""
    return exported.plan.out


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


def snapshot(folder):
    """Bytes and inode of every file."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_ino)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def no_work(*_):
    """Stands for what must not be begun."""
    raise AssertionError("work was begun")


def dry_run(folder, *arguments):
    """Exit code of `gap-export FOLDER --dry-run`."""
    template = "prompt.template=USER: <image> {phrase}"
    return cli.main([str(folder), "--dry-run", "--set", template, *arguments])


def dead_process():
    """The ID of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# What a bundle holds


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
    assert data["schema"] == 4
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


# The graphs


def test_the_decoder_has_exactly_onnxruntimes_operators(decoder):
    """Counts per layer: a node more would be run at every token."""
    assert Counter(node.op_type for node in decoder.node) == {
        # q, k, v, o, gate, up, down and the head.
        "Gemm": 7 * LAYERS + 1,
        "GroupQueryAttention": LAYERS,
        "RotaryEmbedding": 2 * LAYERS,
        # Queries, keys and values get their batch of one, what attention gives loses it.
        "Unsqueeze": 3 * LAYERS,
        "Squeeze": LAYERS + 2,
        "RMSNormalization": 2 * LAYERS + 1,
        "Sigmoid": LAYERS,
        "Mul": 2 * LAYERS,
        "Add": 2 * LAYERS + 1,
        # The wanted row, and the slots in use.
        "Gather": 2,
        "Reshape": 1,
        "Shape": 1,
        "Cast": 1,
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


def test_queries_and_keys_are_turned_by_explicit_positions(decoder, native):
    for graph in (decoder, native):
        rotations = [node for node in graph.node if node.op_type == "RotaryEmbedding"]
        assert {node.input[3] for node in rotations} == {"position_ids"}
    for node in decoder.node:
        if node.op_type == "GroupQueryAttention":
            assert {a.name: a.i for a in node.attribute}["do_rotary"] == 0


def test_only_rows_is_free_and_only_in_the_decoder(graphs):
    for name, graph in graphs.items():
        free = set()
        for value in [*graph.input, *graph.output, *graph.value_info]:
            assert value.type.tensor_type.HasField("shape"), value.name
            for dim in value.type.tensor_type.shape.dim:
                assert dim.HasField("dim_value") or dim.dim_param, value.name
                free.add(dim.dim_param or None)
        assert free - {None} == ({"rows"} if name == "decoder.onnx" else set())


def test_rotary_tables_cover_the_unpruned_sequence(decoder, prefix_ids):
    shapes = {tensor.name: list(tensor.dims) for tensor in decoder.initializer}
    rotation = next(node for node in decoder.node if node.op_type == "RotaryEmbedding")
    positions = len(prefix_ids) + PATCHES + SUFFIX + ANSWER
    assert [shapes[name] for name in rotation.input[1:3]] == [[positions, HEAD_DIM // 2]] * 2


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
                "logits_row": np.array([row]),
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


def test_more_ratios_do_not_change_the_decoder(
    bundle, tiny_llava, tmp_path, make_plan, run_export
):
    run_export(make_plan(tiny_llava, tmp_path / "one", ratios=(0.5,), weights="link"))
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


# Failures


@pytest.fixture
def failing(monkeypatch):
    """Make every proof of a graph fail."""

    def fail(path, **promise):
        del promise
        raise GraphError(f"{path.name}: planted")

    monkeypatch.setattr(stages, "prove_graph", fail)


@pytest.mark.usefixtures("failing")
def test_a_failed_export_leaves_nothing(tiny_llava, tmp_path, make_plan, run_export):
    with pytest.raises(GraphError, match="planted"):
        run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("failing")
def test_a_failed_export_leaves_an_older_bundle_alone(
    bundle, tiny_llava, tmp_path, make_plan, run_export
):
    old = tmp_path / "old"
    shutil.copytree(bundle, old)
    before = snapshot(old)
    with pytest.raises(GraphError, match="planted"):
        run_export(make_plan(tiny_llava, old))
    assert snapshot(old) == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.fixture
def quick(monkeypatch):
    """Skip the slow part of an export: tracing, graphs, weights, manifest."""

    class Nothing:
        size = 0
        shards, placed = {}, {}

    for name in ("write_graphs", "_start_record"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "_trace", lambda *_: Graphs(visions=(), decoder=None, text=None))
    monkeypatch.setattr(pipeline, "bring_weights", lambda *_, **__: {})
    monkeypatch.setattr(pipeline, "_plan_weights", lambda *_: Nothing())
    monkeypatch.setattr(pipeline, "_make_manifest", lambda *_: QuickManifest())


class QuickManifest:
    """Stands for a manifest where only the moving of folders is of interest."""

    reference = None

    def write(self, folder):
        (folder / "manifest.json").write_text("new", encoding="utf-8")


@pytest.fixture
def old(bundle, tmp_path):
    """A bundle that an export would replace; nothing else lies beside it."""
    return shutil.copytree(bundle, tmp_path / "old")


@pytest.mark.usefixtures("quick")
def test_a_finished_export_replaces_an_older_bundle_whole(
    old, tiny_llava, tmp_path, make_plan, run_export
):
    run_export(make_plan(tiny_llava, old))
    assert sorted(path.name for path in old.iterdir()) == ["manifest.json", "tokenizer.json"]
    assert (old / "manifest.json").read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.usefixtures("quick")
def test_a_move_that_fails_halfway_leaves_the_older_bundle(
    old, tiny_llava, tmp_path, make_plan, run_export, monkeypatch
):
    before, rename = snapshot(old), type(old).rename

    def refuse(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(old), "rename", refuse)
    with pytest.raises(ExportError, match="Input/output error"):
        run_export(make_plan(tiny_llava, old))
    assert snapshot(old) == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.usefixtures("failing")
def test_a_bundle_that_a_killed_export_had_moved_away_is_put_back(
    old, tiny_llava, tmp_path, make_plan, run_export
):
    before = snapshot(old)
    old.rename(tmp_path / f".old.replaced-{dead_process()}")
    with pytest.raises(GraphError, match="planted"):
        run_export(make_plan(tiny_llava, old))
    assert snapshot(old) == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.usefixtures("quick")
def test_an_export_that_differs_from_pytorch_is_not_kept(
    old, tiny_llava, tmp_path, make_plan, run_export, monkeypatch
):
    def differ(*_):
        raise CheckError("planted")

    before = snapshot(old)
    monkeypatch.setattr(pipeline, "_check", differ)
    with pytest.raises(CheckError, match="planted"):
        run_export(make_plan(tiny_llava, old))
    assert snapshot(old) == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["thesis.txt", "samples/thesis.txt", ".hidden"])
def test_a_file_that_is_no_part_of_the_older_bundle_is_not_lost(
    old, tiny_llava, make_plan, run_export, name
):
    (old / name).parent.mkdir(exist_ok=True)
    (old / name).write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"thesis|hidden"):
        run_export(make_plan(tiny_llava, old))
    assert (old / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("schema", [0, 1, 4])
def test_a_bundle_of_another_schema_may_be_replaced(
    old, tiny_llava, make_plan, run_export, schema
):
    path = old / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8")) | {"schema": schema, "unknown": 1}
    path.write_text(json.dumps(data), encoding="utf-8")
    run_export(make_plan(tiny_llava, old))
    assert path.read_text(encoding="utf-8") == "new"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text", ['{"schema": 0}', "{", '{"files": {}}'])
def test_a_bundle_that_cannot_be_read_is_kept_with_advice_that_helps(
    old, tiny_llava, make_plan, run_export, text
):
    """`export again` would lead in a circle here."""
    (old / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(GapError, match="choose another --out") as caught:
        run_export(make_plan(tiny_llava, old))
    assert "export again" not in str(caught.value)
    assert (old / "manifest.json").read_text(encoding="utf-8") == text


@pytest.mark.usefixtures("quick")
def test_a_full_disk_is_one_clear_error(tiny_llava, tmp_path, make_plan, run_export, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "bring_weights", full)
    with pytest.raises(ExportError, match="No space left on device"):
        run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("pid", ["dead", "own"])
def test_a_stale_partial_folder_is_cleaned(tiny_llava, tmp_path, make_plan, run_export, pid):
    """Also where it has this process's ID, as in a container that numbers from 1 each time."""
    number = os.getpid() if pid == "own" else dead_process()
    stale = tmp_path / f".new.partial-{number}"
    stale.mkdir()
    (stale / "decoder.onnx").write_text("half", encoding="utf-8")
    run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    assert not (tmp_path / "new" / "decoder.onnx").exists()


@pytest.mark.usefixtures("quick")
def test_the_partial_folder_of_a_living_export_is_left_alone(
    tiny_llava, tmp_path, make_plan, run_export
):
    living = tmp_path / f".new.partial-{os.getppid()}"
    living.mkdir()
    run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert living.is_dir()


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(
    tiny_llava, tmp_path, make_plan, run_export
):
    script = "import sys; from gap_export.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", script, str(tiny_llava), "--no-reference"),
            *("--out", str(tmp_path / "out")),
            *("--set", "prompt.template=<image>\n{phrase}", "--json"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    partial = tmp_path / f".out.partial-{process.pid}"
    assert list(tmp_path.iterdir()) == [partial]
    assert not (partial / "manifest.json").exists()
    result = run_export(make_plan(tiny_llava, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert read_manifest(tmp_path / "out") == result.manifest


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_bundle_is_never_replaced(tiny_llava, tmp_path, make_plan, run_export, kind):
    out = tmp_path / "mine"
    if kind == "folder":
        out.mkdir()
    thesis = out / "thesis.txt" if kind == "folder" else out
    thesis.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="exists and is no bundle") as caught:
        run_export(make_plan(tiny_llava, out))
    assert str(out) in str(caught.value)
    assert thesis.read_text(encoding="utf-8") == "mine"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("quick")
def test_an_empty_folder_may_become_the_bundle(tiny_llava, tmp_path, make_plan, run_export):
    (tmp_path / "new").mkdir()
    run_export(make_plan(tiny_llava, tmp_path / "new"))
    assert (tmp_path / "new" / "manifest.json").is_file()


def test_the_folder_that_one_stands_in_is_refused_at_once(
    tiny_llava, tmp_path, make_plan, run_export, monkeypatch
):
    """It could be moved only from under one's feet, and `.` names no bundle."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(pipeline, "_trace", no_work)
    with pytest.raises(ConfigError, match="--out"):
        run_export(make_plan(tiny_llava, pipeline.Path()))
    assert not list((tmp_path / "here").iterdir())
    assert dry_run(tiny_llava, "--out", ".") == 2


@pytest.mark.usefixtures("quick")
def test_missing_parents_of_the_bundle_are_made(tiny_llava, tmp_path, make_plan, run_export):
    run_export(make_plan(tiny_llava, tmp_path / "a" / "b" / "new"))
    assert (tmp_path / "a" / "b" / "new" / "manifest.json").is_file()


def test_a_parent_that_is_a_file(tiny_llava, tmp_path, make_plan, run_export):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_export(make_plan(tiny_llava, tmp_path / "file" / "new"))


# Checkpoints that do not fit


@pytest.fixture
def copy(tiny_llava, tmp_path):
    """A copy of the tiny checkpoint to be broken."""
    return shutil.copytree(tiny_llava, tmp_path / "copy")


def edit_config(folder, edit):
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_without_a_tokenizer_only_graphs_can_be_made(copy, tmp_path, make_plan):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        make_plan(copy, tmp_path / "out", reference=True)
    assert "--no-reference" in str(caught.value)
    plan = make_plan(copy, tmp_path / "out", reference=False, prompt__prefix=7)
    assert (plan.prompt.tokenizer, plan.layout.prefix) == (None, 7)


@pytest.mark.usefixtures("quick")
def test_a_bundle_of_graphs_alone_has_no_tokenizer(copy, tmp_path, make_plan, run_export):
    (copy / "tokenizer.json").unlink()
    run_export(make_plan(copy, tmp_path / "out"))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_broken_tokenizer_is_named(copy, tmp_path, make_plan):
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises((CheckpointError, ConfigError), match=r"tokenizer\.json"):
        make_plan(copy, tmp_path / "out")


def test_an_image_token_that_the_tokenizer_lacks(copy, tmp_path, make_plan):
    edit_config(copy, lambda data: data.update(image_token_index=9999, image_token_id=9999))
    with pytest.raises(CheckpointError, match="no token 9999"):
        make_plan(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("language_model.model.layers.1.mlp.up_proj.weight", None, ("missing", "layers.1.mlp.up")),
        (
            "language_model.model.layers.0.mlp.up_proj.weight",
            torch.t,
            ("model.safetensors", "up_proj.weight", "[64, 96]", "[96, 64]", "it lies transposed"),
        ),
    ],
)
def test_a_tensor_that_is_missing_or_transposed(
    copy, tmp_path, make_plan, capsys, name, change, parts
):
    """Said before any work; the other damages and layouts are in models/test_llava_files.py."""

    def edit(tensors):
        value = tensors.pop(name)
        return tensors if change is None else tensors | {name: change(value)}

    checkpoints.edit_tensors(copy, edit)
    with pytest.raises(CheckpointError) as caught:
        make_plan(copy, tmp_path / "out")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert dry_run(copy) == 3
    assert str(caught.value) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda data: data.update(vision_feature_layer=-9), "vision_feature_layer"),
        (lambda data: data.update(vision_feature_layer=[-2, -3]), "vision_feature_layer"),
        (lambda data: data.update(vision_feature_select_strategy="full"), "strategy"),
        (lambda data: data["text_config"].update(model_type="gemma"), "gemma"),
        (
            lambda data: data["text_config"].update(model_type="mistral", sliding_window=64),
            "sliding_window",
        ),
        (lambda data: data["text_config"].update(hidden_act="gelu"), "hidden_act"),
        (lambda data: data["vision_config"].update(model_type="siglip_vision_model"), "siglip"),
        (
            lambda data: data["text_config"].update(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "dynamic",
        ),
    ],
)
def test_configs_that_the_family_does_not_have(copy, tmp_path, make_plan, edit, part):
    edit_config(copy, edit)
    with pytest.raises(CheckpointError) as caught:
        make_plan(copy, tmp_path / "out")
    assert "config.json" in str(caught.value)
    assert part in str(caught.value)


@pytest.mark.parametrize("window", [None, 512])
def test_mistral_is_llama_where_its_window_holds_every_position(copy, tmp_path, make_plan, window):
    edit_config(
        copy,
        lambda data: data["text_config"].update(model_type="mistral", sliding_window=window),
    )
    assert make_plan(copy, tmp_path / "out").spec.max_positions == 512


def test_a_checkpoint_of_another_family_under_a_model_file(copy, tmp_path):
    edit_config(copy, lambda data: (data.clear(), data.update(model_type="gpt2", n_embd=64)))
    named = load_config("refshapes", {}, checkpoint=str(copy))
    request = ExportRequest(
        named=named, target="cpu", out=tmp_path / "out", weights="clone", reference=False
    )
    with pytest.raises((CheckpointError, ConfigError), match="gpt2"):
        plan_export(request)


def test_a_prompt_that_is_too_long_for_its_slots(tiny_llava, tmp_path, make_plan):
    with pytest.raises(
        ConfigError, match=r"prompt.suffix is 3; raise it with --set prompt.suffix"
    ):
        make_plan(tiny_llava, tmp_path / "out", prompt__suffix=3)


def test_room_after_the_image_fits_the_template_where_it_is_not_given(tiny_llava, tmp_path):
    """64 tokens, or the template's own and 32 more where that is more."""
    tokenizer = Tokenizer.from_file(str(tiny_llava / "tokenizer.json"))
    for template in ("<image> {phrase}", "<image>" + "0123456789" * 6 + " {phrase}"):
        named = load_config(str(tiny_llava), {"prompt.template": template})
        request = ExportRequest(
            named=named, target="cpu", out=tmp_path, weights="clone", reference=False
        )
        ids = tokenizer.encode(template.replace("{phrase}", "x")).ids
        after = len(ids) - ids.index(IMAGE_ID) - 1
        assert plan_export(request).layout.suffix == max(64, after + 32)
    assert after > 32


@pytest.mark.parametrize("frame", ["padded-square", "original"])
def test_the_frame_of_boxes_can_be_said(tiny_llava, tmp_path, make_plan, frame):
    usual = make_plan(tiny_llava, tmp_path / "out").spec.box
    assert usual.frame == "padded-square"
    said = make_plan(tiny_llava, tmp_path / "out", box__frame=frame).spec.box
    assert said == dataclasses.replace(usual, frame=frame)


def test_the_default_folder_name(tiny_llava, make_plan):
    plan = make_plan(tiny_llava, None, ratios=(0.75, 0.5))
    assert plan.out == pipeline.Path("tiny-llava-6-13of25")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stored_dtype_is_the_default(tmp_path, make_plan, dtype):
    folder = checkpoints.make_llava_checkpoint(tmp_path / "small", dtype=dtype)
    assert make_plan(folder, tmp_path / "out").dtype == dtype
