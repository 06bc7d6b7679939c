"""What a folder or a file is in which no model was found, and what to give instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from gap_runtime.errors import ConfigError
from gap_runtime.records.files import exists, is_file, read_text

GGUF: Final = (
    "is a model for llama.cpp, whose weights are packed for it alone; give the checkpoint that it "
    "was converted from, with model.safetensors or pytorch_model.bin"
)
"""What is said of llama.cpp's files."""
_STRAYS: Final = (
    (
        ("*.gguf",),
        GGUF,
    ),
    (
        ("*.ckpt",),
        (
            "is a checkpoint of PyTorch Lightning; save its state dict under the model's own "
            "names: torch.save(torch.load(FILE)['state_dict'], 'pytorch_model.bin'), beside "
            "config.json"
        ),
    ),
    (
        ("*.msgpack", "*.h5", "saved_model.pb", "*.ckpt.index"),
        (
            "holds weights for Flax or TensorFlow; give the model's files for PyTorch, or load "
            "these with transformers 4 (from_flax=True, from_tf=True) and call save_pretrained"
        ),
    ),
    (
        ("*.onnx", "*.engine", "*.plan", "*.mlmodelc", "*.tflite", "openvino_*.xml"),
        "holds a graph that was exported already; give the checkpoint that it was made from",
    ),
    (
        (
            *("*.incomplete", ".cache/huggingface/download/*.incomplete"),
            *("*.part", "*.aria2", "*.crdownload", "*.download"),
        ),
        "is a download that was not finished; download the checkpoint again",
    ),
    (
        ("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z"),
        "is an archive; unpack it and give the folder that comes out",
    ),
    (
        ("*/mp_rank_*_model_states.pt", "*/*zero_pp_rank_*"),
        (
            "is a shard of DeepSpeed's ZeRO; join all with the zero_to_fp32.py that lies beside "
            "them and give the folder with what it writes, named pytorch_model.bin"
        ),
    ),
    (
        ("*.distcp", "*/*.distcp"),
        (
            "is a shard of a distributed checkpoint; join all with `accelerate merge-weights` "
            "and give the folder with what it writes"
        ),
    ),
    (
        ("*.safetensors",),
        (
            "holds weights that no index names; download model.safetensors.index.json too, or "
            "give one file alone: --checkpoint FILE"
        ),
    ),
    (
        ("tokenizer.json", "tokenizer.model", "vocab.json"),
        "is of a tokenizer alone; download the weights too and give the folder of both",
    ),
)
"""Names of files by which people's folders are known, the most telling first."""
_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pth", "*.pt")


def describe_folder(folder: Path) -> str | None:
    """What a folder is that is no model, and what to give instead; None where nothing is known."""
    if exists(folder / "config.json"):
        return None
    adapter = folder / "adapter_config.json"
    if is_file(adapter):
        text = read_text(adapter, ConfigError)
        found = re.search(r'"base_model_name_or_path":\s*"([^"]+)"', text)
        base = found[1] if found else "FOLDER"
        return (
            "an adapter of PEFT, not a model; give the model and the adapter: gap-export NAME "
            f"--checkpoint {base} --set parts.adapter={folder}"
        )
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        head = folder / "refs" / "main"
        commits = sorted(path.name for path in (folder / "snapshots").iterdir())
        commit = read_text(head, ConfigError).strip() if is_file(head) else ""
        chosen = commit if commit in commits else commits[-1] if commits else "COMMIT"
        return f"the top of a hub cache; give the files' folder: {folder / 'snapshots' / chosen}"
    if is_file(folder / "params.json") and _find(folder, ("consolidated*",)):
        return (
            "a language model in the layout of its first release (consolidated*, params.json); "
            "give the same in Hugging Face's layout, whose folder has config.json"
        )
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    # A folder with weights of its own may have its parts in folders.
    if inner and not holds_weights(folder):
        return (
            f"no config.json in it, but in {len(inner)} of its folders; give one, as {inner[-1]}"
        )
    return None


def describe_file(file: Path) -> str:
    """What a file is that was given in the place of a model, and what to give instead."""
    for patterns, advice in _STRAYS:
        if file.suffix != ".safetensors" and any(file.match(pattern) for pattern in patterns):
            return advice
    if any(file.match(pattern) for pattern in _WEIGHTS):
        return (
            "a file of weights, which does not tell the model; give its folder, or the model's "
            f"name and the file: gap-export NAME --checkpoint {file}"
        )
    return f"a file, expected a model's name, a .toml file or a folder; give {file.parent}"


def describe_strays(folder: Path) -> str | None:
    """What lies in a folder in the place of weights; None where nothing is known of it."""
    for patterns, advice in _STRAYS:
        found = _find(folder, patterns)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            return f"'{found[0].relative_to(folder)}'{more} {advice}"
    inner = sorted({path.parent for path in _find(folder, (f"*/{name}" for name in _WEIGHTS))})
    if inner:
        return f"there are some in {len(inner)} of its folders; give one, as {inner[-1]}"
    return None


def holds_weights(folder: Path) -> bool:
    """Whether files of weights lie in a folder itself, whatever they are called."""
    return bool(_find(folder, _WEIGHTS))


def _find(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})
