"""What an export is made of, as one hash: the same again would give the same bundle.

Nothing here loads torch, so that a bundle that is there already is recognised at once.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from gap_export.checkpoint.folder import list_files
from gap_export.checkpoint.index import locate_checkpoint, locate_part
from gap_export.config.load import settle_family
from gap_export.config.pruners import IVC, is_pruner_file
from gap_export.config.records import NamedConfig, PruneConfig
from gap_export.pipeline.request import ExportRequest
from gap_export.pipeline.result import ExportResult
from gap_export.reference.samples import SAMPLES_FILE, find_samples, read_samples
from gap_runtime.bundle.hashes import hash_bytes
from gap_runtime.bundle.manifest import FileEntry, Manifest
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.errors import ConfigError, GapError
from gap_runtime.grounding.check import CheckReport
from gap_runtime.machines.target import load_target
from gap_runtime.records import dump_record, load_record
from gap_runtime.records.files import expand, read_bytes
from gap_runtime.records.plain import read_json

IDENTITY_FILE: Final = "export.json"
_PACKAGES: Final = (
    *("gap-export", "gap-runtime", "torch", "transformers", "tokenizers", "safetensors"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime"),
)
_CODE: Final = ("gap_export", "gap_runtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """What a bundle remembers of its export.

    `parts` are the places of the checkpoint's parts, by role, that no setting names. `report` is
    the comparison with PyTorch, `note` says why there was none.
    """

    identity: str
    parts: dict[str, str]
    report: CheckReport | None = None
    note: str = ""

    def write(self, folder: Path) -> FileEntry:
        """Put it into a bundle that is being made."""
        data = (json.dumps(dump_record(self), indent=2, sort_keys=True) + "\n").encode()
        (folder / IDENTITY_FILE).write_bytes(data)
        return FileEntry(size=len(data), blake3=hash_bytes(data))


def identify(request: ExportRequest, parts: dict[str, str]) -> str | None:
    """The identity of an export; None where a file of it is not on this machine.

    A hash of the settings, the target, the versions and code of what exports, and place, size
    and time of every file of the checkpoint and its parts; not of their bytes.

    Args:
        request: What to export; its folder does not matter.
        parts: Places of parts, by role, that the settings do not name.
    """
    try:
        checkpoint = _locate(request.named)
        beside = checkpoint.parent if checkpoint.is_file() else checkpoint
        # As the export writes it down.
        named = settle_family(request.named, beside)
        facts = {
            "name": named.name,
            "config": dump_record(named.config),
            "pruner": describe_pruner(named.config.prune),
            "target": dump_record(load_target(request.target)),
            "bring": request.bring,
            "reference": request.reference,
            "versions": {name: _find_version(name) for name in _PACKAGES},
            "files": [
                (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
                for path in (
                    *list_files(checkpoint),
                    *_list_others(named, parts, beside, reference=request.reference),
                )
            ],
        }
    except (GapError, OSError):
        # The export itself says what is wrong with it.
        return None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def find_finished(request: ExportRequest) -> ExportResult | None:
    """The bundle that this export would only make again; None where there is none.

    Its files must be there and as long as they were. Without a folder in the request, those here
    that may have its name are looked at.
    """
    name, out = request.named.name, request.out
    # The usual name has counts in it that only the family knows, but the same export has the same.
    folders = sorted(Path().glob(f"{glob.escape(name)}-*of*")) if out is None else [expand(out)]
    for folder in folders:
        found = _read_whole(folder)
        if found is None:
            continue
        record, manifest = found
        if identify(request, record.parts) == record.identity:
            return ExportResult(
                folder=folder.resolve() if folder.is_symlink() else folder,
                manifest=manifest,
                report=record.report,
                note=record.note,
                plan=None,
            )
    return None


def _read_whole(folder: Path) -> tuple[ExportRecord, Manifest] | None:
    """What a bundle remembers and says, if it still has its name and its files their sizes."""
    path = folder / IDENTITY_FILE
    if not path.is_file():
        return None
    try:
        manifest = read_manifest(folder)
        record = load_record(ExportRecord, read_json(path, ConfigError), IDENTITY_FILE)
        sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    except (GapError, OSError, ValueError):
        return None
    whole = all(entry.size == sizes[name] for name, entry in manifest.files.items())
    if not whole or manifest.name != folder.resolve().name:
        return None
    return record, manifest


def describe_pruner(prune: PruneConfig) -> str:
    """A pruner's name; of a file of the user's, with the hash of its bytes."""
    if not is_pruner_file(prune.strategy):
        return prune.strategy
    path = Path(prune.strategy.removesuffix(IVC))
    return f"{prune.name}-{hash_bytes(read_bytes(path, ConfigError))}"


def _locate(named: NamedConfig) -> Path:
    """The checkpoint's folder or file, which must be on this machine."""
    config = named.config
    checkpoint = locate_checkpoint(config.checkpoint, config.revision)
    if checkpoint is None:
        raise FileNotFoundError
    return checkpoint


def _list_others(
    named: NamedConfig, parts: dict[str, str], beside: Path, *, reference: bool
) -> Iterator[Path]:
    """Files that decide what an export makes, besides the checkpoint's: its own code too."""
    config = named.config
    for _, location in sorted((parts | config.parts).items()):
        part = locate_part(location, beside) if location else None
        if location and part is None:
            raise FileNotFoundError
        if part is not None:
            yield from list_files(part)
    if reference:
        yield find_samples(config.check.samples) / SAMPLES_FILE
        yield from (sample.path for sample in read_samples(config.check.samples))
    for package in _CODE:
        spec = find_spec(package)
        for home in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(home).rglob("*.py"))


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
