"""A checkpoint as an index of tensors: where each lies in which file. No values are read."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from gap_export.config.families import describe_folder
from gap_export.errors import CheckpointError
from gap_runtime.bundle.tensors import ITEM_BYTES

if TYPE_CHECKING:
    import torch

_LAYOUTS: Final = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Index and single file of a checkpoint folder, the preferred format first."""
_DTYPES: Final = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "BOOL": "bool",
}
_TORCH_FILES: Final = ("*.bin", "*.pth", "*.pt")
_NO_WEIGHTS: Final = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*")
ADAPTER_CONFIG: Final = "adapter_config.json"
_ADAPTERS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE_ADAPTERS: Final = "non_lora_trainables.bin"
"""What training scripts save beside an adapter, in the model's own names."""
_HUB_FILES: Final = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "tokenizer.model",
    "*.jinja",
    _BESIDE_ADAPTERS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLocation:
    """A tensor in a file; `offset` in bytes from the start of the file.

    `shown` is how errors name the file: in its folder, where `file` may be a cache's blob.
    `strides` are in elements; None where the values lie in order, as they do in safetensors.
    """

    key: str
    file: Path
    shown: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def span(self) -> int:
        """Bytes of the file from the first value to the last; `length` where they lie in order."""
        if self.strides is None:
            return self.length
        steps = zip(self.shape, self.strides, strict=True)
        return (1 + sum((size - 1) * step for size, step in steps)) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint's folder, and the hub id that it was fetched by, if any.

    `unreadable` has the dtype of each tensor that no graph can use. `parts` are the further
    checkpoints that a model is made of, by role.
    """

    hub_id: str | None
    folder: Path
    revision: str | None
    tensors: dict[str, TensorLocation]
    unreadable: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Checkpoint] = field(default_factory=dict)

    @property
    def index_sha256(self) -> str:
        """SHA-256 of the config and the index of tensors, with the parts'; not of values."""
        digest = hashlib.sha256()
        for config in (self.folder / "config.json", self.folder / ADAPTER_CONFIG):
            digest.update(config.read_bytes() if config.is_file() else b"")
        for key in sorted(self.tensors):
            tensor = self.tensors[key]
            digest.update(f"{key} {tensor.file.name} {tensor.offset} ".encode())
            strides = "" if tensor.strides is None else f" {tensor.strides}"
            digest.update(f"{tensor.dtype} {tensor.shape}{strides}\n".encode())
        for role in sorted(self.parts):
            digest.update(f"{role} {self.parts[role].index_sha256}\n".encode())
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

    def require_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder.

        Raises:
            CheckpointError: The folder has no such file, or it is not a JSON object.
        """
        data = self.read_json(name)
        if data is None:
            advice = describe_folder(self.folder) or f"no {name} in it; give a checkpoint folder"
            raise CheckpointError(f"{self.folder}: {advice}")
        return data

    def require_part(self, role: str) -> Checkpoint:
        """A further checkpoint that the model cannot be made without.

        Raises:
            CheckpointError: It was left out.
        """
        if role not in self.parts:
            raise CheckpointError(
                f"{self.folder}: needs its part '{role}'; give it with --set parts.{role}=DIR"
            )
        return self.parts[role]


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileIndex:
    """Tensors of one file, and the dtypes of those that no graph can use."""

    tensors: dict[str, TensorLocation]
    unreadable: dict[str, str]


class Fetch(Protocol):
    """Another way than a download to come by a checkpoint that is not on this machine."""

    def __call__(self, location: str, revision: str | None, advice: str) -> Path | None:
        """Its folder; None where it is not known."""


def open_checkpoint(
    location: str,
    revision: str | None = None,
    *,
    ignored: frozenset[str] = frozenset(),
    fetch: Fetch | None = None,
) -> Checkpoint:
    """Index a folder's weight files, or one file, downloading the folder if it is a hub id.

    Args:
        location: A folder, a file or a hub id.
        revision: Commit, branch or tag on the hub.
        ignored: Names of other parts of the model that lie in the same folder.
        fetch: Asked for what is not on this machine, before the hub is.

    Raises:
        CheckpointError: No such folder or file, the hub cannot be reached, or a weight file is
            missing, cut short or not to be trusted.
    """
    path = Path(location).expanduser()
    if path.exists():
        return _index_path(path, revision, ignored)
    advice = "a local checkpoint folder works too: gap-export FOLDER, or --checkpoint FOLDER"
    folder = None if fetch is None else fetch(location, revision, advice)
    if folder is not None:
        return _index_files(folder, _weight_files(folder), location, folder.name)
    if not is_hub_id(location):
        raise CheckpointError(f"{location}: no such checkpoint folder or file")
    return _index_hub(location, revision, advice)


def locate_checkpoint(location: str, revision: str | None = None) -> Path | None:
    """Where `open_checkpoint` finds a checkpoint on this machine; None where it would download."""
    path = Path(location).expanduser()
    if path.exists():
        return path
    return find_snapshot(location, revision) if is_hub_id(location) else None


def locate_part(location: str, beside: Path) -> Path | None:
    """Where `open_part` finds a part on this machine; None where it would download."""
    found = next((place for place in _part_places(location, beside) if place.exists()), None)
    if found is None and is_hub_id(location):
        return find_snapshot(location, None)
    return found


def list_files(place: Path) -> list[Path]:
    """The files of a checkpoint's folder that an export may read; of a file, what lies beside."""
    folder = place.parent if place.is_file() else place
    patterns = _HUB_FILES if place.is_file() else (*_HUB_FILES, *_TORCH_FILES)
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found | {place} if place.is_file() else found)


