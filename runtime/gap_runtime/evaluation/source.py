"""What a reader of data is given, and what it must give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression, FilePicture
from gap_runtime.records.files import is_file, is_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data to read.

    `name` and `split` are empty where the user named none. `by` is who split it (unc, umd,
    google), empty for the usual one. `images` is the folder of the pictures. A reader adds to
    `notes` what the user should know.
    """

    paths: tuple[Path, ...]
    name: str
    split: str
    by: str
    images: Path | None
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The one file.

        Raises:
            InputError: There are several.
        """
        if len(self.paths) != 1:
            raise InputError(f"{self.paths[0]}: one of {len(self.paths)} files; name one")
        return self.paths[0]

    @property
    def image_folder(self) -> Path:
        """Where the pictures are: as the user says, or beside the data."""
        return self.path.parent if self.images is None else self.images

    def find_images(self, *places: str) -> Path:
        """Where the pictures are: as the user says, or where the set has them.

        Args:
            places: Folders as they are published, seen from that of the data; the first that is
                there is taken, and that of the data where none is.
        """
        home = self.paths[0].parent
        if self.images is not None:
            return self.images
        return next((home / place for place in places if is_folder(home / place)), home)

    def require_unpacked(self, picture: FilePicture, archive: str) -> None:
        """Refuse data whose pictures nobody has unpacked, before all of them are missed.

        Args:
            picture: The first one.
            archive: The file that they are published in, beside the data or a folder above.

        Raises:
            InputError: The picture is not there and the archive is.
        """
        home = self.paths[0].parent
        packed = existing(home / archive, home.parent / archive)
        if packed and not is_file(picture.path):
            raise InputError(
                f"{packed[0]}: the pictures are still packed ({picture.path.name} is not in "
                f"{picture.path.parent}); unpack it and give their folder with --images"
            )


class Reader(Protocol):
    """A module in gap_runtime.evaluation.readers."""

    SUFFIXES: tuple[str, ...]
    """Endings of the files that it may read; none where the data are generated."""

    USUAL: int | None
    """How many phrases are meant where the user does not say; None for all."""

    def recognise(self, head: Any) -> bool:
        """Whether a file of such an ending is of this format.

        `head` is the first record of a file of lines, the whole value of a .json file that is
        not larger than FILE_BYTES, the columns of a table, or None of other files.
        """

    def locate(self, folder: Path, source: Source) -> tuple[Path, ...]:
        """The files of a named set in a folder, as they are published; empty without them."""

    def read(self, source: Source) -> Iterator[Expression]:
        """All phrases, in the order of the data.

        Raises:
            InputError: A record is not of the format; the message names the line.
        """


def existing(*paths: Path) -> tuple[Path, ...]:
    """The first of these files that is there."""
    return next(((path,) for path in paths if is_file(path)), ())
