"""Refshapes: generated pictures of coloured shapes, each with phrases that name one of them.

The data on which the embedded model was trained and is judged. Needs numpy and Pillow only, so
that the same split can be scored on the device. A scene is a function of (split, index) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

SIDE: Final = 112
"""Longest side of every picture, in pixels."""

COLOURS: Final = {
    "red": (215, 45, 45),
    "green": (45, 165, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (145, 55, 190),
    "orange": (240, 135, 30),
    "cyan": (60, 205, 220),
    "white": (245, 245, 245),
}
SHAPES: Final = ("circle", "square", "triangle", "cross")

SPLITS: Final = {"train": 20_260_101, "val": 20_260_202, "test": 20_260_303}
"""Seed of each split; the figures in the documentation are on `test`."""

_SMALL, _BIG = (15, 21), (29, 37)
_GAP = 3
_MIN_APART = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One drawn object and its tight box, in pixels of its picture."""

    colour: str
    shape: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box (x, y), in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def area(self) -> int:
        """Area of the box, in square pixels."""
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A phrase, the box that it refers to and how it tells its object from the others."""

    phrase: str
    box: tuple[int, int, int, int]
    target: int
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture (RGB, longest side 112 pixels), its objects and one question for each."""

    image: Image.Image
    shapes: tuple[Shape, ...]
    questions: tuple[Question, ...]


def draw_scene(
    split: str, index: int, *, least: int = 2, most: int = 4, repeats: float = 0.3
) -> Scene:
    """The scene at one place of a split, always the same for the same arguments.

    Args:
        split: One of SPLITS.
        index: Place in the split, from 0.
        least: Fewest objects.
        most: Most objects.
        repeats: Share of scenes in which two objects have the same colour and shape, so that
            only size or place tells them apart.

    Returns:
        The picture with one question per object.
    """
    rng = np.random.default_rng((SPLITS[split], index))
    width, height = _canvas_size(rng)
    count = int(rng.integers(least, most + 1))
    paired = count >= 2 and rng.random() < repeats
    relation = str(rng.choice(("size", "across", "down"))) if paired else ""
    shapes = _place_shapes(rng, width, height, count, relation)
    image = _paint(rng, width, height, shapes)
    questions = tuple(_ask(rng, shapes, k, relation if k < 2 else "") for k in range(count))
    return Scene(image=image, shapes=shapes, questions=questions)


def format_box(box: tuple[int, int, int, int], width: int, height: int, side: int) -> str:
    """What the embedded models are taught to answer: shares of a square's side, two decimals.

    Args:
        box: Corners in pixels of the picture.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        side: Of the square in whose middle the models see it, in pixels.
    """
    dx, dy = (side - width) // 2, (side - height) // 2
    x0, y0, x1, y1 = ((v + (dx, dy)[k % 2]) / side for k, v in enumerate(box))
    return f"[{x0:.2f}, {y0:.2f}, {x1:.2f}, {y1:.2f}]"


def _canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    """Square in seven of ten pictures, else one side shorter."""
    if rng.random() < 0.7:
        return SIDE, SIDE
    short = int(rng.integers(80, SIDE))
    return (SIDE, short) if rng.random() < 0.5 else (short, SIDE)


def _place_shapes(
    rng: np.random.Generator, width: int, height: int, count: int, relation: str
) -> tuple[Shape, ...]:
    """Objects that do not touch; with a relation, the first two look alike but for it."""
    while True:
        colours = [str(name) for name in rng.choice(list(COLOURS), size=count, replace=False)]
        kinds = [str(name) for name in rng.choice(SHAPES, size=count)]
        sizes = [_size(rng, (_SMALL[0], _BIG[1])) for _ in range(count)]
        if relation:
            colours[1], kinds[1] = colours[0], kinds[0]
        if relation == "size":
            sizes[0], sizes[1] = _size(rng, _SMALL), _size(rng, _BIG)
        boxes = [_drop(rng, width, height, size) for size in sizes]
        if all(
            _apart(boxes[a], boxes[b]) for a in range(count) for b in range(a)
        ) and _tells_apart(boxes, relation):
            return tuple(
                Shape(colour=colours[k], shape=kinds[k], box=boxes[k]) for k in range(count)
            )


