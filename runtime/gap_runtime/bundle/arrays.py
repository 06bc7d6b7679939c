"""The reference's arrays, held to the manifest before anything uses them.

<sample>/pixels           float32, as the vision graph takes them
<key>/visual_tokens       float32 [1, kept and extra, W], W as wide as the decoder's rows
<key>/kept_index          int64 [1, kept], in [0, patches)
<key>/position_ids        int64 [axes, tokens of the prompt]
<key>/logits              float32 [V]
<key>/scores              float32 [patches], where the pruner scores; infinite is never removed
<key>/probabilities       float32 [tokens of the answer], left out by older exporters
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER, RatioEntry, Reference, ReferenceSample
from gap_runtime.errors import BundleError, GapError
from gap_runtime.records.files import open_file

_DAMAGE: Final = (
    *(ValueError, TypeError, EOFError, LookupError, ArithmeticError, RuntimeError),
    *(SyntaxError, MemoryError, zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What the libraries raise over a broken file."""
_ADVICE: Final = "copy the bundle again or export again"
_HEADER_BYTES: Final = 10_000
"""Bytes of an array's header at most."""
_OPTIONAL: Final = frozenset({"scores", "probabilities"})
"""Arrays that not every reference has."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What an array has to be. `most` bounds integers, from 0 on; None where it holds floats."""

    dtype: str
    shape: tuple[int, ...]
    most: int | None = None
    takes_infinity: bool = False


class ReferenceArrays:
    """The arrays of a bundle's reference. Names, dtypes and shapes are checked when it is made."""

    def __init__(self, bundle: Bundle, reference: Reference) -> None:
        """Look at the header of every array.

        Raises:
            BundleError: One is missing or not what the manifest says.
        """
        self._path = bundle.folder / reference.arrays
        try:
            self._wanted = {
                sample.key: _list_wanted(bundle, sample) for sample in reference.samples
            }
        except (LookupError, ValueError) as error:
            raise self._refuse(f"the decoder's inputs and outputs lack {error}") from error
        self._held: set[str] = set()
        with open_file(self._path, BundleError, advice=_ADVICE) as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    self._require_headers(archive)
            except _DAMAGE as error:
                raise self._refuse(f"a damaged file ({error})") from error

    def read(self, sample: ReferenceSample) -> dict[str, np.ndarray]:
        """The arrays of a sample by what they are; optional ones only where they are there.

        Raises:
            BundleError: One holds values that none can have.
        """
        found: dict[str, np.ndarray] = {}
        with open_file(self._path, BundleError, advice=_ADVICE) as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    for name, wanted in self._wanted[sample.key].items():
                        if name in self._held:
                            kind = name.rpartition("/")[2]
                            found[kind] = self._read_one(archive, name, wanted)
            except _DAMAGE as error:
                raise self._refuse(f"a damaged file ({error})") from error
        return found

    def _require_headers(self, archive: zipfile.ZipFile) -> None:
        held = {info.filename: info for info in archive.infolist()}
        for wanted in self._wanted.values():
            for name, each in wanted.items():
                info = held.get(f"{name}.npy")
                if info is None and name.rpartition("/")[2] in _OPTIONAL:
                    continue
                if info is None:
                    raise self._refuse(f"no array '{name}'")
                size = math.prod(each.shape) * np.dtype(each.dtype).itemsize
                if info.file_size > size + _HEADER_BYTES:
                    raise self._refuse(
                        f"'{name}' has {info.file_size:,} bytes, expected about {size:,}"
                    )
                with archive.open(info) as file:
                    shape, dtype = _read_header(io.BytesIO(file.read(_HEADER_BYTES)))
                if (shape, dtype) != (each.shape, np.dtype(each.dtype)):
                    raise self._refuse(
                        f"'{name}' is {dtype} {list(shape)}, expected {each.dtype} "
                        f"{list(each.shape)}"
                    )
                self._held.add(name)

    def _read_one(self, archive: zipfile.ZipFile, name: str, wanted: _Wanted) -> np.ndarray:
        with archive.open(f"{name}.npy") as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        if wanted.most is not None:
            usable = array.min(initial=0) >= 0 and array.max(initial=0) <= wanted.most
        elif wanted.takes_infinity:
            usable = not np.isnan(array).any()
        else:
            usable = bool(np.isfinite(array).all())
        if not usable:
            raise self._refuse(f"'{name}' holds values that it cannot have")
        return array

    def _refuse(self, what: str) -> GapError:
        return BundleError(f"{self._path}: {what}; {_ADVICE}")


def _list_wanted(bundle: Bundle, sample: ReferenceSample) -> dict[str, _Wanted]:
    """What the manifest says of the arrays of a sample, by name."""
    manifest = bundle.manifest
    bucket = manifest.bucket(sample.bucket)
    if sample.ratio is None:
        entry = RatioEntry(
            ratio=0.0, bucket=bucket.name, patches=bucket.patches, kept=sample.kept, extra=0
        )
    else:
        entry = bundle.choose_ratio(sample.ratio, sample.bucket)
    shapes = {spec.name: spec.shape for spec in manifest.stage(DECODER).inputs}
    shapes |= {spec.name: spec.shape for spec in manifest.stage(DECODER).outputs}
    visual, width = manifest.layout.at(entry).visual, int(shapes["embeddings"][-1])
    prompt = len(sample.prompt_ids) + visual
    return {
        f"{sample.sample}/pixels": _Wanted("float32", manifest.preprocess.pixel_shape(bucket)),
        f"{sample.key}/visual_tokens": _Wanted("float32", (1, visual, width)),
        f"{sample.key}/kept_index": _Wanted("int64", (1, entry.kept), most=bucket.patches - 1),
        f"{sample.key}/position_ids": _Wanted(
            "int64", (int(shapes["position_ids"][0]), prompt), most=_MOST_POSITION
        ),
        f"{sample.key}/logits": _Wanted("float32", (int(shapes["logits"][-1]),)),
        f"{sample.key}/scores": _Wanted("float32", (bucket.patches,), takes_infinity=True),
        f"{sample.key}/probabilities": _Wanted("float32", (len(sample.token_ids),)),
    }


_MOST_POSITION: Final = 2**31 - 1


def _read_header(file: io.BytesIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"an array of version {version}")
    shape, _, dtype = read(file)
    return shape, dtype
