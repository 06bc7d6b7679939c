"""Decoders with three position IDs a token: exported, and against the library's own.

The model is made up: LLaVA's tower and projector before the language models of Qwen2.5-VL and
Qwen3-VL, whose rotary frequencies are turned by time, row and column in sections and by turns.
"""

from functools import partial

import numpy as np
import pytest
from makers.checkpoints import make_llava_checkpoint
from makers.families import make_picture, make_samples
from truths.axes import count_positions
from truths.masked import MaskedLlava

from gap_export.blocks import llama
from gap_runtime import Bundle, Grounder
from gap_runtime.grounding.check import check_bundle

STEPS, SIDE = 5, 5
SECTIONS = [2, 3, 3]
TEXTS = ("qwen2_5_vl_text", "qwen3_vl_text")


@pytest.fixture(autouse=True)
def three_axes(monkeypatch):
    """LLaVA as a family whose tokens have three position IDs."""
    monkeypatch.setattr(llama, "read_decoder", partial(llama.read_decoder, axes=3))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def make_checkpoint(text):
        home = tmp_path_factory.mktemp("axes")
        make_samples(home / "samples", make_picture(90, 61))
        folder = make_llava_checkpoint(
            home / text,
            image_size=14 * SIDE,
            text=text,
            width=96,
            heads=6,
            kv_heads=2,
            layers=3,
            head_dim=16,
            sections=SECTIONS,
            seed=6,
        )
        return folder, {
            "check__samples": str(home / "samples"),
            "prompt__answer": STEPS,
            "prompt__template": "USER: <image>\n Where is {phrase} ? ASSISTANT:",
        }

    return make_checkpoint


def number(before, after):
    return count_positions(before, (SIDE, SIDE), after)


def answer(folder):
    """Logits [STEPS, V] of the graphs, all that was computed on the way, and the prompt."""
    bundle = Bundle.open(folder)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    recorded = []
    decoder = grounder._open_cache().session

    class Recorder:
        fit = staticmethod(decoder.fit)

        def run(self, *arguments):
            recorded.append(decoder.run(*arguments).copy())
            return recorded[-1]

    grounder._open_cache().session, grounder._drafter = Recorder(), None
    values = grounder.run_stages(
        make_picture(90, 61, seed=2), "the café mug", bundle.manifest.ratios[0], most=STEPS
    )
    return np.concatenate(recorded), values, grounder.encoder.encode("the café mug")


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("text", "target"),
    [
        # The graphs of the whole model are run for the CPU by test_qwen2_5_vl.py.
        pytest.param("qwen2_5_vl_text", "cpu", marks=pytest.mark.matrix),
        ("qwen2_5_vl_text", "portable"),
        ("qwen3_vl_text", "standard"),
    ],
)
def test_gap_is_masking(make, export, tmp_path, text, target):
    folder, settings = make(text)
    bundle = export(folder, tmp_path / "b", target=target, prune__ratios=[0.47], **settings)
    found, values, prompt = answer(bundle)
    kept, before = values.kept_index[0].tolist(), len(prompt.prefix)
    ids = number(before, len(prompt.suffix))
    left = [*range(before), *(before + k for k in kept), *range(before + SIDE**2, ids.shape[1])]
    np.testing.assert_array_equal(values.position_ids[:, : len(left)], ids[:, left])

    oracle = MaskedLlava(folder, number)
    expected = oracle.answer(values.pixels, prompt.prefix, prompt.suffix, kept, STEPS).numpy()
    assert relative(found, expected) < 1e-4
    assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    "mode",
    [
        "compact",
        *(pytest.param(m, marks=pytest.mark.matrix) for m in ("permuted", "permuted-compact")),
    ],
)
def test_other_modes_are_not_masking(make, export, tmp_path, mode):
    folder, settings = make(TEXTS[0])
    bundle = export(
        folder, tmp_path / "b", prune__ratios=[0.47], prune__positions=mode, **settings
    )
    found, values, prompt = answer(bundle)
    kept = values.kept_index[0].tolist()
    expected = MaskedLlava(folder, number).answer(
        values.pixels, prompt.prefix, prompt.suffix, sorted(kept), STEPS
    )
    assert relative(found[0], expected[0].numpy()) > 1e-2


@pytest.mark.parametrize("text", [pytest.param(TEXTS[0], marks=pytest.mark.matrix), TEXTS[1]])
def test_the_check_compares_all_axes(make, export, tmp_path, text):
    folder, settings = make(text)
    bundle = export(folder, tmp_path / "b", reference=True, prune__ratios=[0.0, 0.8], **settings)
    assert check_bundle(Bundle.open(bundle), "onnxruntime:cpu").passed
