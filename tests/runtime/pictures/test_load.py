"""Pictures of any kind to RGB, and RGB to pixels."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from gap_runtime.errors import BundleError, GapError, InputError
from gap_runtime.pictures import limits
from gap_runtime.pictures.load import (
    find_bucket,
    fitting_size,
    load_picture,
    make_pixels,
    to_rgb,
)
from gap_runtime.pictures.modes.anyres import choose_canvas, mosaic_grid, newline_index
from gap_runtime.pictures.modes.pad import pad_to_square
from gap_runtime.pictures.preprocess import Bucket, Preprocess

ONE = Bucket(name="", canvas=None, grids=((2, 2),), strip=1, fixed=())

COLOURS = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        [[10, 20, 30], [40, 50, 60], [70, 80, 90]],
    ],
    dtype=np.uint8,
)


def load(path):
    picture = load_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def save(tmp_path, picture, name="picture.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def write_png(path, width, height, *, bits=8, rows=b""):
    """Write a colour PNG by hand: its header may promise more than its rows hold."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


@pytest.fixture
def noise():
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, COLOURS),
        (2, COLOURS[:, ::-1]),
        (3, COLOURS[::-1, ::-1]),
        (4, COLOURS[::-1]),
        (5, COLOURS.transpose(1, 0, 2)),
        (6, np.rot90(COLOURS, -1)),
        (7, COLOURS[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(COLOURS, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(COLOURS), exif=exif)
    assert np.array_equal(load(path), upright)


def test_exif_orientation_is_applied_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    once = load_picture(save(tmp_path, Image.fromarray(COLOURS), exif=exif))
    assert np.array_equal(np.asarray(to_rgb(once)), np.asarray(once))


def test_a_picture_of_plain_pixels_is_one_of_its_own(noise):
    before = np.asarray(noise).copy()
    taken = to_rgb(noise)
    noise.paste((1, 2, 3), (0, 0, *noise.size))
    assert np.array_equal(np.asarray(taken), before)
    # One that says how it lies, in no file.
    taken.getexif()[0x0112] = 3
    turned = to_rgb(taken)
    assert np.array_equal(np.asarray(turned), before[::-1, ::-1])
    assert dict(turned.getexif()) == {}


def test_photo_with_a_sloppy_exif_entry_is_read_upright(tmp_path):
    # The description's type says float; cameras and editors write such entries.
    entries = struct.pack("<HHIf", 0x010E, 11, 1, 1.5) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    path = save(tmp_path, Image.fromarray(COLOURS), "photo.jpg", exif=exif)
    assert load_picture(path).size == (2, 3)


def test_a_broken_exif_is_read_without_a_warning(tmp_path):
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + b"\1\2\3\4"
    path = save(tmp_path, Image.fromarray(COLOURS), "photo.jpg", exif=exif)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_picture(path).size == (3, 2)
    assert said == []


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(grey))
    assert np.array_equal(load(path), np.stack([grey] * 3, axis=-1))


def test_grey_with_alpha_drops_alpha(tmp_path):
    pixels = np.array([[[7, 0], [200, 255]]], dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(pixels))
    assert load(path).tolist() == [[[7, 7, 7], [200, 200, 200]]]


def test_colour_with_alpha_drops_alpha(tmp_path):
    pixels = np.array([[[1, 2, 3, 0], [4, 5, 6, 128]]], dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(pixels))
    assert load(path).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def make_palette():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    return picture


@pytest.mark.parametrize("name", ["palette.png", "palette.gif"])
def test_palette_is_looked_up(tmp_path, name):
    path = save(tmp_path, make_palette(), name)
    assert load(path).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_palette_with_transparency_is_read_without_a_warning(tmp_path):
    path = save(tmp_path, make_palette(), transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_cmyk_is_converted(tmp_path):
    pixels = np.array([[[0, 255, 255, 0], [0, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(pixels, "CMYK"), "print.tif")
    assert load(path).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 0]]]


def test_16_bit_grey_keeps_its_upper_eight_bits(tmp_path):
    deep = np.array([[0, 255, 256, 0x8040, 65535]], dtype=np.uint16)
    path = save(tmp_path, Image.fromarray(deep))
    assert load(path)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_16_bit_grey_of_the_other_byte_order_is_the_same(tmp_path):
    deep = np.array([[0, 256, 0x8040, 65535]], dtype=">u2")
    path = save(tmp_path, Image.fromarray(deep), "deep.tif")
    assert load(path)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_16_bit_colour_keeps_its_upper_eight_bits(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(">HHH", 0x80FF, 0x01FF, 0xFF00))
    path = tmp_path / "deep.png"
    signature = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(
        signature + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    )
    assert load(path).tolist() == [[[128, 1, 255]]]


def test_one_bit_becomes_black_and_white(tmp_path):
    path = save(tmp_path, Image.fromarray(np.array([[True, False]])))
    assert load(path).tolist() == [[[255] * 3, [0] * 3]]


def test_float_picture_is_refused(tmp_path):
    path = save(tmp_path, Image.fromarray(np.array([[0.5, 2.5]], dtype=np.float32)), "depth.tif")
    with pytest.raises(InputError, match="32-bit floats"):
        load_picture(path)


def test_refusal_of_a_float_picture_names_the_file(tmp_path):
    path = save(tmp_path, Image.fromarray(np.array([[0.5, 2.5]], dtype=np.float32)), "depth.tif")
    with pytest.raises(InputError, match=r"depth\.tif"):
        load_picture(path)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.gif", "cut.bmp", "cut.tif"])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_truncated_file_is_refused(tmp_path, noise, name, share):
    path = save(tmp_path, noise, name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=name):
        load_picture(path)


def test_text_named_like_a_picture_is_refused(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"notes\.png: not a picture"):
        load_picture(path)


def test_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(InputError, match=r"empty\.png: not a picture"):
        load_picture(path)


def test_texture_of_an_unknown_pixel_format_is_refused(tmp_path):
    # Pillow raises NotImplementedError for it, which is no OSError.
    path = tmp_path / "texture.dds"
    head = struct.pack("<4s7I44x", b"DDS ", 124, 0x1007, 4, 4, 16, 0, 0)
    path.write_bytes(head + struct.pack("<II24x", 32, 0) + struct.pack("<5I", 0x1000, 0, 0, 0, 0))
    with pytest.raises(InputError, match=r"texture\.dds"):
        load_picture(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png: no such file"):
        load_picture(tmp_path / "nowhere.png")


def test_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="folder"):
        load_picture(tmp_path)


@pytest.mark.parametrize(
    "size",
    [
        (12_000, 10_000),  # above our limit, where Pillow would only warn
        (60_000, 60_000),  # above Pillow's
    ],
)
def test_decompression_bomb_is_refused_for_its_pixels(tmp_path, size):
    path = tmp_path / "bomb.png"
    write_png(path, *size)
    assert path.stat().st_size < 100
    with pytest.raises(InputError, match=r"bomb\.png: .*pixels.*scale it down"):
        load_picture(path)


def test_picture_below_the_limit_is_not_taken_for_a_bomb(tmp_path):
    path = tmp_path / "hollow.png"
    write_png(path, 9_999, 10_000)
    with pytest.raises(InputError, match="broken"):
        load_picture(path)


def test_thin_picture_that_would_be_padded_to_a_bomb_is_refused(tmp_path, monkeypatch):
    # 200 pixels wide and 2 high is a small file, but a canvas of 40,000 pixels.
    monkeypatch.setattr(limits, "MAX_PIXELS", 10_000)
    path = save(tmp_path, Image.new("RGB", (200, 2)))
    with pytest.raises(InputError, match="pixels"):
        make_pixels(load_picture(path), make_spec(side=4), ONE)


@pytest.mark.parametrize(
    ("size", "corner"),
    [
        ((2, 5), (1, 0)),  # tall: 3 columns to share, 1 to the left
        ((5, 2), (0, 1)),  # wide: 3 rows to share, 1 above
        ((4, 10), (3, 0)),
        ((10, 4), (0, 3)),
    ],
)
def test_padding_puts_the_picture_in_the_middle(size, corner):
    padded = pad_to_square(Image.new("RGB", size, (255, 0, 0)), (1, 2, 3))
    side = max(size)
    expected = np.full((side, side, 3), (1, 2, 3), dtype=np.uint8)
    x, y = corner
    expected[y : y + size[1], x : x + size[0]] = (255, 0, 0)
    assert np.array_equal(np.asarray(padded), expected)


def test_square_picture_is_not_padded(noise):
    assert np.array_equal(np.asarray(pad_to_square(noise, (1, 2, 3))), np.asarray(noise))


def make_spec(**changes):
    values = {
        "mode": "pad",
        "side": 2,
        "fill": (0, 51, 255),
        "mean": (0.5, 0.25, 0.0),
        "std": (0.5, 0.25, 2.0),
        "canvases": (),
    }
    return Preprocess(**{**values, **changes})


def test_pixels_are_scaled_and_normalized_by_channel():
    picture = np.array(
        [[[0, 0, 0], [255, 255, 255]], [[51, 102, 153], [255, 0, 51]]], dtype=np.uint8
    )
    pixels = make_pixels(Image.fromarray(picture), make_spec(), ONE)
    red = [[-1, 1], [-0.6, 1]]  # (v / 255 - 0.5) / 0.5
    green = [[-1, 3], [0.6, -1]]  # (v / 255 - 0.25) / 0.25
    blue = [[0, 0.5], [0.3, 0.1]]  # v / 255 / 2
    assert pixels == pytest.approx(np.array([[red, green, blue]]), abs=1e-6)


def test_pixels_are_a_contiguous_float32_batch(noise):
    pixels = make_pixels(noise, make_spec(side=7), ONE)
    assert pixels.shape == (1, 3, 7, 7)
    assert pixels.dtype == np.float32
    assert pixels.flags["C_CONTIGUOUS"]


def test_padding_has_the_fill_colour_in_pixels():
    # 1 wide, 2 high: the picture is the left column, the fill is the right one.
    pixels = make_pixels(Image.new("RGB", (1, 2), (255, 255, 255)), make_spec(), ONE)
    assert pixels[0, :, 0, 0] == pytest.approx([1, 3, 0.5], abs=1e-6)
    assert pixels[0, :, 1, 1] == pytest.approx([-1, -0.2, 0.5], abs=1e-6)


def test_stretch_mode_does_not_pad():
    picture = Image.new("RGB", (1, 2), (255, 255, 255))
    pixels = make_pixels(picture, make_spec(mode="stretch"), ONE)
    assert pixels[0, 0] == pytest.approx(np.ones((2, 2)), abs=1e-6)


def test_unknown_mode_is_refused(noise):
    with pytest.raises(
        GapError, match="mode 'crop' is unknown; have anyres, anyres_max, pad, resize, str"
    ):
        make_pixels(noise, make_spec(mode="crop"), ONE)


def test_resizing_is_bicubic():
    step = np.repeat(np.array([[100, 100, 200, 200]], dtype=np.uint8), 4, axis=0)
    picture = Image.fromarray(np.stack([step] * 3, axis=-1))
    spec = make_spec(side=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    row = make_pixels(picture, spec, ONE)[0, 0, 8] * 255
    # A cubic overshoots on both sides of a step, a linear filter never does.
    assert row.min() < 98
    assert row.max() > 202


CANVASES = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))
"""(width, height), in the order of a published model's list."""


def make_tiles_spec(side=336, canvases=CANVASES):
    return make_spec(mode="anyres", side=side, canvases=canvases)


def make_bucket(canvas, mosaic, tile_grid=24):
    name = f"{canvas[0]}x{canvas[1]}-{mosaic[0]}x{mosaic[1]}"
    return Bucket(
        name=name,
        canvas=canvas,
        grids=((tile_grid, tile_grid), mosaic),
        strip=1,
        fixed=newline_index(mosaic, tile_grid),
    )


def test_tiles_are_the_views_of_a_buckets_canvas():
    spec = make_spec(mode="anyres", side=4, canvases=((8, 4), (4, 8)))
    picture = Image.new("RGB", (8, 4), (255, 255, 255))
    pixels = make_pixels(picture, spec, make_bucket((8, 4), (2, 4), 2))
    assert pixels.shape == (1, 3, 3, 4, 4)
    assert pixels.dtype == np.float32
    assert pixels[0, :, :, 0, 0] == pytest.approx(np.array([[1, 3, 0.5]] * 3), abs=1e-6)
    # Of the other canvas half is black.
    other = make_pixels(picture, spec, make_bucket((4, 8), (4, 2), 2))
    assert other[0, 1, :, 0, 0] == pytest.approx([-1, -1, 0], abs=1e-6)


@pytest.mark.parametrize("mode", ["pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (640, 480), (3, 999)])
def test_without_tiles_every_picture_has_the_one_bucket(mode, size):
    assert find_bucket(size, make_spec(mode=mode), (ONE,)) is ONE


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((640, 480), "672x672-36x48"),
        ((1280, 960), "672x672-36x48"),
        ((480, 640), "672x672-48x36"),
        # Too small to need four tiles.
        ((320, 240), "672x336-24x32"),
        ((1008, 336), "1008x336-24x72"),
    ],
)
def test_bucket_is_that_of_the_pictures_canvas_and_mosaic(size, name):
    buckets = tuple(
        make_bucket(canvas, mosaic)
        for canvas, mosaic in (
            ((672, 672), (36, 48)),
            ((672, 672), (48, 36)),
            ((672, 336), (24, 32)),
            ((1008, 336), (24, 72)),
        )
    )
    assert find_bucket(size, make_tiles_spec(), buckets).name == name


def test_picture_without_a_bucket_is_told_which_one_to_export():
    buckets = (make_bucket((672, 672), (36, 48)), make_bucket((672, 336), (24, 32)))
    with pytest.raises(InputError) as caught:
        find_bucket((480, 640), make_tiles_spec(), buckets)
    assert str(caught.value) == (
        "a picture of 480x640 needs graphs for 48x36 tokens on a canvas of 672x672; have "
        "672x672-36x48, 672x336-24x32; export with --set image.canvas=672x672/480:640, or crop "
        "the picture to one of those"
    )


def test_same_mosaic_on_another_canvas_is_another_bucket():
    # 24x24 on the canvas of two tiles over each other, not side by side.
    bucket = make_bucket((336, 672), (24, 24))
    with pytest.raises(InputError, match=r"--set image\.canvas=672x336/336:336"):
        find_bucket((336, 336), make_tiles_spec(), (bucket,))


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000)])
def test_picture_too_thin_for_any_bucket_is_told_so(size):
    bucket = make_bucket((672, 672), (36, 48))
    with pytest.raises(InputError, match="so thin that none of its tiles' tokens is left") as told:
        find_bucket(size, make_tiles_spec(), (bucket,))
    assert "image.canvas" not in str(told.value)


