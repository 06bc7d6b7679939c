"""What is painted where, pixel by pixel."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.pictures.boxes import Box
from gap_runtime.pictures.drawing import BOX_COLOUR, draw_grounding

GREY = (200, 200, 200)
# 170/255 of the shade (16, 18, 28) over grey 200.
SHADED = (77, 79, 85)
ALL = tuple(range(16))


def draw(manifest, *, size=(480, 480), phrase="mug", boxes=(), kept_index=ALL, **options):
    picture = Image.new("RGB", size, GREY)
    painted = draw_grounding(
        picture,
        manifest.preprocess,
        manifest.buckets,
        phrase=phrase,
        boxes=boxes,
        kept_index=kept_index,
        **options,
    )
    return np.asarray(painted).astype(int)


def is_shaded(colour):
    return bool((abs(colour - np.array(SHADED)) <= 2).all())


def is_grey(colour):
    return tuple(colour) == GREY


def test_removed_patches_are_shaded_and_kept_ones_are_not(manifest):
    kept = (0, 3, 5, 6, 10)
    painted = draw(manifest, kept_index=kept)
    for patch in range(12):  # the label lies on the last row of patches
        row, column = divmod(patch, 4)
        colour = painted[row * 120 + 60, column * 120 + 60]
        assert is_grey(colour) if patch in kept else is_shaded(colour), patch


def test_shade_fills_the_patch_to_its_corners(manifest):
    painted = draw(manifest, kept_index=tuple(k for k in ALL if k != 5))
    for y, x in ((120, 120), (120, 239), (239, 120), (239, 239)):
        assert is_shaded(painted[y, x])


def test_shade_does_not_reach_into_the_patches_around(manifest):
    painted = draw(manifest, kept_index=tuple(k for k in ALL if k != 5))
    for y, x in ((119, 180), (240, 180), (180, 119), (180, 240)):
        assert is_grey(painted[y, x])


def test_patches_are_found_under_the_padding(manifest):
    # Wide, 480x240: the first and last of the four rows of patches are padding.
    painted = draw(manifest, size=(480, 240), kept_index=tuple(k for k in ALL if k != 5))
    assert is_shaded(painted[60, 180])
    assert is_grey(painted[60, 60])
    assert is_grey(painted[180, 180])


def test_removed_padding_shades_nothing(manifest):
    painted = draw(manifest, size=(480, 240), kept_index=tuple(range(4, 16)))
    assert is_grey(painted[10, 200])


def test_stretched_pictures_have_no_padding(manifest):
    stretched = dataclasses.replace(
        manifest, preprocess=dataclasses.replace(manifest.preprocess, mode="stretch")
    )
    painted = draw(stretched, size=(480, 240), kept_index=ALL[1:])
    assert is_shaded(painted[30, 60])
    assert is_grey(painted[90, 60])


@pytest.fixture
def tiles(manifest, tiled):
    """Pictures twice as wide as high show a mosaic of 2x4, tall ones one of 4x2."""
    return dataclasses.replace(manifest, **tiled)


# Of the wide bucket: four tokens of the whole view, then two rows of four and a newline.
MOSAIC = (4, 5, 6, 7, 9, 10, 11, 12)
WIDE = tuple(range(14))


def test_of_several_grids_the_last_one_is_shaded(tiles):
    removed = {5, 7, 9, 12}
    kept = tuple(token for token in WIDE if token not in removed)
    painted = draw(tiles, size=(480, 240), kept_index=kept)
    for place, token in enumerate(MOSAIC):
        row, column = divmod(place, 4)
        if (row, column) == (1, 0):
            continue  # where the label lies
        colour = painted[row * 120 + 60, column * 120 + 60]
        assert is_shaded(colour) if token in removed else is_grey(colour), token


def test_each_token_of_the_last_grid_is_shaded_in_its_place(tiles):
    for place, token in enumerate(MOSAIC):
        kept = tuple(other for other in WIDE if other != token)
        painted = draw(tiles, size=(480, 240), phrase="", kept_index=kept)
        row, column = divmod(place, 4)
        for y in (0, 1):
            for x in range(4):
                # High enough in a token that the label, at the foot, hides none.
                colour = painted[y * 120 + 30, x * 120 + 60]
                assert is_shaded(colour) if (y, x) == (row, column) else is_grey(colour)


def test_tokens_of_the_whole_view_shade_nothing(tiles):
    painted = draw(tiles, size=(480, 240), kept_index=(*MOSAIC, 8, 13))
    assert (painted[:190] == GREY).all()


def test_newlines_shade_nothing(tiles):
    kept = tuple(token for token in WIDE if token not in {8, 13})
    painted = draw(tiles, size=(480, 240), kept_index=kept)
    assert (painted[:190] == GREY).all()


def test_bucket_of_the_picture_decides_its_grid(tiles):
    # Tall: 4x2, with newlines at 6, 9, 12 and 15; token 7 is the first of the second row.
    kept = tuple(token for token in range(16) if token != 7)
    painted = draw(tiles, size=(240, 480), kept_index=kept)
    for y in range(3):
        for x in (0, 1):
            colour = painted[y * 120 + 60, x * 120 + 60]
            assert is_shaded(colour) if (y, x) == (1, 0) else is_grey(colour)


def test_fixed_tokens_before_a_single_grid_shift_it(manifest):
    bucket = dataclasses.replace(manifest.buckets[0], fixed=(0, 5))
    marked = dataclasses.replace(manifest, buckets=(bucket,))
    # 18 tokens: 0 and 5 show nothing, so token 6 is the fifth patch.
    kept = tuple(token for token in range(18) if token not in {0, 5, 6})
    painted = draw(marked, kept_index=kept)
    for patch in range(12):
        row, column = divmod(patch, 4)
        colour = painted[row * 120 + 60, column * 120 + 60]
        assert is_shaded(colour) if patch == 4 else is_grey(colour), patch


def test_picture_of_no_bucket_is_not_painted(tiles):
    with pytest.raises(InputError, match=r"--set image\.canvas=16x16/480:480"):
        draw(tiles, size=(480, 480))


def test_box_is_outlined_in_its_colour(manifest):
    painted = draw(manifest, boxes=(Box(x0=100, y0=200, x1=300, y1=400),))
    for y, x in ((300, 100), (300, 299), (200, 250), (399, 200)):
        assert tuple(painted[y, x]) == BOX_COLOUR, (y, x)


def test_box_is_not_filled(manifest):
    painted = draw(manifest, boxes=(Box(x0=100, y0=200, x1=300, y1=400),))
    assert is_grey(painted[300, 200])
    assert is_grey(painted[300, 90])
    assert is_grey(painted[300, 310])


def test_box_may_have_another_colour(manifest):
    painted = draw(manifest, boxes=(Box(x0=100, y0=200, x1=300, y1=400),), colour=(1, 2, 3))
    assert tuple(painted[300, 100]) == (1, 2, 3)


def test_box_at_the_edges_is_seen_on_all_sides(manifest):
    painted = draw(manifest, boxes=(Box(x0=0, y0=0, x1=480, y1=480),))
    for y, x in ((240, 0), (240, 479), (0, 470), (479, 240)):
        assert tuple(painted[y, x]) == BOX_COLOUR, (y, x)


def test_several_boxes_are_all_outlined(manifest):
    boxes = (Box(x0=40, y0=100, x1=140, y1=200), Box(x0=300, y0=300, x1=400, y1=400))
    painted = draw(manifest, boxes=boxes)
    assert tuple(painted[150, 40]) == BOX_COLOUR
    assert tuple(painted[350, 300]) == BOX_COLOUR


def test_label_stands_above_its_box(manifest):
    painted = draw(manifest, boxes=(Box(x0=100, y0=200, x1=300, y1=400),))
    above = painted[180:198, 104:140].reshape(-1, 3)
    assert (above == BOX_COLOUR).all(axis=1).any()
    assert (above == 255).all(axis=1).any()
    assert is_grey(painted[410, 110])


def test_label_of_a_box_at_the_top_stays_in_the_picture(manifest):
    painted = draw(manifest, boxes=(Box(x0=100, y0=0, x1=300, y1=400),))
    assert (painted[2:20, 104:140] == 255).all(axis=-1).any()


def test_without_a_box_nothing_is_outlined_but_it_is_said(manifest):
    painted = draw(manifest, phrase="the mug")
    assert (painted[:430] == GREY).all()
    assert (painted[430:] == BOX_COLOUR).all(axis=-1).any()


def test_small_pictures_are_enlarged_with_their_boxes(manifest):
    box = Box(x0=12, y0=50, x1=36, y1=100)
    painted = draw(manifest, size=(112, 112), boxes=(box,))
    assert painted.shape == (560, 560, 3)
    assert tuple(painted[375, 60]) == BOX_COLOUR
    assert tuple(painted[375, 179]) == BOX_COLOUR
    assert is_grey(painted[375, 120])


def test_the_given_picture_is_not_painted_on(manifest):
    picture = Image.new("RGB", (480, 480), GREY)
    draw_grounding(
        picture, manifest.preprocess, manifest.buckets, phrase="mug", boxes=(), kept_index=()
    )
    assert picture.getcolors() == [(480 * 480, GREY)]
