"""Refshapes-256: pictures of 224 x 224 with cluttered backgrounds, and phrases that may relate.

The data of the embedded model with 256 visual tokens. As in `refshapes`, a scene is a function of
(split, index) alone and needs numpy and Pillow only. What differs: up to six objects that cover
5 to 20 % of the 16 x 16 cells, two more shapes, backgrounds with texture, strokes and confetti
that draw attention, and phrases that name an object by its relation to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from gap_runtime.evaluation.refshapes import COLOURS, Question, Shape

SIDE: Final = 224
"""Longest side of every picture, in pixels."""

CELL: Final = 14
"""Side of a cell, in pixels: what one visual token sees."""

SHAPES: Final = ("circle", "square", "triangle", "cross", "ring", "star")

SPLITS: Final = {"train": 20_261_101, "val": 20_261_202, "test": 20_261_303}
"""Seed of each split; the figures in the documentation are on `test`."""

KINDS: Final = ("plain", "size", "place", "relation")
"""How a phrase tells its object from the others."""

Box = tuple[int, int, int, int]

_COVER = (0.05, 0.20)
_SMALL, _BIG = (22, 27), (36, 44)
_LARGEST = (44, 44, 44, 44, 38, 33, 29)
_GAP = 4
_CLEAR = 28
_TIMES_AS_BIG = 1.7
_WORDS_OF_PLACE = (("left", "right"), ("top", "bottom"))
_WORDS_OF_RELATION = (("left of", "right of"), ("above", "below"))
_STAR = tuple(
    ((1.0, 0.45)[k % 2] * np.sin(k * np.pi / 5), -(1.0, 0.45)[k % 2] * np.cos(k * np.pi / 5))
    for k in range(10)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture (RGB, longest side 224 pixels), its objects and one question for each."""

    image: Image.Image
    shapes: tuple[Shape, ...]
    questions: tuple[Question, ...]


def draw_scene(
    split: str,
    index: int,
    *,
    size: tuple[int, int] | None = None,
    least: int = 2,
    most: int = 6,
    repeats: float = 0.4,
) -> Scene:
    """The scene at one place of a split, always the same for the same arguments.

    Args:
        split: One of SPLITS.
        index: Place in the split, from 0.
        size: Width and height in pixels; by default as the split has them, and the objects then
            cover 5 to 20 % of the cells.
        least: Fewest objects.
        most: Most objects.
        repeats: Share of scenes in which two objects have the same colour and shape, so that
            only size, place or a relation tells them apart.

    Returns:
        The picture with one question per object.
    """
    rng = np.random.default_rng((SPLITS[split], index))
    canvas = size or _canvas_size(rng)
    count = int(rng.integers(least, most + 1))
    twins = ""
    if count >= 2 and rng.random() < repeats:
        twins = str(rng.choice(KINDS[1:] if count >= 3 else KINDS[1:3]))
    # Three more tries at a number of objects that will not fit, then one fewer.
    shapes, tries = None, 0
    while shapes is None:
        shapes = _place_shapes(rng, canvas, count, twins, cover=size is None)
        tries += 1
        if tries % 400 == 0 and count > 1:
            count, twins = count - 1, ""
    image = _paint(rng, canvas, shapes)
    questions = tuple(
        _choose(rng, describe(shapes, k), twins if k < 2 else "") for k in range(len(shapes))
    )
    return Scene(image=image, shapes=shapes, questions=questions)


def describe(shapes: tuple[Shape, ...], target: int) -> tuple[Question, ...]:
    """Every phrase that means one of the objects and no other, in a fixed order.

    A word of size or place stands only where exactly two objects fit without it and they differ
    clearly; a relation only where its anchor is named without one and every object that fits
    the rest lies clearly on one side of the anchor, the target alone on the side that is said.
    """
    return tuple(
        Question(phrase=f"the {words}", box=shapes[target].box, target=target, kind=kind)
        for words, kind in (
            pair
            for name in _names(shapes[target])
            for pair in _tell_apart(name, shapes, target, _fitting(name, shapes))
        )
    )


