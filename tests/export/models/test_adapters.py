"""LoRA: PEFT's adapters on a LLaVA, and the folders that its authors' training leaves."""

import json
from dataclasses import replace

import pytest
import torch
from makers import damage, originals
from makers.checkpoints import edit_tensors
from makers.families import export
from safetensors.torch import load_file, save_file
from tools.refusals import refuse

from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.sources import cut_pieces, make_tensor
from gap_export.config.load import load_config
from gap_export.errors import CheckpointError
from gap_export.models import llava, shikra
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_runtime import Bundle
from gap_runtime.errors import ConfigError
from gap_runtime.grounding.check import check_bundle

EVERY = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def require_same(plan, merged):
    """Every tensor of a plan is that of the merged model's plan, whole and row by row."""
    assert set(plan.sources) == set(merged.sources)
    changed = 0
    for name, source in plan.sources.items():
        wanted = make_tensor(merged.sources[name]).float()
        changed += source.make is not None
        torch.testing.assert_close(make_tensor(source).float(), wanted, rtol=1e-6, atol=1e-6)
        pieces = [make_tensor(piece).float() for piece in cut_pieces(source)]
        torch.testing.assert_close(torch.cat(pieces), wanted, rtol=1e-6, atol=1e-6)
    return changed


def merge_into(case, adapter, home):
    """The same with an adapter merged into its safetensors files by hand."""
    case = case.copy(home)
    merged = originals.merge_adapter(originals.read_folder(case.place()), adapter)
    edit_tensors(case.place(), lambda tensors: {key: merged[key].float() for key in tensors})
    return case


# An adapter of a whole model.


@pytest.mark.parametrize(
    "name", ["llava", "llava-next-vicuna", "llava-next-mistral", "internvl3", "internvl3.5"]
)
@pytest.mark.parametrize(
    "how",
    [
        {"layers": EVERY},
        {"layers": (*EVERY, "linear_1", "out_proj", "fc1"), "files": "bin", "dtype": "float16"},
        {"settings": {"use_rslora": True}, "patterns": {r"layers\.1\.self_attn\.q_proj": 2}},
    ],
    ids=["all", "old", "scaled"],
)
def test_an_adapter_is_merged(find, tmp_path, name, how):
    case = find(name)
    adapter = originals.make_adapter(tmp_path / "lora", case.place(), seed=3, **how)
    plan = case.plan(tmp_path / "a", parts__adapter=str(adapter))
    merged = merge_into(case, adapter, tmp_path / "home").plan(tmp_path / "b")
    pairs = sum(".lora_A." in key for key in originals.read_adapter(adapter))
    assert require_same(plan, merged) == pairs > 5


def test_what_was_trained_whole_stands_in(find, tmp_path):
    case = find("llava")
    saved = ("model.multi_modal_projector.linear_2.weight", "lm_head.weight")
    adapter = originals.make_adapter(tmp_path / "lora", case.place(), saved=saved)
    # As the library wrote them while they were in training.
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in saved:
        layer = f"base_model.model.{key.removesuffix('.weight')}"
        tensors[f"{layer}.modules_to_save.default.weight"] = tensors.pop(f"{layer}.weight")
    old = {key.replace("lora_A.", "lora_A.default."): value for key, value in tensors.items()}
    plan = case.plan(tmp_path / "a", parts__adapter=str(adapter))
    merged = merge_into(case, adapter, tmp_path / "home").plan(tmp_path / "b")
    require_same(plan, merged)
    save_file(old, path)
    plan = case.plan(tmp_path / "c", parts__adapter=str(adapter))
    require_same(plan, merged)


