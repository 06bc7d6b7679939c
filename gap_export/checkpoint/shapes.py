"""Checkpoints of which no value is here: configs, names and shapes, enough to plan an export.

    shapes.json   LOCATION -> {"dtype", "files": {NAME: config}, "tensors": {NAME: shape}, "ones"}

Models of export_configs/ are described there (made by benchmarks/shapes.py); `{32}` in a name
stands for the numbers 0 to 31, and tensors in `ones` are told by their values. Of any other
repository on the hub the small files are fetched, and of its weights the headers alone. Both
become folders of sparse files, which take no space and are indexed like real ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gap_export.checkpoint.folder import list_weight_files
from gap_export.checkpoint.hub import explain_failure, find_snapshot, is_hub_id
from gap_export.errors import CheckpointError
from gap_runtime.bundle.hub_library import library_failures
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.records.files import exists, expand

SHAPES_FILE: Final = Path(__file__).with_name("shapes.json")
_CODES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ONE: Final = bytes.fromhex("003c")
"""1.0 in float16."""
_SMALL_FILES: Final = ("*.json", "*.txt", "tokenizer.model", "*.jinja")


class ShapeSource:
    """Finds checkpoints that are not on this machine by their shapes; fits index.Fetch."""

    def __init__(self, home: Path) -> None:
        """Folders are made in `home`, which is to be removed when the plan is no longer used."""
        self._home = home
        self._packaged: dict[str, Any] = json.loads(SHAPES_FILE.read_text(encoding="utf-8"))

    def is_packaged(self, location: str, revision: str | None = None) -> bool:
        """Whether a checkpoint that is not here is known by its packaged shapes."""
        is_here = exists(expand(location)) or _find_whole(location, revision)
        return location in self._packaged and revision is None and not is_here

    def __call__(self, location: str, revision: str | None, advice: str) -> Path | None:
        """The folder of a checkpoint: real, where all of it is in the hub's cache, else of shapes.

        None where it is neither known nor a hub id.

        Raises:
            CheckpointError: The hub cannot be reached, or has no safetensors of it.
        """
        whole = _find_whole(location, revision)
        if whole is not None:
            return whole
        if self.is_packaged(location, revision):
            return self._write_packaged(location)
        return self._fetch(location, revision, advice) if is_hub_id(location) else None

    def _write_packaged(self, location: str) -> Path:
        known = self._packaged[location]
        folder = self._home / location.replace("/", "--")
        folder.mkdir(exist_ok=True)
        for name, data in known["files"].items():
            (folder / name).write_text(json.dumps(data), encoding="utf-8")
        dtype, entries, end = known["dtype"], {}, 0
        for name, shape in expand_names(known["tensors"]).items():
            start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            entries[name] = {
                "dtype": _CODES[dtype],
                "shape": shape,
                "data_offsets": [start, end],
            }
        write_sparse(folder / "model.safetensors", entries)
        for name in known.get("ones", ()):
            _write_ones(folder / "model.safetensors", entries[name])
        return folder

    def _fetch(self, hub_id: str, revision: str | None, advice: str) -> Path:
        """The small files of a repository, and placeholders by the headers of its weights."""
        from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415 - slow to import
        from huggingface_hub.errors import (  # noqa: PLC0415
            NotASafetensorsRepoError,
            SafetensorsParsingError,
        )

        failures: tuple[type[Exception], ...] = (*library_failures(), SafetensorsParsingError)
        try:
            small = snapshot_download(hub_id, revision=revision, allow_patterns=list(_SMALL_FILES))
            commit = Path(small).name
            files = HfApi().get_safetensors_metadata(hub_id, revision=commit).files_metadata
        except NotASafetensorsRepoError as error:
            raise CheckpointError(
                f"{hub_id}: has no safetensors, and shapes in other files are only told by the "
                f"whole of them; {advice}"
            ) from error
        except failures as error:
            raise explain_failure(hub_id, error, advice) from error
        folder = self._home / hub_id.replace("/", "--") / commit
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(small).iterdir():
            if path.is_file() and not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())
        for name, metadata in files.items():
            entries = {
                key: {
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "data_offsets": list(tensor.data_offsets),
                }
                for key, tensor in metadata.tensors.items()
            }
            write_sparse(folder / name, entries)
        return folder


def write_sparse(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """A safetensors file with its header and without values, which takes no space on disk."""
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + end)


def _write_ones(path: Path, entry: Mapping[str, Any]) -> None:
    """Give a tensor of float16 its usual value in a file without values."""
    start, end = entry["data_offsets"]
    with path.open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header + start)
        file.write(_ONE * ((end - start) // len(_ONE)))


def expand_names(tensors: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Shapes by name, of shapes by names in which `{n}` stands for 0 to n - 1."""
    found: dict[str, list[int]] = {}
    for name, shape in tensors.items():
        before, brace, rest = name.partition("{")
        count, _, after = rest.partition("}")
        numbers = range(int(count)) if brace else [""]
        found |= {f"{before}{k}{after}": shape for k in numbers}
    return found


def _find_whole(location: str, revision: str | None) -> Path | None:
    """The folder of a repository in the hub's cache, if its weights are all there."""
    folder = find_snapshot(location, revision) if is_hub_id(location) else None
    if folder is None:
        return None
    try:
        names = list_weight_files(folder)
    except CheckpointError:
        return None
    return folder if all(exists(folder / name) for name in names) else None
