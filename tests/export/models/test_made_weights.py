"""Weights that are made of several tensors, and files that are used in place."""

import pytest
import torch
from makers import originals
from makers.damage import edit
from makers.families import PHRASE, export, make_picture
from tools.distances import furthest
from truths import published

from gap_export.checkpoint.sources import make_tensor
from gap_export.config.load import load_config
from gap_export.pipeline.model import read_model
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_runtime import Bundle, Grounder
from gap_runtime.bundle.hashes import hash_file


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
                expected = expected.double() + 24 / 8 * up @ down
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
    """With `--bring link` nothing of a checkpoint in .bin files is written again."""
    clip = originals.make_clip(tmp_path / "clip-vit", files="bin", dtype="float16")
    folder = originals.make_llava_original(tmp_path / "model", clip, vocabulary=400)
    values = {"prune.ratios": [0, 0.5], "prompt.answer": 4}
    overrides = values | {"parts.clip": str(clip), "prune.strategy": "text_similarity"}
    request = make_request(
        folder, settings=overrides, out=tmp_path / "b", bring="link", reference=False
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
    plan = case.plan(tmp_path / "b", bring="link", dtype="float16")
    export(plan)
    bundle = Bundle.open(tmp_path / "b")
    for name, entry in bundle.manifest.files.items():
        assert entry.blake3 == hash_file(tmp_path / "b" / name)
        assert entry.size == (tmp_path / "b" / name).stat().st_size