def test_names_of_an_older_library_on_files_of_a_newer_one(find, tmp_path):
    """`language_model.model.layers` became `model.language_model.layers` in 2025."""
    case = find("llava")
    adapter = originals.make_adapter(tmp_path / "lora", case.place())
    merged = merge_into(case, adapter, tmp_path / "home").plan(tmp_path / "b")
    path = adapter / "adapter_model.safetensors"
    old = {
        key.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower."
        ): value
        for key, value in load_file(path).items()
    }
    save_file(old, path)
    require_same(case.plan(tmp_path / "a", parts__adapter=str(adapter)), merged)


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param(name, memory, marks=() if (i + j) % 2 == 0 else pytest.mark.matrix)
        for i, name in enumerate(["llava", "llava-original", "llava-next-mistral", "internvl3"])
        for j, memory in enumerate([None, 20_000])
    ],
)
def test_pytorch_has_the_adapter_too(find, tmp_path, name, memory):
    case = find(name)
    layers = (*EVERY, "0", "linear_1")
    adapter = originals.make_adapter(tmp_path / "lora", case.place(), layers=layers)
    plan = case.plan(tmp_path / "a", parts__adapter=str(adapter))
    model = plan.family.load_eager(plan.checkpoint, plan.spec, "float32", memory=memory)
    plain = find(name).plan(tmp_path / "b")
    other = plain.family.load_eager(plain.checkpoint, plain.spec, "float32")
    rows = model.embed([5, 6, 7])
    assert torch.equal(rows, other.embed([5, 6, 7]))
    positions = torch.arange(3)[None]
    logits = model.run_decoder(rows, positions, model.start_cache())
    before = other.run_decoder(rows, positions, other.start_cache())
    assert float((logits - before).abs().max()) > 1e-2
    patches = torch.linspace(-1, 1, 2 * plan.spec.vision_width).reshape(2, -1)
    weights = {key: make_tensor(each).float() for key, each in plan.sources.items()}
    stem, hidden = "multi_modal_projector.linear", patches
    norm = "multi_modal_projector.layer_norm"
    if f"{norm}.weight" in weights:
        affine = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
        hidden = torch.nn.functional.layer_norm(patches, patches.shape[-1:], *affine)
    hidden = hidden @ weights[f"{stem}_1.weight"].T + weights[f"{stem}_1.bias"]
    hidden = torch.nn.functional.gelu(hidden)
    projected = hidden @ weights[f"{stem}_2.weight"].T + weights[f"{stem}_2.bias"]
    torch.testing.assert_close(model.project(patches), projected, rtol=1e-5, atol=1e-5)


def test_a_bundle_with_an_adapter_answers_as_pytorch_does(find, tmp_path):
    case = find("llava")
    adapter = originals.make_adapter(tmp_path / "lora", case.place(), layers=EVERY)
    plan = case.plan(
        tmp_path / "bundle", reference=True, parts__adapter=str(adapter), prune__ratios=[0.5]
    )
    export(plan)
    assert check_bundle(Bundle.open(tmp_path / "bundle")).passed


# The authors' folders.


@pytest.fixture
def lora(find, tmp_path):
    """The authors' folder of a training with LoRA from a plain language model."""
    case = find("llava-original").copy(tmp_path / "home")
    base = originals.make_vicuna(tmp_path / "lmsys" / "vicuna-7b-v1.5", case.place())
    folder = originals.make_llava_lora(
        tmp_path / "liuhaotian" / "llava-v1.5-7b-lora", case.place()
    )
    return replace(
        case,
        home=tmp_path,
        model=str(folder),
        overrides=case.overrides | {"parts.base": str(base)},
    )


def merge_by_hand(lora, home):
    """The whole model in the authors' layout that a folder of theirs comes to."""
    whole = originals.merge_adapter(originals.read_folder(lora.place("base")), lora.place())
    for key, value in torch.load(lora.place() / "non_lora_trainables.bin").items():
        whole["model." + key.removeprefix("base_model.model.model.")] = value.double()
    for path in lora.place("base").glob("*token*"):
        (home / path.name).write_bytes(path.read_bytes())
    (home / "config.json").write_bytes((lora.place() / "config.json").read_bytes())
    torch.save({k: v.float() for k, v in whole.items()}, home / "pytorch_model.bin")
    return replace(lora, model=str(home), overrides={**lora.overrides, "parts.base": ""})


