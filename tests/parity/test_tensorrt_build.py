"""Engines of every family, built by a real TensorRT (TensorRT-RTX builds without a GPU)."""

import dataclasses
import shutil

import onnx
import pytest
from makers.families import ARCHITECTURES, EVERY_FAMILY, WITHOUT_CLS, export, find_family
from onnx import TensorProto, helper
from tools.engines import build_bundle

import gap_export
from benchmarks import checkpoints
from gap_runtime import Bundle
from gap_runtime.bundle.engines import read_engine_record
from gap_runtime.bundle.hashes import describe_file
from gap_runtime.cli.main import main
from gap_runtime.errors import EngineError, GapError

PRUNERS = ("cls_attention", "divprune", "trim")
TARGETS = ("rtx", "jetson-orin-jp6")
BUILT = (*(each for each in ARCHITECTURES if "llava" not in each), *WITHOUT_CLS)
CASES = [
    pytest.param(
        family,
        None if family in WITHOUT_CLS else PRUNERS[k % 3],
        target,
        # Each architecture for one of both targets, in turns; the other LLaVAs are built by
        # test_quantized.py.
        marks=() if family in BUILT and BUILT.index(family) % 2 == j else pytest.mark.matrix,
    )
    for k, family in enumerate(EVERY_FAMILY)
    for j, target in enumerate(TARGETS)
]
HEAD_DIM = 16
"""The least that TensorRT's attention kernels take."""
ONE_BUCKET = {"internvl3": "24x24", "llava-onevision": "62x31"}
"""Canvases of one bucket: an engine for each takes the most of the time."""
NATIVE_LAYERS = ("ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING")


def require_layers(bundle, records):
    """Assert that attention, rotation and cache are layers of their own, or none of them is."""
    manifest = bundle.manifest
    layers = records["decoder"].layers
    found = [layers.get(name, 0) for name in NATIVE_LAYERS]
    count = manifest.cache.layers
    native = manifest.target.dialect == "native"
    assert found == ([count, 2 * count, 2 * count] if native else [0, 0, 0])
    assert records["decoder"].is_cache_in_place == native
    towers = [record for name, record in records.items() if name.startswith("vision")]
    assert len(towers) == len(manifest.ratios)
    for record in towers:
        assert (record.layers.get("ATTENTION_OUTPUT", 0) > 0) == native


def require_family_builds(case, out, pruner, target, **overrides):
    plan = case.plan(
        out, pruner=pruner, target=target, dtype="float16", prune__ratios=[0.5], **overrides
    )
    export(plan)
    bundle = Bundle.open(out)
    records = build_bundle(bundle)
    assert set(records) == {stage.name for stage in bundle.manifest.stages}
    require_layers(bundle, records)
    assert {record.precision for record in records.values()} == {"float16"}


@pytest.mark.parametrize(("family", "pruner", "target"), CASES)
def test_every_family_builds(tmp_path_factory, tmp_path, family, pruner, target):
    case = find_family(family, tmp_path_factory, head_dim=HEAD_DIM)
    canvas = ONE_BUCKET.get(family)
    one = {} if canvas is None else {"image__canvas": canvas}
    require_family_builds(case, tmp_path / "b", pruner, target, **one)


