"""What the commands of both distributions share: parsing, results, errors, exit codes."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypedDict

from gap_runtime.backends import DEFAULT_BACKEND, describe_backends, resolve_backend
from gap_runtime.cli.interrupts import STOPPED, is_interrupted
from gap_runtime.cli.streams import give_up_stdout, prepare_streams
from gap_runtime.errors import ConfigError, GapError, show_line

if TYPE_CHECKING:
    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.bundle.hashes import Begin


_NUMBER: Final = re.compile(r"[\d.]+%?")
_STDOUT: Final = "-"
_WRITTEN: Final = ("draw", "html", "jsonl", "out", "timing_cache")
"""Options that name what a command writes."""


class Command(Protocol):
    """A module in gap_runtime.cli.commands; it imports libraries inside functions only."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; the exit code."""


class JsonCommand(Command, Protocol):
    """A command with `--json`, or `--jsonl`."""

    def json_types(self) -> dict[str, Any]:
        """What is printed, as types: dataclasses, typed dictionaries, lists and unions of them.

        By what decides it: `--json` alone, or with what is named behind it. docs/ and the tests
        make JSON Schemas of them.
        """


class ErrorReport(TypedDict):
    """What is wrong: `kind` is the branch of the error, `message` the line for people."""

    kind: str
    message: str


class ErrorResult(TypedDict):
    """What `--json` prints where a command fails; the exit code is that of the kind."""

    error: ErrorReport


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors that `--json` can carry."""

    def error(self, message: str) -> NoReturn:
        """Turn a usage error into a ConfigError; `run_command` prints it."""
        left = message.partition("unrecognized arguments: ")[2].split()
        if left and all(_NUMBER.fullmatch(each) for each in left):
            message += "; several values of an option are joined by commas, as --ratio 0.25,0.5"
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
    prepare_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            code = _run(main, arguments)
        except GapError as error:
            code = _report(error, arguments)
        # Here, not at exit, where a reader that has gone could not be dealt with.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        # The reader of the output has gone; nothing more can be said to it.
        give_up_stdout()
        return 141
    except OSError as error:
        # What the system refuses where no border had a word for it, a full disk for example.
        where = "" if error.filename is None else f"{error.filename}: "
        try:
            sys.stdout.flush()
        except OSError:
            give_up_stdout()
        return _report(ConfigError(f"{where}{error.strerror or error}"), arguments)


def _run(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    try:
        return main(arguments)
    except Exception as error:  # a library may take Ctrl-C for a failure of its own
        if is_interrupted():
            raise KeyboardInterrupt from error
        raise


def _report(error: GapError, arguments: Sequence[str]) -> int:
    """Say an error; its exit code."""
    if "--json" in arguments:
        result: ErrorResult = {"error": describe_error(error)}
        try:
            print(json.dumps(result))
            sys.stdout.flush()
        except OSError:
            # The line on stderr is what is left.
            give_up_stdout()
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def describe_error(error: GapError) -> ErrorReport:
    """What is wrong, as plain data."""
    return {"kind": error.kind, "message": str(error)}


def print_line(text: str) -> None:
    """A line of a result, on stdout, whatever a file has put into it."""
    print(show_line(text))


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
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle folder, or hub:org/name@revision")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_counts(
    parser: argparse.ArgumentParser, *, ratio: str, keep: str, nargs: str | None = None
) -> None:
    """`--ratio` and `--keep`, as lists with commas and given again; never both.

    They become `ratios` and `keep` in the options, None where they are not given.

    Args:
        parser: Of a command.
        ratio: What `--ratio` is for.
        keep: What `--keep` is for.
        nargs: `+` where several may follow one flag without a comma, too.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        *("--ratio", "--ratios"),
        type=_read_ratios,
        action=_ExtendFlat,
        nargs=nargs,
        dest="ratios",
        metavar="R",
        help=ratio,
    )
    group.add_argument(
        *("--keep", "--keeps"),
        type=_read_counts,
        action=_ExtendFlat,
        nargs=nargs,
        dest="keep",
        metavar="N",
        help=keep,
    )


def add_chosen_counts(parser: argparse.ArgumentParser) -> None:
    """`--ratio` and `--keep` where several of the bundle's may be wanted."""
    add_counts(
        parser,
        ratio="the bundle's ratios, shares of visual tokens removed; several with commas or given "
        "again (default: all)",
        keep="the same by counts of visual tokens that stay",
    )


