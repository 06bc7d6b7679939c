"""A checkpoint as an index of tensors: where each lies in which file. No values are read."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gap_export.errors import CheckpointError
from gap_runtime.tensors import ITEM_BYTES

_INDEX_FILE: Final = "model.safetensors.index.json"
_SINGLE_FILE: Final = "model.safetensors"
_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
_HUB_FILES: Final = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLocation:
    """A tensor in a safetensors file; `offset` in bytes from the start of the file."""

    key: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A Hugging Face checkpoint folder, and the hub id that it was fetched by, if any."""

    hub_id: str | None
    folder: Path
    revision: str | None
    tensors: dict[str, TensorLocation]

    @property
    def index_sha256(self) -> str:
        """SHA-256 of the config and the index of tensors; knows nothing of the values."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for key in sorted(self.tensors):
            tensor = self.tensors[key]
            digest.update(f"{key} {tensor.file.name} {tensor.offset} ".encode())
            digest.update(f"{tensor.dtype} {tensor.shape}\n".encode())
        return digest.hexdigest()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where it has none.

        Raises:
            CheckpointError: The file is not a JSON object.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        return _read_json(path)


def open_checkpoint(location: str, revision: str | None = None) -> Checkpoint:
    """Index a folder's safetensors files, downloading the folder first if it is a hub id.

    Raises:
        CheckpointError: No such folder, the hub cannot be reached, or a file is missing or cut
            short.
    """
    folder = Path(location).expanduser()
    if not folder.is_dir():
        folder, revision = _download(location, revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; give a checkpoint folder")
    tensors: dict[str, TensorLocation] = {}
    for name, wanted in _weight_files(folder).items():
        # A hub cache holds links into a blob store; graphs need the real file.
        found = _read_header((folder / name).resolve(), folder / name)
        missing = sorted(wanted - set(found))
        if missing:
            raise CheckpointError(
                f"{folder / name}: tensor '{missing[0]}' is missing, though {_INDEX_FILE} places "
                "it there; download the checkpoint again"
            )
        tensors |= found
    return Checkpoint(
        hub_id=None if Path(location).expanduser().is_dir() else location,
        folder=folder,
        revision=revision,
        tensors=tensors,
    )


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """Safetensors files of a folder, each with the tensors that the index places in it."""
    index = folder / _INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no weight_map in it; download the checkpoint again")
        files: dict[str, set[str]] = {}
        for key, name in weight_map.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{index}: no file name for '{key}'; download it again")
            files.setdefault(name, set()).add(key)
        for name in sorted(files):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name}: shard is missing ({len(files[name])} tensors); "
                    "download the checkpoint again"
                )
        return files
    if (folder / _SINGLE_FILE).is_file():
        return {_SINGLE_FILE: set()}
    raise CheckpointError(
        f"{folder}: neither {_SINGLE_FILE} nor {_INDEX_FILE} in it; "
        "give a checkpoint folder with safetensors weights"
    )


def _read_header(path: Path, shown: Path) -> dict[str, TensorLocation]:
    """Tensors of one safetensors file, which must be as long as its header says.

    The safetensors library does not tell where a tensor lies in the file, so the header (its
    length in 8 bytes, then JSON) is read here.
    """
    size = path.stat().st_size
    advice = "the file is cut short or no safetensors file; download it again"
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise CheckpointError(f"{shown}: {size} bytes hold no complete header; {advice}")
        try:
            header = json.loads(file.read(start - 8))
            entries = {key: value for key, value in header.items() if key != "__metadata__"}
            end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            tensors = {
                key: TensorLocation(
                    key=key,
                    file=path,
                    offset=start + entry["data_offsets"][0],
                    dtype=_DTYPES[entry["dtype"]],
                    shape=tuple(entry["shape"]),
                )
                for key, entry in entries.items()
                # Quantized or index tensors that no graph asks for are no reason to stop.
                if entry["dtype"] in _DTYPES
            }
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise CheckpointError(f"{shown}: its header cannot be read; {advice}") from error
    if end != size:
        raise CheckpointError(f"{shown}: {size} bytes, expected {end}; {advice}")
    for key, tensor in tensors.items():
        first, last = entries[key]["data_offsets"]
        if min(tensor.shape, default=0) < 0 or tensor.length != last - first:
            raise CheckpointError(
                f"{shown}: tensor '{key}' of shape {list(tensor.shape)} lies in "
                f"{last - first} bytes; {advice}"
            )
    return tensors


def _download(hub_id: str, revision: str | None) -> tuple[Path, str | None]:
    """A hub repository in the local cache, and the commit that it is at."""
    if "/" not in hub_id or hub_id.startswith((".", "/", "~")):
        raise CheckpointError(f"{hub_id}: no such checkpoint folder")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only where a hub id is given
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    try:
        folder = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(_HUB_FILES))
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{hub_id}: cannot be fetched from the hub ({reason:.120}); a local checkpoint folder "
            "works too: gap-export FOLDER, or --checkpoint FOLDER"
        ) from error
    return folder, folder.name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data
