"""The text graph: the phrase as CLIP's text tower sees it, for pruners that read it.

    name           dtype    shape    meaning
    in
    text_ids       int64    [1, L]   the phrase's tokens, padded with end tokens
    out
    text_features  float32  [1, W]   the phrase, not normalized; an input of the vision graph

The features are those of the first end token, which sees none of the padding behind it.
"""

from __future__ import annotations

from torch import Tensor, nn

from gap_export.interfaces.family import TextSpec
from gap_export.interfaces.features import Feature
from gap_runtime.bundle.tensors import TensorSpec

# L text tokens, W text width.


def text_inputs(spec: TextSpec) -> list[TensorSpec]:
    """The first part of the table above."""
    return [
        TensorSpec(
            name="text_ids",
            dtype="int64",
            shape=(1, spec.length),
            meaning="the phrase's tokens, padded with end tokens",
        )
    ]


def text_outputs(width: int) -> list[TensorSpec]:
    """The second part, and what a vision graph takes that reads the phrase in any way."""
    return [
        TensorSpec(
            name=Feature.TEXT.value, dtype="float32", shape=(1, width), meaning="the phrase"
        )
    ]


class TextStage(nn.Module):
    """A family's text tower."""

    def __init__(self, tower: nn.Module) -> None:
        """Wrap a tower."""
        super().__init__()
        self.tower = tower

    def forward(self, text_ids: Tensor) -> Tensor:
        """Text features [1, W]; see the table above."""
        features: Tensor = self.tower(text_ids)
        return features
