"""A manifest from its file, refused where it does not fit itself or names what is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

from gap_runtime.bundle.layout import leaves_count
from gap_runtime.bundle.manifest import (
    CLIP,
    DECODER,
    EMBEDDINGS,
    MANIFEST_FILE,
    SCHEMA,
    TEXT,
    TEXT_FEATURES,
    TEXT_IDS,
    VISION,
    Manifest,
    RatioEntry,
    Stage,
)
from gap_runtime.bundle.ranges import count_logits, find_absurd_value
from gap_runtime.errors import BundleError, PatternError, RecordError, SchemaError, suggest
from gap_runtime.machines.target import ModelDtype
from gap_runtime.pictures.preprocess import Bucket, Preprocess, find_mode
from gap_runtime.records import load_record
from gap_runtime.records.files import is_folder
from gap_runtime.records.patterns import count_groups
from gap_runtime.records.plain import read_json


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder.

    Raises:
        BundleError: The folder or its manifest is missing or unreadable.
        SchemaError: The bundle was written in another format.
    """
    path = folder / MANIFEST_FILE
    if not is_folder(folder):
        raise BundleError(f"{folder}: no such bundle folder; make one with gap-export")
    if not os.path.lexists(path):
        raise BundleError(
            f"{folder}: no {MANIFEST_FILE} in it, so it is no bundle; make one with gap-export"
        )
    data = read_json(path, BundleError, advice="export again")
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        advice = (
            "upgrade gap-runtime" if isinstance(found, int) and found > SCHEMA else "export again"
        )
        raise SchemaError(f"{path}: schema {found!r}, this version reads {SCHEMA}; {advice}")
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SchemaError(
            f"{path}: holds halves of characters, which are no text; export again"
        ) from error
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
    try:
        absurd = find_absurd_value(manifest)
    except PatternError as error:
        raise PatternError(f"{path}: {error}") from error
    if absurd is not None:
        raise SchemaError(f"{path}: {absurd}; export again")
    embedding, dtypes = manifest.embedding, get_args(ModelDtype)
    if embedding.dtype not in dtypes:
        raise SchemaError(
            f"{path}: embedding.dtype '{embedding.dtype}' is unknown; "
            f"{suggest(embedding.dtype, dtypes)}; export again with a matching gap-export"
        )
    if embedding.offset + embedding.length > manifest.files[embedding.file].size:
        raise SchemaError(f"{path}: the embedding reaches past {embedding.file}; export again")
    if not manifest.ratios:
        raise SchemaError(f"{path}: ratios is empty; export again")
    _require_consistent(manifest, path)


def _require_consistent(manifest: Manifest, path: Path) -> None:
    """Reject numbers that the graphs' inputs and outputs contradict, or that nothing can use."""
    try:
        find_mode(manifest.preprocess)
    except BundleError as error:
        raise SchemaError(f"{path}: {error}") from error
    layout, cache, decoder = manifest.layout, manifest.cache, manifest.stage(DECODER)
    shapes = _shapes(decoder)
    caches = [spec for spec in decoder.inputs if spec.name.startswith("cache_")]
    wanted = (1, cache.heads, layout.capacity, cache.head_dim)
    claims = {
        "embedding": _is_row_width((shapes.get("embeddings") or (0,))[-1], manifest),
        "embedding.offset": manifest.embedding.offset >= 0,
        "cache": len(caches) == 2 * cache.layers
        and all((spec.shape, spec.dtype) == (wanted, cache.dtype) for spec in caches),
        "layout.capacity": layout.capacity
        == max(layout.at(entry).capacity for entry in manifest.ratios),
        "preprocess.canvases": _are_canvases_usable(manifest.preprocess),
        "buckets": _are_buckets_usable(manifest.buckets, manifest.preprocess),
        "ratios": _are_ratios_usable(manifest),
        "phrase": _is_phrase_told(manifest),
        "box.pattern": count_groups(manifest.box.pattern) == 4
        and count_groups(manifest.box.attempt) == 0,
    }
    wrong = [name for name, holds in claims.items() if not holds]
    if not wrong and not all(_fits_its_graph(entry, manifest) for entry in manifest.ratios):
        wrong = ["layout"]
    if not wrong:
        more = {
            "ratios": _are_counts_of_ratios(manifest),
            "stages": _are_stages_of_ratios(manifest),
            "embedding.shape": manifest.embedding.shape[0] >= count_logits(manifest),
            "target.dtypes": manifest.dtype in (manifest.target.dtypes or (manifest.dtype,)),
        }
        wrong = [name for name, holds in more.items() if not holds]
    if wrong:
        raise SchemaError(f"{path}: {wrong[0]} does not fit the graphs; export again")


def _is_row_width(width: int | str, manifest: Manifest) -> bool:
    """Whether rows of the decoder are so wide: an embedding, and planes of its width or none."""
    own = manifest.embedding.shape[-1]
    return isinstance(width, int) and own > 0 and width >= own and width % own == 0


def _are_canvases_usable(preprocess: Preprocess) -> bool:
    """Whether the canvases can be cut into tiles."""
    sizes = [size for canvas in preprocess.canvases for size in canvas]
    return all(size > 0 and size % max(preprocess.side, 1) == 0 for size in sizes)


def _are_buckets_usable(buckets: tuple[Bucket, ...], preprocess: Preprocess) -> bool:
    """Whether buckets are apart, have tokens, and are of the preprocessing's kind."""
    if len({bucket.name for bucket in buckets}) != len(buckets):
        return False
    for bucket in buckets:
        sizes = [size for grid in bucket.grids for size in grid]
        ordered = sorted({index for index in bucket.fixed if 0 <= index < bucket.patches})
        if not sizes or min(sizes) <= 0 or bucket.strip <= 0 or ordered != list(bucket.fixed):
            return False
    return find_mode(preprocess).is_usable(preprocess, buckets)


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


def _are_counts_of_ratios(manifest: Manifest) -> bool:
    """Whether ratios leave the counts that they stand for.

    A count that was asked for is called by the share of the largest bucket's tokens.
    """
    largest = max(entry.patches for entry in manifest.ratios)
    return all(
        leaves_count(entry.patches, entry.ratio, entry.kept)
        or leaves_count(largest, entry.ratio, entry.kept)
        for entry in manifest.ratios
    )


def _are_stages_of_ratios(manifest: Manifest) -> bool:
    """Whether every graph is one of the ratios', or one for all of them."""
    served = [(each.ratio, each.bucket, each.kept) for each in manifest.ratios]
    return all(
        serves in served or serves == (None, None, None)
        for serves in ((each.ratio, each.bucket, each.kept) for each in manifest.stages)
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
    decoder = _shapes(manifest.stage(DECODER))
    axes = (decoder.get("position_ids") or (None,))[0]
    expected = {
        "pixels": manifest.preprocess.pixel_shape(manifest.bucket(entry.bucket)),
        "visual_tokens": (1, layout.visual, (decoder.get("embeddings") or (None,))[-1]),
        "kept_index": (1, entry.kept),
        "position_ids": (axes, layout.prompt),
    }
    return expected.items() <= _shapes(manifest.stage(VISION, entry)).items()


def _shapes(stage: Stage) -> dict[str, tuple[int | str, ...]]:
    """Shapes of a graph's inputs and outputs by name."""
    return {spec.name: spec.shape for spec in (*stage.inputs, *stage.outputs)}
