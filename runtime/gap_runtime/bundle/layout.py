"""Where the tokens of a prompt lie: integers only, the same on both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

from gap_runtime.errors import ConfigError

PositionMode = Literal["gap", "compact", "permuted", "permuted-compact", "compact-grid"]
"""In which order kept tokens lie, and which position IDs they have."""
ExtraRule = Literal["last-visual", "append", "centroid", "drop"]
"""Where the token goes that a pruner makes of removed ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """Token counts of a prompt and its answer.

    Slots, in order: prefix text, kept patches, extra tokens, suffix text, answer.
    """

    prefix: int
    patches: int
    kept: int
    extra: int
    suffix: int
    answer: int

    @property
    def visual(self) -> int:
        """Slots of the picture: kept patches and extra tokens."""
        return self.kept + self.extra

    @property
    def prompt(self) -> int:
        """Slots of the longest prompt, to which the prefill is padded."""
        return self.prefix + self.visual + self.suffix

    @property
    def capacity(self) -> int:
        """Slots of the KV cache: the longest prompt and the longest answer."""
        return self.prompt + self.answer

    @property
    def positions(self) -> int:
        """Position IDs in use, counted as if no patch had been removed."""
        return self.prefix + self.patches + self.extra + self.suffix + self.answer


def is_ratio(ratio: float) -> bool:
    """Whether a number is a share of tokens that can be removed: in [0, 1)."""
    return math.isfinite(ratio) and 0 <= ratio < 1


def require_ratio(ratio: float) -> None:
    """Refuse what is no share of tokens to remove.

    Raises:
        ConfigError: The ratio lies outside [0, 1).
    """
    if not is_ratio(ratio):
        raise ConfigError(
            f"ratio {ratio:g} is outside [0, 1); it is the share of visual tokens to remove"
            f"{suggest_ratio(ratio)}"
        )


def suggest_ratio(ratio: float) -> str:
    """The end of a message: what somebody may have meant who gave a percentage or a count."""
    if not math.isfinite(ratio) or ratio < 2:
        return ""
    share = f"{ratio / 100:g}" if ratio < 100 else ""
    keep = f"--keep {ratio:g}" if ratio == int(ratio) else ""
    return f"; did you mean {' or '.join(filter(None, (share, keep)))}?"


def count_kept(patches: int, ratio: float) -> int:
    """Patches that stay when a share of them is removed, rounded half up.

    The one place where a ratio becomes a count. Computed in decimal, so that 0.9 of 5 patches
    leaves 1 and not, by a binary hair, 0.

    Args:
        patches: Visual tokens before pruning.
        ratio: Share to remove, in [0, 1).

    Raises:
        ConfigError: The ratio lies outside [0, 1) or leaves no patch.
    """
    require_ratio(ratio)
    kept = _round(patches, ratio)
    if kept == 0:
        highest = (patches - 1) / patches
        raise ConfigError(
            f"ratio {ratio:g} leaves none of {patches} visual tokens; use at most {highest:.4g}"
        )
    return kept


def leaves_count(patches: int, ratio: float, kept: int) -> bool:
    """Whether a ratio, a share in [0, 1), leaves exactly so many of the patches."""
    return _round(patches, ratio) == kept


def find_ratio(patches: int, kept: int) -> float:
    """The shortest ratio that keeps exactly so many patches: what `count_kept` does, undone.

    Args:
        patches: Visual tokens before pruning.
        kept: Those that stay, 1 to `patches`.
    """
    exact = 1 - Decimal(kept) / Decimal(patches)
    for digits in range(1, 18):
        ratio = float(round(exact, digits))
        if ratio < 1 and leaves_count(patches, ratio, kept):
            return ratio
    raise AssertionError((patches, kept))


def _round(patches: int, ratio: float) -> int:
    exact = patches * (1 - Decimal(str(ratio)))
    return int(exact.to_integral_value(ROUND_HALF_UP))
