"""What the environment asks of sessions on a CPU: threads, exactness of products, pages."""

from __future__ import annotations

import os
from typing import Final

from gap_runtime.errors import ConfigError

THREADS: Final = "GAP_RUNTIME_THREADS"
"""Environment variable: threads of each session on the CPU; all cores where it is not set."""
_DIGITS: Final = 4
_MOST_THREADS: Final = 1024
"""onnxruntime starts so many in a second, and 9,999 not within a minute."""
FASTMATH: Final = "GAP_RUNTIME_FASTMATH"
"""Environment variable: 1 lets a CPU that has bfloat16 multiply float32 in it."""
HUGE_PAGES: Final = "GAP_RUNTIME_HUGE_PAGES"
"""Environment variable: 0 leaves weights in the pages that the system gave them."""


def read_threads() -> int | None:
    """The number of threads that is asked for, None where it is left to the backend.

    Raises:
        ConfigError: It is no number, or one that no machine has use for.
    """
    text = os.environ.get(THREADS, "")
    if not text:
        return None
    if not (text.isdecimal() and len(text) <= _DIGITS and 0 < int(text) <= _MOST_THREADS):
        raise ConfigError(
            f"{THREADS}={text:.60}: expected a number of threads, 1 to {_MOST_THREADS}"
        )
    return int(text)


def wants_fastmath() -> bool:
    """Whether products of float32 may be made in bfloat16, where the processor has it.

    Raises:
        ConfigError: It is neither 0 nor 1.
    """
    return _read_switch(FASTMATH, "0", "expected 1, or 0 for exact products")


def wants_huge_pages() -> bool:
    """Whether weights may be moved into huge pages, where the system has them.

    Raises:
        ConfigError: It is neither 0 nor 1.
    """
    return _read_switch(HUGE_PAGES, "1", "expected 1, or 0 for pages as the system gives them")


def _read_switch(name: str, usual: str, expected: str) -> bool:
    text = os.environ.get(name, "") or usual
    if text not in {"0", "1"}:
        raise ConfigError(f"{name}={text:.60}: {expected}")
    return text == "1"
