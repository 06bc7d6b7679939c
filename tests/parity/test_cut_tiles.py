"""The runtime's stretched tiles against Hugging Face's processors."""

import numpy as np
import pytest
import torch
from makers.families import make_picture
from PIL import Image
from transformers import GotOcr2ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from gap_runtime.pictures.modes.tiles import choose_tiles, list_canvases, make_tiles

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = (
    *((1, 1), (2, 3), (1, 50), (50, 1), (7, 300), (300, 7), (28, 28), (56, 28), (29, 29)),
    *((91, 160), (161, 90), (640, 480), (480, 640), (641, 479), (427, 640), (500, 333)),
)
DEFAULT_LEVELS = 6
"""How far the library's default processor may be from its PIL one, of 255."""


def settings(side, least, most):
    return {
        "size": {"height": side, "width": side},
        "crop_to_patches": True,
        "min_patches": least,
        "max_patches": most,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def cut(size, side, least=1, most=12):
    canvases = list_canvases(least, most, side)
    picture = make_picture(*size)
    return picture, make_tiles(picture, choose_tiles(size, canvases), side, MEAN, STD)


@pytest.mark.parametrize("side", [28, 84])
@pytest.mark.parametrize("size", SIZES)
def test_views_equal_hugging_faces(size, side):
    picture, views = cut(size, side)
    processor = GotOcr2ImageProcessorPil(**settings(side, 1, 12))
    expected = processor(picture, return_tensors="np")["pixel_values"]
    assert views[0].shape == expected.shape
    assert views.dtype == expected.dtype
    assert np.abs(views[0] - expected).max() <= 1e-5


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 6), (2, 5), (4, 4)])
def test_any_number_of_tiles_equals_hugging_faces(least, most):
    for size in SIZES:
        picture, views = cut(size, 28, least, most)
        processor = GotOcr2ImageProcessorPil(**settings(28, least, most))
        expected = processor(picture, return_tensors="np")["pixel_values"]
        assert views[0].shape == expected.shape, size
        assert np.abs(views[0] - expected).max() <= 1e-5, size


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (2, 9), (1, 16)])
def test_canvas_equals_hugging_faces(least, most):
    rng = np.random.default_rng(least)
    drawn = np.exp(rng.uniform(0, np.log(5000), (2000, 2))).astype(int).tolist()
    ties = [[k * 448, k * 448] for k in (1, 2, 3)] + [[896 * k, 448 * k] for k in (1, 2, 3)]
    canvases = list_canvases(least, most, 448)
    for width, height in drawn + ties:
        across, down = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        assert choose_tiles((width, height), canvases) == (across * 448, down * 448)


@pytest.mark.parametrize("size", [(640, 480), (427, 640), (100, 75)])
def test_default_processor_differs_by_some_levels(size):
    """It resizes with torchvision, which asks this function of torch."""
    picture = make_picture(*size)
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    for canvas in ((336, 252), (84, 84)):
        ours = np.asarray(picture.resize(canvas, Image.Resampling.BICUBIC), dtype=np.int64)
        resized = torch.nn.functional.interpolate(
            values, canvas[::-1], mode="bicubic", antialias=True, align_corners=False
        )
        theirs = resized.clamp(0, 255).round()[0].permute(1, 2, 0).numpy().astype(np.int64)
        assert 0 < np.abs(ours - theirs).max() <= DEFAULT_LEVELS
