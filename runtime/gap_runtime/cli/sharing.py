"""What `gap-runtime push` and `gap-export --push` share: their options and what they say."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.bundle.hub import HubName
    from gap_runtime.bundle.license import License
    from gap_runtime.display import Display
    from gap_runtime.grounding.check import CheckReport


class Pushed(TypedDict):
    """Where a bundle is on the hub: the commit that was made, its page, and its licence there."""

    repository: str
    commit: str
    url: str
    license: str


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a push."""
    parser.add_argument(
        "--private", action="store_true", help="make the repository private where it is new"
    )
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="licence of the source model, as the hub writes it (default: what its card says)",
    )
    parser.add_argument(
        "--accept-license",
        action="store_true",
        help="you have read the source model's licence, and may share the bundle by it",
    )


def push_bundle(
    options: argparse.Namespace,
    display: Display,
    bundle: Bundle,
    name: HubName,
    license: License,  # noqa: A002 - the field's word
    *,
    report: CheckReport | None,
    accuracy: dict[str, Any] | None = None,
) -> Pushed:
    """Push and say what was pushed; the result for `--json`."""
    from gap_runtime.bundle.push import list_links, push  # noqa: PLC0415
    from gap_runtime.errors import CheckError  # noqa: PLC0415
    from gap_runtime.report.card import make_card  # noqa: PLC0415

    if report is not None and not report.passed:
        raise CheckError(f"{bundle.folder}: differs from PyTorch, so it is not pushed")

    display.say(license.describe())
    if linked := list_links(bundle):
        display.say(
            f"note: {', '.join(linked)}: hard links; their content is pushed, as the hub has no "
            "links, and whoever pulls gets files of their own"
        )
    # The library shows how far it is.
    with display.step(f"pushing to {name}", live=False):
        pushed = push(
            bundle,
            name,
            license,
            make_card(bundle, name, license, report, accuracy),
            accept_license=options.accept_license,
            private=options.private,
            begin=partial(display.count, "hashing", "bytes"),
        )
    display.say(f"gap-runtime ground hub:{name} PICTURE PHRASE")
    return {
        "repository": name.repository,
        "commit": pushed.commit,
        "url": pushed.url,
        "license": license.name,
    }
