"""Export grounding vision-language models with static token pruning and GAP position IDs.

import gap_export

result = gap_export.export("refshapes", ratios=[0.25, 0.5], out="bundle")
print(result.folder, result.report.passed)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gap_export.pipeline.api import export
    from gap_export.pipeline.result import ExportResult
    from gap_runtime.errors import GapError

__version__: Final = "0.1.0"
__all__ = ["ExportResult", "GapError", "__version__", "export"]

_HOMES: Final = {
    "ExportResult": "gap_export.pipeline.result",
    "GapError": "gap_runtime.errors",
    "export": "gap_export.pipeline.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `--help` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gap_export' has no attribute '{name}'")
    from importlib import import_module  # noqa: PLC0415 - keeps `import gap_export` free

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted({*globals(), *__all__})
