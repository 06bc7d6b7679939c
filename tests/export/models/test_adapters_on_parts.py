"""PEFT's adapters on models whose weights lie in several folders, and on Qwen-VL.

The truth is the same model with the adapter merged into its files by hand, in float64.
"""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from makers import originals
from makers.checkpoints import edit_tensors
from makers.qwen import TEMPLATE, make_qwen3_checkpoint, make_qwen_checkpoint
from safetensors.torch import load_file, save_file

from gap_export.checkpoint.sources import cut_pieces, make_tensor
from gap_export.errors import CheckpointError
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request

EVERY = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def require_same(plan, merged, plain):
    """All tensors and PyTorch's logits are the merged model's, and not the plain one's."""
    assert plan.sources.keys() == merged.sources.keys()
    for name, source in plan.sources.items():
        wanted = make_tensor(merged.sources[name]).float()
        torch.testing.assert_close(make_tensor(source).float(), wanted, **CLOSE)
        pieces = [make_tensor(piece).float() for piece in cut_pieces(source)]
        torch.testing.assert_close(torch.cat(pieces), wanted, **CLOSE)
    wanted = answer_three_rows(merged, None)
    for memory in (None, 20_000):
        torch.testing.assert_close(answer_three_rows(plan, memory), wanted, **CLOSE)
    assert float((answer_three_rows(plain, None) - wanted).abs().max()) > 1e-2


def answer_three_rows(plan, memory):
    model = plan.family.load_eager(plan.checkpoint, plan.spec, "float32", memory=memory)
    positions = torch.arange(3).repeat(plan.spec.decoder.axes, 1)
    return model.run_decoder(model.embed([5, 6, 7]), positions, model.start_cache())


@pytest.mark.parametrize("saved", [(), ("lm_head.weight", "model.mm_projector.weight")])
def test_an_adapter_on_a_shikra(find, tmp_path, saved):
    """What was trained whole stands in for the sum of base and differences."""
    case = find("shikra")
    layers = EVERY if saved else (*EVERY, "mm_projector")
    adapter = originals.make_adapter(
        tmp_path / "lora", case.place(), layers=layers, saved=saved, seed=5
    )
    plan = case.plan(tmp_path / "a", parts__adapter=str(adapter))
    home = tmp_path / "merged"
    shutil.copytree(case.place(), home, ignore=shutil.ignore_patterns("pytorch_model*"))
    merged = originals.merge_adapter(case.files.merged, adapter)
    whole = {key: value.float() for key, value in merged.items()}
    torch.save(whole, home / "pytorch_model.bin")
    overrides = {key: each for key, each in case.overrides.items() if key != "parts.base"}
    by_hand = replace(case, model=str(home), overrides=overrides)
    require_same(plan, by_hand.plan(tmp_path / "b"), case.plan(tmp_path / "c"))
    # On a model that was merged with its base before, too.
    adapted = originals.make_adapter(tmp_path / "other", home, seed=6)
    plan = by_hand.plan(tmp_path / "d", parts__adapter=str(adapted))
    key = "model.layers.0.self_attn.q_proj.weight"
    wanted = originals.merge_adapter(whole, adapted)[key]
    found = make_tensor(plan.sources[f"language_{key}"])
    torch.testing.assert_close(found, wanted.float(), **CLOSE)


def test_an_adapter_of_minigpts_language_model(find, tmp_path):
    """It is added beside the checkpoint's own LoRA, as if the language model had it."""
    case = find("minigpt-v2")
    adapter = originals.make_adapter(
        tmp_path / "lora",
        case.place("language"),
        layers=EVERY,
        saved=("model.norm.weight",),
    )
    plan = case.plan(tmp_path / "a", parts__adapter=str(adapter))
    copy = case.copy(tmp_path / "home")
    place = copy.place("language")
    merged = originals.merge_adapter(originals.read_folder(place), adapter)
    edit_tensors(place, lambda tensors: {key: merged[key].float() for key in tensors})
    require_same(plan, copy.plan(tmp_path / "b"), case.plan(tmp_path / "c"))


@pytest.mark.parametrize(
    ("make", "canvas", "layers"),
    [
        (make_qwen_checkpoint, "112x56", (*EVERY, "qkv", "0", "2")),
        (make_qwen3_checkpoint, "96x64", (*EVERY, "qkv", "linear_fc1")),
    ],
    ids=["2.5", "3"],
)
def test_an_adapter_on_a_qwen(tmp_path, make, canvas, layers):
    model = make(tmp_path / "model")
    adapter = originals.make_adapter(tmp_path / "lora", model, layers=layers)
    path = adapter / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    assert any("visual.blocks" in key for key in tensors)
    assert any("merger" in key for key in tensors)

    def plan(folder, name, **settings):
        settings |= {"image.canvas": canvas, "prompt.template": TEMPLATE, "dtype": "float32"}
        request = make_request(folder, ratios=[0.5], settings=settings, out=tmp_path / name)
        return plan_export(replace(request, reference=False))

    home = shutil.copytree(model, tmp_path / "merged")
    merged = originals.merge_adapter(originals.read_folder(home), adapter)
    edit_tensors(home, lambda found: {key: merged[key].float() for key in found})
    by_hand, plain = plan(home, "b"), plan(model, "c")
    # Version 4.52 of the library moved the language model and the tower.
    for layers_at, visual_at in (("model.", ""), ("model.language_model.", "model.")):
        renamed = {
            re.sub(
                r"(?<=base_model\.model\.)(model\.)?(?=visual\.)",
                visual_at,
                re.sub(r"model\.(language_model\.)?(?=layers\.)", layers_at, key),
            ): value
            for key, value in tensors.items()
        }
        save_file(renamed, path)
        adapted = plan(model, f"a{layers_at}", **{"parts.adapter": str(adapter)})
        require_same(adapted, by_hand, plain)


@pytest.mark.parametrize(("name", "role"), [("shikra", ""), ("minigpt-v2", "language")])
def test_what_an_adapter_brings_and_the_model_has_not(find, tmp_path, name, role):
    case = find(name)
    adapter = originals.make_adapter(tmp_path / "lora", case.place(role))
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.wheel.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError) as caught:
        case.plan(tmp_path / "b", parts__adapter=str(adapter))
    assert str(caught.value) == (
        f"{path}: tensor 'base_model.model.wheel.weight' is none that this model has; give an "
        "adapter that was trained on it"
    )
