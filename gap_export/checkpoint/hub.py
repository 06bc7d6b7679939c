"""Checkpoints on the hub: their ids, the local cache, the download."""

from __future__ import annotations

from pathlib import Path

from gap_export.checkpoint.folder import HUB_FILES, NO_WEIGHTS, TORCH_FILES
from gap_export.errors import CheckpointError
from gap_runtime.bundle.hub_library import describe_failure, library_failures, load_constants
from gap_runtime.records.files import is_file, is_folder, read_text


def is_hub_id(location: str) -> bool:
    """Whether a location that is no path here may be a repository on the hub."""
    is_file = Path(location).suffix in {".safetensors", ".bin", ".pth", ".pt"}
    return "/" in location and not location.startswith((".", "/", "~")) and not is_file


def find_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The folder of a hub repository in the local cache; None where it is not there.

    Written out here, because the library's own function takes long to import.
    """
    home = Path(load_constants().HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    revision = revision or "main"
    name = home / "refs" / revision
    commit = read_text(name, CheckpointError).strip() if is_file(name) else revision
    folder = home / "snapshots" / commit
    return folder if is_folder(folder) else None


def download(hub_id: str, revision: str | None, advice: str) -> Path:
    """A hub repository in the local cache, in a folder that has its commit for a name."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only where a hub id is given

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(HUB_FILES)))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(
                hub_id,
                revision=folder.name,
                allow_patterns=list(TORCH_FILES),
                ignore_patterns=[*NO_WEIGHTS, "*/*"],
            )
    except library_failures() as error:
        raise explain_failure(hub_id, error, advice) from error
    return folder


def explain_failure(hub_id: str, error: Exception, advice: str) -> CheckpointError:
    """One line about a repository that could not be fetched.

    Args:
        hub_id: Of the repository.
        error: The library's.
        advice: What to do instead.
    """
    if load_constants().HF_HUB_OFFLINE:
        reason = "it is not in the cache here, and HF_HUB_OFFLINE is set; unset it to download"
        return CheckpointError(f"{hub_id}: {reason}; {advice}")
    reason = describe_failure(error)
    return CheckpointError(f"{hub_id}: cannot be fetched from the hub ({reason}); {advice}")