@pytest.mark.matrix
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ONE_BUCKET)
def test_every_bucket_builds(tmp_path_factory, tmp_path, family, target):
    case = find_family(family, tmp_path_factory, head_dim=HEAD_DIM)
    require_family_builds(case, tmp_path / "b", None, target)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A small LLaVA at two ratios, float16, native."""
    out = tmp_path_factory.mktemp("build") / "b"
    case = find_family("llava", tmp_path_factory, head_dim=HEAD_DIM)
    export(case.plan(out, target="rtx", dtype="float16", prune__ratios=[0.5, 0.75]))
    return Bundle.open(out)


@pytest.fixture
def change(bundle, tmp_path):
    """A function that edits a graph of a copy of the bundle, and says so in its manifest."""

    def edit(role, plant):
        folder = tmp_path / "changed"
        shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns("engines"))
        stage = bundle.manifest.stage(role)
        path = folder / stage.file
        model = onnx.load(path, load_external_data=False)
        plant(model.graph)
        onnx.save(model, path)
        files = bundle.manifest.files | {stage.file: describe_file(path)}
        dataclasses.replace(bundle.manifest, files=files).write(folder)
        return Bundle.open(folder)

    return edit


@pytest.mark.parametrize(
    "capability",
    [
        "8.0",
        # Two engines for both of these are built below, and the others here are of 8.9.
        *(pytest.param(each, marks=pytest.mark.matrix) for each in ("8.6", "8.9", "12.0")),
    ],
)
def test_it_builds_for_each_gpu(bundle, tmp_path, capability):
    folder = tmp_path / "b"
    shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns("engines"))
    assert main(["build", str(folder), "--compute-capability", capability]) == 0
    engines = folder / "engines" / f"rtx-sm{capability.replace('.', '')}"
    for stage in bundle.manifest.stages:
        record = read_engine_record(engines, stage.name)
        assert record.compute_capabilities == (capability,)
        assert record.size > 100_000
    # What is good is kept; an engine of one GPU is none of another's.
    before = {path.name: path.stat().st_mtime_ns for path in engines.iterdir()}
    assert main(["build", str(folder), "--compute-capability", capability]) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in engines.iterdir()}


def test_one_engine_for_several_gpus_and_both_ratios(bundle):
    record = build_bundle(bundle, "8.6", "12.0")["decoder"]
    assert record.compute_capabilities == ("8.6", "12.0")
    prompts = sorted(bundle.manifest.layout.at(entry).prompt for entry in bundle.manifest.ratios)
    suffix = bundle.manifest.layout.suffix
    assert record.profiles == (8, suffix, *prompts, 1)


def refuse(bundle, *texts):
    with pytest.raises(GapError) as caught:
        build_bundle(bundle)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message
    assert not list(bundle.folder.glob("engines/*/*"))


def test_an_unused_graph_input(change):
    def plant(graph):
        graph.input.append(helper.make_tensor_value_info("spare", TensorProto.FLOAT, [1]))

    refuse(change("vision", plant), "nothing reads the input 'spare'")


def test_a_wrong_dtype(change):
    def plant(graph):
        graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        graph.node.insert(
            0,
            helper.make_node(
                "Cast", [graph.input[0].name], ["wide"], name="w", to=TensorProto.FLOAT
            ),
        )
        for node in list(graph.node)[1:]:
            node.input[:] = ["wide" if name == "pixels" else name for name in node.input]

    refuse(change("vision", plant), "input 'pixels' is float16, the manifest says float32")


def test_a_dynamic_dimension(change):
    def plant(graph):
        graph.input[0].type.tensor_type.shape.dim[0].dim_param = "pictures"

    refuse(change("vision", plant), "'pixels' has an open dimension [-1, 3, 70, 70]")


def test_an_operator_that_the_parser_does_not_know(change):
    def plant(graph):
        first = next(node for node in graph.node if node.op_type == "Conv")
        first.op_type = "Det"
        del first.attribute[:]

    refuse(change("vision", plant), "cannot read it: node '", "(Det): UNSUPPORTED_NODE")


def test_an_operator_whose_size_depends_on_values(change):
    def plant(graph):
        graph.node.append(helper.make_node("NonZero", ["pixels"], ["where"], name="find"))

    refuse(change("vision", plant), "node 'find' is NonZero, whose output has no fixed size")


def test_an_input_of_a_node_that_the_parser_ignores(change):
    """The parser takes `nonpad_kv_seqlen` and leaves it out: such an engine sees empty slots."""

    def plant(graph):
        for node in graph.node:
            if node.op_type == "Attention":
                node.input.extend([""] * (6 - len(node.input)) + ["logits_rows"])

    changed = change("decoder", plant)
    with pytest.raises(EngineError, match="with the input nonpad_kv_seqlen, which TensorRT ign"):
        build_bundle(changed)


def test_the_library_warns_of_an_ignored_input_when_it_builds(change, monkeypatch):
    """Of one that nothing else reads; without our own list this is what is left."""

    def plant(graph):
        graph.input.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, [1]))
        for node in graph.node:
            if node.op_type == "Attention":
                node.input.extend([""] * (6 - len(node.input)) + ["lengths"])

    changed = change("decoder", plant)
    monkeypatch.setattr("gap_runtime.backends.tensorrt.rules._IGNORED", {})
    monkeypatch.setattr("gap_runtime.backends.tensorrt.builder.require_interface", lambda *_: None)
    with pytest.raises(EngineError, match=r"ignores a part of it: .*Unused Input: lengths"):
        build_bundle(changed)


def test_a_missing_weight_file(change):
    changed = change("vision", lambda _graph: None)
    name = next(name for name in changed.manifest.files if name.endswith(".safetensors"))
    (changed.folder / name).unlink()
    refuse(changed, f"{name}: missing, vision-")


def test_float32_attention_says_what_to_do(tmp_path_factory, tmp_path):
    """TensorRT-RTX has no kernels for the decoder's attention in float32."""
    case = find_family("llava", tmp_path_factory, head_dim=HEAD_DIM)
    export(case.plan(tmp_path / "b", target="rtx", prune__ratios=[0.5]))
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(EngineError, match=r"could not build it: .*: export with --dtype float16"):
        build_bundle(bundle)


@pytest.mark.matrix
def test_llava_at_its_true_widths(tmp_path, monkeypatch):
    """Two layers of LLaVA-1.5-7B's decoder and tower, all other sizes the real ones."""
    true = checkpoints.vision_config
    monkeypatch.setattr(
        checkpoints, "vision_config", lambda side: true(side) | {"num_hidden_layers": 3}
    )
    home = tmp_path / "checkpoint"
    home.mkdir()
    text = checkpoints.LLAMA_7B | {"num_hidden_layers": 2}
    checkpoints.write_library(home, "llava", text, sparse=True)
    out = tmp_path / "b"
    bundle = gap_export.export(
        "llava-1.5-7b",
        checkpoint=home,
        ratios=0.5,
        target="rtx",
        out=out,
        bring="link",
        reference=False,
    ).bundle
    records = build_bundle(bundle)
    require_layers(bundle, records)
    # Weights that are all zero and alike are stored once, so an engine is smaller than the model.
    assert records["decoder"].size > 500_000_000
    layout = bundle.manifest.layout
    assert records["decoder"].profiles == (8, layout.suffix, layout.capacity - 64, 1)
