"""A command line of commands, a file each: which one is meant, its help, and misspelt names."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gap_runtime.cli.interrupts import stop_tidily
from gap_runtime.cli.options import ArgumentParser, Command
from gap_runtime.errors import ConfigError, UnknownNameError, describe_unknown
from gap_runtime.registry import list_plugins, load_plugin


@dataclass(frozen=True, slots=True, kw_only=True)
class UsualCommand:
    """The command that is meant where the first word is no command.

    `takes` says whether a word can be its first argument; `list_words` gives such words, to tell
    whether one is a misspelt command or a misspelt argument. `metavar` is what help calls it.
    """

    name: str
    metavar: str
    takes: Callable[[str], bool]
    list_words: Callable[[], Iterable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A command line.

    `package` holds its commands, modules that fit `Command`. `renamed` leads from old names to
    new ones. `prepare` is called with the options before a command runs. `list_words` gives the
    words that arguments take, by their names in the options, for completion.
    """

    name: str
    package: str
    description: str
    epilog: str
    usual: UsualCommand | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[argparse.Namespace], None] | None = None
    list_words: Callable[[], Mapping[str, Iterable[str]]] = dict

    def run(self, arguments: Sequence[str]) -> int:
        """Run the command that is named; the exit code.

        Raises:
            GapError: There is no such command, or it failed.
        """
        name, rest = self._choose(arguments)
        if name is None:
            self.make_parser().parse_args(rest)
            raise AssertionError(rest)
        command: Command = load_plugin(self.package, name, "command")
        options = self.make_command_parser(name, command).parse_args(rest)
        if self.prepare is not None:
            self.prepare(options)
        stop_tidily()
        try:
            return command.run(options)
        except SystemExit as error:
            # No command leaves this way: it was code that a user or a library brought.
            code = error.code
            raise ConfigError(
                f"code that {self.name} ran wanted to end the program (SystemExit: {code}); "
                "where it is yours, let it raise another exception"
            ) from error

    def _choose(self, arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
        """The command that is meant and its arguments; no command for help on all of them."""
        first = arguments[0] if arguments else None
        if first in {"-h", "--help", "--version"}:
            return None, arguments[:1]
        commands = list_plugins(self.package)
        usual = self.usual
        if first is None or (usual is None and first.startswith("-")):
            what = f"{usual.metavar} or a COMMAND" if usual else "a COMMAND"
            raise ConfigError(
                f"give {what} ({', '.join(commands)}); see {self.name} --help for what they do"
            )
        if first in self.renamed:
            new = self.renamed[first]
            print(f"note: `{self.name} {first}` is now `{self.name} {new}`", file=sys.stderr)
            return new, arguments[1:]
        if first in commands:
            return first, arguments[1:]
        if usual is not None and (
            first.startswith("-")
            or usual.takes(first)
            or not self._is_misspelt_command(first, commands, usual)
        ):
            return usual.name, arguments
        raise UnknownNameError(
            f"{describe_unknown('command', first, commands)}; see {self.name} --help"
        )

    @staticmethod
    def _is_misspelt_command(word: str, commands: Sequence[str], usual: UsualCommand) -> bool:
        """Whether a word is nearer to a command than to what the usual command takes."""
        names = [*commands, *usual.list_words()]
        near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
        return bool(near) and near[0] in commands

    def make_parser(self) -> ArgumentParser:
        """The parser of `--help` and `--version`."""
        parser = ArgumentParser(
            prog=self.name, allow_abbrev=False, description=self.description, epilog=self.epilog
        )
        if self.usual is not None:
            parser.usage = (
                f"{self.name} {self.usual.metavar} [options]\n"
                f"       {self.name} COMMAND [arguments] [options]"
            )
        parser.add_argument("--version", action=_Version, distribution=self.name)
        commands = parser.add_subparsers(
            required=True, title="commands", metavar="COMMAND", parser_class=ArgumentParser
        )
        for name in list_plugins(self.package):
            command: Command = load_plugin(self.package, name, "command")
            commands.add_parser(name, help=command.SUMMARY)
        return parser

    def make_command_parser(self, name: str, command: Command) -> ArgumentParser:
        """The parser of one command."""
        parser = ArgumentParser(
            prog=f"{self.name} {name}",
            allow_abbrev=False,
            description=command.SUMMARY,
            epilog=self.epilog,
        )
        command.add_arguments(parser)
        return parser


class _Version(argparse.Action):
    """Print the version of a distribution, looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, distribution: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")
        self._distribution = distribution

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Print it and end."""
        del namespace, values, option_string
        from importlib import metadata  # noqa: PLC0415 - as slow as all the rest of help

        print(metadata.version(self._distribution))
        parser.exit()
