"""The generated pictures of 224 pixels: always the same, and every phrase means one object."""

import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gap_runtime.evaluation.refshapes import COLOURS, Shape
from gap_runtime.evaluation.refshapes256 import (
    KINDS,
    SHAPES,
    SIDE,
    SPLITS,
    _draw_shape,
    describe,
    draw_scene,
    touched_cells,
)

SCENES = 250
# Colours are shifted by up to 12, then noise of up to 16 is added.
SPREAD = 28


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene("test", index) for index in range(SCENES)]


def hash_scene(scene):
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


def test_a_known_scene():
    scene = draw_scene("test", 6)
    assert hash_scene(scene)[:16] == "df16c03cc519eee6"
    assert [(question.phrase, question.box) for question in scene.questions] == [
        ("the orange one", (105, 26, 137, 55)),
        ("the white one", (43, 182, 70, 212)),
        ("the purple cross", (107, 79, 137, 109)),
        ("the cyan ring", (81, 193, 105, 215)),
        ("the red ring", (111, 185, 136, 211)),
    ]


def test_a_scene_is_the_same_every_time_whatever_was_drawn_before(scenes):
    again = draw_scene("test", 200)
    assert hash_scene(scenes[200]) == hash_scene(again)
    assert scenes[200].questions == again.questions


def test_scenes_and_splits_differ(scenes):
    assert len({hash_scene(scene) for scene in scenes}) == SCENES
    hashes = {hash_scene(draw_scene(split, k)) for split in SPLITS for k in range(20)}
    assert len(hashes) == 20 * len(SPLITS) == 60


def test_pictures_are_rgb_with_the_longest_side_of_224(scenes):
    assert {scene.image.mode for scene in scenes} == {"RGB"}
    assert {max(scene.image.size) for scene in scenes} == {SIDE} == {224}
    assert min(min(scene.image.size) for scene in scenes) >= 160


def test_most_pictures_are_square_and_some_are_wide_or_tall(scenes):
    square = sum(scene.image.width == scene.image.height for scene in scenes) / SCENES
    assert 0.6 < square < 0.8
    assert any(scene.image.width > scene.image.height for scene in scenes)
    assert any(scene.image.width < scene.image.height for scene in scenes)


def test_two_to_six_objects_each_with_its_question(scenes):
    assert {len(scene.shapes) for scene in scenes} == {2, 3, 4, 5, 6}
    for scene in scenes:
        assert [question.target for question in scene.questions] == list(range(len(scene.shapes)))
        assert [question.box for question in scene.questions] == [s.box for s in scene.shapes]


