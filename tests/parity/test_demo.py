"""The sheet of the demo's pictures."""

import importlib.util

import numpy as np
import pytest
from PIL import Image
from tools.places import ROOT


@pytest.fixture(scope="module")
def draw_panels():
    """Of refshapes/demo.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "refshapes" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo.draw_panels


def make_panels(count):
    return [
        (f"panel {k}", Image.new("RGB", (60, 40), (10 * k, 0, 0))) for k in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [
        # Margin 14 around and between, a title of 38 above each.
        (3, 3, (3 * 60 + 4 * 14, 38 + 40 + 2 * 14)),
        (6, 3, (3 * 60 + 4 * 14, 2 * (38 + 40) + 3 * 14)),
        (4, 3, (3 * 60 + 4 * 14, 2 * (38 + 40) + 3 * 14)),
        (1, 1, (60 + 2 * 14, 38 + 40 + 2 * 14)),
    ],
)
def test_size_of_the_panels(draw_panels, count, columns, size):
    assert draw_panels(make_panels(count), columns).size == size


def test_panels_are_laid_out_row_by_row(draw_panels):
    sheet = np.asarray(draw_panels(make_panels(5), 3))
    # Centres of panels: x = 14 + 30 + k * 74, y = 14 + 38 + 20 + row * 92.
    found = [sheet[72 + row * 92, 44 + column * 74, 0] for row in (0, 1) for column in range(3)]
    assert found == [10, 20, 30, 40, 50, 250]


def test_panels_have_titles(draw_panels):
    sheet = np.asarray(draw_panels(make_panels(1), 1))
    assert sheet[14:52].min() < 100
