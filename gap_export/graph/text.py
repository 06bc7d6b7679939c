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

# L text tokens, W text width.


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
