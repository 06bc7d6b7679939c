"""`gap-runtime serve`: bundles behind HTTP, with a page to try them."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from gap_runtime.cli.options import add_backend, add_count, add_draft, add_kept_pictures
from gap_runtime.errors import ConfigError

SUMMARY: Final = "answer over HTTP, in OpenAI's form too, with a page to try it"
_LIBRARIES: Final = ("starlette", "uvicorn", "prometheus_client", "python_multipart")


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
        "--host", default="127.0.0.1", metavar="NAME", help="where to listen (default 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=int, default=8765, metavar="N", help="default 8765; 0 takes a free one"
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
        ("--queue", int, 16, "requests that may wait or run; more are told to come back"),
        ("--seconds", float, 60.0, "time that a request may take"),
        ("--body-mb", float, 10.0, "largest body, in MB"),
        ("--megapixels", float, 32.0, "largest picture, in millions of pixels"),
        ("--grace", float, 30.0, "seconds that requests may still take after SIGTERM"),
    )
    for flag, kind, default, what in limits:
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
    from gap_runtime.service.settings import (  # noqa: PLC0415
        ServiceSettings,
        is_loopback,
        read_token,
    )

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
