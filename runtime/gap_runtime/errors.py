"""The runtime's branch of the error tree; each class fixes the exit code of its branch.

A message is one line without a full stop: what, where, found, expected, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar, Final

LONGEST_LINE: Final = 2000
"""Characters of a line at most; what is cut is cut from its middle."""
_END: Final = 500
"""Of these at the end, where messages say what to do."""


def show_line(text: str) -> str:
    """A text as one line of printable characters, others written as in a Python string.

    A name in a file from a stranger may hold line breaks, colours of a terminal, or marks that
    turn the direction of writing. All that is printed for people passes through here.
    """
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE - _END - 5]} ... {text[-_END:]}"
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in text
    )


class GapError(Exception):
    """Root of all errors that a user can act on."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """The message as one line, whatever a file or an argument has put into it."""
        return show_line(super().__str__())

    @property
    def kind(self) -> str:
        """Name of the error for `--json`, for example `hash` for HashError."""
        name = type(self).__name__.removesuffix("Error")
        return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


class ConfigError(GapError):
    """A setting, flag or name that cannot be used."""

    exit_code = 2


class RecordError(ConfigError):
    """A key of a configuration or manifest that is unknown, missing or of the wrong type."""


class WordError(RecordError):
    """A value of a key that is none of the words that there are."""

    @property
    def kind(self) -> str:
        """As of any other value that cannot be used."""
        return "config"


class UnknownNameError(ConfigError):
    """A name that no file answers to."""


class InputError(ConfigError):
    """A picture or phrase that cannot be used."""


class BundleError(GapError):
    """A bundle that is missing something or is not what its manifest says."""

    exit_code = 4


class SchemaError(BundleError):
    """A bundle written in a format that this version does not read."""


class HashError(BundleError):
    """A file of a bundle that has changed since it was exported."""


class PatternError(BundleError):
    """A regular expression in a file that cannot be run, or not in the time that there is."""


class HubError(BundleError):
    """A bundle that cannot be brought from the hub, or to it."""


class EngineError(GapError):
    """A backend that cannot load or run a stage."""

    exit_code = 5


class BackendMissingError(EngineError):
    """A backend whose library is not installed."""


class CheckError(GapError):
    """A comparison with the reference that failed or could not be made."""

    exit_code = 6


class NoBoxError(GapError):
    """An answer without a usable box, where one is wanted."""

    exit_code = 7


def describe_unknown(noun: str, name: str, names: Iterable[str]) -> str:
    """One line that names what was asked for, the near matches and all there is."""
    return f"unknown {noun} '{name}'; {suggest(name, sorted(names))}"


def suggest(name: str, names: Iterable[str]) -> str:
    """The near matches of a name that there is not, and all that there are, in their order."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}have {', '.join(known) or 'none'}"
