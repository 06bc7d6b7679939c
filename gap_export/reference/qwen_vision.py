"""Qwen2.5-VL's vision tower, Hugging Face's own, for pictures as the runtime makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from gap_export.interfaces.features import EagerVision, Geometry

# V views (1), N patches, M visual tokens, C width, D decoder width, p pixels of a patch's side.


class EagerQwenVision:
    """The library's tower without its merger."""

    def __init__(self, tower: nn.Module, config: Any) -> None:
        """Wrap a loaded tower; `config` is the library's."""
        self._tower, self._config = tower.eval(), config

    @torch.no_grad()
    def look(
        self,
        views: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        geometry: Geometry,
        arrange: Callable[[Tensor], Tensor],
    ) -> EagerVision:
        """The tokens of the one view [1, 3, H, W]; no by-product is given."""
        config = self._config
        merge, size = config.spatial_merge_size, config.patch_size
        rows, columns = (int(side) // size for side in views.shape[-2:])
        # As the library's processor lays patches out: token by token, then its own patches.
        cut = views[0].reshape(3, rows // merge, merge, size, columns // merge, merge, size)
        cut = cut.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]
        flat = cut.expand(*cut.shape[:5], config.temporal_patch_size, size, size)
        grid = torch.tensor([[1, rows, columns]])
        dtype = next(self._tower.parameters()).dtype
        output = self._tower(flat.reshape(rows * columns, -1).to(dtype), grid_thw=grid)
        order, _ = get_vision_window_index(
            grid,
            spatial_merge_size=merge,
            window_size=config.window_size,
            patch_size=size,
        )
        tokens = output.last_hidden_state.reshape(len(order), -1)
        patches = arrange(tokens[torch.argsort(order)][None])
        return EagerVision(
            patches=patches,
            tokens=project(patches),
            leading=0,
            layer=config.depth,
            geometry=geometry,
            arrange=arrange,
        )

    def normalize(self, patches: Tensor) -> Tensor:
        """Nothing compares patches with CLIP's text here."""
        return patches