def test_the_authors_lora_folder(lora, tmp_path):
    assert {path.name for path in lora.place().iterdir()} == {
        *("adapter_config.json", "adapter_model.bin", "config.json", "non_lora_trainables.bin"),
        *("README.md", "trainer_state.json"),
    }
    (tmp_path / "merged").mkdir()
    whole = merge_by_hand(lora, tmp_path / "merged").plan(tmp_path / "b")
    plan = lora.plan(tmp_path / "a")
    assert require_same(plan, whole) == 7 * plan.spec.decoder.layers
    # Its language model's tokenizer, as the authors' code takes.
    assert plan.tokenizer.to_str() == whole.tokenizer.to_str()
    assert plan.spec.template == whole.spec.template


def test_the_authors_lora_folder_in_pytorch(lora, tmp_path):
    (tmp_path / "merged").mkdir()
    whole = merge_by_hand(lora, tmp_path / "merged").plan(tmp_path / "b")
    plan = lora.plan(tmp_path / "a")
    models = [
        each.family.load_eager(each.checkpoint, each.spec, "float32") for each in (plan, whole)
    ]
    logits = [
        model.run_decoder(model.embed([5, 6, 7]), torch.arange(3)[None], model.start_cache())
        for model in models
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    picture = torch.linspace(-1, 1, 2 * plan.spec.vision_width).reshape(2, -1)
    torch.testing.assert_close(*[model.project(picture) for model in models])


def test_the_base_is_what_the_folder_names(lora, tmp_path):
    """`lmsys/vicuna-7b-v1.5`: looked for beside the folder, by its last name."""
    base = lora.place("base")
    base.rename(lora.place().parent / base.name)
    del lora.overrides["parts.base"]
    plan = lora.plan(tmp_path / "a")
    assert plan.checkpoint.parts["base"].folder == lora.place().parent / base.name


@pytest.mark.parametrize(
    ("prefix", "file"),
    [
        ("model.", "non_lora_trainables.bin"),
        ("model.model.", "non_lora_trainables.bin"),
        ("base_model.model.", "non_lora_trainables.bin"),
    ],
)
def test_prefixes_of_what_was_trained_besides(lora, tmp_path, prefix, file):
    """Versions of PEFT and of DeepSpeed left others; `model.` is the model's own."""
    before = lora.plan(tmp_path / "a").sources
    path = lora.place() / file
    values = {name: make_tensor(each) for name, each in before.items() if "projector" in name}
    tensors = torch.load(path)
    tensors = {
        (prefix + "model." if prefix == "base_model.model." else prefix)
        + key.removeprefix("base_model.model.model."): value
        for key, value in tensors.items()
    }
    torch.save(tensors, path)
    sources = lora.plan(tmp_path / "b").sources
    assert sources.keys() == before.keys()
    assert all(torch.equal(make_tensor(sources[name]), values[name]) for name in values)


def test_lora_on_a_llava_takes_its_projector_where_none_was_trained(lora, find, tmp_path):
    """An adapter beside a config, without `non_lora_trainables.bin`."""
    (lora.place() / "non_lora_trainables.bin").unlink()
    whole = find("llava-original")
    lora = replace(lora, overrides=lora.overrides | {"parts.base": str(whole.place())})
    plan, other = lora.plan(tmp_path / "a"), whole.plan(tmp_path / "b")
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(make_tensor(plan.sources[name]), make_tensor(other.sources[name]))


def test_the_first_stage_is_a_projector_alone(lora, tmp_path):
    place = lora.place()
    for name in ("adapter_config.json", "adapter_model.bin"):
        (place / name).unlink()
    bridge = torch.load(place / "non_lora_trainables.bin")
    (place / "non_lora_trainables.bin").unlink()
    bridge = {key.removeprefix("base_model.model."): each for key, each in bridge.items()}
    torch.save(bridge, place / "mm_projector.bin")
    plan = lora.plan(tmp_path / "a")
    found = plan.sources["multi_modal_projector.linear_2.weight"]
    assert torch.equal(make_tensor(found), bridge["model.mm_projector.2.weight"])
    table = originals.read_folder(lora.place("base"))["model.embed_tokens.weight"]
    assert torch.equal(make_tensor(plan.sources["language_model.embed_tokens.weight"]), table)
    parts = llava.find_parts(open_checkpoint(str(place)), text=False)
    assert parts["base"] == "lmsys/vicuna-7b-v1.5"


def test_a_base_that_was_loaded_in_four_bits_for_training(lora, tmp_path):
    path = lora.place() / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(data), encoding="utf-8")
    lora.plan(tmp_path / "a")


