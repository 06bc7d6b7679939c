"""Where a decoder's weights lie in a machine's memory.

The underscore keeps this file from being taken for a backend.
"""

from __future__ import annotations

from typing import Final

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.machines.environment import wants_huge_pages
from gap_runtime.machines.huge_pages import start_moving

_LARGE: Final = 64 * 2**20
"""Bytes of a bundle's files; a smaller model's weights stay in a processor's caches."""


def move_weights(bundle: Bundle) -> None:
    """Let the weights of a session on the CPU, which is open, lie in huge pages.

    Raises:
        ConfigError: The environment says neither yes nor no to it.
    """
    size = sum(entry.size for entry in bundle.manifest.files.values())
    if wants_huge_pages() and size >= _LARGE:
        start_moving()