def add_count(parser: argparse.ArgumentParser) -> None:
    """`--ratio` and `--keep` where one of the bundle's is wanted."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--ratio",
        type=_read_ratio,
        metavar="R",
        help="one of the bundle's ratios, shares of visual tokens removed (default: first)",
    )
    group.add_argument(
        "--keep",
        type=_read_count,
        metavar="N",
        help="the same by the count of visual tokens that stay",
    )


class _ExtendFlat(argparse.Action):
    """Puts what a flag reads, a list, or several, behind what was read before."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Extend the list."""
        del parser, option_string
        read = [values] if self.nargs is None else values
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*before, *(each for part in read for each in part)])


def _read_ratios(text: str) -> list[float]:
    """`0.5`, or several with commas: `0.25,0.5`."""
    if re.fullmatch(r"0,\d+", text) and int(text[2:]):
        raise argparse.ArgumentTypeError(
            f"'{text}': a comma stands between two ratios; did you mean {text.replace(',', '.')}?"
        )
    return [_read_ratio(part) for part in text.split(",")]


def _read_ratio(text: str) -> float:
    share = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip())
    if share:
        raise argparse.ArgumentTypeError(f"'{text}': did you mean {float(share[1]) / 100:g}?")
    try:
        ratio = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no share of visual tokens to remove, as 0.5"
        ) from error
    if not math.isfinite(ratio):
        raise argparse.ArgumentTypeError(f"'{text}' is outside [0, 1)")
    return ratio


def _read_counts(text: str) -> list[int]:
    """`64`, or several with commas: `64,128`."""
    return [_read_count(part) for part in text.split(",")]


def _read_count(text: str) -> int:
    if re.fullmatch(r"\d+", text.strip()):
        return int(text)
    share = re.fullmatch(r"(\d+(?:\.\d+)?) ?(%?)", text.strip())
    kept = float(share[1]) / (100 if share[2] else 1) if share else 1.0
    hint = (
        f"; did you mean --ratio {round(1 - kept, 9):g}, the share to remove?" if kept < 1 else ""
    )
    raise argparse.ArgumentTypeError(f"'{text}' is no count of visual tokens to keep, as 64{hint}")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """The choice of what runs the graphs."""
    parser.add_argument(
        "--backend",
        type=resolve_backend,
        default=DEFAULT_BACKEND,
        metavar="NAME",
        help=f"what runs the graphs (default: {DEFAULT_BACKEND}), with a device after a colon, or "
        f"a short name in brackets. {describe_backends()}",
    )


def add_draft(parser: argparse.ArgumentParser) -> None:
    """Whether drafts are sent along."""
    parser.add_argument(
        "--no-draft",
        action="store_false",
        dest="draft",
        help="decode token by token, without drafts of what comes next",
    )


def add_kept_pictures(parser: argparse.ArgumentParser, default: int = 256) -> None:
    """How much memory pictures may have that are asked about again."""
    parser.add_argument(
        "--keep-pictures",
        type=_read_mebibytes,
        metavar="MIB",
        default=default,
        help="memory for what was computed of pictures that come again, in MiB; 0 keeps none "
        f"(default {default})",
    )


def _read_mebibytes(text: str) -> int:
    """A number of MiB, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}': expected MiB, a whole number of 0 or more")
    return int(text)


def add_least_score(parser: argparse.ArgumentParser) -> None:
    """How sure the model has to be of a box."""
    parser.add_argument(
        "--least-score",
        type=read_share,
        default=0.0,
        metavar="S",
        help="leave out boxes that the model is less sure of than S, in [0, 1] (default 0)",
    )


def read_share(text: str) -> float:
    """A number in [0, 1]."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number in [0, 1]")
    return share


def open_bundle(
    options: argparse.Namespace, *, verify_all: bool = False, begin: Begin | None = None
) -> Bundle:
    """The bundle that is named on the command line; the rest as for `Bundle.open`.

    Raises:
        InputError: Some option would have the command write into the bundle.
    """
    from gap_runtime.bundle.bundle import Bundle  # noqa: PLC0415 - numpy only when a command runs

    require_outputs_apart(options, [options.bundle])
    if begin is None:
        bundle = Bundle.open(options.bundle, verify_all=verify_all)
    else:
        bundle = Bundle.open(options.bundle, verify_all=verify_all, begin=begin)
    # Again: one of the hub is known by its name before, and by its folder now.
    require_outputs_apart(options, [bundle.folder])
    return bundle


def require_outputs_apart(options: argparse.Namespace, inputs: Iterable[str | Path]) -> None:
    """Refuse every option that names what is written where that is, or lies in, what is read.

    Args:
        options: Of any command.
        inputs: As for `require_apart`.

    Raises:
        InputError: One does.
    """
    from gap_runtime.bundle.files import require_apart  # noqa: PLC0415

    for name in _WRITTEN:
        path = vars(options).get(name)
        # In some commands an option of that name is a flag.
        if isinstance(path, (str, Path)) and path != _STDOUT:
            require_apart(path, inputs, f"--{name.replace('_', '-')}")
