"""Every family's road from the published files to visual tokens, prompts and weights.

Towers, projectors, pixels and prompts against references that share nothing with the exporter;
what is made of several tensors; and checkpoints that must be refused, in one line each.
"""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import sentencepiece
import torch
from makers import originals
from makers.checkpoints import edit_tensors
from makers.families import FAMILIES, PHRASE, export, find_family, make_picture, shared_graphs
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
)
from truths import published
from truths.families import find_truth

from gap_export.checkpoint.sources import make_tensor
from gap_export.config import load_config
from gap_export.errors import CheckpointError, ExportError
from gap_export.pipeline.plan import ExportRequest, plan_export, read_model
from gap_export.weights.plan import strip_stage
from gap_runtime import Bundle, Grounder
from gap_runtime.bundle.hashes import hash_file
from gap_runtime.bundle.manifest import TEXT
from gap_runtime.errors import ConfigError, GapError, UnknownNameError
from gap_runtime.grounding.prompt import PromptEncoder
from gap_runtime.pictures.load import find_bucket, fitting_size, make_pixels

CLIP_FAMILIES = tuple(name for name in FAMILIES if name != "minigpt-v2")
SIZES = ((90, 61), (61, 90), (70, 70), (200, 31), (33, 150), (2, 3))
PHRASES = (
    "x",
    "the red circle",
    "The RED Circle, the 2nd from the left!",
    "a man's t-shirt [0.1, 0.2]",
    "größe café",
    "赤い丸 🔴",
    "[INST] USER: ASSISTANT:",
    "word " * 12,
)


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    with shared_graphs():
        yield


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    return lambda name: find_family(name, tmp_path_factory)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, find):
    return find(request.param)


@pytest.fixture(scope="module")
def truth(case):
    return find_truth(case)


@pytest.fixture(scope="module")
def plan(case, tmp_path_factory):
    """Of an unpruned export that reads phrases, so that all parts are there."""
    out = tmp_path_factory.mktemp("models") / "bundle"
    return case.plan(out, pruner="text_similarity", prune__ratios=[0])


@pytest.fixture(scope="module")
def bundle(plan):
    export(plan)
    return Bundle.open(plan.out)


@pytest.fixture(scope="module")
def eager(plan):
    return plan.family.load_eager(plan.checkpoint, plan.spec, "float32")


