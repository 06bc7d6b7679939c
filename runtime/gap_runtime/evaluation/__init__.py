"""Referring expression comprehension: data, protocols, scores and the long run over them."""

from __future__ import annotations

from typing import Final

from gap_runtime.registry import list_plugins, read_constant, read_summary

READERS: Final = "gap_runtime.evaluation.readers"
"""The package that holds the formats of data."""
PROTOCOLS: Final = "gap_runtime.evaluation.protocols"
"""The package that holds the protocols."""


def describe_formats() -> dict[str, str]:
    """A line for each format of data, from its own file, which is not imported."""
    return {name.replace("_", "-"): read_summary(READERS, name) for name in list_plugins(READERS)}


def describe_protocols() -> dict[str, str]:
    """A line for each protocol, from its own file, which is not imported."""
    return {
        name.replace("_", "-"): read_constant(PROTOCOLS, name, "SUMMARY")
        for name in list_plugins(PROTOCOLS)
    }
