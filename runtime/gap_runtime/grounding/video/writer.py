"""Frames with what was found in them, as a video and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from PIL import Image, ImageOps

from gap_runtime.bundle.files import write_whole
from gap_runtime.errors import ConfigError, InputError
from gap_runtime.grounding.video.source import import_av
from gap_runtime.records.files import exists

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

FORMATS: Final = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
ENCODERS: Final[tuple[tuple[str, dict[str, str]], ...]] = (
    ("libx264", {"preset": "veryfast", "crf": "20"}),
    ("libopenh264", {}),
    ("mpeg4", {}),
)
"""The first that PyAV was built with is taken."""
_TICK: Final = Fraction(1, 1000)
_USUAL_RATE: Final = 25


def require_new(path: Path) -> None:
    """Refuse to write over something.

    Raises:
        ConfigError: It is there, or its folder is not.
    """
    if exists(path):
        raise ConfigError(f"{path}: is there already and not written over; give another name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: no such folder; make it first")


def require_format(path: Path) -> None:
    """Refuse a name that says no kind of video that is written.

    Raises:
        ConfigError: It ends in something else.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: videos are written as {', '.join(FORMATS)}")


class LineWriter(Protocol):
    """Takes plain data, and makes a line of each."""

    def __call__(self, data: dict[str, Any]) -> None:
        """Write it."""


@contextmanager
def open_lines(path: Path) -> Iterator[LineWriter]:
    """A file of JSON lines that is there as a whole when the block ends.

    Raises:
        OSError: It cannot be written.
    """
    with write_whole(path) as aside, aside.open("x", encoding="utf-8") as file:

        def write(data: dict[str, Any]) -> None:
            file.write(json.dumps(data, sort_keys=True) + "\n")

        yield write
        file.flush()


@contextmanager
def open_video(path: Path) -> Iterator[VideoWriter]:
    """A video that is there as a whole when the block ends.

    Raises:
        ConfigError: It cannot be written.
    """
    av = import_av()
    with write_whole(path) as aside:
        try:
            container = av.open(str(aside), "w", format=FORMATS[path.suffix.lower()])
            writer = VideoWriter(path, container)
            try:
                yield writer
                writer.finish()
            finally:
                container.close()
        except av.FFmpegError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


class VideoWriter:
    """Encodes pictures, each shown from its own moment on."""

    def __init__(self, path: Path, container: OutputContainer) -> None:
        """Nothing is written before the first picture, which says the size."""
        self._path, self._container = path, container
        self._stream: VideoStream | None = None
        self._last = -1

    def add(self, picture: Image.Image, seconds: float) -> None:
        """Write an RGB picture; one of another size than the first is fitted into that.

        Raises:
            ConfigError: Nothing here encodes videos.
        """
        av = import_av()
        # Colours are stored for squares of four pixels.
        width, height = (value + value % 2 for value in picture.size)
        if self._stream is None:
            self._stream = self._begin(width, height)
        size = (self._stream.width, self._stream.height)
        if picture.size != size:
            is_odd = (width, height) == size
            picture = picture.crop((0, 0, *size)) if is_odd else ImageOps.pad(picture, size)
        frame = av.VideoFrame.from_image(picture)
        # Moments of a camera may go back; a file has none of that.
        self._last = max(self._last + 1, round(seconds / _TICK))
        frame.pts, frame.time_base = self._last, _TICK
        self._container.mux(self._stream.encode(frame))

    def _begin(self, width: int, height: int) -> VideoStream:
        name, options = self._find_encoder()
        added: Any = self._container.add_stream(name, rate=_USUAL_RATE, options=options)
        stream: VideoStream = added
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = _TICK
        return stream

    def _find_encoder(self) -> tuple[str, dict[str, str]]:
        av = import_av()
        for name, options in ENCODERS:
            try:
                av.Codec(name, "w")
            except ValueError:
                continue
            return name, dict(options)
        names = ", ".join(name for name, _ in ENCODERS)
        raise ConfigError(f"{self._path}: this PyAV has none of the encoders {names}")

    def finish(self) -> None:
        """Write what the encoder still holds.

        Raises:
            InputError: Not one picture was written.
        """
        if self._stream is None:
            raise InputError(f"{self._path}: no frame to write")
        self._container.mux(self._stream.encode(None))