# Refused, in one line.


def edit_settings(folder, **values):
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "use_dora is on, which is not merged here; merge it with PEFT's"),
        ({"peft_type": "IA3"}, "an adapter of type IA3, expected LORA; merge it"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the weights of the base too; merge it"),
        ({"lora_alpha": None}, "r 4 and lora_alpha None, expected numbers; download the adapter"),
        ({"r": True}, "r True and lora_alpha 10, expected numbers; download the adapter"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan, expected a number; download the adapter"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "lora_alpha inf, expected a number"),
        ({"lora_alpha": 1e300}, "lora_alpha 1e+300, expected a number"),
        ({"r": 16}, "adapter_config.json says r 16; download the adapter again"),
    ],
)
def test_adapters_that_are_not_merged_here(find, tmp_path, values, said):
    case = find("llava")
    adapter = originals.make_adapter(tmp_path / "lora", case.place())
    edit_settings(adapter, **values)
    message = refuse(case, tmp_path / "b", CheckpointError, parts__adapter=str(adapter))
    assert str(adapter) in message
    assert said in message


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("{}.lora_embedding_A", "a kind of LoRA that is not merged here"),
        ("{}.lora_magnitude_vector.weight", "a kind of LoRA that is not merged here"),
        ("{}.lora_A.weight", "has no counterpart (lora_A, lora_B); download the adapter again"),
        ("base_model.model.wheel.weight", "is none that this model has"),
    ],
)
def test_tensors_of_an_adapter_that_fit_nowhere(find, tmp_path, key, said):
    case = find("llava")
    adapter = originals.make_adapter(tmp_path / "lora", case.place())
    path = adapter / "adapter_model.safetensors"
    key = key.format("base_model.model.model.language_model.layers.0.mlp.up_proj")
    save_file(load_file(path) | {key: torch.ones(4, 66)}, path)
    message = refuse(case, tmp_path / "b", CheckpointError, parts__adapter=str(adapter))
    assert str(adapter) in message
    assert f"'{key}'" in message
    assert said in message


@pytest.mark.parametrize(
    ("layer", "shape", "said"),
    [
        ("mlp.up_proj", (), "has shape [], expected that of a matrix; merge it with PEFT's"),
        ("mlp.up_proj", (4, 66, 1, 1), "has shape [4, 66, 1, 1], expected that of a matrix"),
        ("input_layernorm", (4, 66), "changes a weight of shape [66], expected a linear layer's"),
    ],
)
def test_matrices_that_are_none(find, tmp_path, layer, shape, said):
    case = find("llava")
    adapter = originals.make_adapter(tmp_path / "lora", case.place())
    path = adapter / "adapter_model.safetensors"
    key = f"base_model.model.model.language_model.layers.0.{layer}.lora_"
    pair = {f"{key}A.weight": torch.ones(shape), f"{key}B.weight": torch.ones(66, 4)}
    save_file(load_file(path) | pair, path)
    message = refuse(case, tmp_path / "b", CheckpointError, parts__adapter=str(adapter))
    assert str(adapter) in message
    assert said in message


def test_an_adapter_of_another_model(find, tmp_path):
    case = find("llava")
    adapter = originals.make_adapter(tmp_path / "lora", find("llava-next-vicuna").place())
    message = refuse(case, tmp_path / "b", CheckpointError, parts__adapter=str(adapter))
    assert str(adapter) in message
    assert "expected [4, 66]" in message


def test_a_whole_model_as_an_adapter(find, tmp_path):
    case = find("llava")
    message = refuse(case, tmp_path / "b", CheckpointError, parts__adapter=str(case.place()))
    assert message.startswith(f"{case.place()}: holds a whole model, expected an adapter")


