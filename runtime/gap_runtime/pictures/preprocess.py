"""What a bundle says of its pictures: how they become pixels, and which share a vision graph."""

from __future__ import annotations

from dataclasses import dataclass

from gap_runtime.pictures.tiles import count_views


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How a picture becomes pixels: RGB, shaped, resized, scaled, normalized.

    `mode` is `pad` (to a square filled with `fill`), `stretch`, `anyres` (a view of the whole
    picture, then tiles of it on the fitting one of `canvases`, (width, height) in pixels), or
    `tiles` (tiles of the picture stretched to the nearest of `canvases`, then the whole).
    `side` is that of every view.
    """

    mode: str
    side: int
    fill: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    canvases: tuple[tuple[int, int], ...]

    def pixel_shape(self, bucket: Bucket) -> tuple[int, ...]:
        """Of the pixels of a bucket's pictures: [1, 3, height, width].

        Tiles and the whole picture before them are views: [1, views, 3, side, side].
        """
        if bucket.canvas is None:
            return 1, 3, self.side, self.side
        width, height = bucket.canvas
        if self.mode == "tiles":
            return 1, count_views(bucket.canvas, self.side), 3, self.side, self.side
        if self.mode != "anyres":
            return 1, 3, height, width
        return 1, 1 + width // self.side * (height // self.side), 3, self.side, self.side


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Pictures that share a vision graph: all of them, or those of one canvas and aspect.

    The visual tokens are `grids` of (rows, columns), one after another, and in between those of
    the indices `fixed`, which show no part of the picture and are never removed. A token of a
    grid is made of `strip` neighbouring patches. `canvas` is (width, height) in pixels, null
    where pictures of any shape take the same road.
    """

    name: str
    canvas: tuple[int, int] | None
    grids: tuple[tuple[int, int], ...]
    strip: int
    fixed: tuple[int, ...]

    @property
    def patches(self) -> int:
        """Visual tokens before pruning."""
        return sum(rows * columns for rows, columns in self.grids) + len(self.fixed)

    @property
    def removable(self) -> list[int]:
        """The visual tokens that may be removed, ascending: all but the fixed ones."""
        fixed = set(self.fixed)
        return [token for token in range(self.patches) if token not in fixed]