@pytest.fixture(scope="module")
def read(case):
    """The tokenizer of SentencePiece's own library, where the family has its file."""
    if case.name in {"llava", "llava-next-vicuna", "llava-next-mistral"}:
        return None
    folder = case.place("language") if case.name == "minigpt-v2" else case.place()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def furthest(found, expected):
    """Largest difference of a row, relative to the row's own length."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def pack(vision, fixed_tokens, bucket):
    """All visual tokens of the eager model, in the order that the decoder gets them."""
    tokens = torch.empty(bucket.patches, vision.tokens.shape[-1])
    fixed = list(bucket.fixed)
    tokens[[index for index in range(bucket.patches) if index not in fixed]] = vision.tokens
    if fixed:
        tokens[fixed] = fixed_tokens
    return tokens


# Towers and projectors.


def test_unpruned_tokens_are_those_of_the_independent_tower(case, truth, plan, eager, bundle):
    assert len(plan.spec.buckets) == len(case.sizes)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    for bucket, size, entry in zip(plan.spec.buckets, case.sizes, plan.entries, strict=True):
        picture = make_picture(*size, seed=1)
        pixels = eager.make_pixels(picture)
        seen = truth.look(pixels, size, PHRASE)
        look = eager.look(pixels, bucket)
        fixed = eager.fixed_tokens(bucket) if bucket.fixed else None
        assert furthest(pack(look, fixed, bucket), seen.tokens) < 1e-4
        values = grounder.run_stages(picture, PHRASE, entry, most=1)
        assert values.kept_index[0].tolist() == list(range(bucket.patches))
        assert furthest(values.visual_tokens[0], seen.tokens) < 1e-4


def test_text_features_are_those_of_the_independent_tower(case, truth, plan, eager, bundle):
    if case.name not in CLIP_FAMILIES:
        assert plan.spec.text is None
        return
    pixels = eager.make_pixels(make_picture(*case.sizes[0]))
    look = eager.look(pixels, plan.spec.buckets[0])
    grounder = Grounder(bundle, "onnxruntime:cpu")
    text = grounder._open(bundle.manifest.stage(TEXT))
    # The last one is cut at 77 tokens.
    for phrase in (PHRASE, "a", "The RED circle, 2nd!", "the red circle " * 40):
        seen = truth.look(pixels, case.sizes[0], phrase)
        assert furthest(eager.read_phrase(phrase), seen.text) < 1e-4
        assert furthest(grounder._read_phrase(phrase, text)[0], seen.text) < 1e-4
    assert furthest(eager.text_patches(look), seen.text_patches) < 1e-4


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
        ("84x84", (90, 90)),
        ("84x84/4:3", (120, 90)),
        ("84x84/3:4", (90, 120)),
        ("42x84", (50, 100)),
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


# Pictures.


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
    if case.name.startswith("llava-next"):
        buckets = buckets[:1]
        picture = picture.resize(fitting_size(buckets[0], plan.spec.preprocess))
    expected = published_pixels(case, picture)
    for found in (
        make_pixels(picture, plan.spec.preprocess, buckets[0]),
        eager.make_pixels(picture).numpy(),
    ):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5


# Prompts.


def test_the_prompt_around_the_picture(plan, eager, read):
    encoder = PromptEncoder(plan.tokenizer, plan.prompt)
    prefixes = set()
    for phrase in PHRASES:
        encoded = encoder.encode(phrase)
        prefixes.add(tuple(encoded.prefix))
        plain = " ".join(phrase.split())
        asked = plan.prompt.template.replace("{phrase}", plain)
        assert eager.encode(asked) == (encoded.prefix, encoded.suffix)
        assert encoder.encode_phrase(plain) == eager.encode_phrase(plain)
        if read is not None:
            assert encoder.encode_phrase(plain) == read.encode(plain)
    assert len(prefixes) == 1
    assert plan.layout.prefix == len(encoded.prefix)


def test_the_authors_llava_encodes_both_sides_apart(find, tmp_path):
    case = find("llava-original")
    read = sentencepiece.SentencePieceProcessor(model_file=str(case.place() / "tokenizer.model"))
    templates = (
        None,
        "A chat. USER: <image>\nPlease provide the box: {phrase} ASSISTANT:",
    )
    for template in templates:
        plan = case.plan(tmp_path / "b", prompt__template=template)
        before, _, after = (template or plan.spec.template).partition("<image>")
        for phrase in ("x", "the red circle"):
            encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode(phrase)
            assert encoded.prefix == [1, *read.encode(before)]
            assert encoded.suffix == read.encode(after.replace("{phrase}", phrase))


@pytest.mark.parametrize("name", ["llava", "llava-next-vicuna", "llava-next-mistral"])
def test_the_librarys_llava_encodes_the_prompt_as_one(find, tmp_path, name):
    case = find(name)
    plan = case.plan(tmp_path / "b")
    tokenizer = Tokenizer.from_file(str(case.place() / "tokenizer.json"))
    image = tokenizer.token_to_id("<image>")
    assert plan.spec.template.startswith("[INST]" if "mistral" in name else "USER:")
    ids = tokenizer.encode(plan.spec.template.replace("{phrase}", "the red circle")).ids
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("the red circle")
    assert [*encoded.prefix, image, *encoded.suffix] == ids
    assert ids.count(image) == 1


def test_shikra_has_tokens_at_both_ends_of_the_picture(find, tmp_path):
    case = find("shikra")
    read = sentencepiece.SentencePieceProcessor(model_file=str(case.place() / "tokenizer.model"))
    added = json.loads((case.place() / "added_tokens.json").read_text("utf-8"))
    assert [added[name] for name in ("<im_patch>", "<im_start>", "<im_end>")] == [400, 401, 402]
    plan = case.plan(tmp_path / "b")
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("the red circle")
    assert (encoded.prefix[0], encoded.prefix[-1], encoded.suffix[0]) == (1, 401, 402)
    before, _, after = plan.spec.template.partition("<image>")
    assert read.decode(encoded.prefix[1:-1]).strip() == before.strip()
    assert read.decode(encoded.suffix[1:]) == after.replace("{phrase}", "the red circle")
    # With text around the picture whose spaces no version of the library moves.
    template = "A chat. USER: In<image> , I need the box of {phrase}. ASSISTANT:"
    plan = case.plan(tmp_path / "b", prompt__template=template)
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("it")
    assert encoded.prefix == [1, *read.encode("A chat. USER: In"), 401]
    assert encoded.suffix == [402, *read.encode(", I need the box of it. ASSISTANT:")]


def test_minigpt_begins_twice(find, tmp_path):
    case = find("minigpt-v2")
    folder = case.place("language")
    read = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    plan = case.plan(tmp_path / "b")
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("the red circle")
    assert encoded.prefix[:2] == [1, 1]
    assert 1 not in encoded.prefix[2:]
    assert read.decode(encoded.prefix[2:]) == "[INST] <Img>"
    after = "</Img> [refer] give me the location of the red circle [/INST]"
    assert encoded.suffix == read.encode(after)
    # With a space behind the token, which no version of the library leaves out.
    template = "<s> [INST] <Img><image></Img> find {phrase} [/INST]"
    plan = case.plan(tmp_path / "b", prompt__template=template)
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("it")
    assert encoded.prefix == [1, 1, *read.encode("[INST] <Img>")]
    assert encoded.suffix == read.encode("</Img> find it [/INST]")


def test_tokens_that_end_an_answer(plan, case):
    """Shikra's config on the hub names others, which are wrong."""
    if plan.tokenizer.token_to_id("<im_patch>") is None and plan.spec.image_token_id is not None:
        assert plan.spec.stop_ids == (plan.tokenizer.token_to_id("</s>"),)
    else:
        assert plan.spec.stop_ids == (2,)
    if case.name == "shikra":
        data = json.loads((case.place() / "config.json").read_text(encoding="utf-8"))
        assert data["eos_token_id"] == 1


# Weights.


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


def test_shikra_is_the_sum_with_rows_that_have_no_base(find, tmp_path):
    case = find("shikra")
    plan = case.plan(tmp_path / "b")
    delta = originals.read_folder(case.files.delta)
    base = originals.read_folder(case.files.base)
    for name in ("embed_tokens", "lm_head"):
        key = f"model.{name}.weight" if name == "embed_tokens" else f"{name}.weight"
        source = plan.sources[f"language_model.{name}.weight" if "embed" in name else key]
        made = make_tensor(source)
        assert made.shape == (403, 56)
        assert torch.equal(made[400:], delta[key][400:].float())
        assert torch.equal(made[:400], delta[key][:400].float() + base[key].float())
    assert not [name for name in plan.sources if "inv_freq" in name]
    merged = case.plan(tmp_path / "b", parts__base="")
    source = merged.sources["language_model.embed_tokens.weight"]
    assert source.make is None
    assert torch.equal(make_tensor(source), delta["model.embed_tokens.weight"])


