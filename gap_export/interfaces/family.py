"""What a model family is: how a checkpoint becomes a tower and a projector before a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.interfaces.decoder import Decoder, DecoderSpec
from gap_export.interfaces.features import EagerVision, Feature, Geometry
from gap_runtime.pictures.boxes import BoxFormat
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), N patches, K kept, F fixed tokens, C patch width, D decoder width, S rows,
# V vocabulary, L text tokens, W text width, G key/value heads, T cached rows, d head width.


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """CLIP's text tower: `tokenizer` is the folder of its tokenizer, `length` its tokens."""

    tokenizer: Path
    length: int
    end_id: int
    width: int
    library_config: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The facts about one checkpoint that the rest of the export works with.

    `features` are the by-products that the tower gives, each with its sizes behind the patches.
    `image_text` is what stands for the picture in a prompt and `image_token_id` the one token of
    it that the visual tokens replace, None where the texts before and after the picture are
    encoded apart; `image_text` is None where it is that token, or nothing.
    `text` is CLIP's text tower where the checkpoint has one.
    `library_config` is the family's own business. `notes` are lines for people about what was
    chosen for this checkpoint. `template` is the configured one where one is configured that does
    not yield.
    """

    buckets: tuple[Bucket, ...]
    vision_width: int
    features: dict[Feature, tuple[int, ...]]
    text: TextSpec | None
    decoder: DecoderSpec
    tokenizer: TokenizerFiles
    image_text: str | None
    image_token_id: int | None
    stop_ids: tuple[int, ...]
    preprocess: Preprocess
    box: BoxFormat
    template: str
    prefix: int
    library_config: Any
    notes: tuple[str, ...] = ()

    def position_grid(self, bucket: Bucket) -> tuple[int, int] | None:
        """Rows and columns that give a bucket's tokens their positions; None where one counts."""
        if self.decoder.axes == 1:
            return None
        ((rows, columns),) = bucket.grids
        assert not bucket.fixed
        return rows, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """Mean size and mean square of each input [I] of a weight, over all tokens seen."""

    mean_size: Tensor
    mean_square: Tensor


def geometry_of(bucket: Bucket) -> Geometry:
    """Where the tokens of a bucket lie that may be removed."""
    return Geometry(grids=bucket.grids, strip=bucket.strip)


