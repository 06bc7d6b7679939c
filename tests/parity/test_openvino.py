"""OpenVINO itself on exported graphs, where it is installed."""

import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import pytest
from makers.families import export as export_family
from makers.families import find_family, make_picture, make_samples
from makers.qwen import TEMPLATE, make_qwen3_checkpoint

from gap_export import export
from gap_runtime.backends import onnxruntime, openvino
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER
from gap_runtime.errors import EngineError
from gap_runtime.evaluation.refshapes import draw_scene
from gap_runtime.grounding.check import check_bundle
from gap_runtime.grounding.grounder import Grounder

Core = pytest.importorskip("openvino").Core
opset = pytest.importorskip("openvino.opset13")

from gap_runtime.backends.openvino import paged_decoder, pages, session, single_row
from gap_runtime.backends.openvino.paged_decoder import PagedDecoder
from gap_runtime.backends.openvino.session import OpenvinoDecoder


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
    """The same calls of a decoder on OpenVINO and on another one, by default onnxruntime."""

    def __init__(self, bundle, other=None):
        stage = bundle.manifest.stage(DECODER)
        shapes = {spec.name: spec.shape for spec in stage.inputs}
        self.width, self.axes = int(shapes["embeddings"][-1]), int(shapes["position_ids"][0])
        self.one = openvino.open_decoder(bundle, stage, "")
        self.other = other or onnxruntime.open_decoder(bundle, stage, "cpu")
        self.random = np.random.default_rng(0)

    def require_same(self, rows, slot, error=1e-4, stride=2):
        """Logits of all rows, and of a call's cache by what follows."""
        values = self.random.standard_normal((1, rows, self.width)).astype(np.float32)
        ids = np.tile(np.arange(rows) * stride + slot, (self.axes, 1))
        wanted = np.arange(max(0, rows - 8), rows)
        found, truth = (each.run(values, ids, slot, wanted) for each in (self.one, self.other))
        np.testing.assert_allclose(found, truth, rtol=error, atol=error)

    def await_single_row(self, slot, error=1e-4):
        """Calls of a single row, until the graph for them alone is there."""
        ends = time.monotonic() + 60
        while not self.one._single.is_open:
            assert time.monotonic() < ends
            self.require_same(1, slot, error)
        self.require_same(1, slot, error)


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
def test_its_cache_is_pages_that_hold_what_the_graph_would(find, family):
    both = BothDecoders(find(family))
    assert isinstance(both.one, PagedDecoder)
    both.require_same(40, 0)
    for slot in (40, 41):
        both.require_same(1, slot)
    # A draft, two rows of which are refused, and another.
    both.require_same(5, 42)
    both.require_same(5, 45)
    saved = [each.copy_slots(30) for each in (both.one, both.other)]
    for name, array in saved[1].tensors.items():
        first = (
            saved[0]
            .tensors[name]
            .transpose(1, 0, 2, 3)
            .reshape(1, array.shape[1], -1, array.shape[3])
        )
        np.testing.assert_allclose(first[:, :, :30], array, rtol=1e-4, atol=1e-4)
    # Other prompts behind a part of the same beginning, with more and with fewer rows.
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


def test_several_pages_are_saved_and_the_last_slot_is_the_last(find):
    bundle = find("llava")
    capacity = bundle.manifest.layout.capacity
    both = BothDecoders(bundle)
    both.require_same(70, 0, stride=1)
    saved = [each.copy_slots(67) for each in (both.one, both.other)]
    both.require_same(60, 0)
    for each, slots in zip((both.one, both.other), saved, strict=True):
        each.put_slots(slots)
    both.require_same(4, 67)
    # To the end of the cache, which need not be the end of a page.
    both.require_same(capacity - 71, 71, stride=1)
    both.require_same(1, capacity - 1)
    values = np.zeros((1, 2, both.width), np.float32)
    ids = np.zeros((both.axes, 2), np.int64)
    for slot in (capacity - 1, capacity, -1):
        with pytest.raises(EngineError, match=f"do not fit the cache of {capacity} slots"):
            both.one.run(values, ids, slot, np.arange(1))
    both.require_same(1, capacity - 1)


def await_threads():
    """Until no graph is being compiled."""
    for thread in threading.enumerate():
        if thread.name == "single row":
            thread.join(60)


def open_plain(bundle, monkeypatch):
    """A decoder whose weights are taken for too large to lie in memory twice."""
    with monkeypatch.context() as patch:
        patch.setattr(session, "_MOST_TWICE", 0)
        return openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "")


