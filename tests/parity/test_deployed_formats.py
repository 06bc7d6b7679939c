"""The models that people deploy, in the formats that they deploy: bfloat16 and four bits.

Where a runtime is here, its answers are compared with the library's; engines are built by
TensorRT-RTX, which needs no GPU for it. Stored values are compared with the checkpoint's.

Random weights lose a tenth of their size in four bits, which moves LLaVA-OneVision's logits by a
third: no tolerance would tell that from an error. So where the library answers, the checkpoint's
values are ones that four bits hold. OpenVINO then gives the library's own logits, but for its
cache in float16; onnxruntime rounds what it multiplies them with to 8 bits, which is 1 to 2 %.
"""

import numpy as np
import onnx
import pytest
import torch
from makers.families import export, find_family, make_picture, make_samples
from makers.qwen import TEMPLATE, make_qwen3_checkpoint, make_qwen_checkpoint
from safetensors.torch import load_file, save_file
from tools.engines import build_bundle

from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.quantization.joined import list_parts
from gap_runtime import Bundle
from gap_runtime.backends.openvino import session
from gap_runtime.grounding.check import check_bundle

HEAD_DIM = 16
"""The least that TensorRT's attention kernels take."""
QWEN = {
    "qwen2.5-vl": (make_qwen_checkpoint, {"full": (1,)}, "112x56"),
    "qwen3-vl": (make_qwen3_checkpoint, {"stacked": (0, 1)}, "64x48"),
}
"""Makers, what they are told of the tower, and canvases."""
FAMILIES = (*QWEN, "internvl3", "llava-onevision")
RUN = (
    ("cpu", "float32", "int4"),
    ("standard", "float32", "int4"),
    ("openvino", "float32", "int4"),
    ("openvino", "bfloat16", None),
    ("openvino", "bfloat16", "int4"),
)
BUILT = (
    ("rtx", "bfloat16", None),
    ("rtx", "bfloat16", "int4"),
    ("rtx", "float16", "int4"),
    ("jetson-orin-jp6", "bfloat16", None),
)
USUAL = {
    ("qwen3-vl", "cpu", "float32", "int4"),
    ("qwen2.5-vl", "rtx", "bfloat16", "int4"),
}


def fit_into_four_bits(folder):
    """Round the language model's matrices in a checkpoint to values that int4 holds exactly.

    Every sixteenth value is the largest, and a row's scale is a power of two, so it does not
    matter which block of a row a scale is of, nor its dtype.
    """
    for path in folder.glob("*.safetensors"):
        values = load_file(path)
        for name, value in values.items():
            if value.ndim != 2 or "vis" in name:
                continue
            scale = (value.float().std(dim=1, keepdim=True) * 2.5 / 7).log2().round().exp2()
            whole = (value.float() / scale).round().clamp(-7, 7)
            whole[:, ::16] = torch.where(whole[:, ::16] < 0, -7.0, 7.0)
            values[name] = (whole * scale).to(value.dtype)
        save_file(values, path, metadata={"format": "pt"})


def rotate(formats):
    """Every family in every format, a few of them in the default run."""
    return [
        pytest.param(
            family,
            *form,
            marks=() if (family, *form) in USUAL else pytest.mark.matrix,
            id="-".join(map(str, (family, *form))),
        )
        for family in FAMILIES
        for form in formats
    ]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A function that plans an export of a family, whose checkpoint is made once."""
    made = {}

    def make(family, out, target, dtype, quantize, *, reference):
        # Scores of a tower in four bits choose other tokens than the library's.
        whole = quantize is not None and not reference
        settings = {"prune.ratios": [0.5], "quantize.vision": whole}
        fits = quantize is not None and reference
        key = (family, fits)
        if family not in QWEN:
            if key not in made:
                made[key] = find_family(family, tmp_path_factory, head_dim=HEAD_DIM)
                if fits:
                    made[key] = made[key].copy(tmp_path_factory.mktemp(family) / "copy")
                    fit_into_four_bits(made[key].place())
            case = made[key]
            settings = {name.replace(".", "__"): value for name, value in settings.items()}
            return case.plan(
                out,
                target=target,
                reference=reference,
                **{"dtype": dtype, "quantize__weights": quantize, **settings},
            )
        if key not in made:
            home = tmp_path_factory.mktemp(family)
            make_samples(home / "samples", make_picture(90, 61))
            maker, tower, _ = QWEN[family]
            made[key] = maker(
                home / "model", depth=2, layers=2, wide=HEAD_DIM, spread=0.08, seed=17, **tower
            )
            if fits:
                fit_into_four_bits(made[key])
        settings |= {
            "check.samples": str(made[key].parent / "samples"),
            "prompt.template": TEMPLATE,
            "prompt.answer": 4,
            "image.canvas": QWEN[family][2],
        }
        return plan_export(
            make_request(
                made[key],
                dtype=dtype,
                quantize=quantize,
                target=target,
                settings=settings,
                out=out,
                reference=reference,
            )
        )

    return make


def tail(name):
    """The end of a tensor's name, which all layouts have in common."""
    return ".".join(name.split(".")[-3:])