class EagerModel(Protocol):
    """A loaded checkpoint in PyTorch, run plainly, for the reference."""

    def make_pixels(self, picture: Image.Image) -> Tensor:
        """Pixels of an RGB picture, by the library's own processor where there is one."""

    def look(self, pixels: Tensor, bucket: Bucket) -> EagerVision:
        """All that pruners may ask for of a picture."""

    def read_phrase(self, phrase: str) -> Tensor:
        """Text features [W] of a phrase, by CLIP's own text tower."""

    def text_patches(self, vision: EagerVision) -> Tensor:
        """Patches [N, W] in the space of CLIP's text features."""

    def project(self, patches: Tensor) -> Tensor:
        """Visual tokens [K, D] of patches [K, C]."""

    def fixed_tokens(self, bucket: Bucket) -> Tensor:
        """The tokens that are never removed, [F, D]."""

    def encode(self, prompt: str) -> tuple[list[int], list[int]]:
        """Token IDs before and after the picture, by the library's own tokenizer."""

    def encode_phrase(self, phrase: str) -> list[int]:
        """Token IDs of a phrase alone, without special tokens."""

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""

    def embed(self, token_ids: list[int]) -> Tensor:
        """Token embeddings [S, D]."""

    def rotary_frequencies(self) -> list[float]:
        """Angle by which each rotary pair of the decoder turns in a step, in radians."""

    def start_cache(self) -> Any:
        """An empty cache of the library's own kind."""

    def read_cache(self, cache: Any) -> list[tuple[Tensor, Tensor]]:
        """Keys, turned by their positions, and values that a cache holds, by layer: [G, T, d]."""

    def run_decoder(self, embeddings: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Logits [V] of the last row; each row sees the cache and the rows before it.

        `position_ids` are [axes, S].
        """

    def observe(self) -> AbstractContextManager[Callable[[], dict[str, InputStatistics]]]:
        """Watch the inputs of the decoder's linear layers, by the canonical name of the weight."""


class Family(Protocol):
    """A module in gap_export.models; what it may have besides is in `FamilyOptions`."""

    DECODER: Decoder
    """The language model behind the projector."""

    TOWER_LAYERS: str
    """Canonical path of the tower's blocks."""

    PARTS: Mapping[str, str]
    """Further checkpoints that the family can read, by role, each with where it usually is.

    Where `clip` is among them, pruners that read the phrase compare it through CLIP's text tower
    unless they are told otherwise; else by the language model's own embeddings.
    """

    def find_parts(self, checkpoint: Checkpoint, *, text: bool) -> dict[str, str]:
        """Those of them that this checkpoint needs; `text` says whether a phrase is to be read."""

    def read_spec(self, checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
        """Read the checkpoint's config."""

    def find_weights(self, checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
        """Where every tensor comes from, by its name in the modules built here.

        Raises:
            CheckpointError: A tensor is missing, misshapen or not known to the family.
        """

    def build_tower(self, spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
        """Pixels to patches [B, N, C] before the projector, and {Feature: by-product}.

        Buffers that no checkpoint holds get their values by a method `fill_constants()`, if it
        has one.
        """

    def build_projector(self, spec: ModelSpec) -> nn.Module:
        """Patches [B, K, C] to visual tokens [B, K, D].

        Where the decoder takes planes, they lie behind each token on both sides; patches that
        come without theirs give tokens without.
        """

    def load_eager(
        self, checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
    ) -> EagerModel:
        """The checkpoint in PyTorch, independent of every graph.

        With `memory`, weights are read from their files when they are needed, and no more than
        that many bytes of them stay in memory in between; the answers are the same.
        """


class FamilyOptions(Protocol):
    """What a family defines only where it has such a thing."""

    TYPES: tuple[str, ...]
    """Further words for it that the `model_type` of a config may be. Plain, as it is read from the
    file."""

    NEIGHBOURS: Mapping[str, str]
    """Patterns of the `model_type` of models that it does not read, and what to do instead. Plain
    too."""

    PRUNER: str
    """The pruner where none is asked for and that of all families needs what this tower has not.
    Plain too."""

    def build_fixed_tokens(self, spec: ModelSpec, bucket: Bucket) -> nn.Module:
        """Nothing to the tokens of a bucket that are never removed [B, F, D]."""

    def build_text_tower(self, spec: ModelSpec) -> nn.Module:
        """Token IDs int64 [B, L] of a phrase to text features float32 [B, W].

        For a family whose `ModelSpec.text` is not None; constants as in `build_tower`.
        """


def no_parts(checkpoint: Checkpoint, *, text: bool) -> dict[str, str]:
    """`find_parts` of a family of which nothing lies elsewhere.

    Phrases are compared by the language model's own embeddings.
    """
    del checkpoint, text
    return {}


def build_fixed_tokens(family: Family, spec: ModelSpec, bucket: Bucket) -> nn.Module | None:
    """A family's tokens that are never removed; None where a bucket has none."""
    if not bucket.fixed:
        return None
    options: FamilyOptions = family  # type: ignore[assignment]
    return options.build_fixed_tokens(spec, bucket)


def build_text_tower(family: Family, spec: ModelSpec) -> nn.Module:
    """A family's text tower."""
    options: FamilyOptions = family  # type: ignore[assignment]
    return options.build_text_tower(spec)


def fill_constants(module: nn.Module) -> None:
    """Give values to the buffers of a tower that no checkpoint holds."""
    fill: Callable[[], None] | None = getattr(module, "fill_constants", None)
    if fill is not None:
        fill()