def touched_cells(boxes: list[Box], offset: tuple[int, int] = (0, 0)) -> int:
    """How many cells of the padded picture the boxes touch, each counted once per box."""
    dx, dy = offset
    return sum(
        (-(-(x1 + dx) // CELL) - (x0 + dx) // CELL) * (-(-(y1 + dy) // CELL) - (y0 + dy) // CELL)
        for x0, y0, x1, y1 in boxes
    )


def _canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    """Square in seven of ten pictures, else one side shorter."""
    if rng.random() < 0.7:
        return SIDE, SIDE
    short = int(rng.integers(160, SIDE))
    return (SIDE, short) if rng.random() < 0.5 else (short, SIDE)


def _place_shapes(
    rng: np.random.Generator, canvas: tuple[int, int], count: int, twins: str, *, cover: bool
) -> tuple[Shape, ...] | None:
    """One try at objects that do not touch; the first two may be twins, told apart as said."""
    boxes: list[Box] = []
    for k in range(count):
        # The more there are, the smaller: else many a try would cover too much.
        limits = _SMALL[0], _LARGEST[count]
        if twins == "size" and k < 2:
            limits = (_SMALL, _BIG)[k]
        box = _drop(rng, canvas, _size(rng, limits))
        if not all(_apart(box, other) for other in boxes):
            return None
        boxes.append(box)
    if cover:
        offset = ((SIDE - canvas[0]) // 2, (SIDE - canvas[1]) // 2)
        least, most = (share * (SIDE // CELL) ** 2 for share in _COVER)
        if not least <= touched_cells(boxes, offset) <= most:
            return None
    looks = _looks(rng, count, twins=bool(twins))
    shapes = tuple(
        Shape(colour=colour, shape=shape, box=box)
        for (colour, shape), box in zip(looks, boxes, strict=True)
    )
    if twins and any(all(q.kind != twins for q in describe(shapes, k)) for k in (0, 1)):
        return None
    return shapes


def _looks(rng: np.random.Generator, count: int, *, twins: bool) -> list[tuple[str, str]]:
    """Colour and shape of each object; no two alike but the twins."""
    shared = rng.random() < 0.3
    while True:
        colours = rng.choice(list(COLOURS), size=count, replace=shared)
        kinds = rng.choice(SHAPES, size=count)
        looks = [(str(c), str(s)) for c, s in zip(colours, kinds, strict=True)]
        if len(set(looks)) == count:
            if twins:
                looks[1] = looks[0]
            return looks


def _size(rng: np.random.Generator, limits: tuple[int, int]) -> tuple[int, int]:
    """Width and height within limits (pixels), nearly equal."""
    width = int(rng.integers(limits[0], limits[1] + 1))
    height = round(width * rng.uniform(0.87, 1.15))
    return width, min(max(height, limits[0]), limits[1])


def _drop(rng: np.random.Generator, canvas: tuple[int, int], size: tuple[int, int]) -> Box:
    """A box of that size somewhere inside the picture."""
    x0 = int(rng.integers(1, canvas[0] - size[0]))
    y0 = int(rng.integers(1, canvas[1] - size[1]))
    return x0, y0, x0 + size[0], y0 + size[1]


def _apart(a: Box, b: Box) -> bool:
    """Whether a gap lies between two boxes."""
    return a[2] + _GAP <= b[0] or b[2] + _GAP <= a[0] or a[3] + _GAP <= b[1] or b[3] + _GAP <= a[1]


def _names(shape: Shape) -> tuple[str, str, str]:
    """An object by colour and shape, by its shape, by its colour."""
    return f"{shape.colour} {shape.shape}", shape.shape, f"{shape.colour} one"


def _fitting(name: str, shapes: tuple[Shape, ...]) -> list[int]:
    """The objects that a name fits."""
    return [k for k, shape in enumerate(shapes) if name in _names(shape)]


def _tell_apart(
    name: str, shapes: tuple[Shape, ...], target: int, fitting: list[int]
) -> list[tuple[str, str]]:
    """Words and kind of every phrase with this name that means the target alone."""
    if len(fitting) == 1:
        return [(name, "plain")]
    found = []
    others = [k for k in fitting if k != target]
    if len(others) == 1:
        areas = shapes[target].area, shapes[others[0]].area
        if max(areas) > _TIMES_AS_BIG * min(areas):
            found.append((f"{'small' if areas[0] < areas[1] else 'big'} {name}", "size"))
        for axis, words in enumerate(_WORDS_OF_PLACE):
            side = _side(shapes[target], shapes[others[0]], axis)
            if side is not None:
                found.append((f"{words[side]} {name}", "place"))
    return found + _relate(name, shapes, target, fitting)


def _relate(
    name: str, shapes: tuple[Shape, ...], target: int, fitting: list[int]
) -> list[tuple[str, str]]:
    """The name with the side of each anchor where the target is, and no other that fits."""
    found = []
    for anchor, shape in enumerate(shapes):
        named = shape.shape if len(_fitting(shape.shape, shapes)) == 1 else _names(shape)[0]
        if anchor in fitting or len(_fitting(named, shapes)) > 1:
            continue
        for axis, words in enumerate(_WORDS_OF_RELATION):
            side = _side(shapes[target], shape, axis)
            against = {_side(shapes[k], shape, axis) for k in fitting if k != target}
            if side is not None and against == {1 - side}:
                found.append((f"{name} {words[side]} the {named}", "relation"))
    return found


def _side(one: Shape, other: Shape, axis: int) -> int | None:
    """0 where the one lies clearly before the other along an axis, 1 behind, else nothing."""
    apart = one.centre[axis] - other.centre[axis]
    return None if abs(apart) < _CLEAR else int(apart > 0)


def _choose(rng: np.random.Generator, choices: tuple[Question, ...], kind: str) -> Question:
    """One of the phrases: of that kind, or three of four times a plain one."""
    plain = [q for q in choices if q.kind == "plain"]
    if not kind and plain and rng.random() < 0.75:
        # Colour and shape come first, and most of the time nothing shorter is said.
        return plain[0 if rng.random() < 0.6 else int(rng.integers(len(plain)))]
    kinds = sorted({q.kind for q in choices})
    said = kind if kind in kinds else str(rng.choice(kinds))
    some = [q for q in choices if q.kind == said]
    return some[int(rng.integers(len(some)))]


def _paint(
    rng: np.random.Generator, canvas: tuple[int, int], shapes: tuple[Shape, ...]
) -> Image.Image:
    """Shapes on a greyish, unevenly lit, textured and littered background."""
    width, height = canvas
    base = rng.uniform(60, 150) + rng.uniform(-16, 16, size=3)
    slope = rng.uniform(-24, 24, size=2)
    across = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light = slope[0] * across + slope[1] * down + _texture(rng, width, height)
    ground = light.astype(np.int16)[..., None] + base.astype(np.int16)
    picture = Image.fromarray(_to_bytes(ground))
    draw = ImageDraw.Draw(picture)
    _litter(rng, draw, canvas)
    for shape in shapes:
        colour = np.array(COLOURS[shape.colour]) + rng.uniform(-12, 12, size=3)
        _draw_shape(draw, shape, _ink(colour))
    random = np.frombuffer(rng.bytes(height * width * 3), np.uint8).reshape(height, width, 3)
    noisy = np.asarray(picture) + np.int16(-16)
    noisy += random >> 3
    return Image.fromarray(_to_bytes(noisy))


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Brightness to add, float32 [height, width]: nothing, stripes, checks or blotches."""
    strength = np.float32(rng.uniform(8, 24))
    kind = int(rng.integers(4))
    if kind == 0:
        return np.zeros((height, width), np.float32)
    if kind == 1:
        coarse = rng.normal(size=(int(rng.integers(5, 12)), int(rng.integers(5, 12))))
        grown = Image.fromarray(coarse.astype(np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        blotches: np.ndarray = strength * np.asarray(grown)
        return blotches
    turn, angle = 2 * np.pi / rng.uniform(7, 30), rng.uniform(0, np.pi)
    x = np.arange(width, dtype=np.float32)[None, :] * np.float32(turn)
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(turn)
    along, aside = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    waves: np.ndarray = np.sin(x * along + y * aside)
    if kind == 3:
        waves = np.sign(waves * np.sin(y * along - x * aside))
    return strength * waves


def _litter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, canvas: tuple[int, int]) -> None:
    """Thin strokes in greys, and confetti in the objects' colours, too small for an object."""
    area = canvas[0] * canvas[1] / SIDE**2
    for _ in range(int(rng.integers(0, 15) * area)):
        x, y = rng.uniform(0, canvas[0]), rng.uniform(0, canvas[1])
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(8, 50)
        grey = rng.uniform(10, 245) + rng.uniform(-12, 12, size=3)
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        draw.line((x, y, *end), fill=_ink(grey), width=int(rng.integers(1, 3)))
    inks = list(COLOURS.values())
    for _ in range(int(rng.integers(0, 25) * area)):
        x, y = int(rng.integers(0, canvas[0])), int(rng.integers(0, canvas[1]))
        across, down = rng.integers(1, 5, size=2)
        fill = inks[int(rng.integers(len(inks)))]
        draw.rectangle((x, y, x + int(across), y + int(down)), fill=fill)


def _ink(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(min(max(int(value), 0), 255) for value in colour)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Clipped in place, then as bytes."""
    np.maximum(values, 0, out=values)
    np.minimum(values, 255, out=values)
    return values.astype(np.uint8)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, colour: tuple[int, ...]) -> None:
    """Fill the shape; its ink touches all four sides of its box."""
    x0, y0, x1, y1 = shape.box
    right, bottom = x1 - 1, y1 - 1
    match shape.shape:
        case "circle":
            draw.ellipse((x0, y0, right, bottom), fill=colour)
        case "ring":
            draw.ellipse((x0, y0, right, bottom), outline=colour, width=round((x1 - x0) * 0.22))
        case "square":
            draw.rectangle((x0, y0, right, bottom), fill=colour)
        case "triangle":
            draw.polygon([((x0 + right) / 2, y0), (right, bottom), (x0, bottom)], fill=colour)
        case "star":
            xs, ys = (np.array(values) for values in zip(*_STAR, strict=True))
            xs = x0 + (xs - xs.min()) / np.ptp(xs) * (right - x0)
            ys = y0 + (ys - ys.min()) / np.ptp(ys) * (bottom - y0)
            points = [(round(x), round(y)) for x, y in zip(xs, ys, strict=True)]
            draw.polygon(points, fill=colour)
        case _:
            third_x, third_y = (x1 - x0) // 3, (y1 - y0) // 3
            draw.rectangle((x0 + third_x, y0, right - third_x, bottom), fill=colour)
            draw.rectangle((x0, y0 + third_y, right, bottom - third_y), fill=colour)
