"""The `gap-runtime` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gap_runtime.cli.options import run_command
from gap_runtime.cli.program import Program

PROGRAM: Final = Program(
    name="gap-runtime",
    package="gap_runtime.cli.commands",
    description="run and check bundles that gap-export made; needs no torch",
    epilog="exit codes: 0 done, 2 wrong setting or input, 4 bad bundle, 5 backend failed, 6 check "
    "failed, 7 no box",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `gap-runtime`."""
    return run_command(PROGRAM.run, arguments)