@pytest.mark.parametrize("mode", ["pad", "stretch"])
def test_without_tiles_a_square_fits(mode):
    assert fitting_size(ONE, make_spec(mode=mode, side=7)) == (7, 7)


@pytest.mark.parametrize(
    ("canvas", "mosaic", "size"),
    [
        ((672, 672), (36, 48), (672, 504)),
        ((672, 336), (24, 32), (448, 336)),
        ((1008, 336), (6, 72), (1008, 84)),
        # 336x672 would go on the smaller canvas of that size, and 349x672 does not fit it.
        ((672, 672), (48, 24), (349, 672)),
        # A square that fits both canvases of two tiles goes on the first one.
        ((336, 672), (24, 24), (336, 349)),
    ],
)
def test_fitting_size_of_a_bucket(canvas, mosaic, size):
    bucket = make_bucket(canvas, mosaic)
    assert fitting_size(bucket, make_tiles_spec()) == size
    assert find_bucket(size, make_tiles_spec(), (bucket,)) is bucket


TILES = (
    *(((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)), ((1, 1),), ((1, 1), (2, 2), (3, 3), (4, 4))),
    *(((3, 3), (1, 2), (2, 1), (5, 1), (1, 5)), ((4, 3), (3, 4), (2, 6), (6, 2), (1, 1), (12, 1))),
)
"""(columns, rows) of tiles of each canvas."""


