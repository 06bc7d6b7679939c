"""LoRA adapters as PEFT saves them, and the folders of LLaVA's authors' training with LoRA."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from makers.originals.files import SPREAD, Draw, cast, linear, read_folder, write_json

_PREFIX = "base_model.model."


def make_adapter(
    folder,
    model,
    *,
    layers=("q_proj", "v_proj"),
    saved=(),
    rank=4,
    alpha=10,
    files="safetensors",
    dtype="float32",
    settings=None,
    patterns=None,
    spread=SPREAD,
    seed=0,
):
    """Make an adapter of a model in the module names of its files, and return its folder.

    Args:
        folder: Is created.
        model: Folder of the model that it was trained from.
        layers: Last words of the linear layers that have LoRA.
        saved: Tensors that are saved whole, as `modules_to_save` does.
        rank: Of LoRA.
        alpha: Of LoRA.
        files: `safetensors` (PEFT from 0.7 on) or `bin`.
        dtype: That it is stored in.
        settings: Further keys of `adapter_config.json`.
        patterns: Rank by layer, as `rank_pattern` has it.
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    draw, patterns, tensors = Draw(seed, spread), patterns or {}, {}
    for key, value in read_folder(model).items():
        layer = key.removesuffix(".weight")
        if value.ndim == 2 and layer.rpartition(".")[2] in layers:
            own = (each for name, each in patterns.items() if re.search(rf"{name}$", layer))
            chosen = next(own, rank)
            rows, columns = value.shape
            tensors[f"{_PREFIX}{layer}.lora_A.weight"] = draw.zero(chosen, columns)
            tensors[f"{_PREFIX}{layer}.lora_B.weight"] = draw.zero(rows, chosen)
        if key in saved:
            tensors[_PREFIX + key] = draw.zero(*value.shape)
    tensors = cast(tensors, dtype)
    if files == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": str(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "modules_to_save": sorted({key.split(".")[-2] for key in saved}) or None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": list(layers),
        "task_type": "CAUSAL_LM",
    }
    config |= {"rank_pattern": patterns} if patterns else {}
    write_json(folder / "adapter_config.json", config | (settings or {}))
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n", encoding="utf-8")
    return folder


def merge_adapter(tensors, folder):
    """A model's tensors with an adapter's merged, in float64, written plainly."""
    settings = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    own = read_adapter(folder)
    merged = {key: value.double() for key, value in tensors.items()}
    for key, value in own.items():
        name = key.removeprefix(_PREFIX)
        if ".lora_A." in key:
            down, up = value.double(), own[key.replace(".lora_A.", ".lora_B.")].double()
            root = len(down) ** 0.5 if settings.get("use_rslora") else len(down)
            weight = name.partition(".lora_A.")[0] + ".weight"
            merged[weight] = merged[weight] + settings["lora_alpha"] / root * up @ down
        elif ".lora_" not in key:
            merged[name] = value.double()
    return merged


def read_adapter(folder):
    """The tensors of an adapter's own file."""
    return read_folder(folder, "adapter_model*")


def make_llava_lora(folder, model, *, base="lmsys/vicuna-7b-v1.5", seed=0, **adapter):
    """Make what LLaVA's authors' script saves of a training with LoRA, and return its folder.

    The projector was trained whole and lies in `non_lora_trainables.bin`; the folder has no
    tokenizer, and the checkpoints of the trainer beside it.

    Args:
        folder: Is created.
        model: Folder of `make_llava_original`, whose config and sizes it has.
        base: What `adapter_config.json` calls the language model.
        seed: Of the weights.
        adapter: Of `make_adapter`.
    """
    folder, model = Path(folder), Path(model)
    every = tuple("qkvo")
    layers = tuple(f"{name}_proj" for name in (*every, "gate", "up", "down"))
    settings = {"base_model_name_or_path": base}
    chosen = {"layers": layers, "files": "bin", "dtype": "bfloat16", "settings": settings}
    make_adapter(folder, model, seed=seed, **(chosen | adapter))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"_name_or_path": base, "model_type": "llava_llama", "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", config)
    draw = Draw(seed + 1, SPREAD)
    width, vision = config["hidden_size"], config["mm_hidden_size"]
    bridge = linear(draw, "mm_projector.0", width, vision)
    bridge |= linear(draw, "mm_projector.2", width, width)
    bridge = {f"base_model.model.model.{key}": value for key, value in bridge.items()}
    torch.save(cast(bridge, "bfloat16"), folder / "non_lora_trainables.bin")
    write_json(folder / "trainer_state.json", {"global_step": 5194})
    return folder


def make_vicuna(folder, model):
    """Make the plain language model that a LLaVA was trained from, and return its folder."""
    folder, model = Path(folder), Path(model)
    folder.mkdir(parents=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(model / name, folder / name)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    plain = {key: value for key, value in config.items() if "mm_" not in key}
    plain |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    write_json(folder / "config.json", plain)
    shutil.copyfile(model / "generation_config.json", folder / "generation_config.json")
    tensors = {k: v for k, v in read_folder(model).items() if "mm_projector" not in k}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder
