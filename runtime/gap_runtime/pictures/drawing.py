"""Paint boxes, phrases and kept patches on a picture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from gap_runtime.pictures.boxes import Box, clip_box
from gap_runtime.pictures.load import find_bucket
from gap_runtime.pictures.preprocess import Bucket, Preprocess, find_mode

_LEAST_SIDE: Final = 480
BOX_COLOUR: Final = (255, 64, 129)
REFERENCE_COLOUR: Final = (47, 111, 228)
TRUE_COLOUR: Final = (0, 200, 83)
_SHADE: Final = (16, 18, 28, 170)
_DARKEST: Final = 215


def draw_grounding(
    picture: Image.Image,
    spec: Preprocess,
    buckets: tuple[Bucket, ...],
    *,
    phrase: str,
    boxes: tuple[Box, ...],
    kept_index: tuple[int, ...],
    colour: tuple[int, int, int] = BOX_COLOUR,
) -> Image.Image:
    """A copy of the picture with removed patches shaded, boxes outlined and the phrase.

    Small pictures are enlarged so that the labels can be read.
    """
    found = [(phrase, boxes)]
    return draw_groundings(picture, spec, buckets, found, kept_index=kept_index, colour=colour)


def draw_groundings(
    picture: Image.Image,
    spec: Preprocess,
    buckets: tuple[Bucket, ...],
    found: Sequence[tuple[str, tuple[Box, ...]]],
    *,
    kept_index: tuple[int, ...],
    colour: tuple[int, int, int] = BOX_COLOUR,
) -> Image.Image:
    """As `draw_grounding`, for several phrases, each with its boxes."""
    canvas, scale = shade_patches(picture, spec, buckets, kept_index)
    draw = ImageDraw.Draw(canvas)
    size = max(14, max(canvas.size) // 24)
    font = ImageFont.load_default(size=size)
    for _, boxes in found:
        outline_boxes(canvas, boxes, scale, colour)
    floor = canvas.height - 4.0
    for phrase, boxes in found:
        anchor = (boxes[0].x0 * scale, boxes[0].y0 * scale) if boxes else (4.0, floor)
        label = phrase if boxes else f"{phrase}: no box"
        _draw_label(draw, label, anchor, canvas.size, font, colour)
        if not boxes:
            floor -= 1.5 * size
    return canvas


def shade_patches(
    picture: Image.Image,
    spec: Preprocess,
    buckets: tuple[Bucket, ...],
    kept_index: Collection[int],
) -> tuple[Image.Image, int]:
    """A copy of the picture with removed patches shaded, and by how much it was enlarged."""
    canvas, scale = enlarge(picture)
    kept = set(kept_index)
    places = find_patches(picture.size, spec, buckets)
    shaded = {token: _SHADE for token in places if token not in kept}
    return _tint(canvas, places, shaded, scale), scale


def draw_heat(
    picture: Image.Image,
    spec: Preprocess,
    buckets: tuple[Bucket, ...],
    shares: Mapping[int, float],
) -> Image.Image:
    """A copy of the picture in which a patch is the darker the smaller its share, in [0, 1]."""
    canvas, scale = enlarge(picture)
    places = find_patches(picture.size, spec, buckets)
    red, green, blue, _ = _SHADE
    tints = {
        token: (red, green, blue, round(_DARKEST * (1 - shares.get(token, 0.0))))
        for token in places
    }
    return _tint(canvas, places, tints, scale)


def outline_boxes(
    canvas: Image.Image,
    boxes: Sequence[Box],
    scale: int,
    colour: tuple[int, int, int],
    *,
    width: int | None = None,
    dashed: bool = False,
) -> None:
    """Outline boxes on a picture that was enlarged so many times; in one colour, in place."""
    draw = ImageDraw.Draw(canvas)
    width = max(2, max(canvas.size) // 160) if width is None else width
    for found in boxes:
        x0, y0, x1, y1 = (round(value * scale) for value in found)
        if dashed:
            _draw_dashes(draw, (x0, y0, x1 - 1, y1 - 1), colour, width)
        else:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=width)


def draw_pair(
    canvas: Image.Image,
    scale: int,
    *,
    reference: Sequence[Box],
    found: Sequence[Box],
    true: Sequence[Box] = (),
) -> None:
    """Outline PyTorch's boxes, inside their line those found, and dashed the true ones."""
    width = max(4, max(canvas.size) // 60)
    outline_boxes(canvas, reference, scale, REFERENCE_COLOUR, width=width)
    outline_boxes(canvas, found, scale, BOX_COLOUR, width=max(2, width // 2))
    outline_boxes(canvas, true, scale, TRUE_COLOUR, width=width, dashed=True)


def _draw_dashes(
    draw: ImageDraw.ImageDraw,
    corners: tuple[int, int, int, int],
    colour: tuple[int, int, int],
    width: int,
) -> None:
    """The outline of a rectangle in dashes, inside it."""
    x0, y0, x1, y1 = corners
    dash = 4 * width
    for x in range(x0, x1 + 1, 2 * dash):
        end = min(x + dash, x1)
        draw.rectangle((x, y0, end, min(y0 + width - 1, y1)), fill=colour)
        draw.rectangle((x, max(y1 - width + 1, y0), end, y1), fill=colour)
    for y in range(y0, y1 + 1, 2 * dash):
        end = min(y + dash, y1)
        draw.rectangle((x0, y, min(x0 + width - 1, x1), end), fill=colour)
        draw.rectangle((max(x1 - width + 1, x0), y, x1, end), fill=colour)


def enlarge(picture: Image.Image) -> tuple[Image.Image, int]:
    """The picture at a size at which labels can be read, and by how much it was enlarged."""
    scale = max(1, math.ceil(_LEAST_SIDE / max(picture.size)))
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST).convert("RGBA"), scale


def find_patches(
    size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]
) -> dict[int, Box]:
    """Where visual tokens lie in a picture of (width, height), but for those in the padding."""
    bucket = find_bucket(size, spec, buckets)
    mode = find_mode(spec)
    frame = mode.frame_picture(size, spec, bucket)
    found = {}
    for token, cell in mode.find_cells(bucket, spec).items():
        box = clip_box(frame.place(cell), *size)
        if box is not None:
            found[token] = box
    return found


def _tint(
    canvas: Image.Image,
    places: Mapping[int, Box],
    tints: Mapping[int, tuple[int, int, int, int]],
    scale: int,
) -> Image.Image:
    """The canvas with colours laid over some patches."""
    shade = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(shade)
    for token, tint in tints.items():
        x0, y0, x1, y1 = (round(value * scale) for value in places[token])
        # Pillow counts the far edge in, which belongs to the next patch.
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=tint)
    return Image.alpha_composite(canvas, shade).convert("RGB")


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    anchor: tuple[float, float],
    size: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: tuple[int, int, int],
) -> None:
    """White text on the colour, above the anchor and inside the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 12, bottom - top + 10
    x = min(max(anchor[0], 0), max(size[0] - width, 0))
    y = anchor[1] - height if anchor[1] >= height else anchor[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 6 - left, y + 5 - top), text, fill=(255, 255, 255), font=font)
