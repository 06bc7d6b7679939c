"""Ground phrases in pictures with an exported bundle, without torch.

from gap_runtime import Bundle, Grounder

with Grounder(Bundle.open("refshapes-32of64")) as grounder:
    found = grounder.ground("photo.png", "the red circle")
print(found.boxes, found.score)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.errors import GapError
    from gap_runtime.evaluation.api import Evaluation, evaluate
    from gap_runtime.grounding.api import check, draw
    from gap_runtime.grounding.check import CheckReport
    from gap_runtime.grounding.grounder import Grounder
    from gap_runtime.grounding.video.watch import WatchedFrame, WatchReport, watch
    from gap_runtime.grounding.view import Grounding, View
    from gap_runtime.pictures.boxes import Box

__version__ = "0.1.0"
__all__ = [
    "Box",
    "Bundle",
    "CheckReport",
    "Evaluation",
    "GapError",
    "Grounder",
    "Grounding",
    "View",
    "WatchReport",
    "WatchedFrame",
    "__version__",
    "check",
    "draw",
    "evaluate",
    "watch",
]

_HOMES: Final = {
    "Box": "gap_runtime.pictures.boxes",
    "Bundle": "gap_runtime.bundle.bundle",
    "CheckReport": "gap_runtime.grounding.check",
    "Evaluation": "gap_runtime.evaluation.api",
    "GapError": "gap_runtime.errors",
    "Grounder": "gap_runtime.grounding.grounder",
    "Grounding": "gap_runtime.grounding.view",
    "View": "gap_runtime.grounding.view",
    "WatchReport": "gap_runtime.grounding.video.watch",
    "WatchedFrame": "gap_runtime.grounding.video.watch",
    "check": "gap_runtime.grounding.api",
    "draw": "gap_runtime.grounding.api",
    "evaluate": "gap_runtime.evaluation.api",
    "watch": "gap_runtime.grounding.video.watch",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `--help` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gap_runtime' has no attribute '{name}'")
    from importlib import import_module  # noqa: PLC0415 - keeps `import gap_runtime` free

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted({*globals(), *__all__})
