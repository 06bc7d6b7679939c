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

from gap_runtime.bundle.layout import TokenLayout
from gap_runtime.bundle.tensors import ITEM_BYTES, StoredTensor, TensorSpec
from gap_runtime.errors import BundleError, RecordError, SchemaError
from gap_runtime.machines.target import Target
from gap_runtime.pictures.boxes import BoxFormat
from gap_runtime.pictures.preprocess import Bucket, Preprocess
from gap_runtime.records import dump_record, load_record

SCHEMA: Final = 5
MANIFEST_FILE: Final = "manifest.json"
DECODER: Final = "decoder"
VISION: Final = "vision"
TEXT: Final = "text"
ANYRES: Final = "anyres"
CLIP: Final = "clip"
EMBEDDINGS: Final = "embeddings"
TEXT_IDS: Final = "text_ids"
TEXT_FEATURES: Final = "text_features"
"""The text graph's input and output; the output is an input of vision graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The checkpoint that the bundle was made from.

    `index_sha256` is of its config and its index of tensors; the values are under `files`.
    """

    checkpoint: str
    revision: str | None
    index_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioEntry:
    """One pruning ratio for one bucket: the share removed and the count that it leaves.

    `kept` of `patches` visual tokens stay; `extra` more are made of the removed ones.
    """

    ratio: float
    bucket: str
    patches: int
    kept: int
    extra: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleLayout:
    """Token counts that all ratios share; `capacity` is the KV cache's slots for any of them."""

    prefix: int
    suffix: int
    answer: int
    capacity: int

    def at(self, entry: RatioEntry) -> TokenLayout:
        """The layout at one ratio."""
        return TokenLayout(
            prefix=self.prefix,
            patches=entry.patches,
            kept=entry.kept,
            extra=entry.extra,
            suffix=self.suffix,
            answer=self.answer,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """How visual tokens are chosen and which position IDs they get.

    `extra_token` is where the token goes that the pruner makes of removed ones, null where it
    makes none.
    """

    strategy: str
    positions: str
    seed: int
    extra_token: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Weights that are stored in fewer bits.

    `weights` is `int8` (a scale for each output channel) or `int4` (one for each block of up to
    128 inputs of it); `method` is how values were found: `nearest`, `awq`, or `checkpoint` for
    one that came quantized, where `weights` tells the bits alone. `parts` are those of `decoder`,
    `head` and `vision` that are so.
    """

    weights: str
    method: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One ONNX graph. `bucket`, `ratio` and `kept` are null for one that serves them all."""

    name: str
    role: str
    file: str
    bucket: str | None
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
class Prompt:
    """How a phrase becomes tokens. `tokenizer` is null in a bundle of graphs alone.

    `image_token` marks the picture's place in `template`. Where it is null, the tokenizer has no
    such token: the texts before and after `<image>` are then encoded apart.
    """

    template: str
    image_token: str | None
    tokenizer: str | None
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhraseInput:
    """How the vision graph is told the phrase.

    `source` is `clip`, the text graph on `length` tokens of `tokenizer`, padded with `end_id`;
    or `embeddings`, the mean direction of the phrase's rows in the token embedding table.
    """

    source: str
    tokenizer: str | None
    length: int
    end_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSample:
    """PyTorch's answer to one picture and phrase at one ratio; arrays are `<key>/...`.

    `ratio` is null for the answer without pruning; `bucket` is the picture's. `prompt_ids` are
    the tokens before and after the picture. `token_margins` is by how much each answer token (and
    the stop token) led the next best, relative to the largest logit.
    """

    key: str
    sample: str
    image: str
    phrase: str
    bucket: str
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
    """Size in bytes and BLAKE3 of a file of the bundle."""

    size: int
    blake3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a bundle holds and how to use it."""

    schema: int
    name: str
    family: str
    dtype: str
    quantization: Quantization | None
    target: Target
    source: Source
    versions: dict[str, str]
    layout: BundleLayout
    pruning: Pruning
    buckets: tuple[Bucket, ...]
    ratios: tuple[RatioEntry, ...]
    stages: tuple[Stage, ...]
    cache: CacheShape
    embedding: StoredTensor
    preprocess: Preprocess
    prompt: Prompt
    phrase: PhraseInput | None
    box: BoxFormat
    reference: Reference | None
    files: dict[str, FileEntry]

    @property
    def precision(self) -> str:
        """What errors are judged by: the dtype, or that of the weights where quantized."""
        return self.quantization.weights if self.quantization else self.dtype

    def stage(self, role: str, entry: RatioEntry | None = None) -> Stage:
        """The stage of that role (and, for a vision graph, of that ratio and bucket)."""
        for stage in self.stages:
            served = entry is None or (stage.bucket, stage.kept) == (entry.bucket, entry.kept)
            if stage.role == role and (stage.kept is None or served):
                return stage
        which = f"{role} stage" + (f" for {entry.kept} kept" if entry else "")
        raise SchemaError(f"{self.name}: its manifest names no {which}; export again")

    def bucket(self, name: str) -> Bucket:
        """The bucket of that name."""
        for bucket in self.buckets:
            if bucket.name == name:
                return bucket
        raise SchemaError(f"{self.name}: its manifest names no bucket '{name}'; export again")

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
    if manifest.phrase is not None and manifest.phrase.tokenizer is not None:
        named.append(manifest.phrase.tokenizer)
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
    shapes = _shapes(decoder)
    caches = [spec for spec in decoder.inputs if spec.name.startswith("cache_")]
    wanted = (1, cache.heads, layout.capacity, cache.head_dim)
    claims = {
        "embedding": manifest.embedding.shape[-1] == shapes.get("embeddings", (None,))[-1],
        "embedding.offset": manifest.embedding.offset >= 0,
        "cache": len(caches) == 2 * cache.layers
        and all((spec.shape, spec.dtype) == (wanted, cache.dtype) for spec in caches),
        "layout.capacity": layout.capacity
        == max(layout.at(entry).capacity for entry in manifest.ratios),
        "preprocess": manifest.preprocess.side > 0 and min(manifest.preprocess.std) > 0,
        "preprocess.canvases": _are_canvases_usable(manifest.preprocess),
        "buckets": _are_buckets_usable(manifest.buckets, manifest.preprocess),
        "ratios": _are_ratios_usable(manifest),
        "phrase": _is_phrase_told(manifest),
        "box.scale": manifest.box.scale > 0,
        "box.pattern": _groups(manifest.box.pattern) == 4 and _groups(manifest.box.attempt) == 0,
    }
    wrong = [name for name, holds in claims.items() if not holds]
    if not wrong and not all(_fits_its_graph(entry, manifest) for entry in manifest.ratios):
        wrong = ["layout"]
    if wrong:
        raise SchemaError(f"{path}: {wrong[0]} does not fit the graphs; export again")


def _are_canvases_usable(preprocess: Preprocess) -> bool:
    """Whether the canvases can be cut into tiles, and are there where they are needed."""
    sizes = [size for canvas in preprocess.canvases for size in canvas]
    whole = all(size > 0 and size % max(preprocess.side, 1) == 0 for size in sizes)
    return whole and (preprocess.mode != ANYRES or bool(sizes))


def _are_buckets_usable(buckets: tuple[Bucket, ...], preprocess: Preprocess) -> bool:
    """Whether buckets are apart, have tokens, and are of the preprocessing's kind."""
    if len({bucket.name for bucket in buckets}) != len(buckets):
        return False
    for bucket in buckets:
        sizes = [size for grid in bucket.grids for size in grid]
        ordered = sorted({index for index in bucket.fixed if 0 <= index < bucket.patches})
        if not sizes or min(sizes) <= 0 or bucket.strip <= 0 or ordered != list(bucket.fixed):
            return False
    if preprocess.mode != ANYRES:
        return len(buckets) == 1 and buckets[0].canvas is None
    # View 0 and a tile have the same square grid, whatever the canvas.
    tile_grid = buckets[0].grids[0][0] if buckets else 0
    return all(
        bucket.canvas in preprocess.canvases
        and len(bucket.grids) == 2
        and bucket.grids[0] == (tile_grid, tile_grid)
        for bucket in buckets
    )


def _are_ratios_usable(manifest: Manifest) -> bool:
    """Whether every bucket has ratios, and the counts are those that it can have."""
    buckets = {bucket.name: bucket for bucket in manifest.buckets}
    return {entry.bucket for entry in manifest.ratios} == set(buckets) and all(
        entry.patches == buckets[entry.bucket].patches
        and len(buckets[entry.bucket].fixed) < entry.kept <= entry.patches
        and entry.extra >= 0
        and (entry.extra == 0 or manifest.pruning.extra_token is not None)
        for entry in manifest.ratios
    )


def _is_phrase_told(manifest: Manifest) -> bool:
    """Whether the vision graphs that read the phrase can be given it."""
    visions = [_shapes(stage) for stage in manifest.stages if stage.role == VISION]
    wanted = {shapes[TEXT_FEATURES] for shapes in visions if TEXT_FEATURES in shapes}
    phrase = manifest.phrase
    if phrase is None:
        return not wanted
    if phrase.source == EMBEDDINGS:
        return phrase.tokenizer is None and wanted <= {(1, manifest.embedding.shape[-1])}
    texts = [_shapes(stage) for stage in manifest.stages if stage.role == TEXT]
    if phrase.source != CLIP or phrase.tokenizer is None or len(texts) != 1:
        return False
    given = texts[0].get(TEXT_FEATURES)
    return texts[0].get(TEXT_IDS) == (1, phrase.length) and wanted <= {given}


def _fits_its_graph(entry: RatioEntry, manifest: Manifest) -> bool:
    """Whether the vision graph of a ratio takes and gives what the counts say."""
    layout = manifest.layout.at(entry)
    expected = {
        "pixels": manifest.preprocess.pixel_shape(manifest.bucket(entry.bucket)),
        "visual_tokens": (1, layout.visual, manifest.embedding.shape[-1]),
        "kept_index": (1, entry.kept),
        "position_ids": (1, layout.prompt),
    }
    return expected.items() <= _shapes(manifest.stage(VISION, entry)).items()


def _shapes(stage: Stage) -> dict[str, tuple[int | str, ...]]:
    """Shapes of a graph's inputs and outputs by name."""
    return {spec.name: spec.shape for spec in (*stage.inputs, *stage.outputs)}


def _groups(pattern: str) -> int | None:
    """Groups of a regular expression, or None where it is none."""
    try:
        return re.compile(pattern).groups
    except re.error:
        return None