def test_minigpt_merges_and_stretches(find, tmp_path):
    case = find("minigpt-v2")
    plan = case.plan(tmp_path / "b")
    eva = torch.load(case.files.eva, weights_only=True)
    model = torch.load(case.files.checkpoint, weights_only=True)["model"]
    stored = originals.read_folder(case.files.llama)
    for layer in range(3):
        name = f"layers.{layer}.self_attn"
        key = f"llama_model.base_model.model.model.{name}"
        for part, merges in (("q", True), ("k", False), ("v", True), ("o", False)):
            made = make_tensor(plan.sources[f"language_model.{name}.{part}_proj.weight"])
            expected = stored[f"model.{name}.{part}_proj.weight"]
            if merges:
                down = model[f"{key}.{part}_proj.lora_A.weight"].double()
                up = model[f"{key}.{part}_proj.lora_B.weight"].double()
                assert (up @ down).abs().max() > 0.05
                expected = expected.double() + 16 / 8 * up @ down
            assert (made.double() - expected.double()).abs().max() < 1e-6
    for layer in range(2):
        made = make_tensor(plan.sources[f"visual_encoder.blocks.{layer}.attn.qkv.bias"])
        query, key, value = made.chunk(3)
        assert torch.equal(query, eva[f"blocks.{layer}.attn.q_bias"].float())
        assert torch.equal(value, eva[f"blocks.{layer}.attn.v_bias"].float())
        assert not key.any()
    made = make_tensor(plan.sources["visual_encoder.pos_embed"])
    expected = published.eva_positions(eva["pos_embed"], 8)
    assert made.shape == expected.shape == (1, 65, 176)
    assert (made.double() - expected).abs().max() < 1e-5
    assert torch.equal(made[:, 0], eva["pos_embed"][:, 0].float())
    for name in ("weight", "bias"):
        source = plan.sources[f"ln_vision.{name}"]
        assert torch.equal(make_tensor(source), model[f"ln_vision.{name}"])
        assert source.make is None


def test_minigpt_without_the_norm_behind_eva(find, tmp_path):
    case = find("minigpt-v2").copy(tmp_path / "home")
    edit(case.place(), lambda tensors: [tensors.pop(f"ln_vision.{n}") for n in ("weight", "bias")])
    plan = case.plan(tmp_path / "b")
    assert torch.equal(make_tensor(plan.sources["ln_vision.weight"]), torch.ones(176))
    assert torch.equal(make_tensor(plan.sources["ln_vision.bias"]), torch.zeros(176))


@pytest.mark.parametrize("stored", [2, 8, 10])
def test_minigpts_table_at_its_own_and_at_smaller_sizes(tmp_path, stored):
    files = originals.make_minigpt(
        tmp_path, image_size=56, patch_size=7, pretraining_grid=stored, spare_blocks=0
    )
    overrides = {"parts.language": str(files.llama), "vision.side": 56}
    model = read_model(load_config("minigpt-v2", overrides, checkpoint=str(files.home)))
    source = model.family.find_weights(model.checkpoint, model.spec)["visual_encoder.pos_embed"]
    table = torch.load(files.eva, weights_only=True)["pos_embed"]
    assert (source.make is None) == (stored == 8)
    expected = published.eva_positions(table, 8)
    assert (make_tensor(source).double() - expected).abs().max() < 1e-5


def test_blocks_to_spare_are_not_read(find, tmp_path):
    """A real file has 40 blocks, of which 39 are run."""
    case = find("minigpt-v2").copy(tmp_path / "home")

    def add(tensors):
        for layer in range(2, 40):
            for name in [name for name in tensors if name.startswith("blocks.0.")]:
                tensors[name.replace("blocks.0.", f"blocks.{layer}.")] = tensors[name]

    edit(case.place("vision"), add)
    plan = case.plan(tmp_path / "b")
    numbers = {
        int(name.split(".")[2])
        for name in plan.sources
        if name.startswith("visual_encoder.blocks")
    }
    assert numbers == set(range(39))
    assert plan.spec.library_config.tower.layers == 39


def test_torch_files_are_used_in_place(tmp_path):
    """With `--weights link` nothing of a checkpoint in .bin files is written again."""
    clip = originals.make_clip(tmp_path / "clip-vit", files="bin", dtype="float16")
    folder = originals.make_llava_original(tmp_path / "model", clip, vocabulary=400)
    values = {"prune.ratios": [0, 0.5], "prompt.answer": 4}
    overrides = values | {"parts.clip": str(clip), "prune.strategy": "text_similarity"}
    request = ExportRequest(
        named=load_config(str(folder), overrides),
        target="cpu",
        out=tmp_path / "b",
        weights="link",
        reference=False,
    )
    plan = plan_export(request)
    assert plan.dtype == "float16"
    export(plan)
    places = {
        "pytorch_model-00001-of-00002.bin": folder / "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin": folder / "pytorch_model-00002-of-00002.bin",
        "clip-pytorch_model.bin": clip / "pytorch_model.bin",
    }
    written = {path.name: path for path in (tmp_path / "b").iterdir() if path.suffix != ".onnx"}
    assert set(written) == {
        *places,
        "export.json",
        "manifest.json",
        "text_tokenizer.json",
        "tokenizer.json",
    }
    for name, source in places.items():
        assert written[name].samefile(source)
    grounder = Grounder(Bundle.open(tmp_path / "b"), "onnxruntime:cpu")
    picture = make_picture(60, 40)
    values = grounder.run_stages(picture, PHRASE, plan.entries[0], most=1)
    tensors = originals.read_folder(folder)
    expected = published.llava_visual_tokens(clip, tensors, torch.as_tensor(values.pixels))[0]
    assert furthest(values.visual_tokens[0], expected) < 2e-2


