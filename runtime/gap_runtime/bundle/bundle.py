"""A bundle on disk: its manifest, its files and the proof that they are unchanged."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from threading import Thread
from typing import Final

import numpy as np

from gap_runtime.bundle.hashes import (
    Begin,
    begin_silently,
    hash_bytes,
    hash_file,
    read_blocks,
)
from gap_runtime.bundle.hub import PREFIX, parse_name, pull
from gap_runtime.bundle.layout import is_ratio, suggest_ratio
from gap_runtime.bundle.manifest import MANIFEST_FILE, Manifest, RatioEntry
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.errors import BundleError, ConfigError, HashError
from gap_runtime.records.files import is_file, open_file, read_bytes, refusal

_SMALL_BYTES: Final = 256 * 2**20
"""Files up to this size are hashed at every opening; larger ones when all are asked for."""
_FEW_BYTES: Final = 16 * 2**20
"""Of all files together, up to which one thread hashes them."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Bundle:
    """An opened bundle."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, path: str | Path, *, verify_all: bool = False, begin: Begin = begin_silently
    ) -> Bundle:
        """Open a bundle and check that its files are those that were exported.

        Args:
            path: The bundle's folder; or `hub:org/name@revision`, which is downloaded where it
                is not in the hub's cache here.
            verify_all: Hash every file. Otherwise files above 256 MiB (the weights of a large
                model) are checked by size alone.
            begin: Shows how far the hashing is.

        Raises:
            BundleError: The folder is no bundle, or a file is missing.
            SchemaError: The bundle was written in another format.
            HashError: A file has changed.
            HubError: It cannot be brought from the hub.
        """
        folder = Path(path)
        if isinstance(path, str) and path.startswith(PREFIX):
            folder = pull(parse_name(path))
        bundle = cls(folder=folder, manifest=read_manifest(folder))
        bundle.verify(limit=None if verify_all else _SMALL_BYTES, begin=begin)
        return bundle

    def __repr__(self) -> str:
        """The folder and what it holds, on one line."""
        manifest = self.manifest
        ratios = ", ".join(f"{ratio:g}" for ratio in self.choose_ratios())
        return (
            f"Bundle({str(self.folder)!r}, {manifest.family}, {manifest.described_precision}, "
            f"pruner {manifest.pruning.strategy}, ratios {ratios})"
        )

    def hash_manifest(self) -> str:
        """SHA-256 of the manifest, which has the hashes of all files: two of one are equal.

        Raises:
            BundleError: It is gone.
        """
        return hashlib.sha256(read_bytes(self.folder / MANIFEST_FILE, BundleError)).hexdigest()

    def verify(self, *, limit: int | None, begin: Begin = begin_silently) -> None:
        """Compare sizes of all files and hashes of those up to `limit` bytes (None: all).

        `begin` shows how far the hashing is.
        """
        files = self.manifest.files
        for name, entry in files.items():
            path = self.folder / name
            if not is_file(path):
                raise BundleError(
                    f"{path}: missing or no regular file; copy the bundle again or export again"
                )
            try:
                size = path.stat().st_size
            except OSError as error:
                raise refusal(path, error, BundleError, "copy the bundle again") from error
            if size != entry.size:
                raise HashError(
                    f"{path}: {size} bytes, expected {entry.size}; "
                    "copy the bundle again or export again"
                )
        hashed = [name for name, entry in files.items() if limit is None or entry.size <= limit]
        size = sum(files[name].size for name in hashed)
        with begin(size) as on_bytes, ThreadPoolExecutor() as pool:
            # Small files are hashed before threads for them have begun.
            each = pool.map if size > _FEW_BYTES else map
            found = each(lambda name: hash_file(self.folder / name, on_bytes), hashed)
            for name, found_hash in zip(hashed, found, strict=True):
                if found_hash != files[name].blake3:
                    raise HashError(
                        f"{self.folder / name}: BLAKE3 {found_hash[:12]}..., expected "
                        f"{files[name].blake3[:12]}...; the file has changed, export again"
                    )

    def choose_ratios(
        self, ratios: Iterable[float] | None = None, keep: Iterable[int] | None = None
    ) -> tuple[float, ...]:
        """The bundle's ratios, or those that are asked for; each once.

        Args:
            ratios: Shares removed.
            keep: Or counts of visual tokens that stay, in every bucket.

        Raises:
            ConfigError: The bundle was not exported at one of them.
        """
        if keep is None:
            wanted = [each.ratio for each in self.manifest.ratios] if ratios is None else ratios
            return tuple(dict.fromkeys(self.choose_ratio(ratio).ratio for ratio in wanted))
        buckets = [bucket.name for bucket in self.manifest.buckets]
        found = [[self.choose_ratio(None, name, keep=kept) for name in buckets] for kept in keep]
        return tuple(dict.fromkeys(entries[0].ratio for entries in found))

    def choose_ratio(
        self, ratio: float | None, bucket: str | None = None, *, keep: int | None = None
    ) -> RatioEntry:
        """The entry of a ratio, or the bundle's first one; of a bucket, or of any.

        Args:
            ratio: Share removed.
            bucket: Name of the bucket.
            keep: Count of visual tokens that stay, instead of a ratio.

        Raises:
            ConfigError: The bundle was not exported at that ratio or count.
        """
        entries = [
            entry for entry in self.manifest.ratios if bucket is None or entry.bucket == bucket
        ]
        if keep is not None:
            if ratio is not None:
                raise ConfigError("ratio and keep are two ways to say one thing; give one")
            for entry in entries:
                if entry.kept == keep:
                    return entry
            have = ", ".join(dict.fromkeys(f"{each.kept} of {each.patches}" for each in entries))
            raise ConfigError(
                f"{self.folder}: no ratio keeps {keep}; have {have}; export with --keep {keep}"
            )
        _require_number(ratio)
        for entry in entries:
            if ratio is None or abs(entry.ratio - ratio) < 1e-9:
                return entry
        for entry in entries:
            # As it was shown: 0.888889 for what was exported at 0.8888888888888888.
            if f"{entry.ratio:g}" == f"{ratio:g}":
                return entry
        # Every bucket has a ratio.
        assert ratio is not None
        have = ", ".join(dict.fromkeys(f"{entry.ratio:g}" for entry in entries))
        way = (
            f"export with --ratio {ratio:g}"
            if is_ratio(ratio)
            else f"ratios lie in [0, 1){suggest_ratio(ratio)}"
        )
        raise ConfigError(f"{self.folder}: no ratio {ratio:g}; have {have}; {way}")

    def map_embedding(self) -> np.ndarray:
        """The token embedding table [V, D], mapped from its file, which is read ahead meanwhile.

        bfloat16, which numpy lacks, comes as uint16; `embedding_rows` gives float32 of any.
        """
        stored = self.manifest.embedding
        path = self.folder / stored.file
        reading = (path, stored.offset, stored.length)
        Thread(target=_read_ahead, args=reading, daemon=True).start()
        with open_file(path, BundleError, advice="copy the bundle again") as file:
            return np.memmap(
                file,
                dtype="uint16" if stored.dtype == "bfloat16" else stored.dtype,
                mode="r",
                offset=stored.offset,
                shape=stored.shape,
            )


def _require_number(ratio: object) -> None:
    """Refuse what a caller without types may give."""
    if ratio is not None and not isinstance(ratio, Real):
        raise ConfigError(f"a ratio of type {type(ratio).__name__}; expected a number")


def _read_ahead(path: Path, offset: int, length: int) -> None:
    """Bring a part of a file into the page cache, so that no token waits for the disk."""
    # Whoever needs the file will say what is wrong with it.
    with contextlib.suppress(BundleError):
        for _ in read_blocks(path, offset, length):
            pass


def embedding_rows(table: np.ndarray, token_ids: list[int]) -> np.ndarray:
    """Rows of an embedding table from `map_embedding`, float32 [len(token_ids), D]."""
    # Indexing a memmap itself takes twice as long.
    rows = np.asarray(table)[token_ids]
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


def identify_files(bundle: Bundle) -> str:
    """A short name of a bundle that changes with any of its files."""
    named = sorted((name, entry.blake3) for name, entry in bundle.manifest.files.items())
    return hash_bytes(json.dumps(named).encode())[:12]
