"""The makers of original checkpoints and the plain references, checked against other code."""

import json

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from truths import published

from makers import originals

EQUAL = 1e-10
# The library takes norms and rotary tables in float32, whatever the model's dtype.
LIBRARY = 1e-5
TEXTS = (
    "The red circle is at [0.12, 0.345].",
    "USER: where is\nthe  purple hexagon? ASSISTANT:",
    "é漢 \t <Img> {<7><100>}",
    "",
)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def furthest(a, b):
    return (a - b).abs().max().item()


def load_llama(kind, tensors, **keys):
    """Hugging Face's decoder in float64, filled strictly."""
    model = kind(keys["config"]).double().eval()
    model.set_attn_implementation("eager")
    values = {name: value.double() for name, value in tensors.items() if "inv_freq" not in name}
    model.load_state_dict(values)
    return model


@torch.no_grad()
def library_logits(model, embeddings, ids, mask):
    return model(inputs_embeds=embeddings, position_ids=ids, attention_mask=mask).logits


def only_llama(tensors):
    return {
        name: value
        for name, value in tensors.items()
        if name.startswith(("model.layers", "model.embed", "model.norm", "lm_head"))
    }


# Tokenizers.


@pytest.mark.parametrize("vocabulary", [331, 400, 513])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_the_library_reads_sentencepiece_as_its_own_processor_does(tmp_path, vocabulary, legacy):
    folder = originals.make_sentencepiece(tmp_path / "t", vocabulary=vocabulary, legacy=legacy)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert processor.vocab_size() == len(tokenizer) == vocabulary
    assert [processor.id_to_piece(k) for k in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert processor.pad_id() == -1
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [1, *processor.encode(text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    # Digits stand alone.
    pieces = [processor.id_to_piece(k) for k in range(259, vocabulary)]
    assert not [piece for piece in pieces if any(c.isdigit() for c in piece) and len(piece) > 1]


def test_added_tokens_follow_the_vocabulary(tmp_path):
    folder = originals.make_sentencepiece(tmp_path, vocabulary=401, added=("<a>", "<b>"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<a><b>")["input_ids"][-2:] == [401, 402]
    assert len(tokenizer) == 403


# CLIP.


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return originals.make_clip(tmp_path_factory.mktemp("openai") / "clip-tiny-patch14-56")


@pytest.mark.parametrize("files", ["safetensors", "bin"])
def test_the_library_reads_all_of_clip(tmp_path, clip, files):
    folder = originals.make_clip(tmp_path / "clip", files=files)
    model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tensors = originals.read_folder(folder)
    state = model.state_dict()
    buffers = {f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}
    assert set(tensors) == set(state) | buffers
    assert all(tensors[name].dtype == torch.int64 for name in buffers)
    assert all(torch.equal(tensors[name], value) for name, value in state.items())
    twin = originals.read_folder(clip)
    assert all(torch.equal(tensors[name], value) for name, value in twin.items())


@pytest.mark.parametrize("eos", [2, "eot"])
def test_clip_pools_at_the_end_of_the_text(tmp_path, eos):
    folder = originals.make_clip(tmp_path / "clip", text_eos=eos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == tokenizer.bos_token_id + 1
    ids = tokenizer("The RED circle!", padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    pieces = ["<|startoftext|>", "the</w>", "red</w>", "circle</w>", "!</w>", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(ids[0, :6]) == pieces
    model = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        output = model.text_model(ids)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, 5])


def test_clip_attends_far_from_uniformly(clip):
    model = CLIPModel.from_pretrained(clip, attn_implementation="eager").eval()
    processor = AutoImageProcessor.from_pretrained(clip)
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 56, 56)
    with torch.no_grad():
        maps = model.vision_model(pixels, output_attentions=True).attentions
    assert all(m.max(-1).values.mean() > 2 / m.shape[-1] for m in maps)


def test_clip_without_a_tokenizer(tmp_path):
    folder = originals.make_clip(tmp_path / "clip", with_tokenizer=False)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}


# LLaVA.


def check_index(folder, stem, ending):
    """The index names every tensor's file, and the files hold nothing else."""
    index = read_json(folder / f"{stem}.{ending}.index.json")
    found = {}
    for path in sorted(folder.glob(f"{stem}-*.{ending}")):
        held = torch.load(path, weights_only=True) if ending == "bin" else load_file(path)
        found |= dict.fromkeys(held, path.name)
    assert index["weight_map"] == found
    tensors = originals.read_folder(folder)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    return sorted(set(found.values()))


@pytest.mark.parametrize("tower", [False, True])
def test_llava_is_stored_as_its_authors_did(tmp_path, clip, tower):
    sizes = {"width": 36, "heads": 6, "kv_heads": 2, "mlp": 77, "vocabulary": 397}
    folder = originals.make_llava_original(tmp_path / "l", clip, with_vision_tower=tower, **sizes)
    files = check_index(folder, "pytorch_model", "bin")
    assert files == [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    tensors = originals.read_folder(folder)
    for name, value in tensors.items():
        assert value.dtype == (torch.float32 if name.endswith("inv_freq") else torch.float16), name
    config = read_json(folder / "config.json")
    assert config["mm_vision_tower"] == "openai/clip-tiny-patch14-56"
    assert config["vocab_size"] == len(tensors["lm_head.weight"]) == 397
    inside = {name for name in tensors if "vision_tower" in name}
    prefix = "model.vision_tower.vision_tower."
    outside = originals.read_folder(clip)
    wanted = {
        prefix + name
        for name in outside
        if name.startswith("vision_model.") and not name.endswith("position_ids")
    }
    assert inside == (wanted if tower else set())
    # A tower that was trained: taking the wrong one must show.
    assert not any(
        torch.equal(tensors[name].float(), outside[name.removeprefix(prefix)]) for name in inside
    )
    extra = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert set(extra) == {
        f"model.mm_projector.{k}.{p}" for k in (0, 2) for p in ("weight", "bias")
    }
    assert all(torch.equal(tensors[name], value) for name, value in extra.items())
    tokens = published.llava_visual_tokens(clip, tensors, noise(1, 3, 56, 56))
    assert tokens.shape == (1, 16, 36)
    assert "<image>" not in AutoTokenizer.from_pretrained(folder).get_vocab()


def test_one_seed_makes_one_llava(tmp_path, clip):
    made = [
        originals.read_folder(originals.make_llava_original(tmp_path / str(k), clip, seed=k // 2))
        for k in range(3)
    ]
    assert all(torch.equal(made[0][name], value) for name, value in made[1].items())
    assert not torch.equal(made[0]["model.norm.weight"], made[2]["model.norm.weight"])


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_the_library_reads_llava_next_in_both_layouts(tmp_path, text):
    processor, logits = None, []
    picture = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    for names in ("legacy", "modern"):
        folder = originals.make_llava_next(
            tmp_path / names, text=text, names=names, max_shard_size="100KB"
        )
        check_index(folder, "model", "safetensors")
        tensors = originals.read_folder(folder)
        newline = "image_newline" if names == "legacy" else "model.image_newline"
        tower = "vision_tower.vision_model." if names == "legacy" else "model.vision_tower."
        head = "language_model.lm_head.weight" if names == "legacy" else "lm_head.weight"
        assert {newline, head} <= set(tensors)
        assert any(name.startswith(tower) for name in tensors)
        assert len({name.split(".")[0] for name in tensors}) == (4 if names == "legacy" else 2)
        config = AutoConfig.from_pretrained(folder)
        assert config.image_grid_pinpoints == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
        decoder = config.text_config
        assert decoder.num_key_value_heads == (4 if text == "llama" else 2)
        assert decoder.rope_parameters["rope_theta"] == (1e4 if text == "llama" else 1e6)
        assert getattr(decoder, "sliding_window", None) is None
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True
        )
        assert not any(info.values())
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(picture, "USER: <image>\nWhere? ASSISTANT:", return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            logits.append(model.eval()(**inputs).logits)
    # Base view of 2x2, mosaic of 4x2 less the padding, newlines.
    assert (inputs["input_ids"] == config.image_token_id).sum() > 4
    assert furthest(*logits) < EQUAL


# Shikra.


@pytest.fixture(scope="module")
def shikra(tmp_path_factory):
    return originals.make_shikra(
        tmp_path_factory.mktemp("shikra"), vocabulary=401, width=30, heads=3, mlp=51, layers=3
    )


def test_shikra_is_a_base_and_a_delta(shikra):
    base, delta = originals.read_folder(shikra.base), originals.read_folder(shikra.delta)
    for folder in (shikra.base, shikra.delta):
        assert len(check_index(folder, "pytorch_model", "bin")) == 2
    assert set(delta) - set(base) == {"model.mm_projector.weight", "model.mm_projector.bias"}
    assert set(base) <= set(delta)
    for name, value in delta.items():
        assert value.dtype == (torch.float32 if name.endswith("inv_freq") else torch.float16), name
    for name, value in shikra.merged.items():
        known = torch.zeros_like(value)
        if name in base:
            known[: len(base[name])] = base[name]
        assert torch.equal(value, delta[name] + known), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (len(base[name]), len(delta[name])) == (401, 404)
    _, info = LlamaForCausalLM.from_pretrained(shikra.base, output_loading_info=True)
    assert not any(info.values())
    # What comes out is a model again: norms around one.
    assert abs(shikra.merged["model.norm.weight"].mean() - 1) < 0.2


def test_shikra_numbers_its_image_tokens(shikra):
    tokenizer = AutoTokenizer.from_pretrained(shikra.delta)
    ids = tokenizer("<im_start><im_patch><im_end>")["input_ids"]
    assert ids[-3:] == [402, 401, 403]
    config = read_json(shikra.delta / "config.json")
    special = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert (config["vocab_size"], special) == (404, [0, 1, -1])


def test_shikra_sees(shikra):
    tokens = published.shikra_visual_tokens(shikra.clip, shikra.merged, noise(2, 3, 56, 56))
    assert tokens.shape == (2, 16, 30)


# MiniGPT-v2.


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def minigpt(tmp_path_factory, request):
    return originals.make_minigpt(
        tmp_path_factory.mktemp("minigpt"), ln_vision=request.param == "bin", rank=5, kv_heads=2,
        llama_files=request.param,
    )  # fmt: skip


def test_minigpt_is_three_downloads(minigpt):
    whole = torch.load(minigpt.checkpoint, weights_only=True)
    assert list(whole) == ["model", "optimizer", "config", "scaler", "epoch"]
    stem = "llama_model.base_model.model.model.layers"
    for layer in (0, 1):
        for part, rows in (("q", 48), ("v", 24)):
            name = f"{stem}.{layer}.self_attn.{part}_proj.lora"
            assert whole["model"][f"{name}_A.weight"].shape == (5, 48)
            assert whole["model"][f"{name}_B.weight"].shape == (rows, 5)
    assert whole["model"]["llama_proj.weight"].shape == (48, 4 * 176)
    assert all(value.dtype == torch.float32 for value in whole["model"].values())
    numbers = [k for group in whole["optimizer"]["param_groups"] for k in group["params"]]
    assert (
        sorted(numbers)
        == sorted(whole["optimizer"]["state"])
        == [*range(sum("inv_freq" not in name for name in whole["model"]))]
    )
    eva = torch.load(minigpt.eva, weights_only=True)
    assert eva["pos_embed"].shape == (1, 10, 176)
    assert eva["blocks.0.mlp.fc1.weight"].shape == (768, 176)
    assert {name.split(".")[1] for name in eva if "blocks" in name} == {"0", "1", "2"}
    assert not any("attn.qkv.bias" in name or "k_bias" in name for name in eva)
    assert {"norm.weight", "head.weight"} <= set(eva)
    assert all(value.dtype == torch.float16 for value in eva.values())
    if list(minigpt.llama.glob("*.bin")):
        check_index(minigpt.llama, "pytorch_model", "bin")
    else:
        check_index(minigpt.llama, "model", "safetensors")
    _, info = LlamaForCausalLM.from_pretrained(minigpt.llama, output_loading_info=True)
    assert not any(info.values())
    AutoTokenizer.from_pretrained(minigpt.llama)


def test_minigpt_joins_four_patches(minigpt):
    eva = torch.load(minigpt.eva, weights_only=True)
    model = torch.load(minigpt.checkpoint, weights_only=True)["model"]
    tokens = published.minigpt_visual_tokens(eva, model, noise(2, 3, 56, 56), 2, 4)
    assert tokens.shape == (2, 4, 48)
    # Token i is made of patches 4i to 4i + 3, by torch's own norm and layer.
    patches = published.eva_tower(eva, noise(2, 3, 56, 56), 2, 4).states[-1][:, 1:]
    norm = torch.nn.LayerNorm(176).double()
    if "ln_vision.weight" in model:
        norm.load_state_dict({name: model[f"ln_vision.{name}"] for name in ("weight", "bias")})
    joined = torch.cat(list(norm(patches[1, 8:12])))
    token = model["llama_proj.weight"].double() @ joined + model["llama_proj.bias"]
    assert furthest(token, tokens[1, 2]) < EQUAL


def test_minigpt_adds_its_lora(minigpt):
    llama = only_llama(originals.read_folder(minigpt.llama))
    model = torch.load(minigpt.checkpoint, weights_only=True)["model"]
    merged = published.minigpt_llama(llama, model, minigpt.lora_alpha)
    changed = {
        name
        for name, value in merged.items()
        if "inv_freq" not in name and not torch.equal(value, llama[name].double())
    }
    assert changed == {
        f"model.layers.{k}.self_attn.{part}_proj.weight" for k in (0, 1) for part in "qv"
    }
    # As the adapter runs it: beside the layer, on the layer's input.
    x, name = noise(48), "model.layers.1.self_attn.v_proj"
    down, up = (
        model[f"llama_model.base_model.model.{name}.lora_{part}.weight"].double() for part in "AB"
    )
    beside = llama[f"{name}.weight"].double() @ x + 16 / 5 * (up @ (down @ x))
    assert furthest(merged[f"{name}.weight"] @ x, beside) < EQUAL


# EVA.


@pytest.fixture(scope="module")
def eva(tmp_path_factory):
    files = originals.make_minigpt(tmp_path_factory.mktemp("eva"), vision_layers=3)
    return torch.load(files.eva, weights_only=True)


def test_eva_is_torchs_own_encoder_layer(eva):
    """torch has the same block: norm first, one matrix for query, key and value, exact GELU."""
    output = published.eva_tower(eva, noise(2, 3, 56, 56), 2, 4)
    assert (len(output.states), len(output.attentions)) == (4, 3)
    for k in range(3):
        block = {name: value.double() for name, value in eva.items()}
        block = {
            name.removeprefix(f"blocks.{k}."): value
            for name, value in block.items()
            if name.startswith(f"blocks.{k}.")
        }
        layer = torch.nn.TransformerEncoderLayer(
            176, 2, 768, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64
        )
        bias = (block["attn.q_bias"], torch.zeros(176), block["attn.v_bias"])
        state = {"self_attn.in_proj_weight": block["attn.qkv.weight"]}
        state["self_attn.in_proj_bias"] = torch.cat(bias)
        for ours, theirs in (
            ("attn.proj", "self_attn.out_proj"),
            ("mlp.fc1", "linear1"),
            ("mlp.fc2", "linear2"),
            ("norm1", "norm1"),
            ("norm2", "norm2"),
        ):
            state |= {f"{theirs}.{part}": block[f"{ours}.{part}"] for part in ("weight", "bias")}
        layer.load_state_dict(state)
        with torch.no_grad():
            rows = output.states[k]
            assert furthest(layer(rows), output.states[k + 1]) < EQUAL
            rows = layer.norm1(rows)
            _, maps = layer.self_attn(rows, rows, rows, average_attn_weights=False)
        assert furthest(maps, output.attentions[k]) < EQUAL
        # Row CLS of the last head, from the raw queries and keys.
        query, key = output.queries[k][:, 0, 88:], output.keys[k][..., 88:]
        row = (torch.einsum("bc,btc->bt", query, key) / 88**0.5).softmax(-1)
        assert furthest(row, output.attentions[k][:, 1, 0]) < EQUAL
        assert 3 / 17 < maps.max(-1).values.mean() < 0.7


def test_eva_leaves_the_last_block_of_the_file(eva):
    pixels = noise(1, 3, 56, 56)
    states = published.eva_tower(eva, pixels, 2, 4).states
    assert torch.equal(states[-1], published.eva_tower(eva, pixels, 2, 4, layers=3).states[-1])
    assert len(published.eva_tower(eva, pixels, 2, 4, layers=4).states) == 5


def test_eva_knows_a_patch_by_its_place_alone(eva):
    """Patches that change place, and take their row of the position table along, are the same."""
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    pixels = noise(1, 3, 42, 42)
    cut = (
        pixels.unflatten(2, (3, 14)).unflatten(4, (3, 14)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    )
    moved = cut[:, order].unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5).reshape(pixels.shape)
    table = eva["pos_embed"]
    other = eva | {"pos_embed": torch.cat([table[:, :1], table[:, 1:][:, order]], 1)}
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    here = published.eva_tower(eva, pixels, 2, 3)
    there = published.eva_tower(other, moved, 2, 3)
    assert furthest(here.states[-1][:, rows], there.states[-1]) < EQUAL
    assert furthest(here.attentions[-1][:, :, rows][..., rows], there.attentions[-1]) < EQUAL
    alone = published.eva_tower(eva, moved, 2, 3)
    assert furthest(here.states[-1][:, rows], alone.states[-1]) > 0.01


@pytest.mark.parametrize("side", [2, 4, 7])
def test_eva_resizes_its_positions_with_the_cubic_kernel(eva, side):
    table = published.eva_positions(eva["pos_embed"], side)
    stored = eva["pos_embed"].double()
    assert torch.equal(table[:, 0], stored[:, 0])
    weights = cubic_weights(3, side)
    grid = stored[0, 1:].reshape(3, 3, -1).numpy()
    wanted = np.einsum("ai,bj,ijc->abc", weights, weights, grid).reshape(side**2, -1)
    assert np.abs(table[0, 1:].numpy() - wanted).max() < EQUAL
    assert torch.equal(published.eva_positions(stored, 3), stored)


def cubic_weights(old, new):
    """Keys' kernel with a = -0.75 at pixel centres, the border repeated."""
    weights = np.zeros((new, old))
    for k in range(new):
        centre = (k + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d, a = abs(centre - tap), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[k, min(max(tap, 0), old - 1)] += near if d <= 1 else far
    return weights


# Llama.


def scattered(slots, seed):
    """Position IDs with gaps, and a mask that hides some earlier slots."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 9, (1, slots), generator=generator).cumsum(-1) - 1
    mask = torch.full((slots, slots), -torch.inf, dtype=torch.float64).triu(1)
    hidden = (torch.rand(slots, slots, generator=generator) < 0.3) & ~torch.eye(slots).bool()
    return ids, mask.masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("seed", [0, 1])
def test_plain_llama_is_the_librarys(tmp_path, clip, seed):
    sizes = {"width": 60, "heads": 6, "kv_heads": 2, "mlp": 77, "layers": 3}
    folder = originals.make_llava_original(tmp_path / "l", clip, seed=seed, **sizes)
    tensors = only_llama(originals.read_folder(folder))
    data = read_json(folder / "config.json")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keys += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    model = load_llama(
        LlamaForCausalLM, tensors, config=LlamaConfig(**{key: data[key] for key in keys})
    )
    embeddings, (ids, mask) = noise(1, 11, 60, seed=seed), scattered(11, seed)
    logits = published.llama_logits(tensors, embeddings, ids, mask, heads=6)
    assert furthest(logits, library_logits(model, embeddings, ids, mask[None, None])) < LIBRARY
    # Causal by slot where nothing is said, and unbatched.
    plain = published.llama_logits(tensors, embeddings[0], torch.arange(11), heads=6)
    with torch.no_grad():
        assert furthest(plain, model(inputs_embeds=embeddings).logits[0]) < LIBRARY
    assert furthest(plain, logits[0]) > 0.01


def test_plain_llama_is_mistral_too(tmp_path):
    folder = originals.make_llava_next(tmp_path / "next", text="mistral")
    prefix = "language_model."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in originals.read_folder(folder).items()
        if name.startswith(prefix)
    }
    config = AutoConfig.from_pretrained(folder).text_config
    assert isinstance(config, MistralConfig)
    model = load_llama(MistralForCausalLM, tensors, config=config)
    embeddings, (ids, mask) = noise(1, 9, 48), scattered(9, 5)
    logits = published.llama_logits(tensors, embeddings, ids, mask, heads=4, theta=1e6)
    assert furthest(logits, library_logits(model, embeddings, ids, mask[None, None])) < LIBRARY
    del tensors["lm_head.weight"]
    tied = published.llama_logits(tensors, embeddings, ids, mask, heads=4, theta=1e6)
    assert tied.shape == logits.shape
    assert furthest(tied, logits) > 0.01


def test_plain_llama_turns_by_differences_alone(shikra):
    embeddings, ids = noise(7, 30), torch.tensor([0, 2, 3, 9, 10, 40, 41])
    run = [
        published.llama_logits(shikra.merged, embeddings, ids + shift, heads=3, eps=1e-6)
        for shift in (0, 100)
    ]
    assert furthest(*run) < EQUAL
    moved = published.llama_logits(shikra.merged, embeddings, ids // 2 * 3, heads=3, eps=1e-6)
    assert furthest(run[0], moved) > 0.01
