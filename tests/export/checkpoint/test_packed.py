"""Checkpoints that came quantized (AWQ, GPTQ): unpacked, kept as they are, checked, refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from makers import originals
from makers.checkpoints import edit_tensors, make_llava_checkpoint
from makers.packing import pack_checkpoint, set_quantization
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.sources import make_tensor
from gap_export.errors import CheckpointError, ExportError
from gap_export.pipeline.estimate import estimate
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.pipeline.run import export
from gap_export.quantization.scheme import ORDER, SCALES, VALUES, ZEROS, packed_scheme
from gap_export.quantization.values import quantize_sources
from gap_export.reference.files import open_tensors
from gap_runtime import Bundle
from gap_runtime.bundle.tensors import count_bytes
from gap_runtime.display import Display
from gap_runtime.errors import ConfigError

FORMATS = {
    "awq": {"method": "awq"},
    "awq-whole": {"method": "awq", "group": -1},
    "gptq": {"method": "gptq"},
    "gptq-symmetric": {"method": "gptq", "symmetric": True, "biases": True},
    "gptq-v2": {"method": "gptq", "form": "gptq_v2"},
    "gptq-16": {"method": "gptq", "group": 16, "nested": True},
    "gptq-whole": {"method": "gptq", "group": -1, "symmetric": True, "head": True},
    "gptq-ordered": {"method": "gptq", "symmetric": True, "desc_act": True},
    "gptq-v2-ordered": {"method": "gptq", "form": "gptq_v2", "desc_act": True},
    "gptq-8": {"method": "gptq", "bits": 8},
    "gptq-8-symmetric": {"method": "gptq", "bits": 8, "symmetric": True},
    "gptq-8-whole": {"method": "gptq", "bits": 8, "group": -1, "symmetric": True},
    "gptq-8-whole-ordered": {"method": "gptq", "bits": 8, "group": -1, "desc_act": True},
}
LAYER = "language_model.layers.0.mlp.up_proj.weight"
STORED = "language_model.model.layers.0.mlp.up_proj"
PROMPT = {
    "prompt.template": "USER: <image>\nWhere is {phrase}? ASSISTANT:",
    "prompt.suffix": 32,
    "prompt.answer": 4,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small LLaVA in float16 whose layers are as wide as packers need them. Read only."""
    return make_llava_checkpoint(
        tmp_path_factory.mktemp("packed") / "base",
        image_size=28,
        vision_heads=2,
        layers=1,
        kv_heads=2,
        mlp=96,
        dtype="float16",
    )


@pytest.fixture(scope="module")
def pack(base, tmp_path_factory):
    """A function that gives a packed copy of the base and its true weights, made once."""
    made = {}

    def find(name, **options):
        if name not in made:
            folder = shutil.copytree(base, tmp_path_factory.mktemp("packed") / name)
            made[name] = folder, pack_checkpoint(folder, **(options or FORMATS[name]))
        return made[name]

    return find


@pytest.fixture
def copy(pack, tmp_path):
    """A function that gives a packed copy which a test may change."""
    return lambda name="gptq": Path(shutil.copytree(pack(name)[0], tmp_path / name))


def plan(folder, out=None, *, target="cpu", reference=False, **overrides):
    values = PROMPT | {key.replace("__", "."): value for key, value in overrides.items()}
    return plan_export(
        make_request(folder, settings=values, target=target, out=out, reference=reference)
    )


def canonical(key):
    """The name in the modules of a stored key."""
    return key.removeprefix("language_model.").replace("model.layers", "language_model.layers")


