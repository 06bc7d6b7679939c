"""What people give by mistake, and what they are told: what it is, where, and what to do next.

Each folder holds only what decides what it is taken for; no weights are made.
"""

import json
import re

import pytest
import torch
from makers.originals.files import write_json
from safetensors.torch import save_file

from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_runtime.errors import GapError
from gap_runtime.registry import list_plugins

# Parts that lie on the hub are left out, so that nothing is asked for there.

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf", "r": 8}
LLAVA = {"model_type": "llava_llama", "mm_hidden_size": 1024}
PAIR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
STEPS = r"\b(give|download|merge|save|export with|name|leave|put|look at|shows|says)\b"
"""What a message asks for."""


def write_tensors(path, *keys):
    tensors = {key: torch.zeros(2, 2) for key in keys}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def peft_adapter(folder):
    write_json(folder / "adapter_config.json", ADAPTER)
    write_tensors(folder / "adapter_model.safetensors", PAIR)


def authors_lora(folder):
    write_json(folder / "config.json", LLAVA)
    write_json(folder / "adapter_config.json", ADAPTER | {"base_model_name_or_path": ""})
    write_tensors(folder / "adapter_model.bin", PAIR)
    write_tensors(folder / "non_lora_trainables.bin", "base_model.model.model.mm_projector.0.bias")


def authors_lora_without_adapter(folder):
    authors_lora(folder)
    (folder / "adapter_model.bin").unlink()


def projector_alone(folder):
    write_json(folder / "config.json", LLAVA | {"_name_or_path": ""})
    write_tensors(folder / "mm_projector.bin", "model.mm_projector.0.weight")


def later_llava(folder):
    write_json(folder / "config.json", LLAVA | {"image_aspect_ratio": "anyres"})
    write_tensors(folder / "pytorch_model.bin", "model.layers.0.mlp.up_proj.weight")


def hub_cache(folder):
    (folder / "snapshots" / "0123abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc", encoding="utf-8")


def folder_of_checkpoints(folder):
    for name in ("checkpoint-100", "checkpoint-200"):
        (folder / name).mkdir()
        write_json(folder / name / "config.json", {"model_type": "llava"})


def empty(folder):
    del folder


def config_alone(folder):
    write_json(folder / "config.json", {"model_type": "llava"})


def missing_shard(folder):
    config_alone(folder)
    name = "model-00001-of-00002.safetensors"
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a.weight": name}})


def two_files(folder):
    config_alone(folder)
    for name in ("a.pth", "b.pth"):
        write_tensors(folder / name, "a.weight")


def pointer(folder):
    config_alone(folder)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
    (folder / "model.safetensors").write_text(text, encoding="utf-8")


def pointer_of_torch(folder):
    config_alone(folder)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
    (folder / "pytorch_model.bin").write_text(text, encoding="utf-8")


