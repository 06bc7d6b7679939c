"""`gap-runtime serve`: bundles behind HTTP, with a page to try them."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from gap_runtime.cli.options import add_backend, add_count, add_draft, add_kept_pictures
from gap_runtime.errors import ConfigError
from gap_runtime.service.settings import (
    DEFAULT_PORT,
    LOCALHOST,
    ServiceSettings,
    is_loopback,
    read_token,
)

SUMMARY: Final = "answer over HTTP, in OpenAI's form too, with a page to try it"
_LIBRARIES: Final = ("starlette", "uvicorn", "prometheus_client", "python_multipart", "pybase64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "bundles",
        nargs="+",
        metavar="BUNDLE",
        help="bundle folders; the first answers requests that name no model, and the page shows "
        "two side by side",
    )
    parser.add_argument(
        "--host", default=LOCALHOST, metavar="NAME", help=f"where to listen (default {LOCALHOST})"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        metavar="N",
        help=f"default {DEFAULT_PORT}; 0 takes a free one",
    )
    parser.add_argument(
        "--host-name",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this host that requests may use; give it again for more",
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="a secret that clients have to send"
    )
    parser.add_argument(
        "--allow-url",
        action="append",
        default=[],
        metavar="BEGINNING",
        help="fetch pictures from addresses that begin so, as https://camera.local/; without, "
        "none are fetched",
    )
    limits = (
        ("--queue", int, "requests that may wait or run; more are told to come back"),
        ("--seconds", float, "time that a request may take"),
        ("--body-mb", float, "largest body, in MB"),
        ("--megapixels", float, "largest picture, in millions of pixels"),
        ("--grace", float, "seconds that requests may still take after SIGTERM or Ctrl-C"),
    )
    usual = ServiceSettings()
    for flag, kind, what in limits:
        default = getattr(usual, flag.removeprefix("--").replace("-", "_"))
        parser.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{what} (default {default:g})"
        )
    add_count(parser)
    add_backend(parser)
    add_draft(parser)
    add_kept_pictures(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not installed, which serve needs; pip install "
            "'gap-runtime[serve]'"
        )
    from gap_runtime.bundle.bundle import Bundle  # noqa: PLC0415 - libraries when a command runs
    from gap_runtime.display import Display  # noqa: PLC0415
    from gap_runtime.grounding.grounder import Grounder  # noqa: PLC0415
    from gap_runtime.service.models import Models  # noqa: PLC0415
    from gap_runtime.service.server import serve  # noqa: PLC0415

    display = Display()
    settings = ServiceSettings(
        host=options.host,
        port=options.port,
        queue=options.queue,
        seconds=options.seconds,
        body_mb=options.body_mb,
        megapixels=options.megapixels,
        token=None if options.token_file is None else read_token(options.token_file),
        allowed_urls=tuple(options.allow_url),
        host_names=tuple(options.host_name),
        grace=options.grace,
    )
    grounders = [
        Grounder(
            Bundle.open(folder),
            options.backend,
            ratio=options.ratio,
            keep=options.keep,
            draft=options.draft,
            keep_pictures=options.keep_pictures,
        )
        for folder in options.bundles
    ]
    models = Models(grounders, settings)
    if settings.token is None and not is_loopback(settings.host):
        display.say(
            f"note: anybody who reaches {settings.host} can ask; --token-file keeps others out"
        )

    def announce(address: str) -> None:
        display.say(f"serving {', '.join(models.names)} at {address} (Ctrl-C stops it)")

    serve(models, settings, announce)
    return 0
