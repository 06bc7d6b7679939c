"""Libraries that would report their use to somebody are told not to, before they are imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

ONNXRUNTIME: Final = "ORT_DISABLE_TELEMETRY"
"""Environment variable that onnxruntime reads when it is loaded; later it is too late."""
_OPENVINO: Final = "openvino_telemetry"
"""The package through which OpenVINO reports; where it is missing, a stub takes its place."""


def silence_telemetry() -> None:
    """Switch onnxruntime's telemetry off, unless the user has said what it is to do."""
    os.environ.setdefault(ONNXRUNTIME, "1")


@contextmanager
def without_reports() -> Iterator[None]:
    """Let OpenVINO be imported without its telemetry, which has no setting of its own.

    It would report every import to Google, write an ID of this user into his home, and have the
    process wait at its end. Whoever has imported either package before is left alone.
    """
    # None in this place is Python's word for a module that cannot be imported.
    modules = cast("dict[str, Any]", sys.modules)
    if _OPENVINO in modules or "openvino" in modules:
        yield
        return
    modules[_OPENVINO] = None
    try:
        yield
    finally:
        modules.pop(_OPENVINO, None)
