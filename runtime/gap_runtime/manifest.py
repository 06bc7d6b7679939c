"""The manifest: everything that a bundle says about itself (docs/bundle-format.md).

Written by gap-export as `manifest.json`, read here. The types are the format: a key that is not
in them is an error, and SCHEMA goes up by one when they change.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import BundleError, RecordError, SchemaError
from gap_runtime.layout import TokenLayout
from gap_runtime.records import dump_record, load_record
from gap_runtime.tensors import ITEM_BYTES, StoredTensor, TensorSpec

SCHEMA: Final = 1
MANIFEST_FILE: Final = "manifest.json"
DECODER: Final = "decoder"
VISION: Final = "vision"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The checkpoint that the bundle was made from.

    `index_sha256` is of its config and its index of tensors; the values are under `files`.
    """

    checkpoint: str
    revision: str | None
    index_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleLayout:
    """Token counts that all ratios share; `capacity` is the KV cache's slots for any of them."""

    prefix: int
    patches: int
    grid: tuple[int, int]
    extra: int
    suffix: int
    answer: int
    capacity: int

    def at(self, kept: int) -> TokenLayout:
        """The layout at one kept count."""
        return TokenLayout(
            prefix=self.prefix,
            patches=self.patches,
            kept=kept,
            extra=self.extra,
            suffix=self.suffix,
            answer=self.answer,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """How visual tokens are chosen and which position IDs they get."""

    strategy: str
    positions: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioEntry:
    """One pruning ratio of the bundle: the share removed and the count that it leaves."""

    ratio: float
    kept: int
    patches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One ONNX graph. `ratio` and `kept` are null for a graph that serves all ratios."""

    name: str
    role: str
    file: str
    ratio: float | None
    kept: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """The KV cache: two tensors [1, heads, capacity, head_dim] per layer."""

    layers: int
    heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How a picture becomes pixels: RGB, padded to a square, resized, scaled, normalized."""

    mode: str
    side: int
    fill: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """How a phrase becomes tokens. `tokenizer` is null in a bundle of graphs alone."""

    template: str
    image_token: str
    tokenizer: str | None
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxFormat:
    """How an answer writes a box.

    `attempt` is a regular expression for what is meant as a box, `pattern` one for all of a
    proper box, whose four groups are x0, y0, x1, y1. A value of `scale` is the far edge of the
    frame: `padded-square` or `original`.
    """

    attempt: str
    pattern: str
    scale: float
    frame: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSample:
    """PyTorch's answer to one picture and phrase at one ratio; arrays are `<key>/...`.

    `ratio` is null for the answer without pruning. `prompt_ids` are the tokens before and after
    the picture. `token_margins` is by how much each answer token (and the stop token) led the
    next best, relative to the largest logit.
    """

    key: str
    sample: str
    image: str
    phrase: str
    ratio: float | None
    kept: int
    answer: str
    token_ids: tuple[int, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    prompt_ids: tuple[int, ...]
    token_margins: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """PyTorch's recorded answers, without pruning and at each ratio."""

    arrays: str
    dtype: str
    samples: tuple[ReferenceSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a bundle holds and how to use it."""

    schema: int
    name: str
    family: str
    dtype: str
    target: str
    opset: int
    source: Source
    versions: dict[str, str]
    layout: BundleLayout
    pruning: Pruning
    ratios: tuple[RatioEntry, ...]
    stages: tuple[Stage, ...]
    cache: CacheShape
    embedding: StoredTensor
    preprocess: Preprocess
    prompt: Prompt
    box: BoxFormat
    reference: Reference | None
    files: dict[str, FileEntry]

    def stage(self, role: str, kept: int | None = None) -> Stage:
        """The stage of that role (and, for a vision graph, that kept count)."""
        for stage in self.stages:
            if stage.role == role and stage.kept in (None, kept):
                return stage
        which = f"{role} stage" + (f" for {kept} kept" if kept else "")
        raise SchemaError(f"{self.name}: its manifest names no {which}; export again")

    def dump(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = dump_record(self)
        return data

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into a folder."""
        text = json.dumps(self.dump(), indent=2, sort_keys=True) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder.

    Raises:
        BundleError: The folder or its manifest is missing or unreadable.
        SchemaError: The bundle was written in another format.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder; make one with gap-export")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder}: no {MANIFEST_FILE} in it, so it is no bundle; make one with gap-export"
        ) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error}); export again") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        advice = (
            "upgrade gap-runtime" if isinstance(found, int) and found > SCHEMA else "export again"
        )
        raise SchemaError(f"{path}: schema {found!r}, this version reads {SCHEMA}; {advice}")
    try:
        manifest = load_record(Manifest, data, str(path))
    except RecordError as error:
        raise SchemaError(f"{error}; export again with a matching gap-export") from error
    _require_whole(manifest, path)
    return manifest