def test_the_bundle_hashes_torch_files_too(tmp_path, find):
    case = find("shikra")
    plan = case.plan(tmp_path / "b", weights="link", dtype="float16")
    export(plan)
    bundle = Bundle.open(tmp_path / "b")
    for name, entry in bundle.manifest.files.items():
        assert entry.blake3 == hash_file(tmp_path / "b" / name)
        assert entry.size == (tmp_path / "b" / name).stat().st_size


# Checkpoints that must be refused.


UP = "model.layers.1.mlp.up_proj.weight"
LORA = "llama_model.base_model.model.model.layers.0.self_attn"
TENSORS = (
    ("llava", "", "model.language_model.layers.1.mlp.up_proj.weight"),
    ("llava", "clip", "text_model.encoder.layers.0.mlp.fc1.weight"),
    ("llava", "clip", "visual_projection.weight"),
    ("llava-original", "", UP),
    ("llava-original", "", "model.mm_projector.0.weight"),
    ("llava-original", "clip", "vision_model.encoder.layers.1.mlp.fc1.weight"),
    ("llava-next-vicuna", "", "language_model.model.layers.0.mlp.up_proj.weight"),
    ("llava-next-vicuna", "", "image_newline"),
    ("llava-next-mistral", "", "model.language_model.layers.2.self_attn.k_proj.weight"),
    ("shikra", "", "model.mm_projector.weight"),
    ("shikra", "", UP),
    ("shikra", "base", UP),
    ("shikra", "base", "model.embed_tokens.weight"),
    ("shikra", "clip", "vision_model.encoder.layers.1.mlp.fc1.weight"),
    ("minigpt-v2", "", "llama_proj.weight"),
    ("minigpt-v2", "", f"{LORA}.q_proj.lora_A.weight"),
    ("minigpt-v2", "", f"{LORA}.v_proj.lora_B.weight"),
    ("minigpt-v2", "", "ln_vision.weight"),
    ("minigpt-v2", "vision", "blocks.1.mlp.fc1.weight"),
    ("minigpt-v2", "vision", "blocks.0.attn.qkv.weight"),
    ("minigpt-v2", "vision", "blocks.0.attn.q_bias"),
    ("minigpt-v2", "vision", "pos_embed"),
    ("minigpt-v2", "language", UP),
)


def weight_files(place):
    if place.is_file():
        return [place]
    return sorted([*place.glob("*.safetensors"), *place.glob("pytorch_model*.bin")])


def edit(place, change):
    """Change the tensors of a checkpoint in place, file by file, and the index with them."""
    if not place.is_file() and list(place.glob("*.safetensors")):

        def changed(tensors):
            change(tensors)
            return tensors

        edit_tensors(place, changed)
        return
    places = {}
    for path in weight_files(place):
        whole = torch.load(path, weights_only=True)
        change(whole.get("model", whole))
        torch.save(whole, path)
        places |= dict.fromkeys(whole, path.name)
    index = place / "pytorch_model.bin.index.json"
    if index.is_file():
        index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def change_one(case, role, key, make):
    """Replace one tensor; the name of its file."""
    held = []

    def change(tensors):
        if key in tensors:
            held.append(True)
            tensors |= make(tensors.pop(key))

    for path in weight_files(case.place(role)):
        before = len(held)
        if path.suffix == ".safetensors":
            held += [True] * (key in load_file(path))
        else:
            whole = torch.load(path, weights_only=True)
            held += [True] * (key in whole.get("model", whole))
        if len(held) > before:
            file = path.name
    edit(case.place(role), change)
    assert len(held) == 2
    return file


def refuse(case, out, kind, **overrides):
    """The one line of a plan's refusal; nothing is written."""
    before = snapshot(case.home)
    with pytest.raises(GapError) as caught:
        case.plan(out, **overrides)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    assert snapshot(case.home) == before
    return message


def snapshot(home):
    return {path: path.stat().st_mtime_ns for path in home.rglob("*")}


def needs(name, role):
    """Overrides with which a part is read."""
    return {"pruner": "trim"} if (role, name[:5]) == ("clip", "llava") else {}


def shown(key):
    """Parts of a key that a message has, whatever the module is called here."""
    lora = key.rpartition(".lora_")[0].rpartition("model.")[2] if ".lora_" in key else None
    return lora or ".".join(key.split(".")[-2:])


@pytest.mark.parametrize(("name", "role", "key"), TENSORS)
def test_a_tensor_is_missing(find, tmp_path, name, role, key):
    case = find(name).copy(tmp_path / "home")
    change_one(case, role, key, lambda _: {})
    message = refuse(case, tmp_path / "b", CheckpointError, **needs(name, role))
    if ".lora_" in key:
        # Told by the half that is left.
        assert "minigptv2_checkpoint.pth" in message
        assert "has no counterpart" in message
        assert key.rpartition(".lora_")[0] in message
    else:
        place = case.place(role)
        assert str(place.parent if place.is_file() else place) in message
        assert "is missing among" in message
        if "mm_projector.0" in key:
            assert "'multi_modal_projector.linear_1.weight'" in message
        else:
            assert shown(key) in message


