"""What a bundle says of its pictures: how they become pixels, and which share a vision graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, Protocol

from gap_runtime.errors import BundleError
from gap_runtime.registry import list_plugins, load_plugin

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from gap_runtime.pictures.boxes import PictureFrame

_MODES: Final = "gap_runtime.pictures.modes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How a picture becomes pixels: RGB, shaped, resized, scaled, normalized.

    `mode` is a file in gap_runtime.pictures.modes: `pad` (to a square filled with `fill`),
    `stretch` (to a square), `resize` (to the canvas of its bucket), `anyres` (a view of the whole
    picture, then tiles of it on the fitting one of `canvases`, (width, height) in pixels),
    `anyres_max` (the same, for graphs that shrink what the tiles give), or `tiles` (tiles of the
    picture stretched to the nearest of `canvases`, then the whole).
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
        return find_mode(self).pixel_shape(self, bucket)


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


class PictureMode(Protocol):
    """A module in gap_runtime.pictures.modes; sizes are (width, height) in pixels."""

    def is_usable(self, spec: Preprocess, buckets: tuple[Bucket, ...]) -> bool:
        """Whether what a manifest says of its pictures fits this mode."""

    def pixel_shape(self, spec: Preprocess, bucket: Bucket) -> tuple[int, ...]:
        """Shape of what `make_pixels` gives of a bucket's pictures."""

    def find_bucket(
        self, size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]
    ) -> Bucket:
        """The bucket of a picture.

        Raises:
            InputError: None of them is made for its shape; the message names the one to export.
        """

    def fitting_size(self, bucket: Bucket, spec: Preprocess) -> tuple[int, int]:
        """Size of a picture whose bucket this is.

        Raises:
            BundleError: There is no such picture.
        """

    def make_pixels(self, picture: Image.Image, spec: Preprocess, bucket: Bucket) -> np.ndarray:
        """Normalized pixels of an RGB picture, float32.

        Raises:
            InputError: The picture is too large, or would be while it is resized.
        """

    def frame_picture(
        self, size: tuple[int, int], spec: Preprocess, bucket: Bucket
    ) -> PictureFrame:
        """What of a picture the model is shown, and at which size."""

    def find_cells(
        self, bucket: Bucket, spec: Preprocess
    ) -> dict[int, tuple[float, float, float, float]]:
        """Where visual tokens lie, by index: x0, y0, x1, y1 as fractions of what is shown."""


def find_mode(spec: Preprocess) -> PictureMode:
    """The mode that a bundle asks for.

    Raises:
        BundleError: This version does not know it.
    """
    return _load_mode(spec.mode)


@cache
def _load_mode(name: str) -> PictureMode:
    """Looked up once: every request asks several times, and each time a folder would be listed."""
    have = list_plugins(_MODES)
    if name not in have:
        raise BundleError(
            f"preprocessing mode '{name}' is unknown; have {', '.join(have)}; upgrade gap-runtime"
        )
    mode: PictureMode = load_plugin(_MODES, name, "picture mode")
    return mode
