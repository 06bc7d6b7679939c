"""Pictures as clients send them: bytes, base64, data URLs, and addresses that are allowed."""

from __future__ import annotations

import binascii
import http.client
import io
import re
import threading
import urllib.request
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.pictures.load import read_picture
from gap_runtime.service.settings import ServiceSettings

_DATA: Final = re.compile(r"data:[\w.+/-]*(?:;[\w.+-]+=[\w.+-]*)*(;base64)?,", re.ASCII)
_REMOTE: Final = ("http://", "https://")
_PATIENCE: Final = 10.0
_PIECE: Final = 2**16


def is_remote(text: str) -> bool:
    """Whether a picture is given by its address."""
    return text[:8].lower().startswith(_REMOTE)


def decode_picture(text: str) -> bytes:
    """The bytes of a picture in base64, or in a data URL.

    Raises:
        InputError: It is neither.
    """
    # Of the extra `serve`; the rest of this file needs none of it.
    import pybase64  # noqa: PLC0415

    head = _DATA.match(text[:200])
    if head is not None:
        if not head[1]:
            raise InputError("the image's data URL is not in base64")
        text = text[head.end() :]
    try:
        data = pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the image is no base64 ({error})") from error
    if not data:
        raise InputError("the image is empty")
    return data


def open_sent_picture(data: bytes, settings: ServiceSettings) -> Image.Image:
    """A picture that a client sent, upright RGB.

    Raises:
        InputError: It is none, broken or too large.
    """
    return read_picture(io.BytesIO(data), "the image", most_pixels=settings.pixels)


def require_allowed(url: str, allowed: Sequence[str]) -> None:
    """Refuse an address that the service may not fetch.

    Raises:
        InputError: It begins with none of those that are allowed.
    """
    wanted = _split(url)
    if not any(_is_within(wanted, _split(beginning)) for beginning in allowed):
        raise InputError(
            "addresses of pictures are not fetched here; send the picture itself as a data URL"
            if not allowed
            else f"the address is none of those allowed here: {', '.join(allowed)}"
        )


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InputError(f"the image's address cannot be read ({error})") from error
    return parts


def _is_within(wanted: SplitResult, allowed: SplitResult) -> bool:
    """Whether an address has the same host, and a path that begins as the allowed one."""
    same_host = (wanted.scheme, wanted.hostname, wanted.port) == (
        allowed.scheme,
        allowed.hostname,
        allowed.port,
    )
    is_plain = "@" not in wanted.netloc and not re.search(
        r"\\|%2e|%2f|%5c|(^|/)\.\.?(/|$)", wanted.path, re.IGNORECASE
    )
    return same_host and is_plain and wanted.path.startswith(allowed.path)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An allowed address must not lead to one that is not."""

    def redirect_request(self, *_: Any) -> None:
        """Do not follow."""
        return


def fetch_picture(url: str, settings: ServiceSettings, given_up: threading.Event) -> bytes:
    """The bytes behind an allowed address.

    Args:
        url: Where it lies.
        settings: What is allowed, and how much.
        given_up: Is set when nobody waits for it any more.

    Raises:
        InputError: It is not allowed, cannot be had, or is too large.
    """
    require_allowed(url, settings.allowed_urls)
    opener = urllib.request.build_opener(_NoRedirect)
    data = bytearray()
    try:
        with opener.open(url, timeout=min(_PATIENCE, settings.seconds)) as answer:
            # Piece by piece: a server that sends a byte now and then never runs out of time.
            while not given_up.is_set() and (piece := answer.read1(_PIECE)):
                data += piece
                if len(data) > settings.body_bytes:
                    raise InputError(f"the image is larger than {settings.body_mb:g} MB")
            if answer.length:
                raise InputError("the image cannot be fetched (it broke off)")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"the image cannot be fetched ({error})") from error
    return bytes(data)
