"""Qwen3-VL: graphs, positions and DeepStack against the library's own model."""

import json
import shutil

import numpy as np
import pytest
import torch
from makers.families import make_picture, make_samples
from makers.qwen import TEMPLATE, make_qwen3_checkpoint
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from truths import pruners as truth
from truths.axes import count_positions
from truths.qwen import MaskedQwen

from gap_export.cli import main as cli
from gap_export.config.records import POSITION_MODES
from gap_export.errors import CheckpointError
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_runtime import Bundle, Grounder
from gap_runtime.errors import ConfigError
from gap_runtime.grounding.check import check_bundle

STEPS = 4
# 16 pixels to a token; the last is as long as it is thin.
GRIDS = {"96x64": (4, 6), "304x16": (1, 19)}
FIRST_ROW = """
from gap_export.interfaces.features import EagerChoice, Kept

NEEDS, EXTRA = frozenset(), 0

def prune(features, kept, config):
    return Kept(order=tuple(range(kept)))

def prune_eagerly(vision, kept, config):
    return EagerChoice(order=tuple(range(kept)), scores=None)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    home = tmp_path_factory.mktemp("qwen3")
    make_samples(home / "samples", make_picture(90, 61))
    (home / "first_row.py").write_text(FIRST_ROW, encoding="utf-8")
    return make_qwen3_checkpoint(home / "model", seed=5)


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return MaskedQwen(checkpoint, "qwen3_vl")


@pytest.fixture(scope="module")
def bundle(checkpoint, export, tmp_path_factory):
    """Of all buckets. Read only."""
    out = tmp_path_factory.mktemp("bundles") / "b"
    return Bundle.open(export(checkpoint, out, reference=False, **settings(checkpoint)))


def settings(checkpoint, **more):
    return {
        "check__samples": str(checkpoint.parent / "samples"),
        "prompt__template": TEMPLATE,
        "prompt__answer": STEPS,
        "image__canvas": ",".join(GRIDS),
        "prune__strategy": "divprune",
        "prune__ratios": [0.47],
        **more,
    }


def answer(grounder, size, entry):
    """Logits [STEPS, V] of the graphs for a picture of a size, and all on the way to them."""
    recorded, decoder = [], grounder._open_cache().session

    class Recorder:
        fit = staticmethod(decoder.fit)

        def run(self, *arguments):
            recorded.append(decoder.run(*arguments).copy())
            return recorded[-1]

    grounder._open_cache().session = Recorder()
    picture = make_picture(*size, seed=2)
    values = grounder.run_stages(picture, "the mug", entry, most=STEPS, draft=False)
    grounder._open_cache().session = decoder
    return np.concatenate(recorded), values


def require_masking(bundle, oracle, choose=None):
    """Every bucket's answer is the full sequence's with the pruned keys masked out."""
    grounder = Grounder(bundle, "onnxruntime:cpu")
    prompt = grounder.encoder.encode("the mug")
    before = len(prompt.prefix)
    for entry in bundle.manifest.ratios:
        grid = GRIDS[entry.bucket]
        size = tuple(int(side) - 3 for side in entry.bucket.split("x"))
        found, values = answer(grounder, size, entry)
        kept = values.kept_index[0].tolist()
        if choose is not None:
            assert kept == sorted(choose(values.pixels, entry.kept))
        ids = count_positions(before, grid, len(prompt.suffix))
        behind = range(before + grid[0] * grid[1], ids.shape[1])
        left = [*range(before), *(before + k for k in kept), *behind]
        np.testing.assert_array_equal(values.position_ids[:, : len(left)], ids[:, left])
        expected = oracle.answer(values.pixels, prompt.prefix, prompt.suffix, kept, STEPS)
        assert np.abs(found - expected.numpy()).max() < 1e-4 * expected.abs().max()
        assert found.argmax(axis=1).tolist() == expected.argmax(dim=1).tolist()
        tokens, planes, _ = oracle.look(values.pixels)
        rows = torch.cat([tokens, *planes], dim=1)[kept].numpy()
        assert np.abs(values.visual_tokens[0] - rows).max() < 1e-4 * np.abs(rows).max()


def test_gap_is_masking(bundle, oracle):
    require_masking(
        bundle,
        oracle,
        lambda pixels, kept: truth.divprune(oracle.look(pixels)[0], kept).order,
    )


@pytest.mark.matrix
@pytest.mark.parametrize("target", ["portable", "standard"])
def test_gap_is_masking_in_other_dialects(checkpoint, oracle, export, tmp_path, target):
    more = settings(checkpoint, image__canvas="96x64")
    folder = export(checkpoint, tmp_path / "b", target=target, reference=False, **more)
    require_masking(Bundle.open(folder), oracle)


def test_everything_but_the_first_row_pruned(checkpoint, oracle, export, tmp_path):
    own = str(checkpoint.parent / "first_row.py")
    more = {"prune__strategy": own, "prune__keep": [6], "image__canvas": "96x64"}
    values = settings(checkpoint, **more)
    del values["prune__ratios"]
    folder = export(checkpoint, tmp_path / "b", reference=False, **values)
    require_masking(Bundle.open(folder), oracle, lambda _, kept: range(kept))


@pytest.mark.matrix
@pytest.mark.parametrize("more", [{"quantize__weights": "int8"}, {"dtype": "float16"}])
def test_the_bundle_is_checked(checkpoint, export, tmp_path, more):
    folder = export(checkpoint, tmp_path / "b", reference=True, **settings(checkpoint, **more))
    assert check_bundle(Bundle.open(folder), "onnxruntime:cpu").passed


def test_stacks_of_other_orders_and_heads_that_are_the_table(export, tmp_path):
    make_samples(tmp_path / "samples", make_picture(90, 61))
    folder = make_qwen3_checkpoint(
        tmp_path / "model", stacked=(2, 0), depth=3, side=4, layers=1, tied=True, seed=9
    )
    more = settings(folder, image__canvas="96x64")
    bundle = Bundle.open(export(folder, tmp_path / "b", reference=False, **more))
    require_masking(bundle, MaskedQwen(folder, "qwen3_vl"))


def test_rows_of_a_decoder_bring_their_planes(bundle):
    manifest = bundle.manifest
    shapes = {
        spec.name: spec.shape
        for stage in manifest.stages
        for spec in (*stage.inputs, *stage.outputs)
    }
    assert manifest.embedding.shape[1] == 96
    assert shapes["embeddings"][2] == shapes["visual_tokens"][2] == 4 * 96


@pytest.mark.parametrize("size", [(96, 64), (97, 66), (301, 15)])
def test_pixels_are_those_of_the_librarys_processor(checkpoint, bundle, size):
    picture = Image.fromarray(
        np.random.default_rng(4).integers(0, 256, (size[1], size[0], 3), np.uint8)
    )
    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    # Its own rule, which takes the sides to whole tokens, gives the bucket's size.
    given = processor(
        picture, size={"shortest_edge": 256, "longest_edge": 10**6}, return_tensors="np"
    )
    rows, columns = (int(side) // 2 for side in given["image_grid_thw"][0][1:])
    flat = given["pixel_values"].reshape(rows, columns, 2, 2, 3, 2, 8, 8)
    assert np.array_equal(flat[..., 0, :, :], flat[..., 1, :, :])
    expected = flat[..., 0, :, :].transpose(4, 0, 2, 5, 1, 3, 6)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    view = grounder.look(picture)
    assert view.bucket == f"{16 * columns}x{16 * rows}"
    values = grounder.run_stages(view, "the mug", bundle.choose_ratio(None, view.bucket), most=1)
    expected = expected.reshape(1, 3, 16 * rows, 16 * columns)
    np.testing.assert_allclose(values.pixels, expected, rtol=0, atol=1e-6)


def test_positions_are_shown_by_axis(checkpoint, capsys):
    code = cli.main(
        [
            *("positions", str(checkpoint), "--json", "--set", f"prompt.template={TEMPLATE}"),
            *("--set", "image.canvas=96x64", "--pruner", "spatial", "--ratio", "0.5"),
            *("--phrase", "the mug"),
        ]
    )
    assert code == 0
    modes = {mode["mode"]: mode for mode in json.loads(capsys.readouterr().out)[0]["modes"]}
    assert list(modes) == list(POSITION_MODES)
    gap, grid = modes["gap"], modes["compact-grid"]
    before, kept = len(gap["prefix_ids"]), gap["visual_slots"]
    ids = count_positions(before, GRIDS["96x64"], len(gap["suffix_ids"]))
    assert gap["visual_ids"] == ids[:, [before + k for k in kept]].tolist()
    assert gap["suffix_ids"] == ids[0, before + 24 :].tolist()
    assert grid["visual_ids"] == gap["visual_ids"]
    assert grid["suffix_ids"][0] == 1 + max(map(max, grid["visual_ids"]))


@pytest.mark.parametrize(
    ("canvas", "part"), [("100x112", "use 96x112"), ("large", "expected WIDTHxHEIGHT")]
)
def test_sizes_that_are_no_whole_tokens(checkpoint, export, tmp_path, canvas, part):
    with pytest.raises(ConfigError, match=part):
        export(checkpoint, tmp_path / "b", **settings(checkpoint, image__canvas=canvas))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("deepstack_visual_indexes", [1, 1], "expected different blocks of 0 to 4"),
        ("deepstack_visual_indexes", [1, 5], "expected different blocks of 0 to 4"),
        ("num_position_embeddings", 50, "expected a square number"),
        ("spatial_merge_size", 3, "expected 2"),
        ("out_hidden_size", 95, "the language model is 96 wide"),
    ],
)
def test_towers_that_are_refused(checkpoint, tmp_path, key, value, part):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    data["vision_config"][key] = value
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match=part):
        plan_export(make_request(str(folder), out=tmp_path / "b", reference=False))
