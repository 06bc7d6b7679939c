"""What the environment asks of sessions on a CPU: how many threads, how exact products."""

from __future__ import annotations

import os
from typing import Final

from gap_runtime.errors import ConfigError

THREADS: Final = "GAP_RUNTIME_THREADS"
"""Environment variable: threads of each session on the CPU; all cores where it is not set."""
_DIGITS: Final = 4
FASTMATH: Final = "GAP_RUNTIME_FASTMATH"
"""Environment variable: 1 lets a CPU that has bfloat16 multiply float32 in it."""


def read_threads() -> int | None:
    """The number of threads that is asked for, None where it is left to the backend.

    Raises:
        ConfigError: It is no number, or one that no machine has use for.
    """
    text = os.environ.get(THREADS, "")
    if not text:
        return None
    if not (text.isdecimal() and len(text) <= _DIGITS and int(text)):
        raise ConfigError(f"{THREADS}={text:.60}: expected a number of threads, 1 to 9999")
    return int(text)


def wants_fastmath() -> bool:
    """Whether products of float32 may be made in bfloat16, where the processor has it.

    Raises:
        ConfigError: It is neither 0 nor 1.
    """
    text = os.environ.get(FASTMATH, "0")
    if text not in {"", "0", "1"}:
        raise ConfigError(f"{FASTMATH}={text}: expected 1, or 0 for exact products")
    return text == "1"
