"""Where Optimum looks for commands: a namespace folder without `__init__.py`, by its rules."""

from gap_export.cli.optimum import REGISTER_COMMANDS

__all__ = ["REGISTER_COMMANDS"]
