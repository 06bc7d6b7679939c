"""Every family's tensors, shards and files when one of them is damaged: one line each."""

import json

import pytest
import torch
from makers.damage import LORA, change_one, edit, weight_files
from makers.families import export
from tools.refusals import needs, refuse

from gap_export.checkpoint.sources import make_tensor
from gap_export.errors import CheckpointError, ExportError

UP = "model.layers.1.mlp.up_proj.weight"
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
        # A tensor that lies ready, one that is converted, and ones that are made of several.
        *(
            pytest.param(*place, float("nan"), marks=() if k % 3 == 0 else pytest.mark.matrix)
            for k, place in enumerate(NOT_FINITE)
        ),
        (*NOT_FINITE[0], float("inf")),
        pytest.param(*NOT_FINITE[-3], -float("inf"), marks=pytest.mark.matrix),
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
    assert export(case.plan(tmp_path / "b")).folder.is_dir()


def test_lora_that_a_layer_does_not_have(find, tmp_path):
    case = find("minigpt-v2").copy(tmp_path / "home")
    name = "layers.1.self_attn.v_proj"

    def remove(tensors):
        for half in "AB":
            del tensors[f"llama_model.base_model.model.model.{name}.lora_{half}.weight"]

    edit(case.place(), remove)
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{case.place()}: LoRA of '{name}' is missing")


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
        model.run_decoder(rows, torch.arange(3)[None], model.start_cache()) for model in models
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
