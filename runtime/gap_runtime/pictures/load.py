"""Pictures of any kind to RGB, and RGB to the pixels that a vision graph takes."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from gap_runtime.errors import BundleError, InputError
from gap_runtime.pictures.anyres import MAX_PIXELS, choose_canvas, make_views, mosaic_grid
from gap_runtime.pictures.preprocess import Bucket, Preprocess
from gap_runtime.pictures.tiles import choose_tiles, make_tiles, shape_for

_MODES: Final = "pad, stretch, anyres, tiles"
_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn a picture upright, by its EXIF orientation."""


def load_picture(path: str | Path, *, turned: bool = True) -> Image.Image:
    """A picture file as upright 8-bit RGB.

    Grey, palette, alpha, CMYK and 16-bit pictures are converted as the models' own processors
    do: alpha is dropped, 16 bits keep their upper eight.

    Args:
        path: The file.
        turned: Apply EXIF rotation; without, the pixels stay as they are stored.

    Raises:
        InputError: The file is missing, no picture, broken, or larger than MAX_PIXELS.
    """
    return read_picture(path, str(path), turned=turned)


def open_picture(image: object) -> Image.Image:
    """A picture in any form as upright 8-bit RGB.

    Args:
        image: A path, the bytes of a picture file, a Pillow picture, or an array of uint8 in RGB
            order [height, width, 3], as cameras give (OpenCV's are BGR: `frame[..., ::-1]`).

    Raises:
        InputError: It is none of these, or cannot be used.
    """
    if isinstance(image, (str, Path)):
        return load_picture(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return read_picture(io.BytesIO(image), "the bytes given as picture")
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"a picture of type {type(image).__name__}; expected a path, bytes of a file, a "
            "Pillow picture or a uint8 array [height, width, 3]"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"a picture as {image.dtype} array {list(image.shape)}; expected uint8 [height, "
            "width, 3] in RGB order"
        )
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise InputError(
            f"a picture of {image.shape[1]}x{image.shape[0]} pixels, at most {MAX_PIXELS:,} in "
            "all are read; scale it down"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def read_picture(file: str | Path | BinaryIO, name: str, *, turned: bool = True) -> Image.Image:
    """A picture as `load_picture` gives it, from an open file or a path; `name` is for errors.

    Raises:
        InputError: As for `load_picture`.
    """
    try:
        with warnings.catch_warnings():
            # The size is checked below, with a lower limit than Pillow's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                # Before it is unpacked: a small file may hold a huge picture.
                if picture.width * picture.height > MAX_PIXELS:
                    raise InputError(
                        f"{picture.width}x{picture.height} pixels, "
                        f"at most {MAX_PIXELS:,} in all are read; scale it down"
                    )
                return to_rgb(picture, turned=turned)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: a folder, expected a picture file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a picture in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: more than {MAX_PIXELS:,} pixels; scale it down") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error) as error:
        raise InputError(f"{name}: the picture is broken ({error})") from error


def to_rgb(picture: Image.Image, *, turned: bool = True) -> Image.Image:
    """8-bit RGB of a picture of any mode, upright unless `turned` is false.

    Raises:
        InputError: The picture holds values that have no fixed range (32-bit float).
    """
    # Pillow's exif_transpose writes the EXIF anew and stumbles over careless entries.
    turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1)) if turned else None
    upright = picture if turn is None else picture.transpose(turn)
    if upright.mode == "F":
        raise InputError("a picture of 32-bit floats has no fixed range; save it with 8 bits")
    if upright.mode.startswith("I"):
        values = np.clip(np.asarray(upright), 0, 65535)
        # Pillow's own conversion would clip 16-bit values to 255.
        if upright.mode != "I" or values.max() > 255:
            values = values >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    # Without metadata, so that a picture that comes again is not turned again.
    return Image.fromarray(np.asarray(upright.convert("RGB")))