def test_objects_cover_5_to_20_percent_of_the_cells(scenes):
    for scene in scenes:
        width, height = scene.image.size
        cells = np.zeros((16, 16), bool)
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            dx, dy = (SIDE - width) // 2, (SIDE - height) // 2
            rows = slice((y0 + dy) // 14, (y1 + dy - 1) // 14 + 1)
            columns = slice((x0 + dx) // 14, (x1 + dx - 1) // 14 + 1)
            cells[rows, columns] = True
        boxes = [shape.box for shape in scene.shapes]
        assert cells.sum() <= touched_cells(boxes, ((SIDE - width) // 2, (SIDE - height) // 2))
        assert 0.04 < cells.mean() <= 0.20


def test_size_and_number_of_objects_can_be_set():
    some = [draw_scene("train", k, size=(224, 56), least=1, most=1) for k in range(10)]
    assert {scene.image.size for scene in some} == {(224, 56)}
    assert {len(scene.shapes) for scene in some} == {1}


def test_objects_lie_inside_the_picture_and_do_not_overlap(scenes):
    for scene in scenes:
        painted = np.zeros((scene.image.height, scene.image.width), int)
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            assert 0 <= x0 < x1 <= scene.image.width
            assert 0 <= y0 < y1 <= scene.image.height
            painted[y0:y1, x0:x1] += 1
        assert painted.max() == 1


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("box", [(3, 4, 25, 27), (5, 2, 49, 46), (1, 1, 37, 31), (2, 3, 28, 31)])
def test_ink_touches_all_sides_of_its_box_and_no_pixel_beyond(name, box):
    canvas = Image.new("L", (60, 60))
    _draw_shape(ImageDraw.Draw(canvas), Shape(colour="red", shape=name, box=box), (255,))
    rows, columns = np.nonzero(np.asarray(canvas))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box


def test_objects_are_drawn_where_their_boxes_are(scenes):
    for scene in scenes[:60]:
        pixels = np.asarray(scene.image).astype(int)
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            inside = pixels[y0:y1, x0:x1]
            ink = (abs(inside - COLOURS[shape.colour]) <= SPREAD).all(axis=-1)
            for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
                assert edge.any()
            assert ink.mean() > 0.25


def middle(shape, axis):
    return (shape.box[axis] + shape.box[axis + 2]) / 2


def area(shape):
    x0, y0, x1, y1 = shape.box
    return (x1 - x0) * (y1 - y0)


PICK = {
    "small": lambda found: min(found, key=area),
    "big": lambda found: max(found, key=area),
    "left": lambda found: min(found, key=lambda shape: middle(shape, 0)),
    "right": lambda found: max(found, key=lambda shape: middle(shape, 0)),
    "top": lambda found: min(found, key=lambda shape: middle(shape, 1)),
    "bottom": lambda found: max(found, key=lambda shape: middle(shape, 1)),
}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def fitting(words, shapes):
    """The objects that a colour, a shape or both fit."""
    assert set(words) <= {*COLOURS, *SHAPES, "one"}
    colours, names = set(words) & set(COLOURS), set(words) & set(SHAPES)
    assert colours or names
    return [
        shape
        for shape in shapes
        if (not colours or shape.colour in colours) and (not names or shape.shape in names)
    ]


def find_objects(phrase, shapes):
    """Every object that a phrase may mean, read from its words alone."""
    assert phrase.startswith("the ")
    for relation, (axis, sign) in RELATIONS.items():
        one, between, other = phrase[4:].partition(f" {relation} the ")
        if between:
            (anchor,) = fitting(other.split(), shapes)
            return [
                shape
                for shape in fitting(one.split(), shapes)
                if shape is not anchor and (middle(shape, axis) - middle(anchor, axis)) * sign > 0
            ]
    first, *rest = phrase[4:].split()
    if first in PICK:
        found = fitting(rest, shapes)
        assert len(found) == 2
        return [PICK[first](found)]
    return fitting([first, *rest], shapes)


def test_every_phrase_fits_exactly_its_object(scenes):
    for scene in scenes:
        for question in scene.questions:
            found = find_objects(question.phrase, scene.shapes)
            assert found == [scene.shapes[question.target]], question.phrase
            assert found[0].box == question.box


def test_all_phrases_that_could_be_said_fit_exactly_their_object(scenes):
    for scene in scenes:
        for target, shape in enumerate(scene.shapes):
            choices = describe(scene.shapes, target)
            assert choices
            assert len({choice.phrase for choice in choices}) == len(choices)
            for choice in choices:
                assert find_objects(choice.phrase, scene.shapes) == [shape], choice.phrase


def test_words_of_size_and_place_are_fair(scenes):
    for scene in scenes:
        for question in scene.questions:
            first, *rest = question.phrase.split()[1:]
            if question.kind in {"size", "place"}:
                one, other = fitting(rest, scene.shapes)
                if question.kind == "size":
                    assert max(area(one), area(other)) > 1.7 * min(area(one), area(other))
                else:
                    axis = 0 if first in {"left", "right"} else 1
                    assert abs(middle(one, axis) - middle(other, axis)) >= 28


def test_share_of_kinds(scenes):
    kinds = [question.kind for scene in scenes for question in scene.questions]
    assert set(kinds) == set(KINDS)
    assert 0.65 < kinds.count("plain") / len(kinds) < 0.8
    for kind in KINDS[1:]:
        assert kinds.count(kind) / len(kinds) > 0.05


def test_all_words_occur(scenes):
    said = set(itertools.chain(*(q.phrase.split() for scene in scenes for q in scene.questions)))
    assert said == {"the", "one", "of", "above", "below", *COLOURS, *SHAPES, *PICK}


def test_backgrounds_are_greyish_and_littered(scenes):
    greys, strays = [], []
    for scene in scenes[:60]:
        pixels = np.asarray(scene.image).astype(int)
        outside = np.ones(pixels.shape[:2], bool)
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            outside[y0:y1, x0:x1] = False
        spread = np.ptp(pixels[outside], axis=1)
        greys.append((spread < 70).mean())
        strays.append((spread > 100).sum())
    assert min(greys) > 0.9
    assert np.count_nonzero(np.array(strays) > 20) > 40