def _size(rng: np.random.Generator, limits: tuple[int, int]) -> tuple[int, int]:
    """Width and height within limits (pixels), nearly equal."""
    width = int(rng.integers(limits[0], limits[1] + 1))
    height = round(width * rng.uniform(0.85, 1.18))
    return width, int(np.clip(height, *limits))


def _drop(
    rng: np.random.Generator, width: int, height: int, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A box of that size somewhere inside the picture."""
    x0 = int(rng.integers(1, width - size[0]))
    y0 = int(rng.integers(1, height - size[1]))
    return x0, y0, x0 + size[0], y0 + size[1]


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether a gap lies between two boxes."""
    return a[2] + _GAP <= b[0] or b[2] + _GAP <= a[0] or a[3] + _GAP <= b[1] or b[3] + _GAP <= a[1]


def _tells_apart(boxes: list[tuple[int, int, int, int]], relation: str) -> bool:
    """Whether a place word is fair: the centres of the first two differ enough along it."""
    if relation not in {"across", "down"}:
        return True
    axis = 0 if relation == "across" else 1
    first, second = (boxes[k][axis] + boxes[k][axis + 2] for k in (0, 1))
    return abs(first - second) / 2 >= _MIN_APART


def _ask(
    rng: np.random.Generator, shapes: tuple[Shape, ...], target: int, relation: str
) -> Question:
    """A phrase that fits only the target."""
    shape = shapes[target]
    words = f"{shape.colour} {shape.shape}"
    if not relation:
        unique = sum(other.shape == shape.shape for other in shapes) == 1
        if unique and rng.random() < 0.1:
            words = shape.shape
        elif rng.random() < 0.1 and sum(o.colour == shape.colour for o in shapes) == 1:
            words = f"{shape.colour} one"
        return Question(phrase=f"the {words}", box=shape.box, target=target, kind="plain")
    other = shapes[1 - target]
    if relation == "size":
        word = "small" if shape.area < other.area else "big"
    else:
        axis, names = (0, ("left", "right")) if relation == "across" else (1, ("top", "bottom"))
        word = names[int(shape.centre[axis] > other.centre[axis])]
    kind = "size" if relation == "size" else "place"
    return Question(phrase=f"the {word} {words}", box=shape.box, target=target, kind=kind)


def _paint(
    rng: np.random.Generator, width: int, height: int, shapes: tuple[Shape, ...]
) -> Image.Image:
    """Shapes on a noisy, greyish, unevenly lit background."""
    base = rng.uniform(60, 150) + rng.uniform(-14, 14, size=3)
    slope = rng.uniform(-18, 18, size=2)
    light = (
        slope[0] * np.linspace(-1, 1, width)[None, :]
        + slope[1] * np.linspace(-1, 1, height)[:, None]
    )
    canvas = Image.fromarray(_to_bytes(base + light[..., None]))
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        colour = np.array(COLOURS[shape.colour]) + rng.uniform(-12, 12, size=3)
        _draw_shape(draw, shape, tuple(int(value) for value in _to_bytes(colour)))
    noise = rng.integers(-16, 17, size=(height, width, 3), dtype=np.int16)
    return Image.fromarray(_to_bytes(np.asarray(canvas, dtype=np.int16) + noise))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    clipped: np.ndarray = np.clip(values, 0, 255).astype(np.uint8)
    return clipped


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, colour: tuple[int, ...]) -> None:
    """Fill the shape; its ink touches all four sides of its box."""
    x0, y0, x1, y1 = shape.box
    right, bottom = x1 - 1, y1 - 1
    match shape.shape:
        case "circle":
            draw.ellipse((x0, y0, right, bottom), fill=colour)
        case "square":
            draw.rectangle((x0, y0, right, bottom), fill=colour)
        case "triangle":
            draw.polygon([((x0 + right) / 2, y0), (right, bottom), (x0, bottom)], fill=colour)
        case _:
            third_x, third_y = (x1 - x0) // 3, (y1 - y0) // 3
            draw.rectangle((x0 + third_x, y0, right - third_x, bottom), fill=colour)
            draw.rectangle((x0, y0 + third_y, right, bottom - third_y), fill=colour)
