"""Ratios and counts: how many visual tokens stay."""

from __future__ import annotations

from gap_export.config.records import PruneConfig
from gap_runtime.bundle.layout import (
    count_kept,
    find_ratio,
)
from gap_runtime.errors import ConfigError


def count_ratios(
    config: PruneConfig, patches: int, fixed: int = 0, *, named_by: int | None = None
) -> list[tuple[float, int]]:
    """Each ratio with its kept count, in the order given.

    Args:
        config: Ratios or counts.
        patches: Visual tokens before pruning.
        fixed: How many of them cannot be removed.
        named_by: Visual tokens of the largest bucket, `patches` by default. A count is called by
            the share of them, so that it has one name in a bundle.

    Raises:
        ConfigError: A ratio or count cannot be used, or two come to the same count.
    """
    if config.keep:
        return [
            (find_ratio(named_by or patches, kept), kept)
            for kept in _require_counts(config.keep, patches, fixed)
        ]
    pairs: list[tuple[float, int]] = []
    for ratio in config.ratios:
        kept = count_kept(patches, ratio)
        if kept <= fixed:
            raise ConfigError(
                f"ratio {ratio:g} keeps {kept} of {patches} visual tokens, of which {fixed} mark "
                f"the ends of rows and stay; use at most {(patches - fixed - 1) / patches:.4g}"
            )
        for other, count in pairs:
            if count == kept:
                raise ConfigError(
                    f"ratios {other:g} and {ratio:g} both keep {kept} of {patches}; give one"
                )
        pairs.append((ratio, kept))
    return pairs


def _require_counts(keep: tuple[int, ...], patches: int, fixed: int) -> tuple[int, ...]:
    """Counts that can be kept, each once."""
    for kept in keep:
        if kept > patches:
            raise ConfigError(
                f"keep {kept}: there are {patches} visual tokens; keep at most so many"
            )
        if kept <= fixed:
            raise ConfigError(
                f"keep {kept}: {fixed} of {patches} visual tokens mark the ends of rows and stay; "
                f"keep at least {fixed + 1}"
            )
        if keep.count(kept) > 1:
            raise ConfigError(f"keep {kept} is given twice; give it once")
    return keep
