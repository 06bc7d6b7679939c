"""How many threads a session may take."""

from __future__ import annotations

import os
from typing import Final

from gap_runtime.errors import ConfigError

THREADS: Final = "GAP_RUNTIME_THREADS"
"""Environment variable: threads of each session on the CPU; all cores where it is not set."""


def read_threads() -> int | None:
    """The number of threads that is asked for, None where it is left to the backend.

    Raises:
        ConfigError: It is no number, or none at all.
    """
    text = os.environ.get(THREADS, "")
    if not text:
        return None
    if not (text.isdecimal() and int(text)):
        raise ConfigError(f"{THREADS}={text}: expected a number of threads, 1 or more")
    return int(text)
