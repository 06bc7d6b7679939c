"""The reference's arrays are what the manifest says before anything uses them."""

import io
import zipfile

import numpy as np
import pytest

from gap_runtime.bundle.arrays import ReferenceArrays
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.errors import BundleError

KEY = "00-/kept-8"


@pytest.fixture
def open_arrays(make_bundle, manifest, make_samples):
    """The arrays of a bundle, changed by a function of the dict of them."""

    def open_changed(change=lambda _: None, pack=np.savez):
        samples = make_samples(manifest)
        with np.load(io.BytesIO(samples["more"]["reference.npz"])) as held:
            arrays = dict(held)
        change(arrays)
        packed = io.BytesIO()
        pack(packed, **arrays)
        samples["more"]["reference.npz"] = packed.getvalue()
        bundle = Bundle.open(make_bundle(**samples))
        reference = bundle.manifest.reference
        return arrays, ReferenceArrays(bundle, reference), reference.samples

    return open_changed


def test_whole_arrays_are_read(open_arrays):
    arrays, opened, samples = open_arrays()
    for sample in samples:
        found = opened.read(sample)
        assert set(found) == {"pixels", "visual_tokens", "kept_index", "position_ids", "logits"}
        for name, array in found.items():
            key = sample.sample if name == "pixels" else sample.key
            np.testing.assert_array_equal(array, arrays[f"{key}/{name}"])


def replace(name, change):
    return lambda arrays: arrays.update({name: change(arrays[name])})


NAMES = [f"{KEY}/{name}" for name in ("visual_tokens", "kept_index", "position_ids", "logits")]


@pytest.mark.parametrize("name", ["00-/pixels", *NAMES])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.astype(np.complex64), "is complex64"),
        (lambda a: a.astype(np.int8), "is int8"),
        (lambda a: a.astype("S4"), "is |S4"),
        (lambda a: a[None], "expected"),
        (lambda a: a[..., :-1], "expected"),
        (lambda a: a[..., :0], "expected"),
        (lambda _: np.array(1.5, np.float32), "expected"),
        (lambda a: a.astype(object), "is object"),
        (lambda _: np.zeros(10**6), "has 8,000,128 bytes"),
    ],
)
def test_other_arrays_are_refused(open_arrays, name, change, said):
    with pytest.raises(BundleError, match=r"reference\.npz: ") as caught:
        open_arrays(replace(name, change))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["00-/pixels", *NAMES])
def test_a_missing_array_is_named(open_arrays, name):
    with pytest.raises(BundleError, match=f"no array '{name}'"):
        open_arrays(lambda arrays: arrays.pop(name))


def first(value):
    def change(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("00-/pixels", np.nan),
        (f"{KEY}/visual_tokens", np.inf),
        (f"{KEY}/logits", -np.inf),
        (f"{KEY}/kept_index", -1),
        (f"{KEY}/kept_index", 16),
        (f"{KEY}/position_ids", 2**62),
    ],
)
def test_values_that_cannot_be(open_arrays, name, value):
    _, opened, samples = open_arrays(replace(name, first(value)))
    with pytest.raises(BundleError, match=f"'{name}' holds values that it cannot have"):
        opened.read(samples[0])


@pytest.mark.parametrize(("value", "usable"), [(np.inf, True), (-1.0, True), (np.nan, False)])
def test_scores_may_be_infinite(open_arrays, value, usable):
    scores = np.arange(16, dtype=np.float32)
    scores[3] = value
    _, opened, samples = open_arrays(lambda arrays: arrays.update({f"{KEY}/scores": scores}))
    if usable:
        np.testing.assert_array_equal(opened.read(samples[0])["scores"], scores)
        assert "scores" not in opened.read(samples[1])
    else:
        with pytest.raises(BundleError, match="scores' holds values"):
            opened.read(samples[0])


def test_a_bomb_is_not_unpacked(open_arrays):
    """Terabytes of zeros in a small file."""
    with pytest.raises(BundleError, match="bytes, expected about"):
        open_arrays(replace(f"{KEY}/logits", lambda _: np.zeros(10**7)), np.savez_compressed)


def pack_bytes(data):
    def pack(file, **_):
        file.write(data)

    return pack


def pack_member(data):
    def pack(file, **arrays):
        with zipfile.ZipFile(file, "w") as archive:
            for name in arrays:
                archive.writestr(f"{name}.npy", data)

    return pack


@pytest.mark.parametrize(
    "pack",
    [
        *(pack_bytes(data) for data in (b"", b"no zip", b"PK\x03\x04", b"PK\x05\x06" + bytes(18))),
        *(pack_member(data) for data in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{")),
        pack_member(b"\x93NUMPY\x03\x00\x10\x00\x00\x00{'descr': '<f4'}"),
        pack_member(b"\x93NUMPY\x01\x00\x76\x00" + b"[" * 118),
    ],
)
def test_a_damaged_file_is_one_line(open_arrays, pack):
    with pytest.raises(BundleError, match=r"reference\.npz: ") as caught:
        open_arrays(pack=pack)
    assert str(caught.value).endswith("; copy the bundle again or export again")
