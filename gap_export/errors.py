"""The exporter's branch of the error tree; the root lives in gap_runtime.errors."""

from __future__ import annotations

from gap_runtime.errors import GapError as GapError  # noqa: PLC0414 - public here too


class ExportError(GapError):
    """An export that cannot be made."""

    exit_code = 3


class CheckpointError(ExportError):
    """A checkpoint that is missing, incomplete or not of the expected shape."""


class StaticShapeError(ExportError):
    """A graph with a dimension that should have been a number."""


class UnsupportedOpError(ExportError):
    """A graph with an operator that the target does not take."""


class GraphError(ExportError):
    """A graph whose inputs, outputs or initializers are not what was promised."""