@pytest.mark.parametrize(
    "family", ["llava", "qwen3", *(pytest.param(each, marks=pytest.mark.matrix) for each in MORE)]
)
def test_a_graph_for_a_single_row_shares_the_cache(find, family, monkeypatch):
    """Its logits are the other graph's, but for the last bits that a version may round apart."""
    bundle = find(family)
    plain = open_plain(bundle, monkeypatch)
    monkeypatch.setattr(single_row, "ENOUGH", 2)
    both = BothDecoders(bundle, plain)
    both.require_same(40, 0)
    both.await_single_row(40)
    # What each of the graphs writes, the other one reads.
    for rows, slot in ((1, 41), (5, 42), (1, 45), (1, 46), (3, 47), (9, 30), (1, 39)):
        both.require_same(rows, slot)
    assert not plain._single.is_open


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_only_small_weights_lie_in_memory_twice(tmp_path, quantize, monkeypatch):
    out = tmp_path / "bundle"
    options = {"ratios": [0.5], "target": "openvino", "out": out, "quantize": quantize}
    bundle = Bundle.open(export("refshapes", **options).folder)
    stage = bundle.manifest.stage(DECODER)
    initializers = onnx.load(out / stage.file, load_external_data=False).graph.initializer
    stored = sum(
        int(entry.value)
        for each in initializers
        for entry in each.external_data
        if entry.key == "length"
    )
    monkeypatch.setattr(single_row, "ENOUGH", 1)
    for most, has_two in ((stored - 1, False), (2 * stored, True)):
        monkeypatch.setattr(session, "_MOST_TWICE", most)
        both = BothDecoders(bundle, open_plain(bundle, monkeypatch))
        both.require_same(1, 0)
        await_threads()
        assert both.one._single.is_open == has_two


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_answers_are_the_same_by_both_graphs(tmp_path, quantize, monkeypatch):
    """Steps and drafts, filled up, over other pictures, phrases and prompts."""
    options = {"ratios": [0.5, 0], "target": "openvino", "quantize": quantize}
    bundle = Bundle.open(export("refshapes", out=tmp_path / "bundle", **options).folder)
    scenes = [draw_scene("test", number) for number in range(6)]
    asked = [
        (scene.image, each.phrase, ratio)
        for scene in scenes
        for each in scene.questions
        for ratio in (0.5, 0)
    ]
    monkeypatch.setattr(single_row, "ENOUGH", 4)
    one = Grounder(bundle, "openvino")
    with monkeypatch.context() as patch:
        patch.setattr(session, "_MOST_TWICE", 0)
        other = Grounder(bundle, "openvino", draft=False)
        other.ground(*asked[0][:2])
    with one, other:
        one.ground(*asked[0][:2])
        await_threads()
        for image, phrase, ratio in asked:
            found, truth = (each.ground(image, phrase, ratio=ratio) for each in (one, other))
            assert (found.answer, found.token_ids) == (truth.answer, truth.token_ids)
            assert found.accepted
        decoders = [each._open_cache().session for each in (one, other)]
        assert [each._single.is_open for each in decoders] == [True, False]


LEFT = """
import sys
from gap_runtime import Bundle, Grounder
from gap_runtime.backends.openvino import single_row
from gap_runtime.evaluation.refshapes import draw_scene

single_row.ENOUGH = 1
for _ in range(2):
    grounder = Grounder(Bundle.open(sys.argv[1]), "openvino")
    print(grounder.ground(draw_scene("test", 0).image, "the red circle").answer)
    grounder.close()
    del grounder
"""


def test_a_process_ends_as_usual_while_a_graph_is_compiled(tmp_path):
    result = export("refshapes", ratios=[0.5], target="openvino", out=tmp_path / "bundle")
    command = [sys.executable, "-c", LEFT, str(result.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == second


def test_drafts_are_filled_up_where_single_rows_do_not_come_between(find, monkeypatch):
    bundle = find("llava")
    monkeypatch.setattr(single_row, "ENOUGH", 1)
    both = BothDecoders(bundle)
    both.require_same(40, 0)
    both.require_same(5, 40)
    assert [both.one.fit(rows) for rows in (1, 2, 5, 6, 12)] == [1, 2, 5, 6, 12]
    both.await_single_row(45)
    assert [both.one.fit(rows) for rows in (1, 2, 5, 6, 12)] == [1, 2, 5, 6, 12]
    both.require_same(5, 46)
    both.require_same(1, 51)
    assert [both.one.fit(rows) for rows in (1, 2, 5, 6, 12)] == [1, 5, 5, 6, 12]
    # Behind another prompt, all is prepared anew in any case.
    both.require_same(12, 30)
    assert [both.one.fit(rows) for rows in (1, 2, 5, 6, 11)] == [1, 2, 5, 6, 11]


def require_slow_and_said(bundle, caplog, reason):
    """Two places that change sides hold the cache, and the reason is told."""
    both = BothDecoders(bundle)
    assert isinstance(both.one, OpenvinoDecoder)
    both.require_same(12, 0)
    both.require_same(1, 12)
    (record,) = (each for each in caplog.records if each.name.endswith("openvino.session"))
    assert record.levelname == "WARNING"
    assert "every call copies the cache" in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("factor", [None, 0.3])
def test_a_graph_of_another_form_runs_as_it_is(find, factor, monkeypatch, caplog):
    monkeypatch.setattr(pages, "_read_factor", lambda _: factor)
    require_slow_and_said(find("llava"), caplog, "the graph's attention is of another form")


def test_an_attention_with_more_in_it_is_not_taken(find):
    """A soft cap, for example, would be lost."""
    bundle = find("llava")
    stage = bundle.manifest.stage(DECODER)
    graph = session._read(bundle, stage, "")
    nodes = [each for each in graph.model.get_ordered_ops() if each.get_type_name() == "Softmax"]
    masked = nodes[-1].input_value(0)
    nodes[-1].input(0).replace_source_output(opset.tanh(masked).output(0))
    with pytest.raises(pages.OtherFormError, match="attention is of another form"):
        pages.move_cache_into_pages(graph.ov, graph.model, stage)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (None, "this version has no attention over pages"),
        (13, "its attention over pages takes other inputs"),
        (29, "its attention over pages takes other inputs"),
    ],
)
def test_without_a_known_attention_over_pages_a_graph_runs_as_it_is(
    find, inputs, reason, monkeypatch, caplog
):
    """Another version of OpenVINO: without the operator, or with other inputs."""

    def make(given):
        if len(given) != inputs:
            raise RuntimeError

    monkeypatch.setattr("openvino.op._PagedAttentionExtension", make if inputs else None)
    require_slow_and_said(find("llava"), caplog, reason)


