"""What the authors' savers write, name by name: lists of files that their code made.

Written down from their saving steps on small models, not from whole trainings: MiniGPT-4@d94738a's
runner with transformers 4.30.2 and peft 0.2.0; LLaVA@c121f04's script with transformers 4.37.2 and
peft 0.7.1.
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