def open_part(location: str, beside: Path, role: str, *, fetch: Fetch | None = None) -> Checkpoint:
    """Index a checkpoint that another one names as its part.

    Args:
        location: A path from the working folder, from `beside` or from its parent, of which the
            last component may be enough in the latter two; or a hub id.
        beside: Folder of the checkpoint that names the part.
        role: What the part is to that checkpoint.
        fetch: Asked for what is not on this machine, before the hub is.

    Raises:
        CheckpointError: Nothing is found, or it cannot be indexed.
    """
    places = _part_places(location, beside)
    for place in places:
        if place.exists():
            return _index_path(place, None)
    looked = ", ".join(map(str, places)) or "nothing"
    advice = f"looked for {looked}; give it with --set parts.{role}=DIR"
    folder = None if fetch is None else fetch(location, None, advice)
    if folder is not None:
        return _index_files(folder, _weight_files(folder), location, folder.name)
    if not is_hub_id(location):
        raise CheckpointError(f"{location or repr(location)}: no such part '{role}'; {advice}")
    return _index_hub(location, None, advice)


def list_weight_files(folder: Path) -> list[str]:
    """Names of a folder's weight files.

    Raises:
        CheckpointError: There are none, or shards are missing.
    """
    return list(_weight_files(folder))


def cut_rows(tensor: TensorLocation, start: int, stop: int) -> TensorLocation:
    """The place of some rows (first axis) of a tensor; of fewer where it ends before."""
    rows = tensor.shape[0]
    start, stop = min(start, rows), min(stop, rows)
    step = math.prod(tensor.shape[1:]) if tensor.strides is None else tensor.strides[0]
    return replace(
        tensor,
        offset=tensor.offset + start * step * ITEM_BYTES[tensor.dtype],
        shape=(stop - start, *tensor.shape[1:]),
    )


def read_tensor(tensor: TensorLocation) -> torch.Tensor:
    """One tensor's values; read, not mapped, so that its memory is given back.

    Raises:
        CheckpointError: The file has become shorter.
    """
    import torch  # noqa: PLC0415 - slow to import, and an index needs none of it

    data = torch.empty(tensor.span, dtype=torch.uint8)
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        read = file.readinto(data.numpy().data)
    if read != tensor.span:
        raise CheckpointError(
            f"{tensor.shown}: ends inside tensor '{tensor.key}'; was it changed while in use?"
        )
    values = data.view(getattr(torch, tensor.dtype))
    if tensor.strides is None:
        return values.reshape(tensor.shape)
    return values.as_strided(tensor.shape, tensor.strides).contiguous()


