"""Scripts by which a shell completes a command line; made from its parsers by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Final

from gap_runtime.cli.options import ArgumentParser, Command
from gap_runtime.cli.program import Program
from gap_runtime.errors import ConfigError
from gap_runtime.registry import list_plugins, load_plugin

SHELLS: Final = ("bash", "zsh", "fish")
_FOLDERS: Final = {"BUNDLE", "DIR"}
_FILES: Final = {"FILE", "FILE.jsonl", "INPUT", "OTHER.jsonl", "OUT.png", "SPEC"}
"""What an argument's value is called in help where it is a folder or a file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `completion`."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def make_script(program: Program, shell: str) -> str:
    """The script that makes a shell complete a program's command lines.

    Args:
        program: Its parsers say which commands and options there are, `Program.words` which words.
        shell: One of `SHELLS`.

    Raises:
        ConfigError: shtab is not installed.
    """
    if find_spec("shtab") is None:
        raise ConfigError(
            "shtab is not installed, which writes completions; pip install "
            f"'{program.name}[completion]'"
        )
    import shtab  # noqa: PLC0415 - for this command alone

    script: str = shtab.complete(_make_tree(program), shell=shell)
    return script.rstrip("\n")


def _make_tree(program: Program) -> ArgumentParser:
    """One parser with all commands and their options under it, which is never asked to parse.

    Words that the usual command takes stand beside the commands and are followed by its options.
    """
    root = program.make_parser()
    (commands,) = (
        action
        for action in root._actions  # noqa: SLF001 - there is no other way to it
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001
    )
    words = program.list_words()
    for name, parser in commands.choices.items():
        command: Command = load_plugin(program.package, name, "command")
        command.add_arguments(parser)
        _give_words(parser, words)
    if program.usual is not None:
        for word in program.usual.list_words():
            if word in commands.choices:
                continue
            parser = commands.add_parser(word, help=f"{program.usual.metavar.lower()} {word}")
            command = load_plugin(program.package, program.usual.name, "command")
            command.add_arguments(parser)
            # It stands there already.
            parser._actions[:] = [  # noqa: SLF001
                action
                for action in parser._actions  # noqa: SLF001
                if action.option_strings or action.metavar != program.usual.metavar
            ]
            _give_words(parser, words)
    assert set(list_plugins(program.package)) <= set(commands.choices)
    return root


def _give_words(parser: argparse.ArgumentParser, words: Mapping[str, Iterable[str]]) -> None:
    """Tell shtab what the values of each argument are."""
    import shtab  # noqa: PLC0415

    for action in parser._actions:  # noqa: SLF001
        given: Any = action
        if action.metavar in _FOLDERS:
            given.complete = shtab.DIRECTORY
        elif action.metavar in _FILES:
            given.complete = shtab.FILE
        elif action.dest in words:
            given.choices = list(words[action.dest])