def pad_to_square(picture: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square canvas as wide as its longest side.

    Raises:
        InputError: The canvas would be too large.
    """
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    if side * side > MAX_PIXELS:
        raise InputError(
            f"a picture of {width}x{height} needs {side}x{side} pixels when padded to a square; "
            "crop it or scale it down"
        )
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    return canvas


def make_pixels(picture: Image.Image, spec: Preprocess, bucket: Bucket) -> np.ndarray:
    """Normalized pixels, float32 [1, 3, side, side], or [1, views, 3, side, side] of tiles.

    Raises:
        BundleError: The bundle asks for a mode that this version does not know.

    References:
        The models' own `image_aspect_ratio=pad` with CLIP's processor: bicubic, 1/255, mean, std.
    """
    if bucket.canvas is not None:
        make = make_tiles if spec.mode == "tiles" else make_views
        return make(picture, bucket.canvas, spec.side, spec.mean, spec.std)
    if spec.mode == "pad":
        picture = pad_to_square(picture, spec.fill)
    elif spec.mode != "stretch":
        raise BundleError(f"preprocessing mode '{spec.mode}' is unknown; have {_MODES}")
    resized = picture.resize((spec.side, spec.side), Image.Resampling.BICUBIC)
    scaled = np.asarray(resized, dtype=np.float32) * np.float32(1 / 255)
    mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1)[None])


def find_bucket(size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]) -> Bucket:
    """The bucket of a picture of that (width, height).

    Raises:
        InputError: None of them is made for its shape; the message names the one to export.
    """
    if spec.mode == "tiles":
        return _find_tiled(size, spec, buckets)
    if spec.mode != "anyres":
        return buckets[0]
    width, height = size
    canvas, mosaic = _place(size, spec, buckets[0].grids[0][0])
    for bucket in buckets:
        if (bucket.canvas, bucket.grids[-1]) == (canvas, mosaic):
            return bucket
    if 0 in mosaic:
        raise InputError(
            f"a picture of {width}x{height} is so thin that none of its tiles' tokens is left on "
            f"a canvas of {canvas[0]}x{canvas[1]}; crop it"
        )
    wanted = f"{canvas[0]}x{canvas[1]}/{width}:{height}"
    raise InputError(
        f"a picture of {width}x{height} needs graphs for {mosaic[0]}x{mosaic[1]} tokens on a "
        f"canvas of {canvas[0]}x{canvas[1]}; have {', '.join(b.name for b in buckets)}; export "
        f"with --set image.canvas={wanted}, or crop the picture to one of those"
    )


def _find_tiled(size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]) -> Bucket:
    """The bucket of the canvas whose aspect is nearest to the picture's."""
    canvas = choose_tiles(size, spec.canvases)
    for bucket in buckets:
        if bucket.canvas == canvas:
            return bucket
    across, down = canvas[0] // spec.side, canvas[1] // spec.side
    raise InputError(
        f"a picture of {size[0]}x{size[1]} is cut into {across}x{down} tiles, and needs graphs "
        f"for a canvas of {canvas[0]}x{canvas[1]}; have {', '.join(b.name for b in buckets)}; "
        f"export with --set image.canvas={canvas[0]}x{canvas[1]}, or crop the picture to one of "
        "those"
    )


def fitting_size(bucket: Bucket, spec: Preprocess) -> tuple[int, int]:
    """(width, height) of a picture whose bucket this is.

    Raises:
        BundleError: There is no such picture: another canvas wins for all that have its grid.
    """
    if bucket.canvas is None:
        return spec.side, spec.side
    if spec.mode == "tiles":
        shape = shape_for(bucket.canvas, spec.canvases, spec.side)
        if shape is None:
            raise BundleError(
                f"no picture fits bucket '{bucket.name}': another canvas always wins; export "
                "without it"
            )
        return shape
    (tile_grid, _), (rows, columns) = bucket.grids[0], bucket.grids[-1]
    exact = (columns * spec.side // tile_grid, rows * spec.side // tile_grid)
    # A smaller canvas may hold the exact size, and not the longest one that counts as much.
    longest = (
        min(-(-(columns + 1) * spec.side // tile_grid) - 1, bucket.canvas[0]),
        min(-(-(rows + 1) * spec.side // tile_grid) - 1, bucket.canvas[1]),
    )
    for size in (exact, longest):
        if _place(size, spec, tile_grid) == (bucket.canvas, (rows, columns)):
            return size
    raise BundleError(
        f"no picture fits bucket '{bucket.name}': other canvases win for all of its shape; "
        "export without it"
    )


def _place(
    size: tuple[int, int], spec: Preprocess, tile_grid: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Canvas (width, height) and mosaic (rows, columns) of a picture of that (width, height)."""
    canvas = choose_canvas(size, spec.canvases)
    return canvas, mosaic_grid(size, canvas, tile_grid, spec.side)
