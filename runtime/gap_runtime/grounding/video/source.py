"""Where frames come from: a video, a folder of pictures, a camera, an address."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Protocol

from PIL import Image

from gap_runtime.errors import ConfigError, InputError
from gap_runtime.pictures import limits
from gap_runtime.pictures.load import list_pictures, load_picture, open_picture
from gap_runtime.records.files import is_folder, open_file

if TYPE_CHECKING:
    from av.container import InputContainer

_ADDRESS: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_CAMERA: Final = re.compile(r"camera:(.+)")
_DEVICE: Final = re.compile(r"/dev/video\d+")
_SECONDS: Final = 10.0
"""How long an address may take to answer, and to send the next piece."""
_PATIENCE: Final = 16
"""Errors in a row that a source is read on after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame before it is looked at.

    `index` counts all frames of the source from 0, the broken ones too. `seconds` is since the
    first one. `at` is when it came, of live sources alone. `load` gives it as upright RGB, and
    raises an InputError where it cannot.
    """

    index: int
    seconds: float
    at: datetime | None
    load: Callable[[], Image.Image]


class Source(Protocol):
    """Frames in their order.

    `duration` is in seconds, None where nobody knows it. A live source does not wait.
    """

    name: str
    is_live: bool
    duration: float | None

    def read(self) -> Iterator[Frame | InputError]:
        """Every frame, or what is wrong with it.

        Raises:
            InputError: The source broke off.
        """

    def close(self) -> None:
        """Give it up."""


def open_source(name: str | Path) -> Source:
    """The source of that name.

    Args:
        name: A video file; a folder of pictures, which follow each other by their names, a second
            apart; `camera:0` or `/dev/video0`; an address as `rtsp://camera.local/stream`.

    Raises:
        InputError: It cannot be opened, or holds no video.
        ConfigError: PyAV is not installed.
    """
    name = str(name)
    address, camera = _ADDRESS.match(name), _CAMERA.fullmatch(name)
    if address is not None:
        return _open_address(name, address[1].lower())
    if camera is not None:
        return _open_camera(name, *_find_camera(camera[1]))
    if _DEVICE.fullmatch(name):
        return _open_camera(name, name, "v4l2")
    if is_folder(name):
        return PictureFolder(Path(name))
    with open_file(name, InputError):
        """Said in the usual words where it is no file that can be read."""
    # A playlist must not lead anywhere else.
    container = _open(name, name, options={"protocol_whitelist": "file"})
    return Video(name, container, is_live=False)


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import av  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            "av is not installed, which videos need; pip install 'gap-runtime[video]'"
        ) from error
    return av


def _find_camera(which: str) -> tuple[str, str]:
    """What FFmpeg calls a camera on this system, and the format of such devices."""
    if sys.platform == "darwin":
        return which, "avfoundation"
    if sys.platform == "win32":
        return f"video={which}", "dshow"
    return (f"/dev/video{which}" if which.isdecimal() else which), "v4l2"


def _open_camera(name: str, device: str, kind: str) -> Source:
    return Video(name, _open(name, device, kind=kind), is_live=True)


def _open_address(name: str, scheme: str) -> Source:
    options = {"rtsp_transport": "tcp"} if scheme in {"rtsp", "rtsps"} else {}
    container = _open(name, name, options=options, timeout=_SECONDS)
    # What a web server has as a whole can wait; cameras send as time goes by.
    is_live = scheme not in {"http", "https"} or container.duration is None
    return Video(name, container, is_live=is_live)


def _open(
    name: str,
    file: str,
    *,
    kind: str | None = None,
    options: dict[str, str] | None = None,
    timeout: float | None = None,
) -> InputContainer:
    av = import_av()
    try:
        container: InputContainer = av.open(file, format=kind, options=options, timeout=timeout)
    except ValueError as error:
        if "no container format" not in str(error):
            raise _refuse(name, error) from error
        raise InputError(f"{name}: this build of PyAV knows no cameras") from error
    except (av.FFmpegError, OSError) as error:
        raise _refuse(name, error) from error
    return container


def _refuse(name: str, error: Exception) -> InputError:
    said = getattr(error, "strerror", None) or str(error)
    return InputError(f"{name}: cannot be opened as a video ({said})")


class PictureFolder:
    """The pictures of a folder in the order of their names, a second apart."""

    def __init__(self, folder: Path) -> None:
        """List them.

        Raises:
            InputError: There is none.
        """
        self.name, self.is_live = str(folder), False
        self._files = list_pictures(folder)
        self.duration: float | None = float(len(self._files))

    def read(self) -> Iterator[Frame | InputError]:
        """Every picture; which are broken is found when they are loaded."""
        for index, path in enumerate(self._files):
            load = partial(load_picture, path)
            yield Frame(index=index, seconds=float(index), at=None, load=load)

    def close(self) -> None:
        """Nothing is open."""


class Video:
    """What FFmpeg reads."""

    def __init__(self, name: str, container: InputContainer, *, is_live: bool) -> None:
        """Take its first video.

        Raises:
            InputError: There is none, or none that can be decoded.
        """
        self.name, self.is_live = name, is_live
        self._container = container
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            container.close()
            raise InputError(f"{name}: no video in it, but {kinds}")
        self._stream = container.streams.video[0]
        # A stream that nothing here decodes has no context, whatever its type says.
        context: Any = self._stream.codec_context
        if context is None:
            container.close()
            raise InputError(f"{name}: its video is in a codec that this PyAV cannot decode")
        if context.width * context.height > limits.MAX_PIXELS:
            container.close()
            raise InputError(
                f"{name}: frames of {context.width}x{context.height} pixels, at most "
                f"{limits.MAX_PIXELS:,} in all are read; scale it down"
            )
        # Later frames may be larger than the first; the decoder refuses them before it has room.
        context.options = {"max_pixels": str(limits.MAX_PIXELS)}
        # Threads by frame hold frames back, and take others along when one is broken.
        self._stream.thread_type = "SLICE"
        microseconds = None if is_live else container.duration
        self.duration = None if microseconds is None else microseconds / 1e6

    def read(self) -> Iterator[Frame | InputError]:
        """Every frame, or what is wrong with it; decoded, not yet in RGB.

        Raises:
            InputError: The source broke off.
        """
        first: float | None = None
        for index, each in enumerate(self._decode()):
            if isinstance(each, InputError):
                yield each
            else:
                moment: float | None = each.time
                rate = float(self._stream.average_rate or 1)
                seconds = index / rate if moment is None else moment
                first = seconds if first is None else first
                yield Frame(
                    index=index,
                    seconds=seconds - first,
                    at=datetime.now(timezone.utc) if self.is_live else None,
                    load=partial(_load, each),
                )

    def _decode(self) -> Iterator[Any]:
        """PyAV's frames, and errors for those that could not be decoded."""
        av = import_av()
        packets, failures = self._container.demux(self._stream), 0
        while True:
            try:
                packet = next(packets, None)
            except av.error.InvalidDataError as error:
                failures += 1
                if failures > _PATIENCE:
                    raise InputError(f"{self.name}: broke off ({error.strerror})") from error
                # An error ends the generator, not the source.
                packets = self._container.demux(self._stream)
                continue
            except (av.FFmpegError, OSError) as error:
                raise InputError(f"{self.name}: broke off ({error.strerror})") from error
            if packet is None:
                return
            failures = 0
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                yield InputError(f"{self.name}: a broken frame ({error.strerror})")
                continue
            for frame in frames:
                if frame.is_corrupt:
                    yield InputError(f"{self.name}: a broken frame")
                else:
                    yield frame

    def close(self) -> None:
        """Let the device or the connection go."""
        self._container.close()


def _load(frame: Any) -> Image.Image:
    """A frame of PyAV as upright RGB."""
    picture = open_picture(frame.to_ndarray(format="rgb24"))
    return turn(picture, frame.rotation)


def turn(picture: Image.Image, degrees: int) -> Image.Image:
    """A picture turned to the left by so many degrees, as phones ask for in their videos."""
    return picture.rotate(degrees, expand=True) if degrees % 360 else picture