def nibbles(packed):
    """Values of bytes, the lower half first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_weight_is_what_its_definition_says(pack, name):
    folder, truths = pack(name)
    sources = plan(folder).sources
    packed = {key for key, source in sources.items() if source.packed}
    assert packed == {canonical(key) for key in truths}
    for key, truth in truths.items():
        made = make_tensor(sources[canonical(key)])
        assert made.dtype == torch.float32
        np.testing.assert_allclose(made.numpy(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_unpacks_by_itself(pack, name, whole):
    folder, truths = pack(name)
    tensors = open_tensors(open_checkpoint(str(folder)), torch.float32, whole=whole)
    assert not any(key.endswith(("qweight", "qzeros", "scales", "g_idx")) for key in tensors)
    assert not any(
        key.endswith("proj.bias") and "layers" in key for key in tensors if "vision" not in key
    )
    for key, truth in truths.items():
        np.testing.assert_allclose(tensors[key].read().numpy(), truth, rtol=1e-6, atol=1e-7)
        assert tensors[key].length == len(truth)


@pytest.mark.parametrize("name", FORMATS)
def test_the_integers_that_are_written_are_the_checkpoint_s(pack, name):
    folder, truths = pack(name)
    sources = plan(folder).sources
    for key, truth in truths.items():
        source = sources[canonical(key)]
        outputs, inputs = source.shape
        scheme = packed_scheme(source.packed, inputs)
        made = quantize_sources({"w": source}, {"w": scheme}, {}, dtype="float16")
        assert {key: (each.dtype or "float16", each.shape) for key, each in made.items()} == {
            "w" + suffix: each for suffix, each in scheme.tensors(source.shape, "float16").items()
        }
        written = {
            suffix: made["w" + suffix].encode()
            for suffix in (VALUES, ZEROS, ORDER)
            if "w" + suffix in made
        }
        for suffix, values in written.items():
            each = made["w" + suffix]
            assert values.nbytes == count_bytes(each.shape, each.dtype)
        bits = int(scheme.dtype[-1])
        assert bits == FORMATS[name].get("bits", 4)
        values, zeros = (
            None if found is None else (nibbles(found) if bits == 4 else found).astype(np.int64)
            for found in (written[VALUES], written.get(ZEROS))
        )
        if zeros is None:
            half = 2 ** (bits - 1)
            values = (values + half) % (2 * half) - half
            assert FORMATS[name]["symmetric"]
        scales = make_tensor(made["w" + SCALES]).numpy().astype(np.float64).reshape(-1, outputs)
        zeros = np.zeros_like(scales) if zeros is None else zeros.reshape(-1, outputs)
        order = written[ORDER].view(np.int32) if ORDER in written else np.arange(inputs)
        block = inputs // len(scales)
        for row, at in enumerate(order):
            line = values.reshape(inputs, outputs)[row] - zeros[row // block]
            np.testing.assert_allclose(line * scales[row // block], truth[:, at], rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "dtype", "block"),
    [
        ("awq", "uint4", 32),
        ("awq-whole", "uint4", 32),
        ("gptq-symmetric", "int4", 32),
        ("gptq-16", "uint4", 16),
        ("gptq-8", "uint8", 32),
        ("gptq-8-symmetric", "int8", 32),
        ("gptq-8-whole", "int8", None),
    ],
)
def test_schemes(pack, name, dtype, block):
    packed = plan(pack(name)[0]).sources["language_model.layers.0.mlp.down_proj.weight"].packed
    scheme = packed_scheme(packed, 96)
    assert (scheme.dtype, scheme.block, scheme.is_ordered) == (dtype, block, False)


def true_logits(base, truths, embeddings, position_ids):
    """The last row's logits of the library's model with the true weights, in float64."""
    model = LlavaForConditionalGeneration.from_pretrained(
        base, dtype=torch.float64, attn_implementation="eager"
    )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, truth in truths.items():
            name = canonical(key)
            name = name if name.startswith("lm_head") else f"model.{name}"
            parameters[name].copy_(torch.from_numpy(truth))
        output = model.model.language_model(
            inputs_embeds=torch.from_numpy(embeddings).double(),
            position_ids=torch.from_numpy(position_ids),
        )
        return model.lm_head(output.last_hidden_state[0, -1]).numpy()


def run_decoder(bundle, embeddings, position_ids, tmp_path):
    """Logits of the decoder graph with plain float arithmetic, and the operators that ran."""
    stage = bundle.manifest.stage("decoder")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry(
        "optimization.disable_specified_optimizers", "MatMulAddFusion"
    )
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    # Beside the weights, as the bundle's own graph, but for the rounding of inputs to 8 bits.
    model = onnx.load(bundle.folder / stage.file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, bundle.folder / "plain.onnx")
    session = onnxruntime.InferenceSession(
        str(bundle.folder / "plain.onnx"), options, providers=["CPUExecutionProvider"]
    )
    feeds = {
        "embeddings": embeddings,
        "position_ids": position_ids,
        "write_slot": np.zeros(1, np.int64),
        "logits_rows": np.array([embeddings.shape[1] - 1]),
    } | {
        spec.name: np.zeros(spec.shape, spec.dtype)
        for spec in stage.inputs
        if spec.name not in {"embeddings", "position_ids", "write_slot", "logits_rows"}
    }
    logits = session.run(["logits"], feeds)[0][0]
    model = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    return logits, [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "name", ["awq", "gptq-symmetric", "gptq-v2-ordered", "gptq-whole", "gptq-8", "gptq-8-whole"]
)
def test_an_export_passes_its_check_and_is_exact(base, pack, tmp_path, name):
    folder, truths = pack(name)
    wanted = plan(folder, tmp_path / "b", reference=True, dtype="float32")
    result = export(wanted, Display(quiet=True))
    assert result.report is not None
    assert result.report.passed
    bundle = Bundle.open(tmp_path / "b")
    quantization = bundle.manifest.quantization
    bits = FORMATS[name].get("bits", 4)
    assert (quantization.weights, quantization.method) == (f"int{bits}", "checkpoint")
    head = FORMATS[name].get("head", False)
    assert quantization.parts == (("decoder", "head") if head else ("decoder",))
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(1, 7, 64)).astype(np.float32)
    position_ids = np.arange(7)[None] * 2
    found, operators = run_decoder(bundle, embeddings, position_ids, tmp_path)
    expected = true_logits(base, truths, embeddings, position_ids)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    # No weight is unpacked in memory: every one has a kernel of its own, but for queries, keys and
    # values, which have one together. Sorted inputs keep them apart.
    is_apart = FORMATS[name].get("desc_act")
    assert operators.count("MatMulNBits") == len(truths) - (0 if is_apart else 2)


def test_a_float16_bundle_holds_the_checkpoint_s_own_scales(pack, tmp_path):
    folder, _ = pack("awq")
    wanted = plan(folder, tmp_path / "b", reference=True)
    assert wanted.dtype == "float16"
    assert export(wanted, Display(quiet=True)).report.passed
    source = wanted.sources[LAYER]
    made = quantize_sources(
        {"w": source}, {"w": packed_scheme(source.packed, 64)}, {}, dtype="float16"
    )
    stored = load_file(folder / "model.safetensors")[f"{STORED}.scales"]
    assert torch.equal(make_tensor(made["w" + SCALES]), stored.float())


def test_layers_that_were_not_converted_stay(pack, tmp_path):
    folder, truths = pack("some", method="awq", keep=("down_proj", "q_proj"))
    assert len(truths) == 5
    wanted = plan(folder, tmp_path / "b", reference=True, dtype="float32")
    assert export(wanted, Display(quiet=True)).report.passed
    graph = onnx.load(tmp_path / "b" / "decoder.onnx", load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("MatMulNBits") == 5
    assert operators.count("Gemm") == 3


def test_the_authors_layout(tmp_path):
    clip = originals.make_clip(tmp_path / "openai" / "clip", image_size=28, seed=1)
    folder = originals.make_llava_original(
        tmp_path / "llava", clip, width=64, mlp=96, layers=1, seed=2
    )
    to_safetensors(folder)
    truths = pack_checkpoint(folder, method="gptq", desc_act=True, biases=True)
    assert len(truths) == 7
    wanted = plan(
        folder,
        tmp_path / "b",
        reference=True,
        dtype="float32",
        parts__clip=str(clip),
        **{"prompt.template": "USER: <image>\nWhere is {phrase}? ASSISTANT:"},
    )
    assert export(wanted, Display(quiet=True)).report.passed
    assert wanted.quantization.method == "checkpoint"


def to_safetensors(folder):
    """The torch files of a folder as one safetensors file."""
    tensors = {}
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
        path.unlink()
    for path in folder.glob("*.index.json"):
        path.unlink()
    tensors = {key: value.clone() for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def test_llava_next(tmp_path):
    folder = originals.make_llava_next(
        tmp_path / "next", text="mistral", width=64, kv_heads=2, mlp=96, layers=1, dtype="float16"
    )
    truths = pack_checkpoint(folder, method="awq", group=16)
    assert len(truths) == 7
    wanted = plan(folder, tmp_path / "b", reference=True, dtype="float32")
    assert export(wanted, Display(quiet=True)).report.passed
    assert wanted.quantization.method == "checkpoint"


def test_torch_files(copy):
    folder = copy("gptq-ordered")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    source = plan(folder).sources[LAYER]
    assert source.packed.is_symmetric
    assert source.packed.order_I is not None


def test_the_estimate_counts_what_is_written(pack, tmp_path):
    for name in ("awq", "gptq-ordered", "gptq-8-whole-ordered"):
        wanted = plan(pack(name)[0], tmp_path / name, dtype="float32")
        export(wanted, Display(quiet=True))
        written = sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        counted = estimate(wanted).bundle_bytes
        header = int.from_bytes(
            (tmp_path / name / "weights-float32.safetensors").read_bytes()[:8], "little"
        )
        assert 0 <= counted - (written - 8 - header) < 64 * 1024


def test_an_engine_of_sorted_symmetric_values_builds(pack, tmp_path):
    from tools.engines import build_bundle

    wanted = plan(pack("gptq-ordered")[0], tmp_path / "b", target="rtx")
    export(wanted, Display(quiet=True))
    assert set(build_bundle(Bundle.open(tmp_path / "b"))) >= {"decoder"}


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq-8"])
def test_engines_take_no_zero_points(pack, tmp_path, name):
    with pytest.raises(ConfigError, match="zero points, which engines of target 'rtx'"):
        plan(pack(name)[0], tmp_path / "b", target="rtx")


def test_blocks_need_a_later_opset(pack, tmp_path):
    with pytest.raises(ConfigError, match="in blocks, which need opset 21; target 'portable'"):
        plan(pack("gptq-8-symmetric")[0], tmp_path / "b", target="portable")
    assert plan(pack("gptq-8-whole")[0], tmp_path / "b", target="portable").quantization


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_what_came_quantized_is_not_quantized_again(pack, tmp_path, weights):
    with pytest.raises(ConfigError, match=f"quantize.weights is {weights}, but .* to 4 bits"):
        plan(pack("awq")[0], tmp_path / "b", quantize__weights=weights)


def refuse(folder, **overrides):
    """The one line by which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        plan(folder, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes', which cannot be read"),
        ({"quant_method": "compressed-tensors"}, "by 'compressed-tensors'"),
        ({"quant_method": None}, "by 'none'"),
        ({"bits": 3}, "bits 3, expected 4 or 8 for gptq"),
        ({"bits": None}, "bits None, expected 4 or 8"),
        ({"quant_method": "awq", "bits": 8}, "bits 8, expected 4 for awq"),
        ({"quant_method": "awq", "version": "gemv"}, "format 'gemv', expected gemm for awq"),
        ({"checkpoint_format": "marlin"}, "format 'marlin', expected gptq or gptq_v2"),
        ({"checkpoint_format": None, "format": "bitblas"}, "format 'bitblas'"),
        ({"group_size": 8}, "group_size 8, expected -1 or a multiple of 16"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": "32"}, "group_size '32'"),
    ],
)
def test_a_format_that_cannot_be_read(copy, values, reason):
    folder = copy()
    path = folder / "config.json"
    found = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
    set_quantization(folder, found | values)
    message = refuse(folder)
    assert message.startswith(str(path))
    assert reason in message
    assert message.endswith("the checkpoint that it was made from")


