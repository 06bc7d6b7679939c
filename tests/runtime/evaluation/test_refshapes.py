"""The generated pictures: always the same, and every phrase means one object."""

import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gap_runtime.evaluation.refshapes import (
    COLOURS,
    SHAPES,
    SIDE,
    SPLITS,
    Shape,
    _draw_shape,
    draw_scene,
)

SCENES = 300
# Colours are shifted by up to 12, then noise of up to 16 is added.
SPREAD = 28


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene("test", index) for index in range(SCENES)]


def pixels_of(scene):
    return np.asarray(scene.image).astype(int)


def hash_scene(scene):
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


def test_a_known_scene():
    scene = draw_scene("test", 6)
    assert scene.image.size == (112, 112)
    assert hash_scene(scene)[:16] == "85f3ac9dd7af22d0"
    assert [(question.phrase, question.box) for question in scene.questions] == [
        ("the bottom yellow circle", (36, 92, 53, 111)),
        ("the top yellow circle", (54, 55, 82, 87)),
        ("the red one", (1, 4, 26, 28)),
        ("the blue triangle", (11, 54, 33, 77)),
    ]


def test_scenes_are_the_same_every_time():
    for index in (0, 7, 41):
        one, other = draw_scene("val", index), draw_scene("val", index)
        assert hash_scene(one) == hash_scene(other)
        assert one.questions == other.questions


def test_a_scene_does_not_depend_on_those_before(scenes):
    assert hash_scene(scenes[250]) == hash_scene(draw_scene("test", 250))


def test_scenes_of_a_split_differ(scenes):
    assert len({hash_scene(scene) for scene in scenes}) == SCENES


def test_splits_differ():
    hashes = {hash_scene(draw_scene(split, k)) for split in SPLITS for k in range(20)}
    assert len(hashes) == 20 * len(SPLITS) == 60


def test_pictures_are_rgb_with_the_longest_side_of_112(scenes):
    assert {scene.image.mode for scene in scenes} == {"RGB"}
    assert {max(scene.image.size) for scene in scenes} == {SIDE} == {112}
    assert min(min(scene.image.size) for scene in scenes) >= 80


def test_most_pictures_are_square_and_some_are_wide_or_tall(scenes):
    square = sum(scene.image.width == scene.image.height for scene in scenes) / SCENES
    assert 0.6 < square < 0.8
    assert any(scene.image.width > scene.image.height for scene in scenes)
    assert any(scene.image.width < scene.image.height for scene in scenes)


def test_two_to_four_objects_each_with_its_question(scenes):
    assert {len(scene.shapes) for scene in scenes} == {2, 3, 4}
    for scene in scenes:
        assert [question.target for question in scene.questions] == list(range(len(scene.shapes)))
        assert [question.box for question in scene.questions] == [s.box for s in scene.shapes]


def test_number_of_objects_can_be_set():
    counts = {len(draw_scene("train", k, least=1, most=1).shapes) for k in range(10)}
    assert counts == {1}


def test_objects_lie_inside_the_picture(scenes):
    for scene in scenes:
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            assert 0 <= x0 < x1 <= scene.image.width
            assert 0 <= y0 < y1 <= scene.image.height


def test_objects_do_not_overlap(scenes):
    for scene in scenes:
        painted = np.zeros((112, 112), int)
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            painted[y0:y1, x0:x1] += 1
        assert painted.max() == 1


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("box", [(3, 4, 24, 27), (5, 2, 20, 17), (1, 1, 37, 31), (2, 3, 18, 21)])
def test_ink_touches_all_sides_of_its_box_and_no_pixel_beyond(name, box):
    canvas = Image.new("L", (40, 40))
    _draw_shape(ImageDraw.Draw(canvas), Shape(colour="red", shape=name, box=box), (255,))
    rows, columns = np.nonzero(np.asarray(canvas))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box


def test_boxes_are_tight_around_the_ink_in_the_picture(scenes):
    for scene in scenes[:60]:
        pixels = pixels_of(scene)
        for shape in scene.shapes:
            ink = (abs(pixels - COLOURS[shape.colour]) <= SPREAD).all(axis=-1)
            x0, y0, x1, y1 = shape.box
            inside = ink[y0:y1, x0:x1]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            around = ink[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2]
            assert around.sum() == inside.sum()


