"""Files of a checkpoint's folder: its weights by every saver's names, and its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from gap_export.config.folders import describe_folder, describe_strays
from gap_export.errors import CheckpointError
from gap_runtime.records.files import is_file, refusal
from gap_runtime.records.plain import read_table

_LAYOUTS: Final = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Index and single file of a checkpoint folder, the preferred format first."""
TORCH_FILES: Final = ("*.bin", "*.pth", "*.pt")
NO_WEIGHTS: Final = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*")
ADAPTER_CONFIG: Final = "adapter_config.json"
_ADAPTERS: Final = ("adapter_model.safetensors", "adapter_model.bin")
BESIDE_ADAPTERS: Final = "non_lora_trainables.bin"
"""What training scripts save beside an adapter, in the model's own names."""
HUB_FILES: Final = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "tokenizer.model",
    "*.jinja",
    BESIDE_ADAPTERS,
)


def list_files(place: Path) -> list[Path]:
    """The files of a checkpoint's folder that an export may read; of a file, what lies beside."""
    folder = place.parent if is_file(place) else place
    patterns = HUB_FILES if is_file(place) else (*HUB_FILES, *TORCH_FILES)
    found = {path for pattern in patterns for path in folder.glob(pattern) if is_file(path)}
    return sorted(found | {place} if is_file(place) else found)


def list_weight_files(folder: Path) -> list[str]:
    """Names of a folder's weight files.

    Raises:
        CheckpointError: There are none, or shards are missing.
    """
    return list(find_weight_files(folder))


def find_weight_files(folder: Path, ignored: frozenset[str] = frozenset()) -> dict[str, set[str]]:
    """Weight files of a folder, each with the tensors that the index places in it."""
    for index, single in _LAYOUTS:
        if is_file(folder / index):
            return _placed_tensors(folder / index)
        if is_file(folder / single):
            return {single: set()}
    adapters = [name for name in _ADAPTERS if is_file(folder / name)][:1]
    if is_file(folder / BESIDE_ADAPTERS) and is_file(folder / ADAPTER_CONFIG):
        if not adapters:
            raise CheckpointError(
                f"{folder}: no adapter in it ({' or '.join(_ADAPTERS)}), though there is "
                f"{BESIDE_ADAPTERS}; download it again"
            )
        adapters.append(BESIDE_ADAPTERS)
    if adapters:
        return {name: set() for name in adapters}
    others = sorted(
        path.name
        for path in _list_folder(folder)
        if any(path.match(pattern) for pattern in TORCH_FILES)
        and not any(path.match(pattern) for pattern in NO_WEIGHTS)
        and path.name not in ignored
        and is_file(path)
    )
    if len(others) == 1:
        return {others[0]: set()}
    if others:
        raise CheckpointError(
            f"{folder}: {len(others)} files that may be the weights ({', '.join(others)}), "
            "expected one; name the file itself"
        )
    strays = describe_strays(folder)
    names = ", ".join(name for layout in _LAYOUTS for name in layout)
    advice = describe_folder(folder) or (
        f"no weights in it; {strays}"
        if strays
        else f"no weights in it (none of {names}, and no other {', '.join(TORCH_FILES)}); give a "
        "checkpoint folder or file"
    )
    raise CheckpointError(f"{folder}: {advice}")


def _list_folder(folder: Path) -> list[Path]:
    """What lies in a folder.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise refusal(folder, error, CheckpointError, "mend its permissions") from error


def _placed_tensors(index: Path) -> dict[str, set[str]]:
    """Files that an index names, each with its tensors."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; download the checkpoint again")
    files: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: no file name for '{key}'; download it again")
        files.setdefault(name, set()).add(key)
    for name in sorted(files):
        if not is_file(index.parent / name):
            raise CheckpointError(
                f"{index.parent / name}: shard is missing ({len(files[name])} tensors); "
                "download the checkpoint again"
            )
    return files


def refuse_pointer(head: bytes, shown: Path) -> None:
    """Refuse what Git leaves in the place of a large file that was not fetched.

    Raises:
        CheckpointError: The file begins as such.
    """
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{shown}: a pointer of Git LFS in place of the file; fetch it with `git lfs pull` or "
            "download it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: The file cannot be read, or is none.
    """
    return read_table(path, CheckpointError, advice="download it again")
