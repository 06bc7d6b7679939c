"""A projector under the name that its tensors have in a checkpoint."""

from __future__ import annotations

from torch import Tensor, nn

# B batch (1), K tokens, C patch width, D decoder width.


class Projector(nn.Module):
    """One module, as the only child of that name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        """Take the module in."""
        super().__init__()
        self.name = name
        self.add_module(name, module)

    def forward(self, patches_BKC: Tensor) -> Tensor:
        """Visual tokens [B, K, D]."""
        tokens_BKD: Tensor = getattr(self, self.name)(patches_BKC)
        return tokens_BKD