def _require_whole(manifest: Manifest, path: Path) -> None:
    """Reject a manifest that speaks of files it does not list, or of nothing at all."""
    named = [stage.file for stage in manifest.stages] + [manifest.embedding.file]
    if manifest.prompt.tokenizer is not None:
        named.append(manifest.prompt.tokenizer)
    if manifest.reference is not None:
        named += [manifest.reference.arrays, *(s.image for s in manifest.reference.samples)]
    lost = sorted(set(named) - set(manifest.files))
    if lost:
        raise SchemaError(f"{path}: '{lost[0]}' is not among its files; export again")
    outside = [name for name in manifest.files if ".." in Path(name).parts or name.startswith("/")]
    if outside:
        raise SchemaError(f"{path}: '{outside[0]}' lies outside the bundle; export again")
    for where, dtype in (("dtype", manifest.dtype), ("embedding", manifest.embedding.dtype)):
        if dtype not in ITEM_BYTES:
            raise SchemaError(f"{path}: {where} '{dtype}' is unknown; upgrade gap-runtime")
    embedding = manifest.embedding
    if embedding.offset + embedding.length > manifest.files[embedding.file].size:
        raise SchemaError(f"{path}: the embedding reaches past {embedding.file}; export again")
    if not manifest.ratios:
        raise SchemaError(f"{path}: ratios is empty; export again")
    _require_consistent(manifest, path)


def _require_consistent(manifest: Manifest, path: Path) -> None:
    """Reject numbers that the graphs' inputs and outputs contradict, or that nothing can use."""
    layout, cache, decoder = manifest.layout, manifest.cache, manifest.stage(DECODER)
    shapes = {spec.name: spec.shape for spec in (*decoder.inputs, *decoder.outputs)}
    caches = [spec for spec in decoder.inputs if spec.name.startswith("cache_")]
    wanted = (1, cache.heads, layout.capacity, cache.head_dim)
    most = max(entry.kept for entry in manifest.ratios)
    claims = {
        "embedding": manifest.embedding.shape[-1] == shapes.get("embeddings", (None,))[-1],
        "embedding.offset": manifest.embedding.offset >= 0,
        "cache": len(caches) == 2 * cache.layers
        and all((spec.shape, spec.dtype) == (wanted, cache.dtype) for spec in caches),
        "layout.capacity": layout.capacity == layout.at(most).capacity,
        "preprocess": manifest.preprocess.side > 0 and min(manifest.preprocess.std) > 0,
        "box.scale": manifest.box.scale > 0,
        "box.pattern": _groups(manifest.box.pattern) == 4 and _groups(manifest.box.attempt) == 0,
    }
    for entry in manifest.ratios:
        outputs = {spec.name: spec.shape for spec in manifest.stage(VISION, entry.kept).outputs}
        claims["layout"] = outputs.get("position_ids") == (1, layout.at(entry.kept).prompt)
        if not claims["layout"]:
            break
    wrong = [name for name, holds in claims.items() if not holds]
    if wrong:
        raise SchemaError(f"{path}: {wrong[0]} does not fit the graphs; export again")


def _groups(pattern: str) -> int | None:
    """Groups of a regular expression, or None where it is none."""
    try:
        return re.compile(pattern).groups
    except re.error:
        return None
