"""Every family's visual tokens, pixels and decoder weights against references of their own.

Towers, projectors and pixels share nothing with the exporter on the other side.
"""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from makers import originals
from makers.families import (
    CLIP_FAMILIES,
    FAMILIES,
    PHRASE,
    export,
    make_picture,
)
from PIL import Image
from tools.distances import furthest
from transformers import (
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
)
from truths import published

from gap_export.config.load import load_config
from gap_export.pipeline.model import read_model
from gap_export.tracing.graph import strip_stage
from gap_runtime import Bundle, Grounder
from gap_runtime.bundle.manifest import TEXT
from gap_runtime.pictures.load import find_bucket, fitting_size, make_pixels

exported_families = pytest.mark.parametrize(
    "case",
    [
        # Graphs of the other architectures are held to them by test_families_masked.py.
        pytest.param(name, marks=() if name in {"llava", "minigpt-v2"} else pytest.mark.matrix)
        for name in FAMILIES
    ],
    indirect=True,
    scope="module",
)
SIZES = ((90, 61), (61, 90), (70, 70), (200, 31), (33, 150), (2, 3))


def pack(vision, fixed_tokens, bucket):
    """All visual tokens of the eager model, in the order that the decoder gets them."""
    tokens = torch.empty(bucket.patches, vision.tokens.shape[-1])
    fixed = list(bucket.fixed)
    tokens[[index for index in range(bucket.patches) if index not in fixed]] = vision.tokens
    if fixed:
        tokens[fixed] = fixed_tokens
    return tokens


def test_pytorchs_unpruned_tokens_are_those_of_the_independent_tower(case, truth, plan, eager):
    assert len(plan.spec.buckets) == len(case.sizes)
    for bucket, size in zip(plan.spec.buckets, case.sizes, strict=True):
        pixels = eager.make_pixels(make_picture(*size, seed=1))
        seen = truth.look(pixels, size, PHRASE)
        look = eager.look(pixels, bucket)
        fixed = eager.fixed_tokens(bucket) if bucket.fixed else None
        assert furthest(pack(look, fixed, bucket), seen.tokens) < 1e-4


@exported_families
def test_unpruned_tokens_are_those_of_the_independent_tower(case, truth, plan, eager, bundle):
    assert len(plan.spec.buckets) == len(case.sizes)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    for bucket, size, entry in zip(plan.spec.buckets, case.sizes, plan.entries, strict=True):
        picture = make_picture(*size, seed=1)
        seen = truth.look(eager.make_pixels(picture), size, PHRASE)
        values = grounder.run_stages(picture, PHRASE, entry, most=1)
        assert values.kept_index[0].tolist() == list(range(bucket.patches))
        assert furthest(values.visual_tokens[0], seen.tokens) < 1e-4


# The last one is cut at 77 tokens.
PHRASES = (PHRASE, "a", "The RED circle, 2nd!", "the red circle " * 40)


def test_pytorchs_text_features_are_those_of_the_independent_tower(case, truth, plan, eager):
    if case.name not in CLIP_FAMILIES:
        assert plan.spec.text is None
        return
    pixels = eager.make_pixels(make_picture(*case.sizes[0]))
    look = eager.look(pixels, plan.spec.buckets[0])
    for phrase in PHRASES:
        seen = truth.look(pixels, case.sizes[0], phrase)
        assert furthest(eager.read_phrase(phrase), seen.text) < 1e-4
    assert furthest(eager.text_patches(look), seen.text_patches) < 1e-4


@exported_families
def test_text_features_are_those_of_the_independent_tower(case, truth, plan, eager, bundle):
    if case.name not in CLIP_FAMILIES:
        assert plan.spec.text is None
        return
    pixels = eager.make_pixels(make_picture(*case.sizes[0]))
    grounder = Grounder(bundle, "onnxruntime:cpu")
    text = grounder._open(bundle.manifest.stage(TEXT))
    for phrase in PHRASES:
        seen = truth.look(pixels, case.sizes[0], phrase)
        assert furthest(grounder._read_phrase(phrase, text)[0], seen.text) < 1e-4


def test_a_stored_vision_tower_wins_over_clips(find, tmp_path):
    """As where it was trained with the rest."""
    case = find("llava-original")
    folder = originals.make_llava_original(
        tmp_path / "model",
        case.place("clip"),
        width=60,
        heads=6,
        mlp=84,
        with_vision_tower=True,
        dtype="float32",
    )
    case = replace(case, model=str(folder))
    plan = case.plan(tmp_path / "b", pruner="text_similarity", prune__ratios=[0])
    export(plan)
    stored = originals.read_folder(folder)
    start = "model.vision_tower.vision_tower."
    own = {k.removeprefix(start): v for k, v in stored.items() if k.startswith(start)}
    mixed = originals.read_folder(case.place("clip")) | own
    clip = tmp_path / "clip"
    shutil.copytree(case.place("clip"), clip)
    torch.save(mixed, clip / "pytorch_model.bin")
    grounder = Grounder(Bundle.open(plan.out), "onnxruntime:cpu")
    values = grounder.run_stages(make_picture(60, 40), PHRASE, plan.entries[0], most=1)
    pixels = torch.as_tensor(values.pixels)
    expected = published.llava_visual_tokens(clip, stored, pixels)[0]
    other = published.llava_visual_tokens(case.place("clip"), stored, pixels)[0]
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    for found in (values.visual_tokens[0], eager.look(pixels, plan.spec.buckets[0]).tokens):
        assert furthest(found, expected) < 1e-4
        assert furthest(found, other) > 0.1