def require_stored(plan, folder, dtype):
    """Values in the bundle that are in no fewer bits are the checkpoint's, rounded by torch."""
    wanted = {}
    for path in plan.checkpoint.folder.glob("*.safetensors"):
        for name, value in load_file(path).items():
            wanted.setdefault(tail(name), []).append(value.to(getattr(torch, dtype)))
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    plain = {name: value for name, value in stored.items() if value.dtype == getattr(torch, dtype)}
    exact = 0
    for name, value in plain.items():
        same = [each for each in wanted.get(tail(name), ()) if each.shape == value.shape]
        assert not same or any(torch.equal(each, value) for each in same), name
        exact += bool(same)
    assert exact > len(plain) / 2


def list_few(bundle, stage="decoder"):
    """Weights in few bits that a graph's products take, by name."""
    file = next(each.file for each in bundle.manifest.stages if each.name == stage)
    nodes = onnx.load(bundle.folder / file, load_external_data=False).graph.node
    values = {"DequantizeLinear": 0, "MatMulNBits": 1}
    return [node.input[values[node.op_type]] for node in nodes if node.op_type in values]


@pytest.mark.parametrize(("family", "target", "dtype", "quantize"), rotate(RUN))
def test_answers_are_the_librarys(plan, tmp_path, family, target, dtype, quantize, monkeypatch):
    if target == "openvino":
        pytest.importorskip("openvino")
    asked = plan(family, tmp_path / "b", target, dtype, quantize, reference=True)
    export(asked)
    bundle = Bundle.open(tmp_path / "b")
    report = check_bundle(bundle, "openvino" if target == "openvino" else "onnxruntime:cpu")
    assert report.passed
    assert report.precision == (quantize or dtype)
    # Of scores that are the same in bfloat16, each library keeps others: nothing behind compares.
    rows = [row for row in report.rows if not row.near_tie]
    assert len(rows) == len(report.rows) or dtype == "bfloat16"
    assert all(row.positions_equal for row in rows)
    errors = [row.relative_logit_error for row in rows]
    assert np.isfinite(errors).all()
    exact = quantize is not None and (target, dtype) == ("openvino", "float32")
    if quantize is not None:
        assert max(errors) < (2e-3 if exact else 0.04)
    if exact:
        # All that is left is the cache in float16.
        monkeypatch.setattr(session, "_choose_cache", lambda _, precision: precision)
        report = check_bundle(bundle, "openvino")
        assert max(row.relative_logit_error for row in report.rows) < 1e-4
    # Six to a layer at least, as a width that is no multiple of a block stays as it is.
    few = sum(len(list_parts(name)) for name in list_few(bundle))
    assert (few >= 6 * bundle.manifest.cache.layers) == (quantize is not None)
    if quantize is None:
        require_stored(asked, tmp_path / "b", dtype)


@pytest.mark.parametrize(("family", "target", "dtype", "quantize"), rotate(BUILT))
def test_engines_are_built(plan, tmp_path, family, target, dtype, quantize):
    asked = plan(family, tmp_path / "b", target, dtype, quantize, reference=False)
    export(asked)
    bundle = Bundle.open(tmp_path / "b")
    records = build_bundle(bundle)
    assert set(records) == {stage.name for stage in bundle.manifest.stages}
    assert {record.precision for record in records.values()} == {quantize or dtype}
    few = {name: record.layers.get("DEQUANTIZE", 0) for name, record in records.items()}
    for stage in bundle.manifest.stages:
        assert few[stage.name] == len(list_few(bundle, stage.name))
    # As above.
    assert (few["decoder"] >= 6 * bundle.manifest.cache.layers) == (quantize is not None)
    require_stored(asked, tmp_path / "b", dtype)
