"""Pictures of any kind to RGB, and RGB to the pixels that a vision graph takes."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from gap_runtime.errors import BundleError, InputError
from gap_runtime.manifest import Preprocess

MAX_PIXELS: Final = 100_000_000
"""Larger pictures are refused before they are unpacked (decompression bombs)."""

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


def load_picture(path: str | Path) -> Image.Image:
    """A picture file as upright 8-bit RGB.

    EXIF rotation is applied. Grey, palette, alpha, CMYK and 16-bit pictures are converted as
    the models' own processors do: alpha is dropped, 16 bits keep their upper eight.

    Raises:
        InputError: The file is missing, no picture, broken, or larger than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            # The size is checked below, with a lower limit than Pillow's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise InputError(
                        f"{picture.width}x{picture.height} pixels, "
                        f"at most {MAX_PIXELS:,} in all are read; scale it down"
                    )
                return to_rgb(picture)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: a folder, expected a picture file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a picture in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: more than {MAX_PIXELS:,} pixels; scale it down") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error) as error:
        raise InputError(f"{path}: the picture is broken ({error})") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of a picture of any mode.

    Raises:
        InputError: The picture holds values that have no fixed range (32-bit float).
    """
    # Pillow's exif_transpose writes the EXIF anew and stumbles over careless entries.
    turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
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


def make_pixels(picture: Image.Image, spec: Preprocess) -> np.ndarray:
    """Normalized pixels, float32 [1, 3, side, side].

    Raises:
        BundleError: The bundle asks for a mode that this version does not know.

    References:
        The models' own `image_aspect_ratio=pad` with CLIP's processor: bicubic, 1/255, mean, std.
    """
    if spec.mode == "pad":
        picture = pad_to_square(picture, spec.fill)
    elif spec.mode != "stretch":
        raise BundleError(f"preprocessing mode '{spec.mode}' is unknown; have pad, stretch")
    resized = picture.resize((spec.side, spec.side), Image.Resampling.BICUBIC)
    scaled = np.asarray(resized, dtype=np.float32) * np.float32(1 / 255)
    mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1)[None])
