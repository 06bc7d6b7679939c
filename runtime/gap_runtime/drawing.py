"""Paint boxes, phrases and kept patches on a picture."""

from __future__ import annotations

import math
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from gap_runtime.boxes import Box, clip_box, unpad_box
from gap_runtime.image import find_bucket
from gap_runtime.manifest import Manifest

_LEAST_SIDE: Final = 480
BOX_COLOUR: Final = (255, 64, 129)
_SHADE: Final = (16, 18, 28, 170)


def draw_grounding(
    picture: Image.Image,
    manifest: Manifest,
    *,
    phrase: str,
    boxes: tuple[Box, ...],
    kept_index: tuple[int, ...],
    colour: tuple[int, int, int] = BOX_COLOUR,
) -> Image.Image:
    """A copy of the picture with removed patches shaded, boxes outlined and the phrase.

    Small pictures are enlarged so that the labels can be read.
    """
    scale = max(1, math.ceil(_LEAST_SIDE / max(picture.size)))
    canvas = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
    ).convert("RGBA")
    shade = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(shade)
    bucket = find_bucket(picture.size, manifest.preprocess, manifest.buckets)
    # Of several grids the last is the finest, and shows the whole picture too.
    rows, columns = bucket.grids[-1]
    tokens = [token for token in range(bucket.patches) if token not in bucket.fixed]
    kept = set(kept_index)
    for place, token in enumerate(tokens[-rows * columns :]):
        box = _patch_box(place, rows, columns, manifest, picture)
        if token not in kept and box is not None:
            x0, y0, x1, y1 = (round(value * scale) for value in box.as_list())
            # Pillow counts the far edge in, which belongs to the next patch.
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=_SHADE)
    canvas = Image.alpha_composite(canvas, shade).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    width = max(2, max(canvas.size) // 160)
    font = ImageFont.load_default(size=max(14, max(canvas.size) // 24))
    for found in boxes:
        x0, y0, x1, y1 = (round(value * scale) for value in found.as_list())
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=width)
    anchor = (boxes[0].x0 * scale, boxes[0].y0 * scale) if boxes else (4.0, canvas.height - 4.0)
    _draw_label(draw, phrase if boxes else f"{phrase}: no box", anchor, canvas.size, font, colour)
    return canvas


def draw_panels(panels: list[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Titled pictures of one size side by side, row by row."""
    font = ImageFont.load_default(size=22)
    margin, header = 14, 38
    width, height = panels[0][1].size
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + margin) + margin, rows * (height + header + margin) + margin),
        (250, 250, 252),
    )
    draw = ImageDraw.Draw(sheet)
    for k, (title, panel) in enumerate(panels):
        x = margin + (k % columns) * (width + margin)
        y = margin + (k // columns) * (height + header + margin)
        draw.text((x, y + 4), title, fill=(28, 30, 40), font=font)
        sheet.paste(panel, (x, y + header))
    return sheet


def _patch_box(
    patch: int, rows: int, columns: int, manifest: Manifest, picture: Image.Image
) -> Box | None:
    """Where a patch lies in the picture, or None where it lies in the padding."""
    row, column = divmod(patch, columns)
    values = [column / columns, row / rows, (column + 1) / columns, (row + 1) / rows]
    frame = "padded-square" if manifest.preprocess.mode == "pad" else "original"
    return clip_box(unpad_box(values, frame, *picture.size), *picture.size)


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
