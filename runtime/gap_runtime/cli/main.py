"""The `gap-runtime` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from gap_runtime.cli.options import run_command
from gap_runtime.cli.program import Program


def _list_words() -> Mapping[str, Sequence[str]]:
    from gap_runtime.backends import list_backends  # noqa: PLC0415 - for completion alone
    from gap_runtime.evaluation import describe_protocols  # noqa: PLC0415
    from gap_runtime.machines.target import list_targets  # noqa: PLC0415

    return {
        "backend": list_backends(),
        "protocol": list(describe_protocols()),
        "target": list_targets(),
    }


PROGRAM: Final = Program(
    name="gap-runtime",
    package="gap_runtime.cli.commands",
    description="run and check bundles that gap-export made; needs no torch",
    epilog="exit codes: 0 done, 2 wrong setting or input, 4 bad bundle, 5 backend failed, 6 check "
    "failed, 7 no box",
    list_words=_list_words,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `gap-runtime`."""
    return run_command(PROGRAM.run, arguments)
