"""What the commands of both distributions share: parsing, results, errors, exit codes."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from gap_runtime.errors import ConfigError, GapError

if TYPE_CHECKING:
    from gap_runtime.bundle.bundle import Bundle


class Command(Protocol):
    """A module in gap_runtime.cli.commands; it imports libraries inside functions only."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; the exit code."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors that `--json` can carry."""

    def error(self, message: str) -> NoReturn:
        """Turn a usage error into a ConfigError; `run_command` prints it."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def add_old_name(
    parser: argparse.ArgumentParser, old: str, new: str, values: Mapping[str, str] | None = None
) -> None:
    """Take an option under its old name, and say the new one.

    Args:
        parser: Has the new one already.
        old: With its dashes, as `new`.
        new: What it is called now.
        values: New values by the old ones, where they have other names too.
    """
    (action,) = (each for each in parser._actions if new in each.option_strings)  # noqa: SLF001

    class OldName(argparse.Action):
        """Says the new name, and does what it does."""

        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            given: Any,
            option_string: str | None = None,
        ) -> None:
            """As the option under its new name."""
            given = given if values is None else values[given]
            shown = new if values is None else f"{new} {given}"
            print(f"note: {option_string} is now {shown}", file=sys.stderr)
            action(parser, namespace, given, new)

    parser.add_argument(
        old,
        action=OldName,
        dest=action.dest,
        default=argparse.SUPPRESS,
        type=action.type or str,
        nargs=action.nargs,
        choices=None if values is None else list(values),
        metavar=action.metavar,
        help=argparse.SUPPRESS,
    )


def run_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    """Run a command line; turn a GapError into its line, its JSON and its exit code.

    The one place of both distributions where GapError is caught.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            code = main(arguments)
        except GapError as error:
            if "--json" in arguments:
                print(json.dumps({"error": {"kind": error.kind, "message": str(error)}}))
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        # Here, not at exit, where a reader that has gone could not be dealt with.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def print_json(data: Any) -> None:
    """A result for programs, on stdout; JSON has no infinity, so that becomes null."""
    print(json.dumps(_finite(data), indent=2, sort_keys=True, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command on one bundle."""
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """The choice of what runs the graphs."""
    parser.add_argument(
        "--backend",
        default="onnxruntime",
        metavar="NAME",
        help="onnxruntime: CUDA where it is there, else the CPU (default); onnxruntime:cpu, "
        "onnxruntime:cuda, onnxruntime:tensorrt, onnxruntime:nvtensorrtrtx: that or nothing; "
        "tensorrt: the engines of `gap-runtime build`",
    )


def add_draft(parser: argparse.ArgumentParser) -> None:
    """Whether what the form of an answer forces is drafted."""
    parser.add_argument(
        "--no-draft",
        action="store_false",
        dest="draft",
        help="decode token by token, without drafts of what the form of an answer forces",
    )


def open_bundle(options: argparse.Namespace, *, verify_all: bool = False) -> Bundle:
    """The bundle that is named on the command line."""
    from gap_runtime.bundle.bundle import Bundle  # noqa: PLC0415 - numpy only when a command runs

    return Bundle.open(options.bundle, verify_all=verify_all)
