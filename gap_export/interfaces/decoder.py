"""What a decoder is: the language model of a family, which several families may share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from gap_export.interfaces.dialect import Dialect

# P positions, d head width.


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """The facts about one decoder that the rest of the export works with.

    `layers` is their number, `max_positions` that of the position IDs that it was trained with,
    `axes` how many of them a token has: 1, or 3 for time, row and column. `planes` is how many
    further vectors of the same width a row brings, which are added to the hidden states behind
    the first layers, one behind each; text has zeros there. `sizes` are the decoder's own
    business.
    """

    width: int
    layers: int
    cache_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    axes: int
    planes: int
    sizes: Any

    @property
    def row_width(self) -> int:
        """Width of a row of the input: an embedding, and the planes behind it."""
        return self.width * (1 + self.planes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothingGroup:
    """Weights that read the same input, and what makes it: a norm's weight, or a linear layer's.

    Dividing the maker's outputs and multiplying the readers' columns leaves the model the same.
    """

    maker: str
    readers: tuple[str, ...]


class Decoder(Protocol):
    """A module in gap_export.blocks that is a whole decoder.

    Names of tensors are canonical: those of the modules that `build` makes, and the table's.
    """

    EMBEDDING: str
    """Name of the token embedding table."""

    LAYERS: str
    """Path of the layers, whose numbers follow."""

    def read_decoder(
        self, config: Any, where: str, *, is_tied: bool = False, axes: int = 1, planes: int = 0
    ) -> DecoderSpec:
        """The facts in a library's config of the language model.

        Args:
            config: The library's.
            where: The file that it is from.
            is_tied: Whether something else says that the head is the embedding table.
            axes: How many position IDs the family gives to a token.
            planes: How many vectors it adds behind the first layers.

        Raises:
            CheckpointError: The config asks for something that this decoder does not have.
        """

    def tensor_shapes(self, spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
        """Every tensor of the decoder, its head and its embedding table, with its shape."""

    def linear_layers(self, spec: DecoderSpec) -> list[str]:
        """Names of the weights of all linear layers, the head's among them."""

    def smoothing_groups(self, spec: DecoderSpec) -> list[SmoothingGroup]:
        """The weights whose inputs can be scaled before they are quantized."""

    def rotary_tables(self, spec: DecoderSpec, positions: int) -> tuple[Tensor, ...]:
        """Constants of the graph that depend on the number of positions."""

    def build(self, spec: DecoderSpec, dialect: Dialect, tables: tuple[Tensor, ...]) -> nn.Module:
        """The decoder; see gap_export.graph.decoder for its inputs and outputs."""
