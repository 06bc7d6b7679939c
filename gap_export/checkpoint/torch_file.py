"""Torch's files as an index of tensors. No values are read and no pickled code is run."""

from __future__ import annotations

import io
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from gap_export.checkpoint.folder import refuse_pointer
from gap_export.checkpoint.legacy_torch_file import MAGIC, load_legacy
from gap_export.checkpoint.torch_pickle import DAMAGE, Record, Skeleton, is_plain, unpickling
from gap_export.config.folders import GGUF
from gap_export.errors import CheckpointError
from gap_runtime.records.files import open_file

_CONTAINERS: Final = ("model", "state_dict", "module")
"""Where training scripts keep the state dict, beside the optimizer's and others."""
_WRAPPER: Final = "module."
"""Before all names where the model was saved in its wrapper for several GPUs (DDP)."""
_LOCAL_HEADER: Final = 30
"""Bytes of a zip record's header before its name, whose last four are two lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchTensor:
    """A tensor of a torch file, of which `room` bytes from `offset` (bytes) on may be its own.

    `strides` are in elements, None where the values lie in order. A tensor that has no plain
    values in the file has a `dtype` that says so, and no room.
    """

    offset: int
    room: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None


def index_torch_file(path: Path, shown: Path) -> dict[str, TorchTensor]:
    """Tensors of a file of torch.save by their keys in its state dict.

    Args:
        path: The file.
        shown: How errors name it.

    Raises:
        CheckpointError: The file is cut short or no torch file at all, asks for code to be run,
            or holds no tensors.
    """
    skeleton = _load(path, shown)
    state = _without_wrapper(_find_state(skeleton.loaded, shown))
    return {
        key: _describe(value, skeleton.records)
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }


def read_settings(path: Path, shown: Path) -> dict[str, Any]:
    """What a training script saved beside the state dict under `config`; empty without it.

    Args:
        path: The file.
        shown: How errors name it.

    Raises:
        CheckpointError: As `index_torch_file` does.
    """
    loaded = _load(path, shown).loaded
    settings = loaded.get("config") if isinstance(loaded, dict) else None
    return settings if isinstance(settings, dict) else {}


def _load(path: Path, shown: Path) -> Skeleton:
    """What a torch file holds, in either of torch's formats."""
    with open_file(path, CheckpointError, advice="download it again") as file:
        head = file.read(64)
        refuse_pointer(head, shown)
        if MAGIC in head:
            return load_legacy(file, shown)
        if head.startswith(b"GGUF"):
            raise CheckpointError(f"{shown}: {GGUF}")
        if not head:
            raise CheckpointError(f"{shown}: the file is empty; download it again")
        if not head.startswith(b"PK"):
            raise CheckpointError(
                f"{shown}: not a file of torch.save (it starts with {head[:8]!r}); download it "
                "again"
            )
        pickled, records = _read_archive(file, shown)
    archive, places = _build_skeleton(pickled, records)
    with unpickling(shown, plain=is_plain(pickled)):
        # "meta" keeps the pickle from GPUs and from memory.
        loaded = torch.load(archive, map_location="meta", weights_only=True)
    return Skeleton(loaded=loaded, records=places)


def _read_archive(file: BinaryIO, shown: Path) -> tuple[bytes, dict[str, Record]]:
    """The pickle of a torch file, and where each of its storages lies."""
    try:
        with zipfile.ZipFile(file) as archive:
            prefix = _find_prefix(archive, shown)
            start = f"{prefix}/data/"
            records = {
                info.filename.removeprefix(start): _locate(file, info, archive.start_dir)
                for info in archive.infolist()
                if info.filename.startswith(start)
            }
            return archive.read(f"{prefix}/data.pkl"), records
    except DAMAGE as error:
        raise CheckpointError(
            f"{shown}: cut short or damaged ({error}); download it again"
        ) from error