@pytest.mark.parametrize(("name", "role", "key"), TENSORS)
def test_a_tensor_is_too_much(find, tmp_path, name, role, key):
    case = find(name).copy(tmp_path / "home")
    file = change_one(case, role, key, lambda value: {key: value, f"{key}.more": value + 1})
    message = refuse(case, tmp_path / "b", CheckpointError, **needs(name, role))
    assert message.startswith(f"{file}: tensor '{key}.more' is none that this model has")


@pytest.mark.parametrize(("name", "role", "key"), TENSORS)
def test_a_tensor_is_misshapen(find, tmp_path, name, role, key):
    case = find(name).copy(tmp_path / "home")
    shapes = []

    def lengthen(value):
        longer = torch.cat([value, value[:1]])
        shapes.extend([list(value.shape), list(longer.shape)])
        return {key: longer}

    file = change_one(case, role, key, lengthen)
    message = refuse(case, tmp_path / "b", CheckpointError, **needs(name, role))
    if key.endswith("lora_A.weight"):
        # Its rows are the rank, which the other half does not have.
        key, shapes = key.replace("lora_A", "lora_B"), [[48, 9], [48, 8]]
    expected = f"{file}: tensor '{key}' has shape {shapes[1]}, expected {shapes[0]}"
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("name", "role", "key"), [place for place in TENSORS if "newline" not in place[2]]
)
def test_a_tensor_lies_transposed(find, tmp_path, name, role, key):
    case = find(name).copy(tmp_path / "home")
    flat = key in {"ln_vision.weight", "blocks.0.attn.q_bias"}
    file = change_one(
        case,
        role,
        key,
        lambda value: {key: value[:, None] if flat else value.transpose(0, -1).contiguous()},
    )
    message = refuse(case, tmp_path / "b", CheckpointError, **needs(name, role))
    assert message.startswith(f"{file}: tensor '{key}' has shape ")
    # LoRA's rank is read off lora_A itself.
    if not flat and not key.endswith("lora_A.weight"):
        assert message.endswith("it lies transposed")


@pytest.mark.parametrize(("name", "role", "key"), TENSORS)
def test_a_tensor_is_stored_in_a_type_that_no_graph_takes(find, tmp_path, name, role, key):
    case = find(name).copy(tmp_path / "home")
    change_one(case, role, key, lambda value: {key: value.to(torch.int8)})
    message = refuse(case, tmp_path / "b", CheckpointError, **needs(name, role))
    assert f"tensor '{key}' is stored as" in message
    assert "I8" in message or "int8" in message


SHARDED = (
    ("llava-original", ""),
    ("llava-next-vicuna", ""),
    ("shikra", ""),
    ("shikra", "base"),
    ("minigpt-v2", "language"),
)


@pytest.mark.parametrize(("name", "role"), SHARDED)
def test_a_shard_is_missing(find, tmp_path, name, role):
    case = find(name).copy(tmp_path / "home")
    shard = weight_files(case.place(role))[1]
    shard.unlink()
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{shard}: shard is missing")


@pytest.mark.parametrize(("name", "role"), [(n, r) for n, r, _ in TENSORS if r != "clip"])
def test_a_file_is_cut_short(find, tmp_path, name, role):
    case = find(name).copy(tmp_path / "home")
    file = weight_files(case.place(role))[-1]
    file.write_bytes(file.read_bytes()[:-2000])
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(str(file))
    assert "download it again" in message


@pytest.mark.parametrize(
    ("name", "role", "key"),
    [
        ("llava", "", "model.language_model.embed_tokens.weight"),
        ("llava-original", "", "model.embed_tokens.weight"),
        ("llava-next-vicuna", "", "language_model.model.embed_tokens.weight"),
        ("llava-next-mistral", "", "model.language_model.embed_tokens.weight"),
        ("shikra", "", "model.embed_tokens.weight"),
        ("shikra", "base", "model.embed_tokens.weight"),
        ("minigpt-v2", "language", "model.embed_tokens.weight"),
    ],
)
def test_the_config_tells_another_vocabulary(find, tmp_path, name, role, key):
    case = find(name).copy(tmp_path / "home")
    config = case.place(role) / "config.json"
    data = json.loads(config.read_text(encoding="utf-8"))
    facts = data.get("text_config", data)
    before = facts["vocab_size"]
    facts["vocab_size"] = before - 5
    config.write_text(json.dumps(data), encoding="utf-8")
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert "by the config" in message
    assert f"[{before}, " in message
    assert f"[{before - 5}, " in message
    assert f"'{key}'" in message or "lm_head" in message


NOT_FINITE = (
    ("llava", "", "model.language_model.layers.1.mlp.up_proj.weight"),
    ("llava", "clip", "text_projection.weight"),
    ("llava-original", "", "model.mm_projector.0.weight"),
    ("llava-original", "clip", "vision_model.encoder.layers.1.mlp.fc1.weight"),
    ("llava-next-vicuna", "", "image_newline"),
    ("shikra", "", "model.embed_tokens.weight"),
    ("shikra", "base", "model.embed_tokens.weight"),
    ("minigpt-v2", "", "llama_proj.weight"),
    ("minigpt-v2", "", f"{LORA}.q_proj.lora_A.weight"),
    ("minigpt-v2", "vision", "blocks.1.attn.q_bias"),
    ("minigpt-v2", "vision", "pos_embed"),
    ("minigpt-v2", "language", "model.norm.weight"),
)


