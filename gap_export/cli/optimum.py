"""`optimum-cli export gap`: the same export, for people who live in that tool.

Registered by `optimum/commands/register/gap.py`.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Final

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from gap_export.cli.commands.export import make_bundle
from gap_export.cli.options import add_export_arguments, read_request


class GapExportCommand(BaseOptimumCLICommand):
    """Export with visual tokens pruned and their positions kept."""

    COMMAND = CommandInfo(
        name="gap",
        help="Export a grounding vision-language model with pruned visual tokens (gap-export).",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options: gap-export's, with MODEL as Optimum writes it."""
        parser.add_argument(
            "-m", "--model", required=True, help="name, .toml file, checkpoint folder or hub id"
        )
        parser.add_argument("out", metavar="output", type=Path, help="bundle folder")
        add_export_arguments(parser)

    def run(self) -> None:
        """Export, or end with gap-export's message and exit code."""
        from gap_runtime.cli.options import run_command  # noqa: PLC0415

        code = run_command(lambda _: self._export(), [])
        if code:
            raise SystemExit(code)

    def _export(self) -> int:
        from gap_runtime.display import Display  # noqa: PLC0415

        return make_bundle(read_request(self.args), Display())


REGISTER_COMMANDS: Final = [(GapExportCommand, ExportCommand)]
