"""Formats of picture files: upright in each of them, the first picture said, others refused."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.pictures.load import FORMATS, load_picture, open_picture

# What each value of EXIF's orientation has to be turned by, in the words of its standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}
WITH_EXIF = ("JPEG", "PNG", "TIFF", "WEBP", "AVIF")


def make_stored():
    """Four corners of different colours, wider than high."""
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, 24:], stored[16:, :24], stored[16:, 24:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    return stored


def encode(stored, kind, orientation=None, **options):
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if kind == "ICO":
        options["sizes"] = [stored.shape[1::-1]]
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", WITH_EXIF)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_upright_in_every_format(tmp_path, kind, orientation):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    stored = make_stored()
    path = tmp_path / "x"
    path.write_bytes(encode(stored, kind, orientation))
    upright = np.asarray(load_picture(path)).astype(int)
    wanted = UPRIGHT[orientation](stored).astype(int)
    assert upright.shape == wanted.shape
    assert np.abs(upright - wanted).mean() < 12
    # As the sets of COCO count their boxes.
    plain = np.asarray(load_picture(path, turned=False)).astype(int)
    assert plain.shape == stored.shape
    assert np.abs(plain - stored).mean() < 12


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_pictures_is_taken_and_said(tmp_path, kind, caplog):
    stored = make_stored()
    others = [Image.fromarray(stored[::-1].copy()), Image.fromarray(stored[:, ::-1].copy())]
    path = tmp_path / "several"
    path.write_bytes(encode(stored, kind, save_all=True, append_images=others))
    found = np.asarray(load_picture(path)).astype(int)
    assert np.abs(found - stored).mean() < 12
    assert f"{path}: the first of its 3 pictures is taken" in caplog.text
    caplog.clear()
    path.write_bytes(encode(stored, kind))
    load_picture(path)
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["EPS", "PCX", "ICNS", "TGA", "PSD", "SPIDER", "XBM", "PDF"])
def test_other_formats_are_refused(kind):
    """PCX and TGA have no check of their own, EPS runs a program."""
    stored, mode = make_stored(), {"SPIDER": "F", "XBM": "1"}.get(kind, "RGB")
    buffer = io.BytesIO()
    Image.init()
    if kind in Image.SAVE:
        Image.fromarray(stored).convert(mode).save(buffer, kind)
    else:
        buffer.write(b"8BPS\0\1" + bytes(20))
    with pytest.raises(InputError, match="not a picture in a format that is read"):
        open_picture(buffer.getvalue())


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_are_read(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    found = np.asarray(open_picture(encode(make_stored(), kind))).astype(int)
    assert np.abs(found - make_stored()).mean() < 16


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_cut_anywhere_are_read_or_refused(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    whole = encode(make_stored(), kind)
    for length in range(0, len(whole), max(len(whole) // 40, 1)):
        try:
            found = open_picture(whole[:length])
        except InputError as error:
            assert str(error).isprintable()  # noqa: PT017 - either is right
        else:
            assert found.mode == "RGB"


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png: a pipe, socket or device, expected a file"):
        load_picture(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="a folder, expected a file"):
        load_picture(tmp_path)