@pytest.mark.parametrize(
    ("name", "role", "key", "value"),
    [
        *((*place, float("nan")) for place in NOT_FINITE),
        (*NOT_FINITE[0], float("inf")),
        (*NOT_FINITE[-3], -float("inf")),
    ],
)
def test_values_that_are_no_numbers(find, tmp_path, name, role, key, value):
    """Found with the reference and without it.

    llava and llava-next lie ready in float32; all others are converted or made of several.
    """
    case = find(name).copy(tmp_path / "home")

    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return {key: tensor}

    file = change_one(case, role, key, spoil)
    (tmp_path / "out").mkdir()
    for reference in (False, True):
        plan = case.plan(tmp_path / "out" / "b", reference=reference, **needs(name, role))
        with pytest.raises(ExportError) as caught:
            export(plan)
        assert str(caught.value).startswith(f"{file}: tensor '{key}' holds values that are no")
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "out").iterdir())


def test_tensors_that_nobody_reads_may_hold_anything(find, tmp_path):
    case = find("llava").copy(tmp_path / "home")
    key = "model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight"
    change_one(case, "", key, lambda value: {key: value * float("nan")})
    assert export(case.plan(tmp_path / "b")).plan.out.is_dir()


def test_lora_that_a_layer_does_not_have(find, tmp_path):
    case = find("minigpt-v2").copy(tmp_path / "home")
    name = "layers.1.self_attn.v_proj"

    def remove(tensors):
        for half in "AB":
            del tensors[f"llama_model.base_model.model.model.{name}.lora_{half}.weight"]

    edit(case.place(), remove)
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"minigptv2_checkpoint.pth: LoRA of '{name}' is missing")


def test_lora_on_a_layer_that_is_not_there(find, tmp_path):
    case = find("minigpt-v2").copy(tmp_path / "home")
    key = f"{LORA}.q_proj.lora_A.weight"
    more = key.replace("layers.0", "layers.7")
    change_one(case, "", key, lambda value: {key: value, more: value})
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert f"tensor '{more}' has no counterpart" in message


def test_lora_under_an_adapters_name(find, tmp_path):
    """Later versions of the library put the adapter's name before `weight`."""
    case = find("minigpt-v2")
    plan = case.plan(tmp_path / "b")
    changed = case.copy(tmp_path / "home")

    def rename(tensors):
        for key in [key for key in tensors if ".lora_" in key]:
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    edit(changed.place(), rename)
    other = changed.plan(tmp_path / "b")
    models = [
        each.family.load_eager(each.checkpoint, each.spec, "float32") for each in (plan, other)
    ]
    rows = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    first, second = (
        model.run_decoder(rows, torch.arange(3), model.start_cache()) for model in models
    )
    assert torch.equal(first, second)
    name = "language_model.layers.2.self_attn.v_proj.weight"
    assert torch.equal(make_tensor(plan.sources[name]), make_tensor(other.sources[name]))


def test_no_lora_at_all(find, tmp_path):
    """Then it has been merged already."""
    case = find("minigpt-v2").copy(tmp_path / "home")
    edit(
        case.place(),
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".lora_" in name],
    )
    plan = case.plan(tmp_path / "b")
    assert plan.sources["language_model.layers.0.self_attn.q_proj.weight"].make is None


# Parts that are missing or wrong.


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub

    asked = []

    def refuse_download(hub_id, **_):
        asked.append(hub_id)
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse_download)
    return asked


def without(case, role):
    """The same, without being told where a part is; what it is called elsewhere is moved."""
    place = case.place(role)
    place.rename(place.with_name(f"moved-{place.name}"))
    overrides = {key: v for key, v in case.overrides.items() if key != f"parts.{role}"}
    text = {key: v for key, v in case.text.items() if key != f"parts.{role}"}
    return replace(case, overrides=overrides, text=text)


@pytest.mark.parametrize(
    ("name", "role", "hub_id"),
    [
        ("llava", "clip", "openai/clip-vit-large-patch14-336"),
        ("llava-original", "clip", "openai/clip-tiny-patch14-70"),
        ("llava-next-vicuna", "clip", "openai/clip-vit-large-patch14-336"),
        ("shikra", "clip", "openai/clip-vit-large-patch14"),
        ("shikra", "base", "huggyllama/llama-7b"),
        ("minigpt-v2", "language", "meta-llama/Llama-2-7b-chat-hf"),
    ],
)
def test_a_part_is_nowhere(find, tmp_path, offline, name, role, hub_id):
    """The folder `delta` has a name that says that it cannot do without the base."""
    case = without(find(name).copy(tmp_path / "home"), role)
    message = refuse(case, tmp_path / "b", CheckpointError, **needs(name, role))
    assert offline == [hub_id]
    assert message.startswith(f"{hub_id}: cannot be fetched from the hub (no network here)")
    place = case.place()
    folder = place.parent if place.is_file() else place
    for looked in (hub_id, folder / hub_id, folder / hub_id.rpartition("/")[2], folder.parent):
        assert str(looked) in message
    assert message.endswith(f"--set parts.{role}=DIR")


def test_a_part_that_is_a_file_is_nowhere(find, tmp_path, offline):
    case = without(find("minigpt-v2").copy(tmp_path / "home"), "vision")
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith("eva_vit_g.pth: no such part 'vision'; looked for eva_vit_g.pth, ")
    assert message.endswith("--set parts.vision=DIR")
    assert offline == []


def test_a_folder_that_is_not_called_delta_is_merged_already(find, tmp_path, offline):
    case = find("shikra").copy(tmp_path / "home")
    case.place().rename(tmp_path / "home" / "shikra-7b")
    overrides = {"parts.clip": case.overrides["parts.clip"]}
    case = replace(case, model=str(tmp_path / "home" / "shikra-7b"), overrides=overrides)
    plan = case.plan(tmp_path / "b")
    assert plan.sources["lm_head.weight"].make is None
    assert offline == []


