"""Checkpoints as people have them: what savers leave in, and what folders are not named after."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from makers import originals
from safetensors.torch import load_file, save_file

from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.sources import make_tensor
from gap_export.config.families import resolve_family
from gap_export.config.load import load_config
from gap_export.errors import CheckpointError
from gap_export.models import shikra as family
from gap_runtime.errors import UnknownNameError
from gap_runtime.registry import list_plugins


def edit_config(folder, **values):
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(data), encoding="utf-8")


def refuse(case, out, **overrides):
    with pytest.raises(CheckpointError) as caught:
        case.plan(out, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# LLaVA.


def test_the_authors_later_code_calls_it_llava_llama(find, tmp_path):
    case = find("llava-original").copy(tmp_path / "home")
    before = find("llava-original").plan(tmp_path / "a")
    edit_config(case.place(), model_type="llava_llama")
    assert resolve_family(case.place()) == "llava"
    plan = case.plan(tmp_path / "b")
    assert {name: each.shape for name, each in plan.sources.items()} == {
        name: each.shape for name, each in before.sources.items()
    }


@pytest.mark.parametrize("name", ["llava-original", "shikra", "minigpt-v2"])
def test_files_in_torchs_older_format_hold_the_same(find, tmp_path, name):
    """The graphs' weights and PyTorch's model; the originals are from around its end."""
    case = find(name).copy(tmp_path / "home")
    before = find(name).plan(tmp_path / "a")
    files = [path for path in case.home.rglob("*") if path.suffix in {".bin", ".pth"}]
    assert files
    for path in files:
        saved = torch.load(path, weights_only=True)
        torch.save(saved, path, _use_new_zipfile_serialization=False)
    plan = case.plan(tmp_path / "b")
    assert set(plan.sources) == set(before.sources)
    for key, source in plan.sources.items():
        assert torch.equal(make_tensor(source), make_tensor(before.sources[key])), key
    rows, wanted = (
        each.family.load_eager(each.checkpoint, each.spec, "float32").embed([5, 6, 7])
        for each in (plan, before)
    )
    assert torch.equal(rows, wanted)


@pytest.mark.parametrize("files", ["bin", "safetensors"])
def test_what_the_authors_later_code_saves(find, tmp_path, files):
    """The tower inside, bfloat16, today's files and no buffers in them."""
    case = find("llava-original")
    folder = originals.make_llava_original(
        tmp_path / "llava-later",
        case.place("clip"),
        model_type="llava_llama",
        files=files,
        dtype="bfloat16",
        with_vision_tower=True,
        width=60,
        heads=6,
        layers=3,
    )
    plan = replace(case, model=str(folder)).plan(tmp_path / "b")
    stored = originals.read_folder(folder)
    tower = "encoder.layers.1.mlp.fc1.weight"
    for name, key in (
        (f"vision_tower.{tower}", f"model.vision_tower.vision_tower.vision_model.{tower}"),
        ("language_model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
    ):
        assert torch.equal(make_tensor(plan.sources[name]), stored[key])


@pytest.mark.parametrize("value", ["square", None])
def test_pictures_that_the_authors_code_would_crop(find, tmp_path, value):
    case = find("llava-original").copy(tmp_path / "home")
    assert case.plan(tmp_path / "a").spec.notes == ()
    edit_config(case.place(), image_aspect_ratio=value)
    (note,) = case.plan(tmp_path / "b").spec.notes
    assert note.startswith(f"{case.place() / 'config.json'}: image_aspect_ratio is {value!r}, ")


@pytest.mark.parametrize("role", ["", "vision", "language"])
def test_a_model_that_was_saved_in_its_wrapper(find, tmp_path, role):
    """DistributedDataParallel puts `module.` before every name."""
    case = find("minigpt-v2").copy(tmp_path / "home")
    if role == "language":
        tensors = originals.read_folder(case.place(role))
        for path in case.place(role).glob("model*"):
            path.unlink()
        torch.save(tensors, case.place(role) / "pytorch_model.bin")
    before = case.plan(tmp_path / "a")
    values = {name: make_tensor(source) for name, source in before.sources.items()}
    logits = answer_three_rows(before)
    place = case.place(role) / "pytorch_model.bin" if role == "language" else case.place(role)
    whole = torch.load(place, weights_only=True)
    inner = whole.get("model", whole)
    wrapped = {f"module.{name}": value for name, value in inner.items()}
    torch.save(whole | {"model": wrapped} if "model" in whole else wrapped, place)
    plan = case.plan(tmp_path / "b")
    assert plan.sources.keys() == values.keys()
    for name, source in plan.sources.items():
        assert torch.equal(make_tensor(source), values[name]), name
    assert torch.equal(answer_three_rows(plan), logits)


def answer_three_rows(plan):
    model = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    rows = model.embed([5, 6, 7])
    return model.run_decoder(rows, torch.arange(3)[None], model.start_cache())


def test_the_library_is_not_given_a_model_in_a_wrapper(find, tmp_path):
    """It would leave all parameters as they are made, at random."""
    case = find("llava").copy(tmp_path / "home")
    wanted = answer_three_rows(case.plan(tmp_path / "a"))
    tensors = originals.read_folder(case.place())
    for path in case.place().glob("model*.safetensors*"):
        path.unlink()
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    torch.save(wrapped, case.place() / "pytorch_model.bin")
    assert torch.equal(answer_three_rows(case.plan(tmp_path / "b")), wanted)


@pytest.mark.parametrize(
    "values",
    [
        {"image_aspect_ratio": "anyres"},
        {"image_aspect_ratio": "anyres_max_9"},
        {"mm_patch_merge_type": "spatial_unpad"},
    ],
)
def test_llava_next_in_its_authors_layout(find, tmp_path, values):
    case = find("llava-original").copy(tmp_path / "home")
    edit_config(case.place(), model_type="llava_llama", **values)
    message = refuse(case, tmp_path / "b")
    assert message.startswith(f"{case.place() / 'config.json'}: LLaVA-NeXT (1.6) in its authors")
    assert "llava-hf/llava-v1.6-vicuna-7b-hf" in message


@pytest.mark.parametrize(
    ("model_type", "advice"),
    [
        ("llava_mistral", "llava-hf/llava-v1.6-mistral-7b-hf"),
        ("llama", "it is a part of a model alone"),
        ("qwen2_vl", "llava-next-vicuna-7b"),
        ("llavaonevision1_5", "llava-next-vicuna-7b"),
        ("internvl_chat", "OpenGVLab/InternVL3-1B-hf"),
        ("paligemma", "llava-next-vicuna-7b"),
        ("bert", "gap-export list"),
    ],
)
def test_another_kind_of_model_is_told_the_families(tmp_path, model_type, advice):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), "utf-8")
    with pytest.raises(UnknownNameError) as caught:
        load_config(str(tmp_path), {})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: model_type '{model_type}' is none of")
    assert f"({', '.join(list_plugins('gap_export.models'))})" in message
    assert advice in message


