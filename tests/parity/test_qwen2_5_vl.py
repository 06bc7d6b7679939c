"""Qwen2.5-VL: graphs and positions against the library's own model, windows and all."""

import numpy as np
import pytest
from makers.families import make_picture, make_samples
from makers.qwen import TEMPLATE, make_qwen_checkpoint
from truths.axes import count_positions
from truths.qwen import MaskedQwen

from gap_export.tracing import repeat_layers
from gap_runtime import Bundle, Grounder
from gap_runtime.errors import ConfigError
from gap_runtime.grounding.check import check_bundle

STEPS = 4
# Of 112 x 168 and 168 x 112 pixels: 28 pixels to a token, 2 x 2 tokens to a window.
GRIDS = {(90, 61): (4, 6), (61, 90): (6, 4)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    home = tmp_path_factory.mktemp("qwen")
    make_samples(home / "samples", make_picture(90, 61))
    return make_qwen_checkpoint(home / "model", seed=5)


def settings(checkpoint, **more):
    return {
        "check__samples": str(checkpoint.parent / "samples"),
        "prompt__template": TEMPLATE,
        "prompt__answer": STEPS,
        "image__canvas": "168x112,112x168",
        "prune__strategy": "divprune",
        "prune__ratios": [0.47],
        **more,
    }


def answer(folder, size):
    """Logits [STEPS, V] of the graphs for a picture of a size, and all on the way to them."""
    bundle = Bundle.open(folder)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    recorded, decoder = [], grounder._open_cache().session

    class Recorder:
        fit = staticmethod(decoder.fit)

        def run(self, *arguments):
            recorded.append(decoder.run(*arguments).copy())
            return recorded[-1]

    grounder._open_cache().session, grounder._drafter = Recorder(), None
    rows, columns = GRIDS[size]
    name = f"{28 * columns}x{28 * rows}"
    entry = next(each for each in bundle.manifest.ratios if each.bucket == name)
    values = grounder.run_stages(make_picture(*size, seed=2), "the mug", entry, most=STEPS)
    return np.concatenate(recorded), values, grounder.encoder.encode("the mug")


@pytest.mark.parametrize("target", ["cpu", pytest.param("portable", marks=pytest.mark.matrix)])
def test_gap_is_masking(checkpoint, export, tmp_path, target):
    folder = export(checkpoint, tmp_path / "b", target=target, **settings(checkpoint))
    oracle = MaskedQwen(checkpoint, "qwen2_5_vl")
    for size, grid in GRIDS.items():
        found, values, prompt = answer(folder, size)
        kept, before = values.kept_index[0].tolist(), len(prompt.prefix)
        ids = count_positions(before, grid, len(prompt.suffix))
        behind = range(before + grid[0] * grid[1], ids.shape[1])
        left = [*range(before), *(before + k for k in kept), *behind]
        np.testing.assert_array_equal(values.position_ids[:, : len(left)], ids[:, left])
        expected = oracle.answer(values.pixels, prompt.prefix, prompt.suffix, kept, STEPS)
        difference = np.abs(found - expected.numpy()).max()
        assert difference < 1e-4 * expected.abs().max()
        assert found.argmax(axis=1).tolist() == expected.argmax(dim=1).tolist()


@pytest.mark.parametrize(
    "more",
    [
        {
            "prune__ratios": [0.0, 0.9],
            "prune__strategy": "column_attention",
            "image__canvas": "112x168",
        },
        pytest.param(
            {"prune__ratios": [0.0, 0.9], "prune__strategy": "column_attention"},
            marks=pytest.mark.matrix,
        ),
        pytest.param({"quantize__weights": "int8"}, marks=pytest.mark.matrix),
    ],
)
def test_the_bundle_is_checked(checkpoint, export, tmp_path, more):
    folder = export(checkpoint, tmp_path / "b", reference=True, **settings(checkpoint, **more))
    assert check_bundle(Bundle.open(folder), "onnxruntime:cpu").passed


# Such a head is exported by test_decoders.py and test_qwen3_vl.py too.
@pytest.mark.matrix
def test_a_head_that_is_the_embedding_table(export, tmp_path):
    make_samples(tmp_path / "samples", make_picture(90, 61))
    folder = make_qwen_checkpoint(tmp_path / "model", tied=True, full=(0,), seed=3)
    export(folder, tmp_path / "b", **settings(folder, image__canvas="168x112"))


# Copies of such blocks are held to a whole trace by test_repeat_layers.py.
@pytest.mark.matrix
def test_windows_and_full_attention_are_kinds_of_blocks(checkpoint, export, tmp_path, monkeypatch):
    copied, find = [], repeat_layers.find_copies
    monkeypatch.setattr(
        repeat_layers,
        "find_copies",
        lambda *given: copied.append(find(*given)) or copied[-1],
    )
    folder = make_qwen_checkpoint(tmp_path / "model", depth=9, full=(2, 5, 8), seed=4, layers=2)
    export(
        folder, tmp_path / "b", reference=False, **settings(checkpoint, image__canvas="168x112")
    )
    towers = [
        {number: each.source.number for number, each in found.items()}
        for found in copied
        if len(found) > 1
    ]
    assert towers == [{3: 1, 4: 1, 5: 2, 6: 1, 7: 1, 8: 2}]


@pytest.mark.parametrize(
    ("canvas", "part"), [("100x112", "use 112x112"), ("large", "expected WIDTHxHEIGHT")]
)
def test_sizes_that_windows_do_not_divide(checkpoint, export, tmp_path, canvas, part):
    with pytest.raises(ConfigError, match=part):
        export(checkpoint, tmp_path / "b", **settings(checkpoint, image__canvas=canvas))
