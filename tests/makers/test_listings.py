"""What the authors' savers write, name by name: lists of files that their code made.

Written down from their saving steps on small models, not from whole trainings: MiniGPT-4@d94738a's
runner with transformers 4.30.2 and peft 0.2.0; LLaVA@c121f04's script with transformers 4.37.2 and
peft 0.7.1; shikra@ff79a4c's trainer with transformers 4.30.2, and its weights halved.
"""

import json

import torch

from makers import originals

MINIGPT = {
    f"llama_model.base_model.model.model.layers.{layer}.self_attn.{name}": (dtype, shape)
    for layer in range(2)
    for name, dtype, shape in (
        ("q_proj.lora_A.weight", torch.float32, (8, 48)),
        ("q_proj.lora_B.weight", torch.float32, (48, 8)),
        ("v_proj.lora_A.weight", torch.float32, (8, 48)),
        ("v_proj.lora_B.weight", torch.float32, (48, 8)),
        ("rotary_emb.inv_freq", torch.float32, (6,)),
    )
} | {
    "llama_proj.weight": (torch.float32, (48, 704)),
    "llama_proj.bias": (torch.float32, (48,)),
}
LAYERS = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)


def describe(tensors):
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def test_minigpts_runner(tmp_path):
    """Trainable parameters and all buffers, in the order of the model's state dict."""
    made = originals.make_minigpt(tmp_path / "m")
    saved = torch.load(made.checkpoint, weights_only=True)
    assert list(describe(saved["model"]).items()) == list(MINIGPT.items())
    assert list(saved) == ["model", "optimizer", "config", "scaler", "epoch"]
    scaler = torch.amp.GradScaler("cpu").state_dict()
    assert list(saved["scaler"]) == list(scaler)
    assert [type(value) for value in saved["scaler"].values()] == [
        type(value) for value in scaler.values()
    ]


def test_llavas_training_with_lora(tmp_path):
    """Its parameters' names have no adapter's name, since PEFT's saver takes it away."""
    originals.make_clip(tmp_path / "clip", with_tokenizer=False)
    model = originals.make_llava_original(tmp_path / "llava", tmp_path / "clip")
    folder = originals.make_llava_lora(tmp_path / "lora", model)
    adapter = torch.load(folder / "adapter_model.bin", weights_only=True)
    assert set(adapter) == {
        f"base_model.model.model.layers.{layer}.{name}_proj.lora_{side}.weight"
        for layer in range(2)
        for name in LAYERS
        for side in "AB"
    }
    besides = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert list(besides) == [
        f"base_model.model.model.mm_projector.{place}.{kind}"
        for place in (0, 2)
        for kind in ("weight", "bias")
    ]
    every = (*adapter.values(), *besides.values())
    assert {value.dtype for value in every} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llava_llama"
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["bias"] == "none"
    assert sorted(settings["target_modules"]) == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]


def list_layers(mlp, dtype, *, buffers):
    """Names, dtypes and shapes of two layers of a Llama of 48 with four heads, in order."""
    for layer in range(2):
        stem = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{stem}.self_attn.{name}_proj.weight", dtype, (48, 48)
        if buffers:
            yield f"{stem}.self_attn.rotary_emb.inv_freq", torch.float32, (6,)
        for name in mlp:
            yield f"{stem}.mlp.{name}_proj.weight", dtype, (48, 80) if name == "down" else (80, 48)
        yield f"{stem}.input_layernorm.weight", dtype, (48,)
        yield f"{stem}.post_attention_layernorm.weight", dtype, (48,)


def list_clip(dtype):
    """The same of CLIP's tower of 32 with three layers."""
    stem = "model.vision_tower.vision_tower.vision_model"
    yield f"{stem}.embeddings.class_embedding", dtype, (32,)
    yield f"{stem}.embeddings.patch_embedding.weight", dtype, (32, 3, 14, 14)
    yield f"{stem}.embeddings.position_embedding.weight", dtype, (17, 32)
    for kind in ("weight", "bias"):
        yield f"{stem}.pre_layrnorm.{kind}", dtype, (32,)
    sides = {"mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}
    parts = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")]
    parts += ["layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"]
    for layer in range(3):
        for part in parts:
            shape = sides.get(part, (32, 32) if "self_attn" in part else (32,))
            yield f"{stem}.encoder.layers.{layer}.{part}.weight", dtype, shape
            yield f"{stem}.encoder.layers.{layer}.{part}.bias", dtype, shape[:1]
    for kind in ("weight", "bias"):
        yield f"{stem}.post_layernorm.{kind}", dtype, (32,)


def read_in_order(folder):
    """Names, dtypes and shapes of a folder's torch files, in their order."""
    for path in sorted(folder.glob("pytorch_model*.bin")):
        for name, value in torch.load(path, weights_only=True).items():
            yield name, value.dtype, tuple(value.shape)


def test_llavas_whole_training(tmp_path):
    """The frozen tower is saved too, before the projector; there are no buffers."""
    originals.make_clip(tmp_path / "clip", with_tokenizer=False)
    kind = {"model_type": "llava_llama", "dtype": "bfloat16", "with_vision_tower": True}
    folder = originals.make_llava_original(tmp_path / "a", tmp_path / "clip", **kind)
    half = torch.bfloat16
    wanted = [
        ("model.embed_tokens.weight", half, (400, 48)),
        *list_layers(("gate", "up", "down"), half, buffers=False),
        ("model.norm.weight", half, (48,)),
        *list_clip(half),
        ("model.mm_projector.0.weight", half, (48, 32)),
        ("model.mm_projector.0.bias", half, (48,)),
        ("model.mm_projector.2.weight", half, (48, 48)),
        ("model.mm_projector.2.bias", half, (48,)),
        ("lm_head.weight", half, (400, 48)),
    ]
    assert len(wanted) == 80
    assert list(read_in_order(folder)) == wanted
    folder = originals.make_llava_original(
        tmp_path / "b", tmp_path / "clip", files="safetensors", **kind
    )
    found = describe(originals.read_folder(folder))
    assert found == {name: (dtype, shape) for name, dtype, shape in wanted}


def test_shikras_trainer(tmp_path):
    """Rotary buffers lie behind attention, in float32 whatever the weights are in."""
    made = originals.make_shikra(tmp_path)
    half = torch.float16
    wanted = [
        ("model.embed_tokens.weight", half, (403, 48)),
        *list_layers(("gate", "down", "up"), half, buffers=True),
        ("model.norm.weight", half, (48,)),
        ("model.mm_projector.weight", half, (48, 32)),
        ("model.mm_projector.bias", half, (48,)),
        ("lm_head.weight", half, (403, 48)),
    ]
    assert list(read_in_order(made.delta)) == wanted
    plain = [
        (name, dtype, (400, *shape[1:]) if shape[0] == 403 else shape)
        for name, dtype, shape in wanted
        if "mm_projector" not in name
    ]
    assert list(read_in_order(made.base)) == plain