@pytest.mark.parametrize(
    ("canvas", "size"),
    [
        pytest.param("84x84", (90, 90), marks=pytest.mark.matrix),
        pytest.param("84x84/4:3", (120, 90), marks=pytest.mark.matrix),
        pytest.param("84x84/3:4", (90, 120), marks=pytest.mark.matrix),
        pytest.param("42x84", (50, 100), marks=pytest.mark.matrix),
        ("42x126/2:9", (20, 90)),
    ],
)
def test_tiles_are_packed_as_the_library_packs_them(find, tmp_path, canvas, size):
    case = find("llava-next-vicuna")
    plan = case.plan(tmp_path / "b", prune__ratios=[0], image__canvas=canvas)
    (bucket,) = plan.spec.buckets
    picture = make_picture(*size)
    assert find_bucket(size, plan.spec.preprocess, plan.spec.buckets) == bucket
    model = LlavaNextForConditionalGeneration.from_pretrained(
        case.files, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    processor = LlavaNextImageProcessorPil.from_pretrained(case.files)
    inputs = processor(picture, return_tensors="pt")
    with torch.no_grad():
        expected = model.model.get_image_features(
            inputs["pixel_values"].double(), inputs["image_sizes"], return_dict=True
        ).pooler_output[0]
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    look = eager.look(eager.make_pixels(picture), bucket)
    assert furthest(pack(look, eager.fixed_tokens(bucket), bucket), expected) < 1e-4
    export(plan)
    grounder = Grounder(Bundle.open(plan.out), "onnxruntime:cpu")
    values = grounder.run_stages(picture, PHRASE, plan.entries[0], most=1)
    assert furthest(values.visual_tokens[0], expected) < 1e-4


@pytest.mark.parametrize(("side", "grid"), [(112, (8, 2)), (84, (1, 9)), (42, (1, 1))])
@pytest.mark.parametrize(("spare", "heads", "norm"), [(1, 2, False), (0, 4, True)])
def test_eva_at_other_sizes(tmp_path, side, grid, spare, heads, norm):
    patch = 21 if side == 42 else 14
    files = originals.make_minigpt(
        tmp_path / "minigpt",
        image_size=side,
        patch_size=patch,
        spare_blocks=spare,
        vision_heads=heads,
        ln_vision=norm,
        pretraining_grid=side // patch,
    )
    named = load_config(
        "minigpt-v2",
        {
            "parts.vision": str(files.eva),
            "parts.language": str(files.llama),
            "vision.side": side,
            "vision.heads": heads,
        },
        checkpoint=str(files.home),
    )
    model = read_model(named)
    (bucket,) = model.spec.buckets
    assert bucket.grids == (grid,)
    eager = model.family.load_eager(model.checkpoint, model.spec, "float32")
    pixels = eager.make_pixels(make_picture(60, 40))
    # The small file has no 40 blocks, so that the one to spare is not told from the others.
    expected = published.minigpt_visual_tokens(
        torch.load(files.eva, weights_only=True),
        torch.load(files.checkpoint, weights_only=True)["model"],
        pixels,
        heads,
        side // patch,
        layers=files.vision_layers + spare,
    )[0]
    assert furthest(eager.look(pixels, bucket).tokens, expected) < 1e-4


def pad(picture, colour):
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def published_pixels(case, picture):
    """By the processors and the few lines around them that the authors use."""
    if case.name.startswith("llava-next"):
        processor = LlavaNextImageProcessorPil.from_pretrained(case.files)
        return processor(picture, return_tensors="np")["pixel_values"]
    if case.name.startswith("internvl"):
        tiles = {"max_patches": 1} if case.name == "internvl3.5" else {}
        processor = GotOcr2ImageProcessorPil.from_pretrained(
            case.files, crop_to_patches=True, **tiles
        )
        return processor(picture, return_tensors="np")["pixel_values"][None]
    if case.name == "minigpt-v2":
        values = np.asarray(picture.resize((56, 56), Image.Resampling.BICUBIC)) / 255
        values = (values - originals.CLIP_MEAN) / originals.CLIP_STD
        return values.transpose(2, 0, 1)[None]
    folder = case.files if case.name == "llava" else case.place("clip")
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    white = case.name == "shikra"
    colour = (255,) * 3 if white else tuple(int(v * 255) for v in processor.image_mean)
    return processor(pad(picture, colour), return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_published_processor(case, plan, eager, size):
    picture = make_picture(*size)
    buckets = plan.spec.buckets
    if case.name.startswith(("llava-next", "internvl")):
        buckets = buckets[:1]
        picture = picture.resize(fitting_size(buckets[0], plan.spec.preprocess))
    expected = published_pixels(case, picture)
    for found in (
        make_pixels(picture, plan.spec.preprocess, buckets[0]),
        eager.make_pixels(picture).numpy(),
    ):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5


@exported_families
def test_the_decoders_weights_are_the_published_ones(truth, bundle):
    """Every initializer of the decoder, as the files of the bundle hold it."""
    graph = onnx.load(bundle.folder / "decoder.onnx", load_external_data=False).graph
    compared = set()
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        name = strip_stage(tensor.name).replace("language_model.", "model.")
        expected = truth.decoder[name].double()
        found = torch.as_tensor(read_external(bundle.folder, tensor)).double()
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        compared.add(name)
    table = torch.as_tensor(np.array(bundle.map_embedding())).double()
    assert (table - truth.embed(range(len(table)))).abs().max() <= 1e-6
    assert compared == set(truth.decoder) - {"model.embed_tokens.weight"}


def read_external(folder, tensor):
    place = {entry.key: entry.value for entry in tensor.external_data}
    assert tensor.data_type == onnx.TensorProto.FLOAT
    return np.fromfile(
        folder / place["location"],
        dtype=np.float32,
        count=int(np.prod(tensor.dims)),
        offset=int(place["offset"]),
    ).reshape(tuple(tensor.dims))