@pytest.mark.parametrize(("name", "role"), [("llava-original", "clip"), ("shikra", "base")])
def test_a_part_beside_the_checkpoint_is_found(find, tmp_path, offline, name, role):
    case = find(name).copy(tmp_path / "home")
    hub_name = {"clip": "clip-tiny-patch14-70", "base": "llama-7b"}[role]
    beside = case.place().parent / hub_name
    case.place(role).rename(beside)
    overrides = {key: v for key, v in case.overrides.items() if key != f"parts.{role}"}
    plan = replace(case, overrides=overrides).plan(tmp_path / "b")
    assert plan.checkpoint.parts[role].folder == beside
    assert offline == []


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("llava-original", "clip"),
        ("shikra", "clip"),
        ("minigpt-v2", "language"),
        ("minigpt-v2", "vision"),
    ],
)
def test_a_part_is_left_out_that_is_needed(find, tmp_path, name, role):
    message = refuse(find(name), tmp_path / "b", CheckpointError, **{f"parts__{role}": ""})
    assert message.endswith(f"needs its part '{role}'; give it with --set parts.{role}=DIR")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_that_the_family_has_not(find, tmp_path, name):
    message = refuse(find(name), tmp_path / "b", UnknownNameError, parts__wheel="x")
    assert message.startswith("unknown part 'wheel'; have ")


@pytest.mark.parametrize("pruner", ["cls_attention", "trim"])
@pytest.mark.parametrize("name", CLIP_FAMILIES)
def test_clip_of_another_width(find, tmp_path, name, pruner):
    wide = originals.make_clip(tmp_path / "wide", image_size=70, vision_width=44)
    case = find(name)
    message = refuse(case, tmp_path / "b", CheckpointError, pruner=pruner, parts__clip=str(wide))
    width = {"llava-next-mistral": 40, "llava-original": 40, "shikra": 48}.get(name, 36)
    assert str(wide) in message
    assert "44" in message
    assert str(width) in message
    assert message.endswith("--set parts.clip=DIR")


def test_clip_without_a_tokenizer(find, tmp_path):
    bare = originals.make_clip(
        tmp_path / "bare", image_size=70, vision_width=36, vision_heads=3, with_tokenizer=False
    )
    message = refuse(
        find("llava"), tmp_path / "b", CheckpointError, pruner="trim", parts__clip=str(bare)
    )
    assert message == f"{bare}: no tokenizer in it; CLIP's is needed to read phrases"


def test_parts_that_were_exchanged(find, tmp_path):
    case = find("minigpt-v2")
    eva, llama = str(case.place("vision")), str(case.place("language"))
    message = refuse(case, tmp_path / "b", CheckpointError, parts__vision=llama)
    assert "patch_embed.proj.weight" in message
    message = refuse(case, tmp_path / "b", CheckpointError, parts__language=eva)
    assert "config.json" in message


# Settings.


@pytest.mark.parametrize(
    ("canvas", "reason"),
    [
        ("big", "expected WIDTHxHEIGHT or WIDTHxHEIGHT/ASPECT"),
        ("", "expected WIDTHxHEIGHT"),
        ("126x42,", "expected WIDTHxHEIGHT"),
        ("126x42/9", "expected WIDTHxHEIGHT"),
        ("126 x 42", "expected WIDTHxHEIGHT"),
        ("126x42/9:1/3", "expected WIDTHxHEIGHT"),
        ("126x42/0:3", "aspect of 0"),
        ("126x42/3:0", "aspect of 0"),
        ("126x43", "no such canvas; have 84x42, 42x84, 84x84, 42x126, 126x42"),
        ("0x0", "no such canvas"),
        ("126x42/1:1", "use 84x84/1:1"),
        ("42x126/3:1", "use 126x42/3:1"),
    ],
)
def test_a_canvas_that_cannot_be(find, tmp_path, canvas, reason):
    case = find("llava-next-vicuna")
    message = refuse(case, tmp_path / "b", ConfigError, image__canvas=canvas)
    assert message.startswith(f"image.canvas '{canvas.rpartition(',')[2]}': ")
    assert reason in message


def test_a_ratio_that_would_remove_newlines(find, tmp_path):
    case = find("llava-next-mistral")
    message = refuse(case, tmp_path / "b", ConfigError, prune__ratios=[0.92])
    assert "ratio 0.92 keeps 6 of 70 visual tokens, of which 6 mark the ends of rows" in message
    plan = case.plan(tmp_path / "b", prune__ratios=[float(message.rpartition(" ")[2])])
    assert plan.entries[0].kept == 7


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("vision__heads", 3, "vision.heads is 3, which does not divide EVA's width of 176"),
        ("vision__heads", 0, "vision.heads is 0, expected at least 1"),
        ("vision__side", 50, "vision.side is 50, expected an even number of patches of 7 pixels"),
        ("vision__side", 49, "vision.side is 49, expected an even number"),
        ("vision__side", 0, "vision.side is 0, expected at least 1"),
        ("prune__phrase", "clip", "use --set prune.phrase=embeddings"),
    ],
)
def test_sizes_that_eva_cannot_have(find, tmp_path, setting, value, reason):
    case = find("minigpt-v2")
    pruner = "trim" if setting == "prune__phrase" else "random"
    message = refuse(case, tmp_path / "b", ConfigError, pruner=pruner, **{setting: value})
    assert reason in message


def change_json(path, **values):
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | values), encoding="utf-8")