@pytest.mark.parametrize("name", ["PAGE", "DTYPES"])
def test_pages_of_another_form_are_not_taken(find, name, monkeypatch, caplog):
    """Another version of OpenVINO: pages of other sizes or dtypes than are known."""
    monkeypatch.setattr(paged_decoder, name, {"PAGE": 16, "DTYPES": {}}[name])
    require_slow_and_said(find("llava"), caplog, "pages are <Type: 'float32'> [?,")


def test_a_processor_without_that_attention_runs_a_graph_as_it_is(find, monkeypatch, caplog):
    compile_graph = session._compile

    def refuse(graph):
        if any(each.get_any_name() == "past_lens" for each in graph.model.inputs):
            raise EngineError("no kernel")
        return compile_graph(graph)

    monkeypatch.setattr(session, "_compile", refuse)
    require_slow_and_said(find("llava"), caplog, "no kernel")


@pytest.mark.parametrize(
    ("dtype", "fastmath", "quantize"),
    [
        *(("float16", "0", None), ("bfloat16", "0", None), ("float32", "1", None)),
        ("float32", "0", "int8"),
    ],
)
def test_pages_hold_what_is_computed_in(tmp_path, dtype, fastmath, quantize, monkeypatch):
    """Other dtypes beside the graph as it is, bfloat16 where the processor has it.

    A float16 graph is computed in float32, whatever the processor has. Its cache, and that beside
    weights in 8 bits, is in float16, which every processor reads.
    """
    monkeypatch.setenv("GAP_RUNTIME_FASTMATH", fastmath)
    out = tmp_path / "bundle"
    bundle = Bundle.open(
        export(
            "refshapes", ratios=[0.5], target="openvino", out=out, dtype=dtype, quantize=quantize
        ).folder
    )

    def refuse(*_):
        raise pages.OtherFormError("a test")

    with monkeypatch.context() as patch:
        patch.setattr(session, "move_cache_into_pages", refuse)
        whole = openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "")
    both = BothDecoders(bundle, whole)
    assert isinstance(both.one, PagedDecoder)
    has = Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    wanted = "float16" if quantize else "bfloat16" if fastmath == "1" else dtype
    if wanted == "bfloat16" and "BF16" not in has:
        wanted = "float32"
    (held,) = {each.array.dtype.name for each in both.one._pages.values()}
    assert held == {"bfloat16": "uint16"}.get(wanted, wanted)
    # A graph of float16 that is computed in float32 rounds its cache all the same. Where rows are
    # rounded to 8 bits, a last bit may become a step of 127.
    error = 0.3 if wanted == "bfloat16" or quantize else 2e-3
    monkeypatch.setattr(single_row, "ENOUGH", 1)
    for rows, slot in ((40, 0), (1, 40), (5, 41), (9, 30)):
        both.require_same(rows, slot, error)
    both.await_single_row(39, error)


def test_the_installed_version_has_the_attention_over_pages(tmp_path):
    """The small model too; a version that changes the operator would be slow without a word."""
    result = export("refshapes", ratios=[0.5], target="openvino", out=tmp_path / "bundle")
    bundle = Bundle.open(result.folder)
    decoder = openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "")
    assert isinstance(decoder, PagedDecoder)


SIGNALLED = """
import gc, signal, sys
from gap_runtime import Bundle, Grounder
from gap_runtime.evaluation.refshapes import draw_scene

told = []
signal.signal(signal.SIGINT, lambda *_: told.append(1))
for _ in range(3):
    grounder = Grounder(Bundle.open(sys.argv[1]), "openvino")
    grounder.ground(draw_scene("test", 0).image, "the red circle")
    grounder.close()
    del grounder
    gc.collect()
    signal.raise_signal(signal.SIGINT)
print(len(told))
"""


def test_a_signal_finds_its_way_after_a_session_has_ended(tmp_path):
    result = export("refshapes", ratios=[0.5], target="openvino", out=tmp_path / "bundle")
    command = [sys.executable, "-c", SIGNALLED, str(result.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
