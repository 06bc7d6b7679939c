"""The `gap-export` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

import signal
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
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


def _list_words() -> Mapping[str, Iterable[str]]:
    from typing import get_args  # noqa: PLC0415 - all of it for completion alone

    from gap_export.cli.commands.list import KINDS  # noqa: PLC0415
    from gap_export.config.pruners import PRUNERS  # noqa: PLC0415
    from gap_export.config.records import DTYPES, EXTRA_RULES, POSITION_MODES  # noqa: PLC0415
    from gap_export.config.shipped import list_configs  # noqa: PLC0415
    from gap_export.pipeline.request import BRINGS  # noqa: PLC0415
    from gap_runtime.bundle.manifest import WeightDtype  # noqa: PLC0415
    from gap_runtime.cli.main import PROGRAM as RUNTIME  # noqa: PLC0415
    from gap_runtime.registry import list_plugins  # noqa: PLC0415

    pruners = list_plugins(PRUNERS)
    return {
        **RUNTIME.list_words(),
        "bring": BRINGS,
        "dtype": DTYPES,
        "extra_token": EXTRA_RULES,
        "kinds": KINDS,
        "model": list_configs(),
        "modes": POSITION_MODES,
        "positions": POSITION_MODES,
        "pruner": pruners,
        "pruners": ["all", *pruners],
        "quantize": get_args(WeightDtype),
    }


def _prepare(options: Namespace) -> None:
    from gap_runtime.bundle.hub_library import load_constants  # noqa: PLC0415

    configure_logging(verbose=getattr(options, "verbose", False))
    # Before other libraries load it: what it cannot read of the environment is a line here.
    load_constants()


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
    list_words=_list_words,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `gap-export`."""
    # A polite kill tidies up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_command(PROGRAM.run, arguments)
