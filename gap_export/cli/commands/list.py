"""`gap-export list`: what there is to choose from, a line each from its own file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypedDict

from gap_runtime.cli.options import print_json
from gap_runtime.errors import UnknownNameError, describe_unknown
from gap_runtime.evaluation import describe_formats, describe_protocols
from gap_runtime.registry import list_plugins, read_constant, read_summary


class Line(TypedDict):
    """A name and what it is."""

    name: str
    description: str


class ModelLine(Line):
    """A model that is shipped: its family, and where its checkpoint is (a hub id or a folder)."""

    family: str
    checkpoint: str


class PrunerLine(Line):
    """A pruner, and the names of the published methods that it is (null where there is none)."""

    published_as: str | None


class TargetLine(Line):
    """A kind of machine, what runs its graphs, and the operators that they are written in."""

    backend: str
    dialect: str
    opset: int


class Listing(TypedDict, total=False):
    """Lines by kind."""

    models: list[ModelLine]
    pruners: list[PrunerLine]
    targets: list[TargetLine]
    positions: list[Line]
    formats: list[Line]
    protocols: list[Line]


SUMMARY: Final = "list models, pruners, targets, position modes, formats of data and protocols"
KINDS: Final = ("models", "pruners", "targets", "positions", "formats", "protocols")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "kinds",
        nargs="*",
        metavar="KIND",
        help=f"one or more of {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    return {"--json, the kinds that are named": Listing}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    readers: dict[str, Callable[[], Sequence[Any]]] = {
        "models": _list_models,
        "pruners": _list_pruners,
        "targets": _list_targets,
        "positions": _list_positions,
        "formats": lambda: _list_lines(describe_formats()),
        "protocols": lambda: _list_lines(describe_protocols()),
    }
    for kind in options.kinds:
        if kind not in readers:
            raise UnknownNameError(describe_unknown("kind", kind, readers))
    found = {kind: readers[kind]() for kind in options.kinds or readers}
    if options.json:
        print_json(found)
        return 0
    width = max(len(entry["name"]) for entries in found.values() for entry in entries)
    for kind, entries in found.items():
        print(f"{kind}:")
        for entry in entries:
            published = entry.get("published_as")
            note = f" ({published})" if published else ""
            print(f"  {entry['name']:<{width}}  {entry['description']}{note}")
    return 0


def _list_models() -> list[ModelLine]:
    """The model files that come along."""
    from gap_export.config.files import read_config_file  # noqa: PLC0415 - not for --help
    from gap_export.config.shipped import list_configs  # noqa: PLC0415 - not for --help

    configs = {name: read_config_file(name) for name in list_configs()}
    return [
        {
            "name": name,
            "description": config.description or config.checkpoint,
            "family": config.family,
            "checkpoint": config.checkpoint,
        }
        for name, config in configs.items()
    ]


def _list_pruners() -> list[PrunerLine]:
    """The pruners, with the names of the methods that they are."""
    from gap_export.config.pruners import PRUNERS  # noqa: PLC0415

    return [
        {
            "name": name,
            "description": read_summary(PRUNERS, name),
            "published_as": read_constant(PRUNERS, name, "PUBLISHED_AS"),
        }
        for name in list_plugins(PRUNERS)
    ]


def _list_targets() -> list[TargetLine]:
    """The kinds of machine, and what runs and writes their graphs."""
    from gap_runtime.machines.target import list_targets, load_target  # noqa: PLC0415

    return [
        {
            "name": target.name,
            "description": target.description,
            "backend": target.backend,
            "dialect": target.dialect,
            "opset": target.opset,
        }
        for target in map(load_target, list_targets())
    ]


def _list_positions() -> list[Line]:
    """The position modes."""
    from gap_export.config.records import POSITION_LINES  # noqa: PLC0415

    return _list_lines(POSITION_LINES)


def _list_lines(lines: Mapping[Any, str]) -> list[Line]:
    return [{"name": name, "description": line} for name, line in lines.items()]