def _part_places(location: str, beside: Path) -> list[Path]:
    """Where a part may lie, without those that would be the checkpoint itself."""
    if not location:
        return []
    path = Path(location).expanduser()
    names = [path] if path.name in {"", ".."} else [path, Path(path.name)]
    places = [path, *(base / name for base in (beside, beside.parent) for name in names)]
    return list(dict.fromkeys(places))


def _index_path(
    path: Path, revision: str | None, ignored: frozenset[str] = frozenset()
) -> Checkpoint:
    if path.is_file():
        return _index_files(path.parent, {path.name: set()}, None, revision)
    return _index_files(path, _weight_files(path, ignored), None, revision)


def _index_hub(hub_id: str, revision: str | None, advice: str) -> Checkpoint:
    folder = _download(hub_id, revision, advice)
    return _index_files(folder, _weight_files(folder), hub_id, folder.name)


def _index_files(
    folder: Path, files: dict[str, set[str]], hub_id: str | None, revision: str | None
) -> Checkpoint:
    """Index files of a folder, each of which must hold the tensors named with it."""
    tensors: dict[str, TensorLocation] = {}
    unreadable: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, wanted in files.items():
        # A hub cache holds links into a blob store; graphs need the real file.
        try:
            found = _index_file((folder / name).resolve(), folder / name)
        except OSError as error:
            raise CheckpointError(
                f"{folder / name}: cannot be read ({error.strerror}); mend its permissions or "
                "download it again"
            ) from error
        keys = found.tensors.keys() | found.unreadable.keys()
        missing, repeated = sorted(wanted - keys), sorted(owners.keys() & keys)
        if missing:
            raise CheckpointError(
                f"{folder / name}: tensor '{missing[0]}' is missing, though the folder's index "
                "places it there; download the checkpoint again"
            )
        if repeated:
            raise CheckpointError(
                f"{folder / name}: tensor '{repeated[0]}' is in {owners[repeated[0]]} too, "
                "expected it once; download the checkpoint again"
            )
        owners |= dict.fromkeys(keys, name)
        tensors |= found.tensors
        unreadable |= found.unreadable
    return Checkpoint(
        hub_id=hub_id, folder=folder, revision=revision, tensors=tensors, unreadable=unreadable
    )


def _weight_files(folder: Path, ignored: frozenset[str] = frozenset()) -> dict[str, set[str]]:
    """Weight files of a folder, each with the tensors that the index places in it."""
    for index, single in _LAYOUTS:
        if (folder / index).is_file():
            return _placed_tensors(folder / index)
        if (folder / single).is_file():
            return {single: set()}
    adapters = [name for name in _ADAPTERS if (folder / name).is_file()][:1]
    if (folder / _BESIDE_ADAPTERS).is_file() and (folder / ADAPTER_CONFIG).is_file():
        if not adapters:
            raise CheckpointError(
                f"{folder}: no adapter in it ({' or '.join(_ADAPTERS)}), though there is "
                f"{_BESIDE_ADAPTERS}; download it again"
            )
        adapters.append(_BESIDE_ADAPTERS)
    if adapters:
        return {name: set() for name in adapters}
    others = sorted(
        path.name
        for path in folder.iterdir()
        if any(path.match(pattern) for pattern in _TORCH_FILES)
        and not any(path.match(pattern) for pattern in _NO_WEIGHTS)
        and path.name not in ignored
        and path.is_file()
    )
    if len(others) == 1:
        return {others[0]: set()}
    if others:
        raise CheckpointError(
            f"{folder}: {len(others)} files that may be the weights ({', '.join(others)}), "
            "expected one; name the file itself"
        )
    names = ", ".join(name for layout in _LAYOUTS for name in layout)
    advice = describe_folder(folder) or (
        f"no weights in it (none of {names}, and no other {', '.join(_TORCH_FILES)}); give a "
        "checkpoint folder or file"
    )
    raise CheckpointError(f"{folder}: {advice}")


