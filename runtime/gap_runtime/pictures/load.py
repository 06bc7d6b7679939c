"""Pictures of any kind to RGB, and RGB to the pixels that a vision graph takes."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO, Final, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from gap_runtime.errors import InputError
from gap_runtime.pictures import limits
from gap_runtime.pictures.boxes import PictureFrame
from gap_runtime.pictures.preprocess import Bucket, Preprocess, find_mode
from gap_runtime.records.files import open_file

ImageInput = str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray
"""What a picture may be given as."""
ChannelOrder = Literal["RGB", "BGR"]
"""Of an array's last axis."""

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
_OPPOSITE: Final = {6: 8, 8: 6}
"""The orientation that undoes another one, where it is not the same."""
FORMATS: Final = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "AVIF",
    "JPEG2000",
    "PPM",
    "ICO",
)
"""Formats of pictures that are read, of all that Pillow knows: what people have, and what says
itself where it is broken. Some of the others run programs, or guess."""
_USUAL: Final = ("JPEG", "PNG")
"""Those that are tried before Pillow imports all others, which takes as long as opening one."""
_BROKEN: Final = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, AttributeError),
    *(RuntimeError, ArithmeticError, AssertionError, MemoryError, struct.error),
)
"""What Pillow raises over a damaged file."""
_LOG: Final = logging.getLogger(__name__)


def load_picture(path: str | Path, *, turned: bool = True) -> Image.Image:
    """A picture file as upright 8-bit RGB.

    Grey, palette, alpha and CMYK pictures are converted as the models' own processors do: alpha is
    dropped. 16-bit pictures keep their upper eight bits, where those processors make all but the
    darkest white.

    Args:
        path: The file.
        turned: Apply EXIF rotation; without, the pixels stay as they are stored.

    Raises:
        InputError: The file is missing, no picture, broken, or larger than limits.MAX_PIXELS.
    """
    return read_picture(path, str(path), turned=turned)


def open_picture(image: object, *, order: str = "RGB") -> Image.Image:
    """A picture in any form as upright 8-bit RGB.

    Args:
        image: A path, the bytes of a picture file, a Pillow picture, or an array of uint8
            [height, width, 3], as cameras give.
        order: Of an array's channels: `RGB`, or `BGR` as OpenCV has it.

    Raises:
        InputError: It is none of these, or cannot be used.
    """
    if order not in {"RGB", "BGR"}:
        raise InputError(f"channels in the order {order!r:.20}; expected RGB or BGR")
    if order == "BGR" and not isinstance(image, np.ndarray):
        raise InputError(
            f"channels in the order BGR for a picture of type {type(image).__name__}; only "
            "arrays have an order of their own, leave it out"
        )
    if isinstance(image, (str, Path)):
        return load_picture(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return read_picture(io.BytesIO(image), "the bytes given as picture")
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise InputError(f"a picture of {image.width}x{image.height} pixels, which is none")
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
    if image.shape[0] * image.shape[1] > limits.MAX_PIXELS:
        raise InputError(
            f"a picture of {image.shape[1]}x{image.shape[0]} pixels, at most "
            f"{limits.MAX_PIXELS:,} in all are read; scale it down"
        )
    frame = image[..., ::-1] if order == "BGR" else image
    return Image.fromarray(np.ascontiguousarray(frame))


def read_picture(
    file: str | Path | BinaryIO,
    name: str,
    *,
    turned: bool = True,
    most_pixels: int | None = None,
) -> Image.Image:
    """A picture as `load_picture` gives it, from an open file or a path; `name` is for errors.

    `most_pixels` are read, limits.MAX_PIXELS by default.

    Raises:
        InputError: As for `load_picture`.
    """
    most = limits.MAX_PIXELS if most_pixels is None else most_pixels
    if isinstance(file, (str, Path)):
        with open_file(file, InputError, limit=limits.MAX_FILE_BYTES) as opened:
            return _decode(opened, name, most, turned=turned)
    return _decode(file, name, most, turned=turned)


def _decode(file: BinaryIO, name: str, most: int, *, turned: bool) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # The size is checked below, with a lower limit than Pillow's. Of its other warnings,
            # as of broken EXIF, nothing follows for the pixels.
            warnings.simplefilter("ignore")
            with _open(file) as picture:
                # Before it is unpacked: a small file may hold a huge picture.
                if picture.width * picture.height > most:
                    raise InputError(
                        f"{picture.width}x{picture.height} pixels, "
                        f"at most {most:,} in all are read; scale it down"
                    )
                # What cameras put behind a photograph is its own preview.
                if (frames := getattr(picture, "n_frames", 1)) > 1 and picture.format != "MPO":
                    _LOG.warning("%s: the first of its %d pictures is taken", name, frames)
                return to_rgb(picture, turned=turned)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name}: not a picture in a format that is read ({', '.join(FORMATS)})"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: more than {limits.MAX_PIXELS:,} pixels; scale it down"
        ) from error
    except _BROKEN as error:
        raise InputError(f"{name}: the picture is broken ({error})") from error


