"""Libraries that would report their use to somebody are told not to, before they are imported."""

from __future__ import annotations

import os
from typing import Final

ONNXRUNTIME: Final = "ORT_DISABLE_TELEMETRY"
"""Environment variable that onnxruntime reads when it is loaded; later it is too late."""


def silence_telemetry() -> None:
    """Switch onnxruntime's telemetry off, unless the user has said what it is to do."""
    os.environ.setdefault(ONNXRUNTIME, "1")
