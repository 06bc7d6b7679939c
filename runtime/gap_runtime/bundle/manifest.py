"""The manifest: everything that a bundle says about itself (docs/bundle-format.md).

Written by gap-export as `manifest.json`, read by `bundle.validation`. The types are the format: a
key that is not in them is an error, and SCHEMA goes up by one when they change.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from gap_runtime.bundle.layout import ExtraRule, PositionMode, TokenLayout
from gap_runtime.bundle.tensors import StoredTensor, TensorSpec
from gap_runtime.errors import SchemaError
from gap_runtime.machines.target import ModelDtype, Target
from gap_runtime.pictures.boxes import Box, BoxFormat
from gap_runtime.pictures.preprocess import Bucket, Preprocess
from gap_runtime.records import dump_record

SCHEMA: Final = 5
MANIFEST_FILE: Final = "manifest.json"
DECODER: Final = "decoder"
VISION: Final = "vision"
TEXT: Final = "text"
CLIP: Final = "clip"
EMBEDDINGS: Final = "embeddings"
TEXT_IDS: Final = "text_ids"
TEXT_FEATURES: Final = "text_features"
"""The text graph's input and output; the output is an input of vision graphs."""

Role = Literal["vision", "text", "decoder"]
PhraseSource = Literal["clip", "embeddings"]
WeightDtype = Literal["int8", "int4"]
CacheDtype = Literal["float32", "float16", "bfloat16", "int8"]
Method = Literal["awq", "nearest", "checkpoint"]
Part = Literal["decoder", "head", "vision"]
"""Words of a manifest: roles of stages, where phrases are read, how weights are quantized and the
KV cache is stored."""


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
    positions: PositionMode
    seed: int
    extra_token: ExtraRule | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Weights that are stored in fewer bits.

    `weights` is `int8` (a scale for each output channel) or `int4` (one for each block of up to
    128 inputs of it); `method` is how values were found: `nearest`, `awq`, or `checkpoint` for
    one that came quantized, where `weights` tells the bits alone. `parts` are those of `decoder`,
    `head` and `vision` that are so.
    """

    weights: WeightDtype
    method: Method
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One ONNX graph. `bucket`, `ratio` and `kept` are null for one that serves them all."""

    name: str
    role: Role
    file: str
    bucket: str | None
    ratio: float | None
    kept: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """The KV cache: two tensors [1, heads, capacity, head_dim] per layer.

    `dtype` is the model's, or `int8`, which the decoder's graph has scales for.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: CacheDtype


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

    source: PhraseSource
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
    boxes: tuple[Box, ...]
    prompt_ids: tuple[int, ...]
    token_margins: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """PyTorch's recorded answers, without pruning and at each ratio."""

    arrays: str
    dtype: ModelDtype
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
    dtype: ModelDtype
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

    @property
    def has_int8_cache(self) -> bool:
        """Whether keys and values are rounded to 8 bits as they are cached."""
        return self.cache.dtype == "int8"

    @property
    def described_precision(self) -> str:
        """The precision for people, with that of the KV cache where it is another one."""
        return self.precision + (", int8 KV cache" if self.has_int8_cache else "")

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
        text = json.dumps(self.dump(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