def _find_prefix(archive: zipfile.ZipFile, shown: Path) -> str:
    """The folder inside a zip file that torch wrote."""
    names = set(archive.namelist())
    prefixes = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{shown}: a zip file with {len(prefixes)} data.pkl, expected one; give a file of "
            "torch.save"
        )
    prefix = prefixes[0]
    if f"{prefix}/constants.pkl" in names:
        raise CheckpointError(
            f"{shown}: a TorchScript archive, expected a state dict; save its state_dict() with "
            "torch.save"
        )
    order = f"{prefix}/byteorder"
    if order in names and archive.read(order) != sys.byteorder.encode():
        raise CheckpointError(
            f"{shown}: its values are not {sys.byteorder}-endian; save it again on this machine"
        )
    return prefix


def _locate(file: BinaryIO, info: zipfile.ZipInfo, end: int) -> Record:
    """Where a record's bytes lie, which must be as they are and before `end`."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename!r} is compressed")
    offset = _data_offset(file, info)
    if offset + info.file_size > end:
        raise ValueError(f"{info.filename!r} needs {info.file_size} bytes from {offset} on")
    return Record(offset=offset, size=info.file_size)


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Offset of a record's first byte; only the header before it tells how long that is."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"no {info.filename!r} at {info.header_offset}")
    name, extra = header[-4:-2], header[-2:]
    return (
        info.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(name, "little")
        + int.from_bytes(extra, "little")
    )


def _build_skeleton(
    pickled: bytes, records: dict[str, Record]
) -> tuple[BinaryIO, dict[int, Record]]:
    """The archive with empty storages, and the real record for each offset in it.

    Without reading values, torch guesses a storage's offset from the sizes of those before it,
    which is wrong where another tool wrote the records. Of an archive that does not say that
    torch's own writer made it, torch looks each offset up.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3\n")
        for key in records:
            archive.writestr(f"a/data/{key}", b"")
        infos = archive.infolist()[2:]
    places = {
        _data_offset(buffer, info): record
        for info, record in zip(infos, records.values(), strict=True)
    }
    buffer.seek(0)
    return buffer, places


def _find_state(loaded: Any, shown: Path) -> dict[Any, Any]:
    """The state dict: what was saved itself, or what lies under a usual name in it."""
    if isinstance(loaded, dict):
        inner = [loaded.get(name) for name in _CONTAINERS]
        is_state = 2 * _count_tensors(loaded) > len(loaded)
        for candidate in [loaded, *inner] if is_state else [*inner, loaded]:
            if isinstance(candidate, dict) and _count_tensors(candidate):
                return candidate
    found = f"a {type(loaded).__name__}"
    if isinstance(loaded, dict):
        found = f"a dict of {len(loaded)} ({', '.join(f'{key!r:.40}' for key in [*loaded][:5])})"
    raise CheckpointError(
        f"{shown}: no tensors in it but {found}, expected a dict of tensors, alone or under "
        f"{', '.join(map(repr, _CONTAINERS))}; save one with torch.save"
    )


def _without_wrapper(state: dict[Any, Any]) -> dict[Any, Any]:
    """A state dict by the names of the model itself."""
    if all(isinstance(key, str) and key.startswith(_WRAPPER) for key in state):
        return {key.removeprefix(_WRAPPER): value for key, value in state.items()}
    return state


def _count_tensors(state: dict[Any, Any]) -> int:
    return sum(isinstance(value, torch.Tensor) for value in state.values())


def _describe(tensor: torch.Tensor, places: dict[int, Record]) -> TorchTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_nested or tensor.layout != torch.strided:
        return _without_values(f"{tensor.layout} {dtype}".removeprefix("torch."))
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if not isinstance(place, int) or place not in places:
        return _without_values(f"{dtype} without values")
    if tensor.is_neg():
        return _without_values(f"negated {dtype}")
    record, skipped = places[place], int(tensor.storage_offset()) * tensor.element_size()
    return TorchTensor(
        offset=record.offset + skipped,
        room=record.size - skipped,
        dtype=dtype,
        shape=tuple(tensor.shape),
        strides=None if tensor.is_contiguous() else tensor.stride(),
    )


def _without_values(dtype: str) -> TorchTensor:
    return TorchTensor(offset=0, room=0, dtype=dtype, shape=(), strides=None)
