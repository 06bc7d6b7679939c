"""What is asked: a picture, a phrase and the box that it refers to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.pictures.boxes import Box
from gap_runtime.pictures.load import load_picture
from gap_runtime.records.files import is_file


class Picture(Protocol):
    """Where a picture is; light, and loaded when it is asked about."""

    @property
    def key(self) -> str:
        """Its name within the data, the same on every machine."""

    def load(self) -> Image.Image:
        """The picture as 8-bit RGB.

        Raises:
            InputError: It cannot be used.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """One phrase to ground.

    `key` names it within its data. `size` is (width, height) of the picture as the data claim,
    None where they do not. `target` names the object that is referred to, empty where the data
    do not tell. `part` is the part of the data that papers quote by itself (`desktop icon`), empty
    without one. `wrong` is whether a review found the phrase or the box wrong, None where nobody
    looked.
    """

    key: str
    picture: Picture
    phrase: str
    box: Box
    size: tuple[int, int] | None
    target: str
    part: str = ""
    wrong: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePicture:
    """A picture file. Published boxes count its pixels as they are stored, not turned by EXIF."""

    key: str
    path: Path
    turned: bool

    def load(self) -> Image.Image:
        """The picture as 8-bit RGB."""
        return load_picture(self.path, turned=self.turned)


def find_picture(name: str, folder: Path, where: str, *, turned: bool, flat: bool) -> FilePicture:
    """The picture file that a record names.

    Args:
        name: As the record has it.
        folder: Folder that all pictures lie in.
        where: File and line of the record, for errors.
        turned: Whether EXIF rotation is to be applied.
        flat: Look for the file's name alone where the whole path is not there.

    Raises:
        InputError: The name leads out of the folder.
    """
    home = os.path.abspath(folder)  # noqa: PTH100 - lexical: links in the folder are the user's
    path = os.path.normpath(os.path.join(home, name))  # noqa: PTH118
    if os.path.commonpath([home, path]) != home or path == home:
        raise InputError(
            f"{where}: picture {name!r:.80} lies outside the folder of the pictures; "
            "give the folder that holds it with --images"
        )
    found, key = Path(path), os.path.relpath(path, home)
    if flat and not is_file(found):
        beside = Path(home) / found.name
        found = beside if is_file(beside) else found
    return FilePicture(key=key, path=found, turned=turned)