def _placed_tensors(index: Path) -> dict[str, set[str]]:
    """Files that an index names, each with its tensors."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; download the checkpoint again")
    files: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: no file name for '{key}'; download it again")
        files.setdefault(name, set()).add(key)
    for name in sorted(files):
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name}: shard is missing ({len(files[name])} tensors); "
                "download the checkpoint again"
            )
    return files


def _index_file(path: Path, shown: Path) -> _FileIndex:
    """Tensors of one file, whose name in the folder tells its format."""
    return (_read_header if shown.suffix == ".safetensors" else _read_archive)(path, shown)


def _read_archive(path: Path, shown: Path) -> _FileIndex:
    """Tensors of one torch file."""
    from gap_export.checkpoint.torch_file import index_torch_file  # noqa: PLC0415 - imports torch

    tensors: dict[str, TensorLocation] = {}
    unreadable: dict[str, str] = {}
    for key, found in index_torch_file(path, shown).items():
        if found.dtype not in ITEM_BYTES:
            unreadable[key] = found.dtype
            continue
        tensor = TensorLocation(
            key=key,
            file=path,
            shown=shown,
            offset=found.offset,
            dtype=found.dtype,
            shape=found.shape,
            strides=found.strides,
        )
        room = max(found.room, 0)
        if tensor.span > room:
            raise CheckpointError(
                f"{shown}: tensor '{key}' of shape {list(tensor.shape)} needs {tensor.span} "
                f"bytes, found {room}; the file is damaged, download it again"
            )
        tensors[key] = tensor
    return _FileIndex(tensors=tensors, unreadable=unreadable)


def _read_header(path: Path, shown: Path) -> _FileIndex:
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
                    shown=shown,
                    offset=start + entry["data_offsets"][0],
                    dtype=_DTYPES[entry["dtype"]],
                    shape=tuple(entry["shape"]),
                )
                for key, entry in entries.items()
                if entry["dtype"] in _DTYPES
            }
            # Quantized or index tensors that no graph asks for are no reason to stop.
            unreadable = {
                key: str(entry["dtype"]) for key, entry in entries.items() if key not in tensors
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
    return _FileIndex(tensors=tensors, unreadable=unreadable)


def is_hub_id(location: str) -> bool:
    """Whether a location that is no path here may be a repository on the hub."""
    is_file = Path(location).suffix in {".safetensors", ".bin", ".pth", ".pt"}
    return "/" in location and not location.startswith((".", "/", "~")) and not is_file


def find_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The folder of a hub repository in the local cache; None where it is not there.

    Written out here, because the library's own function takes long to import.
    """
    from huggingface_hub import constants  # noqa: PLC0415 - only where a hub id is given

    home = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    revision = revision or "main"
    name = home / "refs" / revision
    commit = name.read_text(encoding="utf-8").strip() if name.is_file() else revision
    folder = home / "snapshots" / commit
    return folder if folder.is_dir() else None


def _download(hub_id: str, revision: str | None, advice: str) -> Path:
    """A hub repository in the local cache, in a folder that has its commit for a name."""
    from huggingface_hub import (  # noqa: PLC0415 - only where a hub id is given
        constants,
        snapshot_download,
    )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    try:
        folder = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(_HUB_FILES))
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(
                hub_id,
                revision=folder.name,
                allow_patterns=list(_TORCH_FILES),
                ignore_patterns=[*_NO_WEIGHTS, "*/*"],
            )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            reason = "it is not in the cache here, and HF_HUB_OFFLINE is set; unset it to download"
            raise CheckpointError(f"{hub_id}: {reason}; {advice}") from error
        # The first sentence, whole: the library's go on about its own arguments.
        reason = next(iter(str(error).splitlines()), "").partition(". ")[0]
        reason = reason or type(error).__name__
        raise CheckpointError(
            f"{hub_id}: cannot be fetched from the hub ({reason:.300}); {advice}"
        ) from error
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data