def test_a_base_that_is_not_needed(find, tmp_path):
    case = find("llava")
    message = refuse(case, tmp_path / "b", CheckpointError, parts__base=str(case.place()))
    assert message.startswith(f"{case.place()}: holds a whole model, which needs no base")


@pytest.mark.parametrize(
    ("name", "role"), [("shikra", "base"), ("minigpt-v2", "language"), ("lora", "base")]
)
def test_an_adapter_as_the_model_that_is_changed(find, lora, tmp_path, name, role):
    case = lora if name == "lora" else find(name)
    adapter = originals.make_llava_lora(tmp_path / "other", find("llava-original").place())
    message = refuse(case, tmp_path / "b", CheckpointError, **{f"parts__{role}": str(adapter)})
    assert message.startswith(f"{adapter}: holds changes to a model (LoRA, or a projector alone)")
    assert f"expected a whole one as the part '{role}'; merge them first" in message
    assert f"--set parts.{role}=DIR" in message


def test_a_base_that_was_left_out(lora, tmp_path):
    message = refuse(lora, tmp_path / "b", CheckpointError, parts__base="")
    assert message == (
        f"{lora.place()}: holds changes to a model (LoRA, or the projector alone); give the model "
        "that it was trained from: --set parts.base=DIR"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_model.bin", "no adapter in it (adapter_model.safetensors or adapter_model.bin)"),
        ("adapter_config.json", "no adapter_config.json beside 'adapter_model.bin'"),
        ("config.json", "an adapter of PEFT, not a model; give the model and the adapter"),
    ],
)
def test_files_of_the_authors_folder_that_are_missing(lora, tmp_path, name, said):
    (lora.place() / name).unlink()
    kind = Exception if name == "config.json" else CheckpointError
    with pytest.raises(kind) as caught:
        lora.plan(tmp_path / "b")
    assert str(caught.value).startswith(str(lora.place()))
    assert said in str(caught.value)


def test_an_adapter_given_as_the_model(find, tmp_path):
    adapter = originals.make_adapter(tmp_path / "lora", find("llava").place())
    said = (
        f"{adapter}: an adapter of PEFT, not a model; give the model and the adapter: gap-export "
        f"NAME --checkpoint {find('llava').place()} --set parts.adapter={adapter}"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(adapter), {})
    assert str(caught.value) == said
    with pytest.raises(CheckpointError) as caught:
        plan_export(make_request("llava-1.5-7b", checkpoint=adapter))
    assert str(caught.value) == said


def test_a_family_that_merges_none(find, tmp_path, monkeypatch):
    monkeypatch.delitem(shikra.PARTS, "adapter")
    message = refuse(find("shikra"), tmp_path / "b", ConfigError, parts__adapter="x")
    assert "none is merged into a model of family 'shikra'" in message
    assert "merge_and_unload()" in message


def test_an_adapter_beside_whole_weights_is_told(find, tmp_path):
    """The library would take it, with the base that it names, if it were given this folder."""
    case = find("llava").copy(tmp_path / "home")
    adapter = originals.make_adapter(tmp_path / "lora", case.place())
    for path in adapter.iterdir():
        path.rename(case.place() / path.name)
    plan, file = case.plan(tmp_path / "a"), case.place() / "adapter_model.safetensors"
    (note,) = plan.spec.notes
    assert note.startswith(f"{file}: an adapter beside the weights of a whole model")
    assert note.endswith(f"--set parts.adapter={file}")
    merged = case.plan(tmp_path / "b", parts__adapter=str(file))
    assert merged.spec.notes == ()
    assert sum(source.make is not None for source in merged.sources.values()) > 5


@pytest.mark.parametrize("name", ["llava-original", "minigpt-v2"])
def test_differences_where_a_model_is_wanted(find, tmp_path, name):
    case = find(name).copy(tmp_path / "home")
    role = "language" if name == "minigpt-v2" else ""

    def zero(tensors):
        for key in tensors:
            if key.endswith("inv_freq"):
                tensors[key] = torch.zeros_like(tensors[key])

    damage.edit(case.place(role), zero)
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{case.place(role)}: holds differences to another model's weights")