def _open(file: BinaryIO) -> Image.Image:
    """A picture whose pixels are not read yet."""
    Image.preinit()
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(file, formats=[name for name in _USUAL if name in Image.OPEN])
    return Image.open(file, formats=_list_formats())


@cache
def _list_formats() -> list[str]:
    """Those of FORMATS that the installed Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names.

    Raises:
        InputError: It holds none.
    """
    known = Image.registered_extensions()
    suffixes = {suffix for suffix, name in known.items() if name in FORMATS}
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not files:
        raise InputError(f"{folder}: no picture in this folder (folders in it are not looked at)")
    return files


def to_rgb(picture: Image.Image, *, turned: bool = True) -> Image.Image:
    """8-bit RGB of a picture of any mode, upright unless `turned` is false.

    Raises:
        InputError: The picture holds values that have no fixed range (32-bit float).
    """
    upright = _turn(picture, turned=turned)
    is_plain = type(picture) is Image.Image and picture.mode == "RGB" and not picture.info
    if is_plain and upright is picture:
        # As it came from here, from an array or a video: one copy does.
        return picture.copy()
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
    plain = upright.convert("RGB")
    # Without metadata, so that a picture that comes again is not turned again.
    plain.info = {}
    return plain


def _turn(picture: Image.Image, *, turned: bool) -> Image.Image:
    """A picture upright, or as it is stored, whatever Pillow does while it reads the format."""
    # Pillow's exif_transpose writes the EXIF anew and stumbles over careless entries.
    stored = picture.getexif().get(_ORIENTATION, 1)
    picture.load()
    # It turns some formats upright by itself while it loads them, and then says so.
    left = picture.getexif().get(_ORIENTATION, 1)
    if turned:
        turn = _TURNS.get(left)
    else:
        turn = _TURNS.get(_OPPOSITE.get(stored) or stored) if stored != left else None
    return picture if turn is None else picture.transpose(turn)


def make_pixels(picture: Image.Image, spec: Preprocess, bucket: Bucket) -> np.ndarray:
    """Normalized pixels of an RGB picture, float32 of the shape `spec.pixel_shape(bucket)`.

    Raises:
        BundleError: The bundle asks for a mode that this version does not know.
        InputError: The picture is too large, or would be while it is resized.
    """
    return find_mode(spec).make_pixels(picture, spec, bucket)


def find_bucket(size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]) -> Bucket:
    """The bucket of a picture of that (width, height).

    Raises:
        InputError: None of them is made for its shape; the message names the one to export.
    """
    return find_mode(spec).find_bucket(size, spec, buckets)


def fitting_size(bucket: Bucket, spec: Preprocess) -> tuple[int, int]:
    """(width, height) of a picture whose bucket this is.

    Raises:
        BundleError: There is no such picture.
    """
    return find_mode(spec).fitting_size(bucket, spec)


def frame_picture(size: tuple[int, int], spec: Preprocess, bucket: Bucket) -> PictureFrame:
    """What of a picture of that (width, height) the model is shown, and at which size."""
    return find_mode(spec).frame_picture(size, spec, bucket)
