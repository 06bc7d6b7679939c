"""Mosaics that are shrunk against Hugging Face's LLaVA-OneVision: counts, pixels and values."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from makers.families import make_picture
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from gap_export.blocks.mosaic import read_buckets
from gap_export.blocks.siglip import Packing, SiglipTower
from gap_export.reference.mosaic import pack_views
from gap_runtime.errors import ConfigError
from gap_runtime.pictures.load import make_pixels
from gap_runtime.pictures.modes.anyres import choose_canvas, mosaic_index
from gap_runtime.pictures.modes.anyres_max import read_mosaic, shrink_mosaic
from gap_runtime.pictures.preprocess import Preprocess

MEAN = STD = (0.5, 0.5, 0.5)
DEFAULT_LEVELS = 6
"""How far the library's default processor may be from its PIL one, of 255."""


def make_rules(side, patch, most, views):
    """Our spec, and the library's model and processor of prompts reduced to their rules."""
    pinpoints = [[side * y, side * x] for y in range(1, most + 1) for x in range(1, most + 1)]
    spec = Preprocess(
        mode="anyres_max",
        side=side,
        fill=(0, 0, 0),
        mean=MEAN,
        std=STD,
        canvases=tuple((width, height) for height, width in pinpoints),
    )
    grid, aspect = side // patch, f"anyres_max_{views}"
    vision = SimpleNamespace(image_size=side, patch_size=patch)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    )
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        num_image_tokens=grid**2,
        vision_aspect_ratio=aspect,
    )
    processor._get_unpadded_features = lambda *sizes: (
        LlavaOnevisionProcessor._get_unpadded_features(processor, *sizes)
    )
    return spec, grid, model, processor, aspect


def find(size, spec, grid, views):
    """The bucket of a picture of that size; None where the library cannot make one either."""
    canvas = choose_canvas(size, spec.canvases)
    text = f"{canvas[0]}x{canvas[1]}/{size[0]}:{size[1]}"
    try:
        (bucket,) = read_buckets(text, spec, grid, lambda m: shrink_mosaic(m, grid, views))
    except ConfigError:
        return None
    return bucket


@pytest.mark.parametrize(
    ("side", "patch", "most", "views", "largest"),
    [(384, 14, 6, 9, 4000), (31, 7, 3, 2, 200), (50, 16, 4, 5, 300)],
)
def test_numbers_of_tokens_are_the_librarys(side, patch, most, views, largest):
    spec, grid, _, processor, _ = make_rules(side, patch, most, views)
    shrunk = 0
    for width, height in np.random.default_rng(0).integers(largest // 9, largest, (200, 2)):
        bucket = find((int(width), int(height)), spec, grid, views)
        if bucket is None:
            continue
        expected = LlavaOnevisionProcessor._get_number_of_features(
            processor, height, width, side, side
        )
        assert bucket.patches == expected, (width, height)
        shrunk += read_mosaic(bucket) != bucket.grids[-1]
    assert shrunk > 20


@pytest.mark.parametrize("size", [(93, 93), (80, 60), (40, 120), (200, 90), (31, 31), (17, 90)])
def test_packed_values_are_the_librarys(size):
    spec, grid, model, _, aspect = make_rules(31, 7, 3, 2)
    bucket = find(size, spec, grid, 2)
    views = spec.pixel_shape(bucket)[1]
    values = torch.randn(views, grid**2, 5, generator=torch.Generator().manual_seed(1))
    newline = torch.full((5,), torch.nan)
    packed, _ = LlavaOnevisionModel.pack_image_features(
        model, [values], torch.tensor([size[::-1]]), newline, aspect
    )
    expected = packed[0][~packed[0][:, 0].isnan()]
    assert packed[0][:, 0].isnan().nonzero()[:, 0].tolist() == list(bucket.fixed)
    mosaic = read_mosaic(bucket)
    packing = Packing(
        whole=grid**2,
        mosaic=tuple(mosaic_index(bucket.canvas, mosaic, grid, 31).tolist()),
        cut=mosaic,
        left=bucket.grids[-1],
    )
    found = SiglipTower._pack(SimpleNamespace(packing=packing), values)
    assert torch.allclose(found[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(pack_views(bucket, 31, mosaic)(values), expected)
    scores = SiglipTower._pack(SimpleNamespace(packing=packing), values[..., 0])
    assert torch.allclose(scores, found[..., 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [31, 384])
@pytest.mark.parametrize("size", [(1, 1), (13, 50), (120, 90), (91, 160), (640, 480), (427, 640)])
def test_pixels_are_the_librarys(size, side):
    spec, grid, model, *_ = make_rules(side, 7, 3, 9)
    bucket, picture = find(size, spec, grid, 9), make_picture(*size)
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    expected = processor(picture, return_tensors="np")["pixel_values"]
    found = make_pixels(picture, spec, bucket)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5