def test_an_awq_config_by_its_newer_name(copy):
    folder = copy("awq")
    named = {"quant_method": "awq", "bits": 4, "group_size": 32, "format": "gemm"}
    set_quantization(folder, named)
    assert plan(folder).quantization.weights == "int4"


def change(key, make):
    """An edit of one tensor; without a new value it is left out."""

    def edit(tensors):
        value = make(tensors[key])
        tensors = {name: each for name, each in tensors.items() if name != key}
        return tensors if value is None else tensors | {key: value}

    return edit


def shuffle(groups):
    """The groups of one input too many, and of one too few."""
    groups = groups.clone()
    groups[0] = 1
    return groups


@pytest.mark.parametrize(
    ("part", "make", "reason"),
    [
        ("qzeros", lambda _: None, "up_proj.qzeros' is missing, though"),
        ("scales", lambda _: None, "up_proj.scales' is missing, though"),
        ("qweight", lambda _: None, "is none that this model has"),
        ("scales", lambda t: t[:1].clone(), "has shape [1, 96], expected [2, 96] by the config"),
        ("qweight", lambda t: t[:4].clone(), "has shape [4, 96], expected [8, 96]"),
        ("qzeros", lambda t: t.T.contiguous(), "expected [2, 12] by the config; it lies transp"),
        ("scales", lambda t: t.int(), "stored as int32, expected float32 or float16 or bfloat16"),
        ("qzeros", lambda t: t.to(torch.int16), "stored as I16, expected int32"),
        ("qweight", lambda t: t.half(), "stored as float16, expected int32"),
        ("g_idx", shuffle, "does not put 32 inputs into each of 2 groups"),
        ("g_idx", lambda t: t - 1, "does not put 32 inputs into each of 2 groups"),
        ("g_idx", lambda t: t[:32].clone(), "has shape [32], expected [64]"),
    ],
)
def test_a_layer_that_is_not_whole(copy, part, make, reason):
    folder = copy()
    edit_tensors(folder, change(f"{STORED}.{part}", make))
    assert reason in refuse(folder)


