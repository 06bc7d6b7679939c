"""The library's vision transformer with pixel shuffle, with all that pruners may ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gap_export.interfaces.features import EagerVision, Geometry
from gap_export.reference.hooks import record_outputs

# V views, T tokens of a view (CLS first), P patches of a view, N visual tokens, C width, D decoder
# width, c patches along a cell's side.


class EagerInternVit:
    """A vision tower, and the library's own pixel shuffle behind it."""

    def __init__(
        self,
        tower: Any,
        layer: int,
        shuffle: Callable[..., Tensor],
        *,
        cell: int,
        is_normed: bool,
    ) -> None:
        """Wrap a loaded tower.

        Args:
            tower: The library's.
            layer: Of the hidden state that patches are taken from.
            shuffle: [V, rows, columns, C] and a scale to [V, rows, columns, C * c * c].
            cell: Patches along a cell's side.
            is_normed: Whether the patches are those behind the tower's last norm.
        """
        self._tower, self._layer = tower.eval(), layer
        self._shuffle, self._cell, self._is_normed = shuffle, cell, is_normed

    @torch.no_grad()
    def look(
        self,
        views: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        geometry: Geometry,
        arrange: Callable[[Tensor], Tensor],
    ) -> EagerVision:
        """All that pruners may ask for of the views [V, 3, H, W] of a picture."""
        dtype = next(self._tower.parameters()).dtype
        attentions = [block.attention for block in self._tower.encoder.layer]
        # Behind their norms, where there are any.
        with (
            record_outputs(each.q_norm for each in attentions) as queries,
            record_outputs(each.k_norm for each in attentions) as keys,
        ):
            output = self._tower(
                pixel_values=views.to(dtype), output_hidden_states=True, output_attentions=True
            )
        states = list(output.hidden_states)
        if self._is_normed:
            states[self._layer] = output.last_hidden_state
        patches_VPC = states[self._layer][:, 1:]
        side = round(patches_VPC.shape[1] ** 0.5)
        square = patches_VPC.reshape(len(views), side, side, -1)
        shuffled = self._shuffle(square, scale_factor=1 / self._cell)
        patches = shuffled.reshape(-1, shuffled.shape[-1])
        return EagerVision(
            patches=patches,
            tokens=project(patches),
            hidden_states=tuple(states),
            attentions=tuple(output.attentions),
            queries=tuple(queries),
            keys=tuple(keys),
            leading=1,
            layer=self._layer,
            geometry=geometry,
            arrange=arrange,
        )

    def normalize(self, patches: Tensor) -> Tensor:
        """There is no space that patches share with a text tower."""
        return patches


def pack_cells(cell: int) -> Callable[[Tensor], Tensor]:
    """What brings values by patch [V, P, ...] into one row, cell after cell of each view."""

    def pack(values: Tensor) -> Tensor:
        side = round(values.shape[1] ** 0.5)
        rows = values.reshape(len(values), side, side, *values.shape[2:])
        return torch.stack(
            [
                view[top + row, left + column]
                for view in rows
                for top in range(0, side, cell)
                for left in range(0, side, cell)
                for row in range(cell)
                for column in range(cell)
            ]
        )

    return pack