def files(*names, config=True):
    """A maker of a folder with empty files, and with a config or without."""

    def make(folder):
        if config:
            config_alone(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")

    make.__name__ = f"{names[-1]}{'' if config else ' alone'}"
    return make


def lora_config(folder):
    """An adapter beside a config of the model, without what says how it is scaled."""
    config_alone(folder)
    write_tensors(folder / "adapter_model.safetensors", PAIR)


STRAYS = (
    (files("a.Q4_K_M.gguf"), "", "no weights in it; 'a.Q4_K_M.gguf' is a model for llama", "give"),
    (files("b.gguf", "a.gguf", config=False), "", "in it; 'a.gguf' (and 1 more) is a", "give the"),
    (files("epoch=1.ckpt"), "", "is a checkpoint of PyTorch Lightning", "save its state dict"),
    (files("flax_model.msgpack"), "", "'flax_model.msgpack' holds weights for Flax", "give the"),
    (files("tf_model.h5"), "", "holds weights for Flax or TensorFlow", "save_pretrained"),
    (files("model.onnx"), "", "a graph that was exported already", "give the checkpoint"),
    (files("model.safetensors.part"), "", "a download that was not finished", "download the"),
    (files(".cache/huggingface/download/x.incomplete"), "", "was not finished", "download the"),
    (files("llava.tar.gz"), "", "'llava.tar.gz' is an archive", "give the folder"),
    (files("global_step9/mp_rank_00_model_states.pt"), "", "DeepSpeed's ZeRO", "zero_to_fp32.py"),
    (files("pytorch_model_fsdp_0/__0_0.distcp"), "", "distributed checkpoint", "merge-weights"),
    (files("model-00001-of-00002.safetensors"), "", "no index names", "index.json too, or give"),
    (
        files("tokenizer.model", config=False),
        "",
        "is of a tokenizer alone",
        "download the weights",
    ),
    (files("checkpoint-9/model.safetensors"), "", "some in 1 of its folders", "checkpoint-9"),
    (files("consolidated.00.pth", "params.json", config=False), "", "its first release", "give"),
    (lora_config, "", "holds changes to a model (LoRA", "--set parts.base=DIR"),
)
CASES = (
    (peft_adapter, "", "an adapter of PEFT", "--set parts.adapter="),
    (authors_lora, "", "holds changes to a model", "--set parts.base=DIR"),
    (authors_lora_without_adapter, "", "no adapter in it", "download it again"),
    (projector_alone, "", "the projector alone", "--set parts.base=DIR"),
    (later_llava, "config.json", "LLaVA-NeXT (1.6) in its authors", "llava-hf/llava-v1.6"),
    (hub_cache, "", "the top of a hub cache", "snapshots/0123abc"),
    (folder_of_checkpoints, "", "in 2 of its folders", "checkpoint-200"),
    (empty, "", "no config.json in it", "--checkpoint"),
    (config_alone, "", "no weights in it", "give a checkpoint folder"),
    (missing_shard, "model-00001-of-00002", "shard is missing (1 tensors)", "download"),
    (two_files, "", "2 files that may be the weights (a.pth, b.pth)", "name the file itself"),
    (pointer, "model.safetensors", "a pointer of Git LFS", "git lfs pull"),
    (pointer_of_torch, "pytorch_model.bin", "a pointer of Git LFS", "git lfs pull"),
    *STRAYS,
)


def refuse(model, **options):
    with pytest.raises(GapError) as caught:
        plan_export(make_request(str(model), ratios=[0.5], **options))
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    assert re.search(STEPS, message), message
    return message


@pytest.mark.parametrize(
    ("make", "place", "what", "step"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_a_folder_that_is_no_model(tmp_path, make, place, what, step):
    folder = tmp_path / "given"
    folder.mkdir()
    make(folder)
    message = refuse(folder, settings={"parts.base": "", "parts.clip": ""})
    assert message.startswith(str(folder / place))
    assert what in message
    assert step in message


@pytest.mark.parametrize(
    ("name", "what", "step"),
    [
        ("a.gguf", "is a model for llama.cpp", "give the checkpoint that it was converted from"),
        ("llava.zip", "is an archive", "unpack it and give the folder"),
        ("model.safetensors", "a file of weights", "gap-export NAME --checkpoint"),
        ("minigptv2_checkpoint.pth", "a file of weights", "gap-export NAME --checkpoint"),
        ("config.json", "a file, expected a model's name", "give "),
    ],
)
def test_a_file_in_the_place_of_a_model(tmp_path, name, what, step):
    (tmp_path / name).write_bytes(b"")
    message = refuse(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: {what}")
    assert step in message


@pytest.mark.parametrize(
    ("head", "what"),
    [(b"GGUF\x03", "is a model for llama.cpp"), (b"", "the file is empty; download it again")],
)
def test_a_file_of_weights_that_is_none(tmp_path, head, what):
    (tmp_path / "x.bin").write_bytes(head)
    message = refuse("llava-1.5-7b", checkpoint=tmp_path / "x.bin")
    assert message.startswith(f"{tmp_path / 'x.bin'}: {what}")


@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "version https://git-lfs", "[]"])
def test_a_config_that_is_none(tmp_path, text):
    config_alone(tmp_path)
    write_tensors(tmp_path / "model.safetensors", "a.weight")
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    message = refuse("llava-1.5-7b", checkpoint=tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: not ")
    assert message.endswith("; download it again")


@pytest.mark.parametrize(
    "model_type",
    ["paligemma", "qwen2_vl", "gemma3", "llava_qwen", "llava_phi", "siglip", "phi3_v", "mllama"],
)
def test_a_model_of_another_family(tmp_path, model_type):
    write_json(tmp_path / "config.json", {"model_type": model_type})
    message = refuse(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: model_type '{model_type}' is none of")
    for family in list_plugins("gap_export.models"):
        assert family in message
    # The nearest way: a model's name that can be given, or where they are listed.
    assert re.search(r"; .*(`gap-export list`|gap-export \w|llava-hf/|--set|llava-next)", message)


def test_a_tensor_is_named_with_its_folder(tmp_path):
    """Base and delta may have files of one name."""
    config = {"model_type": "llava", "vision_config": {}, "text_config": {}}
    write_json(tmp_path / "config.json", config)
    tensors = {"a.weight": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(head) == ["a.weight"]
    (tmp_path / "model.safetensors").write_bytes(data[:-4])
    assert refuse(tmp_path).startswith(f"{tmp_path / 'model.safetensors'}: ")
