"""The `gap-runtime` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import metadata

from gap_runtime.cli.options import ArgumentParser, Command, run_command
from gap_runtime.registry import list_plugins, load_plugin

_COMMANDS = "gap_runtime.cli.commands"
_EPILOG = (
    "exit codes: 0 done, 2 wrong setting or input, 4 bad bundle, 5 backend failed, 6 check failed"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `gap-runtime`."""
    return run_command(_main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gap-runtime",
        allow_abbrev=False,
        description="run and check bundles that gap-export made; needs no torch",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=metadata.version("gap-runtime"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=ArgumentParser)
    for name in list_plugins(_COMMANDS):
        command: Command = load_plugin(_COMMANDS, name, "command")
        one = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=_EPILOG,
            allow_abbrev=False,
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run)
    return parser
