"""The `gap-export` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

import signal
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Final

from gap_export.cli.options import configure_logging
from gap_runtime.cli.options import run_command
from gap_runtime.cli.program import Program, UsualCommand


def _takes(word: str) -> bool:
    from gap_export.config.files import is_model  # noqa: PLC0415 - not for a command that is named

    return is_model(word)


def _list_models() -> Iterable[str]:
    from gap_export.config.shipped import list_configs  # noqa: PLC0415

    return list_configs()


def _prepare(options: Namespace) -> None:
    configure_logging(verbose=getattr(options, "verbose", False))


PROGRAM: Final = Program(
    name="gap-export",
    package="gap_export.cli.commands",
    description="export a grounding vision-language model to ONNX, its visual tokens pruned and "
    "their positions kept; `gap-export MODEL` is short for `gap-export export MODEL`",
    epilog="example: gap-export refshapes --ratio 0.25,0.5. Exit codes: 0 done, 2 wrong setting "
    "or input, 3 export failed, 4 bad bundle, 5 backend failed, 6 differs from PyTorch",
    usual=UsualCommand(name="export", metavar="MODEL", takes=_takes, list_words=_list_models),
    renamed={"calibrate": "count"},
    prepare=_prepare,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `gap-export`."""
    # A polite kill tidies up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_command(PROGRAM.run, arguments)