def centre(shape):
    x0, y0, x1, y1 = shape.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def width_times_height(shape):
    x0, y0, x1, y1 = shape.box
    return (x1 - x0) * (y1 - y0)


PICK = {
    "small": lambda found: min(found, key=width_times_height),
    "big": lambda found: max(found, key=width_times_height),
    "left": lambda found: min(found, key=lambda shape: centre(shape)[0]),
    "right": lambda found: max(found, key=lambda shape: centre(shape)[0]),
    "top": lambda found: min(found, key=lambda shape: centre(shape)[1]),
    "bottom": lambda found: max(found, key=lambda shape: centre(shape)[1]),
}


def find_objects(phrase, shapes):
    """Every object that a phrase may mean, read from its words alone."""
    first, *words = phrase.split()
    assert first == "the"
    picks = [PICK[word] for word in words if word in PICK]
    assert len(picks) <= 1
    rest = [word for word in words if word not in PICK]
    assert set(rest) <= {*COLOURS, *SHAPES, "one"}
    colours = set(rest) & set(COLOURS)
    names = set(rest) & set(SHAPES)
    found = [
        shape
        for shape in shapes
        if (not colours or shape.colour in colours) and (not names or shape.shape in names)
    ]
    return [picks[0](found)] if picks and len(found) > 1 else found


def test_every_phrase_fits_exactly_its_object(scenes):
    for scene in scenes:
        for question in scene.questions:
            found = find_objects(question.phrase, scene.shapes)
            assert found == [scene.shapes[question.target]], question.phrase
            assert found[0].box == question.box


def test_words_of_size_and_place_are_used_only_where_needed(scenes):
    for scene in scenes:
        for question in scene.questions:
            words = question.phrase.split()
            without = " ".join(word for word in words if word not in PICK)
            alike = len(find_objects(without, scene.shapes))
            assert alike == (1 if question.kind == "plain" else 2)
            assert (question.kind == "plain") == (without == question.phrase)


def test_place_words_are_fair(scenes):
    for scene in scenes:
        pair = [question for question in scene.questions if question.kind == "place"]
        if pair:
            a, b = (centre(scene.shapes[question.target]) for question in pair)
            axis = 0 if pair[0].phrase.split()[1] in {"left", "right"} else 1
            assert abs(a[axis] - b[axis]) >= 22


def test_size_words_are_fair(scenes):
    for scene in scenes:
        pair = [question for question in scene.questions if question.kind == "size"]
        if pair:
            areas = sorted(width_times_height(scene.shapes[q.target]) for q in pair)
            assert areas[1] > 1.7 * areas[0]


def test_share_of_kinds(scenes):
    kinds = [question.kind for scene in scenes for question in scene.questions]
    assert set(kinds) == {"plain", "size", "place"}
    # Three scenes of ten have a pair, two questions of the three on average that a scene has;
    # one pair of three differs in size, two in place.
    assert kinds.count("size") / len(kinds) == pytest.approx(0.2 / 3, abs=0.03)
    assert kinds.count("place") / len(kinds) == pytest.approx(0.4 / 3, abs=0.04)


def test_all_words_occur(scenes):
    said = set(itertools.chain(*(q.phrase.split() for scene in scenes for q in scene.questions)))
    assert said == {"the", "one", *COLOURS, *SHAPES, *PICK}


def test_repeats_can_be_switched_off():
    kinds = {q.kind for k in range(40) for q in draw_scene("val", k, repeats=0).questions}
    assert kinds == {"plain"}


def test_backgrounds_are_noisy_and_greyish(scenes):
    for scene in scenes[:20]:
        pixels = pixels_of(scene)
        outside = np.ones(pixels.shape[:2], bool)
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            outside[y0:y1, x0:x1] = False
        background = pixels[outside]
        assert (background.max(axis=1) - background.min(axis=1)).max() <= 28 + 33
        assert background.std() > 8
