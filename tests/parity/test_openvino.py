"""OpenVINO itself on exported graphs, where it is installed."""

import numpy as np
import pytest
from makers.families import export as export_family
from makers.families import find_family, make_picture, make_samples
from makers.qwen import TEMPLATE, make_qwen3_checkpoint

from gap_export import export
from gap_runtime.backends import onnxruntime, openvino
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER
from gap_runtime.grounding.check import check_bundle

pytest.importorskip("openvino")

from gap_runtime.backends.openvino import states
from gap_runtime.backends.openvino.session import OpenvinoDecoder
from gap_runtime.backends.openvino.state_decoder import StateDecoder


@pytest.mark.parametrize(
    "quantize",
    [None, *(pytest.param(each, marks=pytest.mark.matrix) for each in ("int8", "int4"))],
)
def test_its_answers_are_pytorchs(tmp_path, quantize):
    """Float32 to the check's own tolerance; quantized weights keep the boxes."""
    result = export(
        "refshapes", ratios=[0.5], target="openvino", out=tmp_path / "bundle", quantize=quantize
    )
    report = check_bundle(Bundle.open(result.folder), "openvino")
    assert report.passed
    assert all(row.kept_equal and row.positions_equal for row in report.rows)
    if quantize is None:
        assert max(row.max_logit_error for row in report.rows) < 1e-4


MORE = ("llava-next-mistral", "internvl3")


class BothDecoders:
    """The same calls of a decoder on OpenVINO and on onnxruntime."""

    def __init__(self, bundle):
        stage = bundle.manifest.stage(DECODER)
        shapes = {spec.name: spec.shape for spec in stage.inputs}
        self.width, self.axes = int(shapes["embeddings"][-1]), int(shapes["position_ids"][0])
        self.one = openvino.open_decoder(bundle, stage, "")
        self.other = onnxruntime.open_decoder(bundle, stage, "cpu")
        self.random = np.random.default_rng(0)

    def require_same(self, rows, slot):
        """Logits of all rows, and of a call's cache by what follows."""
        values = self.random.standard_normal((1, rows, self.width)).astype(np.float32)
        ids = np.tile(np.arange(rows) * 2 + slot, (self.axes, 1))
        wanted = np.arange(max(0, rows - 8), rows)
        found, truth = (each.run(values, ids, slot, wanted) for each in (self.one, self.other))
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    """Small bundles for the target openvino by family, made once."""
    made = {}

    def make(family):
        home = tmp_path_factory.mktemp("openvino")
        if family != "qwen3":
            plan = find_family(family, tmp_path_factory).plan(home / "b", target="openvino")
            return Bundle.open(export_family(plan).folder)
        make_samples(home / "samples", make_picture(90, 61))
        settings = {
            "check.samples": str(home / "samples"),
            "prompt.template": TEMPLATE,
            "image.canvas": "96x64",
        }
        checkpoint = str(make_qwen3_checkpoint(home / "model"))
        result = export(
            checkpoint, ratios=[0.5], target="openvino", out=home / "b", settings=settings
        )
        return Bundle.open(result.folder)

    def find(family):
        if family not in made:
            made[family] = make(family)
        return made[family]

    return find


@pytest.mark.parametrize(
    "family",
    # A key for each query and one for several, a bias, axes of positions and planes.
    [
        "llava",
        "qwen3",
        *(pytest.param(each, marks=pytest.mark.matrix) for each in MORE),
    ],
)
def test_its_cache_is_states_that_hold_what_the_graph_would(find, family):
    both = BothDecoders(find(family))
    assert isinstance(both.one, StateDecoder)
    both.require_same(40, 0)
    for slot in (40, 41):
        both.require_same(1, slot)
    # A draft, two rows of which are refused, and another.
    both.require_same(5, 42)
    both.require_same(5, 45)
    saved = [each.copy_slots(30) for each in (both.one, both.other)]
    for name, array in saved[1].tensors.items():
        np.testing.assert_allclose(saved[0].tensors[name], array, rtol=1e-4, atol=1e-4)
    # Another prompt behind the same beginning, which is run once more; then so few rows that it
    # is not: too many columns are to be hidden.
    both.require_same(30, 12)
    both.require_same(1, 42)
    both.require_same(3, 4)
    both.require_same(20, 2)
    both.require_same(1, 22)
    both.require_same(9, 0)
    for each, slots in zip((both.one, both.other), saved, strict=True):
        each.put_slots(slots)
    both.require_same(3, 30)
    both.require_same(1, 31)


def test_many_refused_rows_are_hidden_and_then_dropped(find):
    both = BothDecoders(find("llava"))
    both.require_same(10, 0)
    for _ in range(20):
        both.require_same(6, 10)
    assert both.one._count < 10 + 20 * 6
    both.require_same(1, 12)


@pytest.mark.parametrize("factor", [None, 0.3])
def test_a_graph_of_another_form_runs_as_it_is(find, factor, monkeypatch):
    """Two places that change sides hold its cache."""
    monkeypatch.setattr(states, "_read_factor", lambda _: factor)
    both = BothDecoders(find("llava"))
    assert isinstance(both.one, OpenvinoDecoder)
    both.require_same(12, 0)
    both.require_same(1, 12)