def test_groups_may_be_left_out(copy):
    folder = copy()
    edit_tensors(folder, change(f"{STORED}.g_idx", lambda _: None))
    assert plan(folder).sources[LAYER].packed.order_I is None


def test_a_group_size_of_another_checkpoint(copy):
    folder = copy()
    set_quantization(folder, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert "cannot be packed in groups of 128 inputs and 4 bits" in refuse(folder)


def test_a_weight_in_both_forms(copy):
    folder = copy()
    edit_tensors(folder, lambda each: each | {f"{STORED}.weight": torch.zeros(96, 64).half()})
    assert "are the same tensor" in refuse(folder)


def test_a_layer_under_two_names(copy):
    folder = copy()
    other = STORED.replace("language_model.model", "model.language_model") + ".qweight"
    edit_tensors(folder, lambda each: each | {other: each[f"{STORED}.qweight"].clone()})
    assert "are the same tensor under two names; remove one" in refuse(folder)


def test_a_bias_that_no_layer_has(copy):
    folder = copy()
    bias = torch.zeros(96).half()
    bias[3] = 1
    edit_tensors(folder, lambda each: each | {f"{STORED}.bias": bias})
    assert "up_proj.bias' is none that this model has, and not zero" in refuse(folder)


def test_a_quantized_vision_tower(copy):
    folder = copy()
    key = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.qweight"
    edit_tensors(folder, lambda each: each | {key: torch.zeros(4, 64, dtype=torch.int32)})
    assert f"tensor '{key}' is quantized, expected only linear layers" in refuse(folder)


def test_packed_layers_without_a_word_in_the_config(copy):
    folder = copy()
    set_quantization(folder, None)
    assert "is quantized, but config.json has no quantization_config; add it" in refuse(folder)


def test_scales_that_are_no_numbers(copy, tmp_path):
    folder = copy()
    edit_tensors(folder, change(f"{STORED}.scales", lambda t: t * math.inf))
    with pytest.raises(ExportError, match=r"up_proj\.scales' holds values that are no finite"):
        export(plan(folder, tmp_path / "b"), Display(quiet=True))
    assert not (tmp_path / "b").exists()


def test_first_format_adds_one_to_whole_words(copy):
    folder = copy()
    words = torch.full((2, 12), 0x3F, dtype=torch.int32)
    edit_tensors(folder, change(f"{STORED}.qzeros", lambda _: words))
    packed = plan(folder).sources[LAYER].packed
    assert packed.read_zeros()[0, :8].tolist() == [0, 5, 1, 1, 1, 1, 1, 1]
    tensors = open_tensors(open_checkpoint(str(folder)), torch.float32, whole=True)
    made = make_tensor(plan(folder).sources[LAYER])
    assert torch.equal(tensors[f"{STORED}.weight"].read(), made)
