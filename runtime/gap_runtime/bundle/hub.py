"""Bundles on the hub: their names, the download, and the proof of what came."""

from __future__ import annotations

import errno
import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gap_runtime.bundle.hashes import Begin, begin_silently, describe_file
from gap_runtime.bundle.hub_library import describe_failure, library_failures, load_library
from gap_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.errors import ConfigError, GapError, HubError
from gap_runtime.records.files import is_file

PREFIX: Final = "hub:"
"""Before the name of a repository: that bundle, on the hub."""
CARD_FILE: Final = "README.md"
_HALF: Final = ".cache/huggingface"
"""What the library keeps in a folder that it downloads to, so that it can go on."""
_DISK: Final = frozenset(
    getattr(errno, name, -1)
    for name in (
        *("EACCES", "EDQUOT", "EFBIG", "EIO", "ENAMETOOLONG", "ENODEV", "ENOENT", "ENOSPC"),
        *("ENOTDIR", "ENXIO", "EPERM", "EROFS", "ESTALE"),
    )
)
"""What a disk says, full, read-only or unplugged; the network has other words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """A repository on the hub, `org/name`, at a branch, tag or commit; null is its main one."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        """As it is written on a command line."""
        return self.repository + (f"@{self.revision}" if self.revision else "")


def parse_name(text: str) -> HubName:
    """`org/name` or `org/name@revision`, with `hub:` before it or without.

    Raises:
        ConfigError: It is no such name.
        HubError: huggingface_hub is not installed.
    """
    repository, _, revision = text.removeprefix(PREFIX).partition("@")
    library = load_library()
    try:
        library.utils.validate_repo_id(repository)
    except library.errors.HFValidationError as error:
        raise ConfigError(f"'{text}': {describe_failure(error)}") from error
    if "/" not in repository or text.endswith("@"):
        raise ConfigError(f"'{text}': expected org/name or org/name@revision")
    return HubName(repository=repository, revision=revision or None)


def explain_failure(name: HubName, what: str, error: Exception) -> GapError:
    """One line about what could not be done with a repository.

    Args:
        name: Of the repository.
        what: Is not possible, `be pulled` for example.
        error: The library's.
    """
    constants = load_library().constants
    if constants.HF_HUB_OFFLINE:
        return HubError(
            f"{PREFIX}{name}: cannot {what}: HF_HUB_OFFLINE is set and it is not all in the cache "
            "here; unset it"
        )
    return HubError(f"{PREFIX}{name}: cannot {what}: {describe_failure(error)}")


def pull(
    name: HubName,
    folder: Path | None = None,
    *,
    verify_all: bool = False,
    begin: Begin = begin_silently,
) -> Path:
    """A bundle from the hub: what is not here yet is downloaded, and compared with the manifest.

    Of the repository come the files that its manifest names, and its card. What was half
    downloaded goes on. Without a network a bundle that is whole in the cache is taken.

    Args:
        name: Of the repository.
        folder: Where it goes; the hub's own cache by default.
        verify_all: Hash what was downloaded earlier, too.
        begin: Shows how far the hashing is.

    Returns:
        The bundle's folder.

    Raises:
        HubError: It cannot be downloaded, or what came is not what its manifest says.
        ConfigError: The folder holds something else.
        BundleError: The repository holds no bundle.
    """
    if folder is not None:
        _require_free(folder)
    seen = _download(name, name.revision, [MANIFEST_FILE])
    if not is_file(seen / MANIFEST_FILE):
        raise HubError(
            f"{PREFIX}{name}: has no {MANIFEST_FILE}, so it is no bundle; a model itself is "
            "exported with gap-export"
        )
    manifest = read_manifest(seen)
    names = [*manifest.files, MANIFEST_FILE, CARD_FILE]
    place = folder or seen
    was_whole = all(is_file(place / each) for each in names[:-1])
    # A commit, so that both downloads are of the same state.
    place = _download(name, seen.name, [glob.escape(each) for each in names], folder)
    if verify_all or not was_whole:
        _verify(name, place, manifest, begin)
    return place


def _download(
    name: HubName, revision: str | None, patterns: list[str], folder: Path | None = None
) -> Path:
    from importlib import metadata  # noqa: PLC0415 - mail and archives, for one number

    library = load_library()
    try:
        return Path(
            library.snapshot_download(
                name.repository,
                revision=revision,
                allow_patterns=patterns,
                local_dir=folder,
                library_name="gap-runtime",
                library_version=metadata.version("gap-runtime"),
            )
        )
    except library_failures() as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise HubError(
                f"{PREFIX}{name}: cannot be pulled: {error.strerror}; what has come lies in "
                f"{folder or 'the cache of the hub'}: mend that place and pull again to go on"
            ) from error
        raise explain_failure(name, "be pulled", error) from error


def _verify(name: HubName, folder: Path, manifest: Manifest, begin: Begin) -> None:
    """Compare all that came with the manifest; what differs is removed, so that it comes again."""
    wrong = []
    with begin(sum(entry.size for entry in manifest.files.values())) as on_bytes:
        for each, entry in manifest.files.items():
            path = folder / each
            if not is_file(path):
                raise HubError(
                    f"{PREFIX}{name}: {each} is in its manifest and not in the repository; its "
                    "owner has to push it again"
                )
            if describe_file(path, on_bytes) != entry:
                wrong.append(each)
                real = Path(os.path.realpath(path))
                path.unlink()
                real.unlink(missing_ok=True)
    if wrong:
        raise HubError(
            f"{PREFIX}{name}: {', '.join(wrong)}: the BLAKE3 differs from the manifest's; what "
            "came was removed. Pull again; if it stays so, its owner has to push it again"
        )


def _require_free(folder: Path) -> None:
    """Refuse a folder that holds something else than a half-pulled bundle."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no folder; give another --out")
    if any(folder.iterdir()) and not (folder / _HALF).is_dir():
        raise ConfigError(f"{folder}: holds something else; give an empty folder or a new one")
