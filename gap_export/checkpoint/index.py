"""A checkpoint as an index of tensors: where each lies in which file. No values are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gap_export.checkpoint.config_values import require_values
from gap_export.checkpoint.folder import ADAPTER_CONFIG, find_weight_files, read_json
from gap_export.checkpoint.hub import download, find_snapshot, is_hub_id
from gap_export.checkpoint.safetensors_file import index_safetensors_file
from gap_export.checkpoint.tensor import FileIndex, TensorLocation
from gap_export.config.folders import describe_folder
from gap_export.errors import CheckpointError
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.records.files import exists, expand, is_file, is_folder, read_bytes, resolve


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
            digest.update(read_bytes(config, CheckpointError) if is_file(config) else b"")
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
        if not exists(path):
            return None
        data = read_json(path)
        # The words of a vocabulary may be anything.
        if not name.startswith("tokenizer"):
            require_values(data, str(path))
        return data

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
    path = expand(location)
    if exists(path):
        return _index_path(path, revision, ignored)
    advice = "a local checkpoint folder works too: gap-export FOLDER, or --checkpoint FOLDER"
    folder = None if fetch is None else fetch(location, revision, advice)
    if folder is not None:
        return _index_files(folder, find_weight_files(folder), location, folder.name)
    if not is_hub_id(location):
        raise CheckpointError(f"{location}: no such checkpoint folder or file")
    return _index_hub(location, revision, advice)


def locate_checkpoint(location: str, revision: str | None = None) -> Path | None:
    """Where `open_checkpoint` finds a checkpoint on this machine; None where it would download."""
    path = expand(location)
    if exists(path):
        return path
    return find_snapshot(location, revision) if is_hub_id(location) else None


def locate_part(location: str, beside: Path) -> Path | None:
    """Where `open_part` finds a part on this machine; None where it would download."""
    found = next((place for place in _part_places(location, beside) if exists(place)), None)
    if found is None and is_hub_id(location):
        return find_snapshot(location, None)
    return found


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
        if exists(place):
            return _index_path(place, None)
    looked = ", ".join(map(str, places)) or "nothing"
    advice = f"looked for {looked}; give it with --set parts.{role}=DIR"
    folder = None if fetch is None else fetch(location, None, advice)
    if folder is not None:
        return _index_files(folder, find_weight_files(folder), location, folder.name)
    if not is_hub_id(location):
        raise CheckpointError(f"{location or repr(location)}: no such part '{role}'; {advice}")
    return _index_hub(location, None, advice)


def _part_places(location: str, beside: Path) -> list[Path]:
    """Where a part may lie, without those that would be the checkpoint itself."""
    if not location:
        return []
    path = expand(location)
    names = [path] if path.name in {"", ".."} else [path, Path(path.name)]
    places = [path, *(base / name for base in (beside, beside.parent) for name in names)]
    return list(dict.fromkeys(places))


def _index_path(
    path: Path, revision: str | None, ignored: frozenset[str] = frozenset()
) -> Checkpoint:
    if not is_folder(path):
        return _index_files(path.parent, {path.name: set()}, None, revision)
    return _index_files(path, find_weight_files(path, ignored), None, revision)


def _index_hub(hub_id: str, revision: str | None, advice: str) -> Checkpoint:
    folder = download(hub_id, revision, advice)
    return _index_files(folder, find_weight_files(folder), hub_id, folder.name)


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
            found = _index_file(resolve(folder / name), folder / name)
        except (OSError, RuntimeError) as error:
            # A circle of links is a RuntimeError to pathlib.
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{folder / name}: cannot be read ({reason}); mend its permissions or download "
                "it again"
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


def _index_file(path: Path, shown: Path) -> FileIndex:
    """Tensors of one file, whose name in the folder tells its format."""
    return (index_safetensors_file if shown.suffix == ".safetensors" else _index_archive)(
        path, shown
    )


def _index_archive(path: Path, shown: Path) -> FileIndex:
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
    return FileIndex(tensors=tensors, unreadable=unreadable)
