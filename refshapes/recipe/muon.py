"""An optimizer for matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon:
    """Momentum made orthogonal by Newton-Schulz, for matrices; scaled to steps like AdamW's.

    References:
        Muon (K. Jordan and others, 2024); the scale is from arXiv:2502.16982.
    """

    def __init__(self, matrices: list[nn.Parameter], *, momentum: float, decay: float) -> None:
        self.momentum, self.decay = momentum, decay
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(matrix.shape), []).append(matrix)
        self.groups = list(shapes.values())
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all matrices, those of one shape together."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp_(buffer, self.momentum))
            scale = 0.2 * max(update.shape[-2:]) ** 0.5
            for matrix, change in zip(group, update, strict=True):
                matrix.mul_(1 - rate * self.decay).add_(change, alpha=-rate * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factors of matrices [K, m, n], five Newton-Schulz steps."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(-1, -2)
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x if wide else x.transpose(-1, -2)