CONFIGS = (
    ("llava", {"quantization_config": {"bits": 4}}, "quantized"),
    ("llava-original", {"quantization_config": {"bits": 4}}, "quantized"),
    ("llava-next-vicuna", {"quantization_config": {"bits": 4}}, "quantized"),
    ("shikra", {"quantization_config": {"bits": 4}}, "quantized"),
    ("llava", {"vision_feature_select_strategy": "full"}, "keeps the CLS token"),
    ("llava-original", {"mm_vision_select_feature": "cls_patch"}, "keeps the CLS token"),
    ("llava-next-vicuna", {"vision_feature_select_strategy": "full"}, "keeps the CLS token"),
    ("llava", {"vision_feature_layer": -9}, "vision_feature_layer -9"),
    ("llava-original", {"mm_vision_select_layer": -9}, "vision_feature_layer -9"),
    ("llava-next-vicuna", {"vision_feature_layer": 7}, "vision_feature_layer 7"),
    ("shikra", {"mm_vision_select_layer": -9}, "vision_feature_layer -9"),
    ("llava", {"vision_feature_layer": [-2, -1]}, "expected one layer"),
    ("llava-original", {"mm_projector_type": "linear"}, "'linear', expected mlp2x_gelu"),
    ("llava-next-vicuna", {"image_grid_pinpoints": [[42, 43]]}, "expected multiples of 42"),
    ("llava-next-vicuna", {"image_grid_pinpoints": []}, "image_grid_pinpoints"),
    ("llava", {"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
)


@pytest.mark.parametrize(("name", "values", "reason"), CONFIGS)
def test_a_config_that_describes_something_else(find, tmp_path, name, values, reason):
    case = find(name).copy(tmp_path / "home")
    change_json(case.place() / "config.json", **values)
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(str(case.place() / "config.json"))
    assert reason in message


@pytest.mark.parametrize(
    ("name", "role"),
    [(n, "") for n in CLIP_FAMILIES]
    + [("llava-original", "clip"), ("shikra", "base"), ("minigpt-v2", "language")],
)
@pytest.mark.parametrize("text", ["{", "[]", '{"text_config": 3, "hidden_size": "wide"}', None])
def test_a_config_that_cannot_be_read(find, tmp_path, name, role, text):
    case = find(name).copy(tmp_path / "home")
    config = case.place(role) / "config.json"
    kinds = (CheckpointError, ConfigError, UnknownNameError)
    config.unlink()
    if text is not None:
        config.write_text(text, encoding="utf-8")
    with pytest.raises(kinds) as caught:
        case.plan(tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert str(config.parent) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "role"), [("llava", ""), ("shikra", "clip"), ("llava-next-vicuna", "")]
)
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"do_normalize": False}, "do_normalize is off"),
        ({"resample": 2}, "resample 2, expected 3"),
        ({"rescale_factor": 1 / 127}, "expected 1/255"),
        ({"size": {"shortest_edge": 77}}, "but the vision tower takes"),
        ({"image_mean": [0.5]}, "need 3 values"),
    ],
)
def test_a_processor_that_does_something_else(find, tmp_path, name, role, values, reason):
    case = find(name).copy(tmp_path / "home")
    change_json(case.place(role) / "preprocessor_config.json", **values)
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{case.place(role)}: image processor: ")
    assert reason in message


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_without_a_tokenizer(find, tmp_path, name):
    case = find(name).copy(tmp_path / "home")
    folder = case.place("language") if name == "minigpt-v2" else case.place()
    for file in ("tokenizer.json", "tokenizer.model"):
        (folder / file).unlink(missing_ok=True)
    message = refuse(case, tmp_path / "b", CheckpointError, reference=True)
    assert message.startswith(f"{folder}: no tokenizer.json in it")
    plan = case.plan(tmp_path / "b")
    assert plan.prompt.tokenizer is None
    assert plan.layout.prefix == plan.spec.prefix


@pytest.mark.parametrize("name", ["llava-original", "shikra", "minigpt-v2"])
def test_a_tokenizer_that_is_broken(find, tmp_path, name):
    case = find(name).copy(tmp_path / "home")
    folder = case.place("language") if name == "minigpt-v2" else case.place()
    (folder / "tokenizer.model").write_bytes(b"no tokenizer")
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{folder}: its tokenizer cannot be read")


def test_every_family_is_refused_by_every_other(find):
    """A configuration's name with a folder of another family."""
    models = {
        "llava-1.5-7b": {"llava", "llava-original"},
        "llava-next-vicuna-7b": {"llava-next-vicuna", "llava-next-mistral"},
        "shikra-7b": {"shikra"},
        "minigpt-v2": {"minigpt-v2"},
    }
    parts = {
        "shikra-7b": {f"parts.{r}": str(find("shikra").place(r)) for r in ("base", "clip")},
        "minigpt-v2": {
            f"parts.{r}": str(find("minigpt-v2").place(r)) for r in ("vision", "language")
        },
    }
    for model, name in itertools.product(models, FAMILIES):
        if name in models[model]:
            continue
        named = load_config(model, parts.get(model, {}), checkpoint=str(find(name).place()))
        with pytest.raises(CheckpointError) as caught:
            find_weights(named)
        assert "\n" not in str(caught.value)


def find_weights(named):
    model = read_model(named)
    return model.family.find_weights(model.checkpoint, model.spec)


def test_copies_are_whole(find, tmp_path):
    """The tests above change copies; one that is not changed can be planned."""
    for name in FAMILIES:
        case = find(name).copy(tmp_path / name)
        assert case.plan(tmp_path / "b", pruner="trim").entries
        shutil.rmtree(case.home)
