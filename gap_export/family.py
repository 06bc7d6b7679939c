"""What a model family is: how a checkpoint becomes a tower, a projector and a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from gap_export.checkpoint import Checkpoint
from gap_export.features import EagerVision, Feature
from gap_runtime.manifest import BoxFormat, Preprocess

# B batch (1), N patches, C vision width, D decoder width, S rows, V vocabulary.


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The facts about one checkpoint that the rest of the export works with.

    `library_config` is the family's own business. `max_positions` is the number of position
    IDs that the decoder was trained with.
    """

    grid: tuple[int, int]
    image_side: int
    vision_width: int
    width: int
    layers: int
    cache_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    image_token_id: int
    stop_ids: tuple[int, ...]
    preprocess: Preprocess
    box: BoxFormat
    template: str
    prefix: int
    library_config: Any

    @property
    def patches(self) -> int:
        """Visual tokens before pruning."""
        return self.grid[0] * self.grid[1]


class EagerModel(Protocol):
    """A loaded checkpoint in PyTorch, run plainly, for the reference."""

    def make_pixels(self, picture: Image.Image) -> Tensor:
        """Pixels [B, 3, H, W] of an RGB picture, by the library's own processor."""

    def look(self, pixels: Tensor) -> EagerVision:
        """All hidden states and attention maps of the vision tower."""

    def project(self, vision: EagerVision) -> Tensor:
        """All visual tokens [N, D]."""

    def encode(self, prompt: str) -> list[int]:
        """Token IDs by the library's own tokenizer."""

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""

    def embed(self, token_ids: list[int]) -> Tensor:
        """Token embeddings [S, D]."""

    def start_cache(self) -> Any:
        """An empty cache of the library's own kind."""

    def run_decoder(self, embeddings: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Logits [V] of the last row; each row sees the cache and the rows before it."""


class Family(Protocol):
    """A module in gap_export.models."""

    EMBEDDING: str
    """Canonical name of the token embedding table."""

    FEATURES: frozenset[Feature]
    """Features that the tower can give to a pruner."""

    def read_spec(self, checkpoint: Checkpoint) -> ModelSpec:
        """Read the checkpoint's config."""

    def canonical_name(self, key: str) -> str:
        """Name of a tensor in the traced modules, from its key in any known file layout."""

    def substitute(self, name: str, spec: ModelSpec) -> str | None:
        """Canonical name of the tensor that stands in for a missing one (tied weights)."""

    def build_tower(self, spec: ModelSpec, needs: frozenset[Feature]) -> nn.Module:
        """Pixels to patch features [B, N, C] and the features that a pruner needs."""

    def fill_constants(self, tower: nn.Module) -> None:
        """Give values to the tower's buffers that no checkpoint holds."""

    def build_projector(self, spec: ModelSpec) -> nn.Module:
        """Patch features [B, K, C] to visual tokens [B, K, D]."""

    def build_decoder(self, spec: ModelSpec, tables: tuple[Tensor, ...]) -> nn.Module:
        """The decoder; see gap_export.graph.decoder for its inputs and outputs."""

    def rotary_tables(self, spec: ModelSpec, positions: int) -> tuple[Tensor, ...]:
        """Constants of the decoder that depend on the number of positions."""

    def load_eager(self, checkpoint: Checkpoint, spec: ModelSpec, dtype: str) -> EagerModel:
        """The checkpoint in PyTorch, independent of every graph."""
