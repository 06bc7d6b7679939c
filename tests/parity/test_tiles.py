"""The runtime's tiles and packed order against Hugging Face's LLaVA-NeXT."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from gap_runtime.pictures.modes.anyres import (
    choose_canvas,
    make_views,
    mosaic_grid,
    mosaic_index,
    newline_index,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
NEWLINE = -1
TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""The checkpoints' canvases as (rows, columns) of tiles, in their order."""
MORE_TILES = (*TILES, (1, 1), (3, 3), (2, 5), (5, 2))


def make_pinpoints(side, tiles=TILES):
    """Hugging Face's list: (height, width)."""
    return [[rows * side, columns * side] for rows, columns in tiles]


def make_canvases(pinpoints):
    return [(width, height) for height, width in pinpoints]


def draw_sizes(count, largest, seed=0):
    """Sizes whose logarithm is even: as many thin and tiny ones as large ones."""
    drawn = np.exp(np.random.default_rng(seed).uniform(0, np.log(largest), (count, 2)))
    return [(int(width), int(height)) for width, height in drawn]


def make_picture(width, height, seed=0):
    """Soft colours with sharp edges, so that every filter differs from every other."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(rows / (3 + k) + columns / (5 - k)) for k in range(3)]
    values = np.stack(waves, axis=-1) + rng.integers(-20, 20, (height, width, 3))
    values[height // 3 :, : width // 2] += 60
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def huggingface_views(picture, side):
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=make_pinpoints(side),
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return processor(picture, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("side", [28, 336])
@pytest.mark.parametrize(
    "size",
    [
        *((1, 1), (2, 3), (1, 50), (50, 1), (7, 1000), (1000, 7), (1, 1000), (1000, 1)),
        *((28, 28), (56, 28), (29, 29), (91, 160), (161, 90), (336, 336), (337, 337)),
        *((640, 480), (480, 640), (641, 479), (427, 640), (500, 333), (333, 500)),
        *((205, 656), (328, 861), (1400, 101), (99, 1400), (672, 672), (1009, 337), (1021, 769)),
    ],
)
def test_views_equal_hugging_faces(size, side):
    picture = make_picture(*size)
    canvas = choose_canvas(size, make_canvases(make_pinpoints(side)))
    views = make_views(picture, canvas, side, MEAN, STD)
    expected = huggingface_views(picture, side)
    assert views.shape == expected.shape
    assert views.dtype == expected.dtype
    assert np.abs(views - expected).max() <= 1e-5


@pytest.mark.parametrize("size", draw_sizes(40, 300))
def test_views_of_any_size_equal_hugging_faces(size):
    picture = make_picture(*size)
    canvas = choose_canvas(size, make_canvases(make_pinpoints(28)))
    views = make_views(picture, canvas, 28, MEAN, STD)
    assert np.abs(views - huggingface_views(picture, 28)).max() <= 1e-5


def huggingface_packed(size, pinpoints, tile_grid, side):
    """Where each packed token comes from: the features are numbers in the order of the views."""
    height, width = select_best_resolution(size[::-1], pinpoints)
    views = 1 + (height // side) * (width // side)
    features = torch.arange(views * tile_grid**2).reshape(views, tile_grid**2, 1)
    vision = SimpleNamespace(image_size=side, patch_size=side // tile_grid)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    )
    packed, lengths = LlavaNextModel.pack_image_features(
        model, [features], torch.tensor([size[::-1]]), "default", torch.tensor([NEWLINE])
    )
    assert lengths.tolist() == [len(packed[0])]
    return packed[0][:, 0].numpy()


def pack(size, canvases, tile_grid, side):
    canvas = choose_canvas(size, canvases)
    mosaic = mosaic_grid(size, canvas, tile_grid, side)
    newlines = list(newline_index(mosaic, tile_grid))
    tokens = tile_grid**2 + mosaic[0] * mosaic[1] + len(newlines)
    patches = np.setdiff1d(np.arange(tokens), newlines)
    packed = np.full(tokens, NEWLINE)
    packed[patches] = np.concatenate(
        [np.arange(tile_grid**2), mosaic_index(canvas, mosaic, tile_grid, side)]
    )
    return packed


@pytest.mark.parametrize(
    ("side", "tile_grid", "tiles", "count", "largest"),
    [
        (336, 24, TILES, 1000, 2000),
        (336, 24, MORE_TILES, 300, 5000),
        (28, 2, TILES, 1000, 300),
        (42, 3, MORE_TILES, 1000, 300),
        (14, 1, MORE_TILES, 300, 100),
    ],
)
def test_packed_order_equals_hugging_faces(side, tile_grid, tiles, count, largest):
    pinpoints = make_pinpoints(side, tiles)
    canvases = make_canvases(pinpoints)
    for size in draw_sizes(count, largest):
        expected = huggingface_packed(size, pinpoints, tile_grid, side)
        assert np.array_equal(pack(size, canvases, tile_grid, side), expected), size


@pytest.mark.parametrize(
    "size",
    [
        # Products that are whole numbers, but not in floats.
        *((110, 176), (110, 352), (198, 176), (205, 328), (205, 656), (205, 984), (220, 1056)),
        *((235, 1128), (328, 861), (352, 110), (352, 748)),
        # Nothing is left of the mosaic but newlines, or not even those.
        *((1, 1000), (1000, 1), (1, 100_000), (100_000, 1), (10, 10_000)),
        # Ties.
        *((1, 1), (336, 336), (200, 300), (300, 200), (672, 672), (1008, 1008)),
    ],
)
def test_packed_order_of_awkward_sizes_equals_hugging_faces(size):
    pinpoints = make_pinpoints(336)
    expected = huggingface_packed(size, pinpoints, 24, 336)
    assert np.array_equal(pack(size, make_canvases(pinpoints), 24, 336), expected)


def test_canvas_equals_hugging_faces_whatever_the_order():
    sizes = [*draw_sizes(50, 3000, seed=1), (1, 100_000), (100_000, 1), (336, 336), (1, 1)]
    for pinpoints in itertools.permutations(make_pinpoints(336)):
        canvases = make_canvases(pinpoints)
        for size in sizes:
            height, width = select_best_resolution(size[::-1], pinpoints)
            assert choose_canvas(size, canvases) == (width, height), size
