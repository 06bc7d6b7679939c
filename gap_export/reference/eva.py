"""EVA-CLIP's vision tower, as plainly as the published architecture reads.

No library that we may use has it. Everything is written out on a dictionary of the file's own
tensors; compare MiniGPT-4's `eva_vit.py` and LAVIS' file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from gap_export.interfaces.features import EagerVision, Geometry

# T tokens (CLS first), P patches, N visual tokens, C width, H heads, d head width.


class EagerEva:
    """The tower on its tensors."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        norm: tuple[Tensor, Tensor],
        *,
        layers: int,
        heads: int,
        strip: int,
    ) -> None:
        """Take the tensors.

        Args:
            tensors: Of the file, by its own keys.
            norm: Weight and bias of the norm behind the tower.
            layers: Blocks that are run.
            heads: Of every block.
            strip: Neighbouring patches that make one token.
        """
        self._tensors, self._norm = tensors, norm
        self._layers, self._heads, self._strip = layers, heads, strip

    @torch.no_grad()
    def look(
        self,
        views: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        geometry: Geometry,
        arrange: Callable[[Tensor], Tensor],
    ) -> EagerVision:
        """All that pruners may ask for of the one view [1, 3, H, W] of a picture."""
        get = self._tensors
        weight = get["patch_embed.proj.weight"]
        grid = functional.conv2d(
            views.to(weight.dtype), weight, get["patch_embed.proj.bias"], stride=weight.shape[-1]
        )
        state = torch.cat([get["cls_token"][0], grid[0].flatten(1).T])
        state = state + self._positions(grid.shape[-1])
        states, attentions, queries, keys = [state], [], [], []
        for layer in range(self._layers):
            state, attention, query, key = self._block(state, f"blocks.{layer}.")
            states.append(state)
            attentions.append(attention[None])
            queries.append(query[None])
            keys.append(key[None])
        width = state.shape[-1]
        states[-1] = functional.layer_norm(state, (width,), *self._norm, 1e-5)
        patches = arrange(states[-1][None, 1:]).reshape(-1, width * self._strip)
        return EagerVision(
            patches=patches,
            tokens=project(patches),
            hidden_states=tuple(each[None] for each in states),
            attentions=tuple(attentions),
            queries=tuple(queries),
            keys=tuple(keys),
            leading=1,
            layer=self._layers,
            geometry=geometry,
            arrange=arrange,
        )

    def normalize(self, patches: Tensor) -> Tensor:
        """The patches are normed already."""
        return patches

    def _positions(self, side: int) -> Tensor:
        """The position table [T, C], stretched to `side` patches a side."""
        table = self._tensors["pos_embed"][0]
        trained = math.isqrt(len(table) - 1)
        if trained == side:
            return table
        square = table[1:].T.reshape(1, -1, trained, trained)
        stretched = functional.interpolate(
            square, size=(side, side), mode="bicubic", align_corners=False
        )
        return torch.cat([table[:1], stretched[0].flatten(1).T])

    def _block(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One block's output, attention maps [H, T, T], queries and keys [T, C]."""
        get = self._tensors
        width = x.shape[-1]

        def norm(values: Tensor, which: str) -> Tensor:
            weight, bias = get[f"{name}{which}.weight"], get[f"{name}{which}.bias"]
            return functional.layer_norm(values, (width,), weight, bias, 1e-6)

        fused = norm(x, "norm1") @ get[f"{name}attn.qkv.weight"].T
        query = fused[:, :width] + get[f"{name}attn.q_bias"]
        key = fused[:, width : 2 * width]
        value = fused[:, 2 * width :] + get[f"{name}attn.v_bias"]
        heads = [
            each.reshape(len(x), self._heads, -1).transpose(0, 1) for each in (query, key, value)
        ]
        scale = heads[0].shape[-1] ** -0.5
        attention = torch.softmax(heads[0] @ heads[1].transpose(1, 2) * scale, dim=-1)
        mixed = (attention @ heads[2]).transpose(0, 1).flatten(1)
        x = x + mixed @ get[f"{name}attn.proj.weight"].T + get[f"{name}attn.proj.bias"]
        inner = norm(x, "norm2") @ get[f"{name}mlp.fc1.weight"].T + get[f"{name}mlp.fc1.bias"]
        outer = functional.gelu(inner) @ get[f"{name}mlp.fc2.weight"].T
        return x + outer + get[f"{name}mlp.fc2.bias"], attention, query, key
