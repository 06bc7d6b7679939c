"""What a service allows and where it listens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from gap_runtime.errors import ConfigError, InputError
from gap_runtime.records.files import read_text

LOCALHOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8765
_LEAST_TOKEN: Final = 16
_MOST: Final = 1_000_000
"""Of requests, seconds, megabytes and megapixels; infinity is no number of any."""
_MOST_TOKEN_BYTES: Final = 10_000
_HOST_NAME: Final = re.compile(r"[\w.:%*-]+|\[[\w.:%]+\]", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """Limits of a service.

    `queue` requests may wait or run at once, `seconds` is the time that one may take in all.
    `body_mb` (10^6 bytes), `megapixels`, `phrases` and `phrase_length` limit what is read. `token`
    has to be sent with every request where it is set. Pictures are fetched from addresses that
    begin with one of `allowed_urls`, and from no other. `host_names` are what a request may call
    this host; empty allows any. `grace` is how long requests may run after a polite stop.
    """

    host: str = LOCALHOST
    port: int = DEFAULT_PORT
    queue: int = 16
    seconds: float = 60.0
    body_mb: float = 10.0
    megapixels: float = 32.0
    phrases: int = 32
    phrase_length: int = 1000
    token: str | None = None
    allowed_urls: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    grace: float = 30.0

    def __post_init__(self) -> None:
        """Refuse limits that would let nothing through."""
        for name in ("queue", "seconds", "body_mb", "megapixels", "grace"):
            if not 0 < getattr(self, name) <= _MOST:
                raise ConfigError(
                    f"{name.replace('_', '-')} {getattr(self, name):g}: has to be more than 0, "
                    f"at most {_MOST:,}"
                )
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port {self.port}: ports lie in 0 to 65535")
        for name in (self.host, *self.host_names):
            if not _HOST_NAME.fullmatch(name):
                raise ConfigError(
                    f"{name!r:.60}: no name of a host; expected one as camera.local or 127.0.0.1"
                )
        for url in self.allowed_urls:
            if not url.startswith(("http://", "https://")) or len(url.split("/")) < 4:
                raise ConfigError(
                    f"{url}: expected the beginning of an address, as https://camera.local/"
                )

    @property
    def body_bytes(self) -> int:
        """The largest body."""
        return int(self.body_mb * 1e6)

    @property
    def pixels(self) -> int:
        """Pixels of the largest picture."""
        return int(self.megapixels * 1e6)

    @property
    def known_names(self) -> tuple[str, ...]:
        """What a request may call this host; a page elsewhere cannot pretend to be one of ours."""
        if self.host_names:
            return (*self.host_names, "localhost", LOCALHOST)
        return ("localhost", LOCALHOST, "[::1]") if is_loopback(self.host) else ("*",)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: Path) -> str:
    """The token that a file holds.

    Raises:
        InputError: The file cannot be read, or what it holds is too short to be a secret.
    """
    token = read_text(path, InputError, limit=_MOST_TOKEN_BYTES).strip()
    if len(token) < _LEAST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise InputError(
            f"{path}: expected one word of at least {_LEAST_TOKEN} ASCII characters; make one "
            "with: openssl rand -hex 32"
        )
    return token
