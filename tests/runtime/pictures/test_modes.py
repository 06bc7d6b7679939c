"""A mode is a file: what each shows of a picture, and boxes in the pixels that it was shown at."""

import dataclasses
import textwrap

import numpy as np
import pytest
from PIL import Image

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.errors import InputError, SchemaError
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.pictures import limits, modes, preprocess
from gap_runtime.pictures.boxes import PictureFrame, parse_boxes
from gap_runtime.pictures.load import find_bucket, fitting_size, frame_picture, make_pixels
from gap_runtime.pictures.preprocess import Bucket, PictureMode, Preprocess
from gap_runtime.registry import list_plugins

ONE = Bucket(name="", canvas=None, grids=((2, 2),), strip=1, fixed=())
MODES = list_plugins("gap_runtime.pictures.modes")


def make_spec(mode, side=8, canvases=()):
    return Preprocess(
        mode=mode,
        side=side,
        fill=(0, 0, 0),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        canvases=canvases,
    )


def sized(*canvases):
    """Buckets of mode `resize`: a token for every 4 x 4 pixels."""
    return tuple(
        Bucket(
            name=f"{width}x{height}",
            canvas=(width, height),
            grids=((height // 4, width // 4),),
            strip=1,
            fixed=(),
        )
        for width, height in canvases
    )


def example(mode):
    """A specification and a bucket of every mode."""
    if mode == "anyres":
        tiles = Bucket(name="wide", canvas=(16, 8), grids=((2, 2), (2, 4)), strip=1, fixed=())
        return make_spec(mode, canvases=((16, 8),)), tiles
    if mode == "anyres_max":
        grids = ((2, 2), (1, 2))
        less = Bucket(name="16x8-2x4", canvas=(16, 8), grids=grids, strip=1, fixed=())
        return make_spec(mode, canvases=((16, 8),)), less
    if mode == "tiles":
        tiles = Bucket(name="wide", canvas=(16, 8), grids=((2, 2),) * 3, strip=1, fixed=())
        return make_spec(mode, canvases=((16, 8),)), tiles
    return make_spec(mode), sized((24, 16))[0] if mode == "resize" else ONE


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_does_what_it_says_of_its_shape(mode):
    spec, bucket = example(mode)
    size = fitting_size(bucket, spec)
    assert find_bucket(size, spec, (bucket,)) is bucket
    picture = Image.new("RGB", size, (255, 0, 51))
    pixels = make_pixels(picture, spec, bucket)
    assert pixels.shape == spec.pixel_shape(bucket)
    assert (pixels.dtype, pixels.flags["C_CONTIGUOUS"]) == (np.float32, True)
    frame = frame_picture(size, spec, bucket)
    assert frame.size == size
    # Of a picture that fits nothing is added: what is shown lies in it.
    left, top, width, height = frame.shown
    assert 0 <= left < left + width <= size[0]
    assert 0 <= top < top + height <= size[1]


# Worked out by hand: size of the picture, mode, (left, top, width, height), what the model takes.
FRAMES = [
    ((200, 100), "pad", (0, -50, 200, 200), (8, 8)),
    ((61, 100), "pad", (-19, 0, 100, 100), (8, 8)),
    ((200, 100), "stretch", (0, 0, 200, 100), (8, 8)),
    ((200, 100), "resize", (0, 0, 200, 100), (24, 16)),
    # 200 x 100 fits the canvas of 16 x 8 exactly; 100 x 100 is 8 x 8 on it.
    ((200, 100), "anyres", (0, 0, 200, 100), (16, 8)),
    ((100, 100), "anyres", (0, 0, 100, 100), (8, 8)),
    ((200, 100), "anyres_max", (0, 0, 200, 100), (16, 8)),
    ((100, 100), "tiles", (0, 0, 100, 100), (16, 8)),
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_a_case_by_hand(mode):
    assert mode in {case[1] for case in FRAMES}, (
        f"work out by hand what of a picture mode '{mode}' shows, and add it to FRAMES"
    )


@pytest.mark.parametrize(("size", "mode", "shown", "resized"), FRAMES)
def test_what_of_a_picture_is_shown(size, mode, shown, resized):
    spec, bucket = example(mode)
    assert frame_picture(size, spec, bucket) == PictureFrame(
        size=size, shown=shown, resized=resized
    )


@pytest.mark.parametrize(
    ("size", "resized", "answer", "expected"),
    [
        # Twice as wide, four times as high.
        ((448, 112), (224, 28), "[20, 7, 112, 14]", [40, 28, 224, 56]),
        ((100, 100), (1000, 500), "[100, 100, 500, 500]", [10, 20, 50, 100]),
        # Over the edge, where it is cut.
        ((100, 100), (200, 200), "[100, 100, 300, 120]", [50, 50, 100, 60]),
    ],
)
def test_boxes_in_pixels_of_the_resized_picture(llava_box, size, resized, answer, expected):
    spec = dataclasses.replace(llava_box, frame="resized", scale=1.0)
    frame = PictureFrame(size=size, shown=(0, 0, *size), resized=resized)
    found = parse_boxes(answer, spec, frame)
    assert [list(box) for box in found.boxes] == [pytest.approx(expected)]


def test_boxes_in_pixels_of_a_padded_picture(llava_box):
    # 200 x 100 in the middle of 200 x 200, shown at 400 x 400: the picture begins at row 100.
    spec = dataclasses.replace(llava_box, frame="resized", scale=1.0)
    frame = PictureFrame.padded((200, 100), (400, 400))
    found = parse_boxes("[100, 150, 200, 250]", spec, frame)
    assert [list(box) for box in found.boxes] == [pytest.approx([50, 25, 100, 75])]


def test_boxes_of_a_thousand_are_shares_of_the_picture(llava_box):
    """Whatever it was resized to, and whether it was cut into tiles."""
    spec = dataclasses.replace(llava_box, frame="original", scale=1000.0)
    for mode in MODES:
        frame = frame_picture((400, 200), *example(mode))
        found = parse_boxes("[250, 100, 500, 200]", spec, frame)
        assert [list(box) for box in found.boxes] == [pytest.approx([100, 20, 200, 40])]


CANVASES = ((28, 28), (56, 28), (28, 56), (112, 112), (112, 56))


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((30, 30), "28x28"),
        ((1000, 1000), "112x112"),
        # The area between those of 28 and 112: the geometric mean is 56.
        ((55, 55), "28x28"),
        ((57, 57), "112x112"),
        ((640, 320), "112x56"),
        ((50, 25), "56x28"),
        # 4:3 is nearer to 1:1 (a factor of 1.33) than to 2:1 (1.5).
        ((640, 480), "112x112"),
        ((480, 640), "112x112"),
        ((300, 640), "28x56"),
        # 3:2 is nearer to 2:1 (1.33) than to 1:1 (1.5), and not by less than a tenth.
        ((900, 600), "112x56"),
    ],
)
def test_the_nearest_aspect_and_of_those_the_nearest_area(size, name):
    assert find_bucket(size, make_spec("resize"), sized(*CANVASES)).name == name


def test_a_picture_of_another_shape_is_refused_with_what_there_is():
    buckets = sized((56, 28))
    assert find_bucket((400, 100), make_spec("resize"), buckets) is buckets[0]
    with pytest.raises(InputError, match=r"410x100 would be distorted .*have 56x28; exp"):
        find_bucket((410, 100), make_spec("resize"), buckets)


def test_a_tall_strip_is_refused_before_pillow_widens_it(monkeypatch):
    monkeypatch.setattr(limits, "MAX_PIXELS", 2000)
    (bucket,) = sized((24, 16))
    assert make_pixels(Image.new("RGB", (2, 83)), make_spec("resize"), bucket).shape[-1] == 24
    with pytest.raises(InputError, match="of 2x84 needs 24x84 pixels when it is resized"):
        make_pixels(Image.new("RGB", (2, 84)), make_spec("resize"), bucket)


def test_a_bundle_of_several_sizes_opens(make_bundle, resizing):
    manifest = Bundle.open(make_bundle(**resizing)).manifest
    spec, buckets = manifest.preprocess, manifest.buckets
    assert find_bucket((100, 40), spec, buckets).name == "16x8"
    assert find_bucket((100, 90), spec, buckets).name == "8x8"


@pytest.mark.parametrize("canvases", [(None, (8, 8)), ((8, 8), (8, 8)), ((0, 8), (8, 8))])
def test_sizes_that_are_none_are_refused(make_bundle, resizing, canvases):
    buckets = tuple(
        dataclasses.replace(bucket, canvas=canvas)
        for bucket, canvas in zip(resizing["buckets"], canvases, strict=True)
    )
    with pytest.raises(SchemaError, match="buckets does not fit the graphs"):
        Bundle.open(make_bundle(**{**resizing, "buckets": buckets}))


MODE = '''
"""The left half of a picture, as a square."""

from gap_runtime.pictures.boxes import PictureFrame
from gap_runtime.pictures.cells import find_cells
from gap_runtime.pictures.pixels import resize_picture
from gap_runtime.pictures.square import find_bucket, fitting_size, is_usable, pixel_shape


def make_pixels(picture, spec, bucket):
    half = picture.crop((0, 0, picture.width // 2, picture.height))
    return resize_picture(half, (spec.side, spec.side), spec.mean, spec.std)


def frame_picture(size, spec, bucket):
    width, height = size
    return PictureFrame(size=size, shown=(0, 0, width // 2, height), resized=(8, 8))
'''


@pytest.fixture
def left_half(tmp_path):
    """A file of a further mode."""
    (tmp_path / "left_half.py").write_text(textwrap.dedent(MODE).lstrip(), encoding="utf-8")
    modes.__path__.append(str(tmp_path))
    yield
    modes.__path__.remove(str(tmp_path))
    preprocess._load_mode.cache_clear()


@pytest.mark.usefixtures("left_half")
def test_a_further_mode_is_one_file(make_bundle, manifest, llava_box):
    spec = dataclasses.replace(manifest.preprocess, mode="left_half")
    bundle = Bundle.open(make_bundle(preprocess=spec))
    picture = Image.new("RGB", (100, 50), (255, 255, 255))
    picture.paste((0, 0, 0), (50, 0, 100, 50))
    pixels = make_pixels(picture, spec, bundle.manifest.buckets[0])
    assert pixels.min() == pixels.max()
    frame = frame_picture(picture.size, spec, bundle.manifest.buckets[0])
    box = dataclasses.replace(llava_box, frame="resized", scale=1.0)
    found = parse_boxes("[4, 4, 8, 8]", box, frame).boxes
    assert [list(each) for each in found] == [[25, 25, 50, 50]]


def test_without_its_file_a_bundle_of_it_is_refused(make_bundle, manifest):
    spec = dataclasses.replace(manifest.preprocess, mode="left_half")
    have = ", ".join(MODES)
    with pytest.raises(SchemaError, match=f"mode 'left_half' is unknown; have {have}; upgrade"):
        Bundle.open(make_bundle(preprocess=spec))


def test_every_mode_has_all_members():
    wanted = {name for name in vars(PictureMode) if name[0] != "_"}
    assert len(wanted) == 7
    for mode in MODES:
        module = __import__(f"gap_runtime.pictures.modes.{mode}", fromlist=[mode])
        assert wanted <= set(dir(module)), mode


class Runner:
    """Graphs that give zeros, and take what their shapes say."""

    def open_stage(self, _bundle, stage, _device):
        self.stage = stage
        return self

    def run(self, inputs):
        assert inputs["pixels"].shape == self.stage.inputs[0].shape
        return {s.name: np.zeros(s.shape, s.dtype) for s in self.stage.outputs}

    def open_decoder(self, *_):
        return Decoder()


class Decoder:
    """Answers at once that there is nothing."""

    def fit(self, rows):
        return rows

    def run(self, _embeddings, _position_ids, _write_slot, logits_rows):
        logits = np.zeros((len(logits_rows), 12), np.float32)
        logits[:, 10] = 1
        return logits


def test_a_grounder_takes_the_bucket_of_the_picture(make_bundle, resizing, llava_box):
    box = dataclasses.replace(llava_box, frame="resized", scale=1.0)
    grounder = Grounder(Bundle.open(make_bundle(**resizing, box=box)), Runner())
    assert grounder.ground(Image.new("RGB", (200, 100)), "the red mug").patches == 8
    assert grounder.ground(Image.new("RGB", (100, 100)), "the red mug").patches == 4
