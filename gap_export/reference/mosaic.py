"""How the patches of a picture's views become one row, written plainly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gap_runtime.pictures.preprocess import Bucket

# V views, P patches of a view.


def pack_views(
    bucket: Bucket, side: int, mosaic: tuple[int, int] | None = None
) -> Callable[[Tensor], Tensor]:
    """What makes one row of patches [V, P, ...]: the whole view, then the mosaic without padding.

    Args:
        bucket: Of the picture.
        side: Pixels along a tile's side.
        mosaic: (rows, columns) before it is shrunk to the bucket's last grid; that grid where it
            is not.
    """
    (grid, _), less = bucket.grids
    rows, columns = mosaic or less
    assert bucket.canvas is not None
    across, down = bucket.canvas[0] // side, bucket.canvas[1] // side
    top, left = (down * grid - rows) // 2, (across * grid - columns) // 2

    def pack(values: Tensor) -> Tensor:
        tiles = values[1:].reshape(down, across, grid, grid, *values.shape[2:])
        bands = [torch.cat(list(band), dim=1) for band in tiles]
        cut = torch.cat(bands, dim=0)[top : top + rows, left : left + columns]
        if (rows, columns) != less:
            channels = cut.reshape(rows, columns, -1).permute(2, 0, 1)
            small = functional.interpolate(channels[None], less, mode="bilinear")[0]
            cut = small.permute(1, 2, 0).reshape(*less, *values.shape[2:])
        return torch.cat([values[0], cut.flatten(0, 1)])

    return pack