# Shikra.


def rename(case, role, name):
    """The same with the folder of a part, or of the checkpoint, under another name."""

    old = case.place(role)
    new = old.rename(old.parent / name)
    if role:
        return replace(case, overrides=case.overrides | {f"parts.{role}": str(new)})
    return replace(case, model=str(new))


@pytest.fixture
def shikra(find, tmp_path):
    return find("shikra").copy(tmp_path / "home")


def merge(case):
    """Write the merged model over the delta, as the authors' script does, buffers and all."""
    files = sorted(case.place().glob("pytorch_model*.bin"))
    base = originals.read_folder(case.place("base"))
    for file in files:
        tensors = torch.load(file, weights_only=True)
        for name, value in tensors.items():
            if name in base:
                known = base[name].to(value.dtype)
                value[: len(known)] += known
        torch.save(tensors, file)


@pytest.mark.parametrize("with_buffers", [True, False])
def test_a_delta_is_one_whatever_its_folder_is_called(shikra, tmp_path, with_buffers):
    case = rename(shikra, "", "model")
    if not with_buffers:
        drop_buffers(case.place())
    found = family.find_parts(open_checkpoint(str(case.place())), text=False)
    assert found["base"] == family.PARTS["base"]
    case.overrides["parts.base"] = ""
    message = refuse(case, tmp_path / "b")
    assert message == (
        f"{case.place()}: holds differences to LLaMA's weights, not a model; give the LLaMA that "
        "they were made from: --set parts.base=DIR"
    )


