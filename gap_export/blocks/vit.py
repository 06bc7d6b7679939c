"""Parts that the vision transformers written out here have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

# B batch or views, T tokens, C width, M inner width, H heads, d head width.


class Mlp(nn.Module):
    """Two linear layers and what lies between; names as in published checkpoints."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        """Declare the parameters."""
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to the same shape."""
        output: Tensor = self.fc2(self.activation(self.fc1(x_BTC)))
        return output


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        """Declare the parameter."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[..., C] to the same shape and dtype."""
        wide_BTC = x_BTC.float()
        mean_BT1 = (wide_BTC * wide_BTC).mean(dim=-1, keepdim=True)
        return self.weight * (wide_BTC / torch.sqrt(mean_BT1 + self.epsilon)).to(x_BTC.dtype)


def attend_fully(query_BTC: Tensor, key_BTC: Tensor, value_BTC: Tensor, heads: int) -> Tensor:
    """Values [B, T, C] mixed by attention of every token to every token, head by head."""
    query, key, value = (_split(x_BTC, heads) for x_BTC in (query_BTC, key_BTC, value_BTC))
    mixed_BHTd = functional.scaled_dot_product_attention(query, key, value)
    return mixed_BHTd.transpose(1, 2).flatten(2)


def _split(x_BTC: Tensor, heads: int) -> Tensor:
    """[B, T, C] to [B, H, T, d]."""
    batch, tokens, width = x_BTC.shape
    return x_BTC.reshape(batch, tokens, heads, width // heads).transpose(1, 2)
