"""Where PyTorch itself gives no usable box, which a check of parity does not say.

Read from the recorded answers; knows no backend and loads no numpy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gap_runtime.bundle.manifest import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxCount:
    """Of how many `samples` PyTorch's answer holds a usable box; `ratio` is null unpruned."""

    ratio: float | None
    samples: int
    boxed: int


def count_boxes(reference: Reference | None) -> tuple[BoxCount, ...]:
    """A count for each ratio, unpruned first; none without a reference."""
    found: dict[float | None, list[bool]] = {}
    for sample in reference.samples if reference else ():
        found.setdefault(sample.ratio, []).append(bool(sample.boxes))
    ratios = sorted(found, key=lambda ratio: -1.0 if ratio is None else ratio)
    return tuple(
        BoxCount(ratio=ratio, samples=len(found[ratio]), boxed=sum(found[ratio]))
        for ratio in ratios
    )


def describe_boxless(counts: Iterable[BoxCount]) -> str:
    """Where samples have no usable box, for people; empty where every answer has one."""
    lacking = [
        f"{each.samples - each.boxed} of {each.samples} "
        + ("unpruned" if each.ratio is None else f"at {each.ratio:g}")
        for each in counts
        if each.boxed < each.samples
    ]
    return f"PyTorch itself gives no box for {', '.join(lacking)}" if lacking else ""