def drop_buffers(folder):
    """As savers of today leave them out."""
    tensors = {
        name: value.contiguous()
        for name, value in originals.read_folder(folder).items()
        if not name.endswith("inv_freq")
    }
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_file(folder / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("with_buffers", [True, False])
def test_a_merged_model_is_one_whatever_its_folder_is_called(shikra, tmp_path, with_buffers):
    merge(shikra)
    if not with_buffers:
        drop_buffers(shikra.place())
    message = refuse(shikra, tmp_path / "b")
    assert message == (
        f"{shikra.place()}: holds a whole model, to which {shikra.place('base')} would be added; "
        "leave the base out: --set parts.base="
    )
    del shikra.overrides["parts.base"]
    assert shikra.place().name == "delta"
    plan = shikra.plan(tmp_path / "b")
    assert set(plan.checkpoint.parts) == {"clip"}
    source = plan.sources["language_model.embed_tokens.weight"]
    assert source.make is None
    table = originals.read_folder(shikra.place())["model.embed_tokens.weight"]
    assert torch.equal(make_tensor(source), table)


def test_differences_as_a_base(shikra, tmp_path):
    delta = shikra.place("base").parent / "other"
    shutil.copytree(shikra.place(), delta)
    shikra.overrides["parts.base"] = str(delta)
    message = refuse(shikra, tmp_path / "b")
    assert message.startswith(f"{delta}: holds differences, not a model, expected LLaMA's weights")


# MiniGPT-v2.


@pytest.fixture
def minigpt(find, tmp_path):
    return find("minigpt-v2").copy(tmp_path / "home")


def edit_whole(case, change):
    whole = torch.load(case.place(), weights_only=True)
    change(whole)
    torch.save(whole, case.place())


def test_buffers_that_the_authors_runner_leaves_in(minigpt, tmp_path):
    names = torch.load(minigpt.place(), weights_only=True)["model"]
    assert any(name.endswith("self_attn.rotary_emb.inv_freq") for name in names)

    def quantize(whole):
        stem = "llama_model.base_model.model.model.layers.0.self_attn.q_proj"
        whole["model"][f"{stem}.SCB"] = torch.ones(48)
        whole["model"][f"{stem}.weight_format"] = torch.tensor(0, dtype=torch.uint8)

    edit_whole(minigpt, quantize)
    minigpt.plan(tmp_path / "b")


@pytest.mark.parametrize("alpha", [8, 32.0])
def test_lora_is_scaled_by_the_checkpoints_own_alpha(minigpt, tmp_path, alpha):
    edit_whole(minigpt, lambda whole: whole["config"]["model"].update(lora_alpha=alpha))
    assert minigpt.plan(tmp_path / "b").spec.library_config.lora.alpha == alpha


def test_lora_without_settings_has_the_authors_alpha(minigpt, tmp_path):
    edit_whole(minigpt, lambda whole: whole.pop("config"))
    assert minigpt.plan(tmp_path / "b").spec.library_config.lora.alpha == 16


def test_lora_of_another_rank_than_the_settings_say(minigpt, tmp_path):
    edit_whole(minigpt, lambda whole: whole["config"]["model"].update(lora_r=64))
    message = refuse(minigpt, tmp_path / "b")
    assert message.startswith(f"{minigpt.place()}: tensor 'llama_model.base_model.model.model")
    assert "has rank 8, its settings say lora_r 64" in message


def test_lora_on_other_layers(minigpt, tmp_path):
    """`lora_target_modules` is a setting of the authors' code; two layers are its default."""
    stems = [
        f"layers.{k}.{name}" for k in range(3) for name in ("self_attn.k_proj", "mlp.up_proj")
    ]
    base = originals.read_folder(minigpt.place("language"))
    pairs = {}

    def add(whole):
        for stem in stems:
            rows, columns = base[f"model.{stem}.weight"].shape
            down, up = torch.randn(8, columns), torch.randn(rows, 8)
            pairs[stem] = (down, up)
            key = f"llama_model.base_model.model.model.{stem}"
            whole["model"] |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}

    edit_whole(minigpt, add)
    plan = minigpt.plan(tmp_path / "b")
    for stem, (down, up) in pairs.items():
        wanted = base[f"model.{stem}.weight"].double() + 24 / 8 * up.double() @ down.double()
        found = make_tensor(plan.sources[f"language_model.{stem}.weight"])
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


def test_a_tower_that_was_trained_with_the_rest(minigpt, tmp_path):
    """`freeze_vit: False`: their runner saves it too, and the file of EVA is not needed."""
    file = minigpt.place("vision")
    eva = torch.load(file, weights_only=True)
    trained = {
        name: 2 * value for name, value in eva.items() if not name.startswith(("head.", "norm."))
    }
    torch.save(eva | trained, file)

    def read(out):
        plan = minigpt.plan(tmp_path / out)
        pixels = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)
        eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
        values = {name: make_tensor(source) for name, source in plan.sources.items()}
        return values, eager.look(pixels, plan.spec.buckets[0]).patches

    expected, patches = read("a")
    inside = {f"visual_encoder.{name}": value.float() for name, value in trained.items()}
    edit_whole(minigpt, lambda whole: whole["model"].update(inside))
    file.unlink()
    del minigpt.overrides["parts.vision"]
    found, again = read("b")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value.float(), expected[name].float()) for name, value in found.items())
    assert torch.equal(patches, again)
