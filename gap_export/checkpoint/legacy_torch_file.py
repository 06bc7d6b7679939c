"""Torch files from before torch 1.6, and those that are still saved so on request.

    magic, version, facts of the machine, the object, keys of the storages:  a pickle each
    for each key:  how many values (8 bytes, little-endian), then the values

Newer tools write it with `_use_new_zipfile_serialization=False`. Values are skipped, not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch._weights_only_unpickler import Unpickler
from torch.storage import TypedStorage

from gap_export.checkpoint.torch_pickle import DAMAGE, Record, Skeleton, unpickling
from gap_export.errors import CheckpointError

MAGIC: Final = b"l\xfc\x9cF\xf9 j\xa8P\x19"
"""In the first pickle of every such file."""
_VERSION: Final = 1001
_COUNT_BYTES: Final = 8
# Their annotations are not whole.
_reader: Any = Unpickler
_bare_storage: Any = torch.UntypedStorage
_storage: Any = TypedStorage


class _Storages:
    """Storages without memory, numbered as they are asked for, by the file's keys."""

    def __init__(self) -> None:
        self.by_key: dict[str, TypedStorage] = {}
        self.sizes: list[int] = []
        """In bytes, by number."""

    def __call__(self, saved: Any) -> TypedStorage:
        """The storage that the pickle refers to: what, dtype, key, device, count, view."""
        _, kind, key, _, count, view = saved
        if view is not None:
            raise ValueError("a storage that is a view of another one")
        if key not in self.by_key:
            dtype = kind.dtype
            size = count * dtype.itemsize
            bare = _bare_storage(size, device="meta")
            # The same place in which torch keeps it for its newer format.
            bare._checkpoint_offset = len(self.sizes)  # noqa: SLF001
            self.sizes.append(size)
            self.by_key[key] = _storage(wrap_storage=bare, dtype=dtype, _internal=True)
        return self.by_key[key]


def load_legacy(file: BinaryIO, shown: Path) -> Skeleton:
    """What a file of that time holds, and where its storages lie.

    Args:
        file: At its start.
        shown: How errors name it.

    Raises:
        CheckpointError: It is damaged, of another machine's byte order, or asks for code to be
            run.
    """
    file.seek(0)
    storages = _Storages()
    with unpickling(shown):
        _unpickle(file)
        version, facts = _unpickle(file), _unpickle(file)
        if version != _VERSION:
            raise CheckpointError(
                f"{shown}: version {version!r:.20} of torch's old format, expected {_VERSION}; "
                "load it with torch and save it again with torch.save"
            )
        if not facts.get("little_endian", True):
            raise CheckpointError(
                f"{shown}: its values are not little-endian; save it again on this machine"
            )
        loaded = _unpickle(file, storages)
        keys = _unpickle(file)
    try:
        return Skeleton(loaded=loaded, records=_locate(file, keys, storages))
    except DAMAGE as error:
        raise CheckpointError(
            f"{shown}: cut short or damaged ({error}); download it again"
        ) from error


def _unpickle(file: BinaryIO, storages: _Storages | None = None) -> Any:
    """The next object of a file; torch's own reader knows tensors and plain values alone."""
    reader = _reader(file, encoding="utf-8")
    if storages is not None:
        reader.persistent_load = storages
    return reader.load()


def _locate(file: BinaryIO, keys: list[str], storages: _Storages) -> dict[int, Record]:
    """Where the values of each storage lie, by its number."""
    records: dict[int, Record] = {}
    offset, size = file.tell(), file.seek(0, 2)
    numbers = {key: number for number, key in enumerate(storages.by_key)}
    for key in keys:
        item = storages.by_key[key].dtype.itemsize
        file.seek(offset)
        count = int.from_bytes(file.read(_COUNT_BYTES), "little")
        offset += _COUNT_BYTES
        length = count * item
        if length != storages.sizes[numbers[key]] or offset + length > size:
            raise ValueError(f"storage {key!r:.30} needs {length} bytes from {offset} on")
        records[numbers[key]] = Record(offset=offset, size=length)
        offset += length
    if offset != size:
        raise ValueError(f"{size} bytes, expected {offset}")
    return records