@pytest.mark.parametrize(
    ("side", "tile_grid"), [(336, 24), (224, 16), (384, 27), (448, 32), (28, 2), (30, 5), (12, 6)]
)
@pytest.mark.parametrize("tiles", TILES, ids=range(len(TILES)))
def test_picture_of_the_fitting_size_finds_its_own_bucket(tiles, side, tile_grid):
    spec = make_tiles_spec(side, tuple((columns * side, rows * side) for columns, rows in tiles))
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.uniform(0, np.log(5000), (400, 2))).astype(int).tolist()
    around = [(width, round(width / ratio)) for width in (100, 999) for ratio in (0.5, 0.52, 2)]
    met = {}
    for size in [*map(tuple, drawn), *around, *spec.canvases]:
        canvas = choose_canvas(size, spec.canvases)
        mosaic = mosaic_grid(size, canvas, tile_grid, side)
        if 0 not in mosaic:
            met[canvas, mosaic] = size
    assert len(met) >= (1 if tile_grid == 2 else 5)
    buckets = tuple(make_bucket(canvas, mosaic, tile_grid) for canvas, mosaic in met)
    for bucket, size in zip(buckets, met.values(), strict=True):
        assert find_bucket(size, spec, buckets) is bucket
        assert find_bucket(fitting_size(bucket, spec), spec, buckets) is bucket
        picture = Image.new("RGB", (1, 1)).resize(fitting_size(bucket, spec))
        assert picture.width <= bucket.canvas[0]
        assert picture.height <= bucket.canvas[1]


def test_bucket_that_no_picture_can_have_is_refused():
    # Whatever is so narrow fits the canvas of two tiles over each other.
    bucket = make_bucket((672, 672), (48, 20))
    with pytest.raises(BundleError, match="no picture fits bucket '672x672-48x20'"):
        fitting_size(bucket, make_tiles_spec())
