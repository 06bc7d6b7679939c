"""Which published figures a row may be put beside, and why it may not be put beside others.

A figure is of a set and split, of a protocol with its frame, and of a set of labels. Where one of
them differs, figures differ for other reasons than the model. What is compared here is how answers
are scored; prompts are always the model's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from gap_runtime.evaluation.data import Data
from gap_runtime.evaluation.protocol import load_protocol
from gap_runtime.evaluation.score import PUBLISHED, Score
from gap_runtime.evaluation.splits import USUAL_BY
from gap_runtime.records import load_record

_FILE: Final = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """How somebody's published figures were made.

    `split` is the only one that they are of, empty for every published one. `format` is the only
    one whose phrases they count, which then are other phrases than those of the published split.
    """

    who: str
    sets: tuple[str, ...]
    protocol: str
    labels: str = PUBLISHED
    split: str = ""
    format: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Somebody's published figures on a row's set.

    `reasons` is what theirs are of and the row is not, empty where the two compare.
    """

    who: str
    reasons: tuple[str, ...]


@lru_cache(maxsize=1)
def read_conventions() -> tuple[Convention, ...]:
    """All that are known."""
    data = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(load_record(Convention, each, _FILE.name) for each in data["conventions"])


def list_standings(score: Score, data: Data) -> tuple[Standing, ...]:
    """Every published convention on the set, with why the row does not compare with it.

    Empty where nobody is known to publish figures on the data.
    """
    return tuple(
        Standing(who=each.who, reasons=tuple(_find_reasons(each, score, data)))
        for each in read_conventions()
        if data.set in each.sets
    )


def describe_standings(standings: Iterable[Standing]) -> tuple[str, str]:
    """The published figures that a row compares with, and those that it does not, as text."""
    found = list(standings)
    fitting = "; ".join(each.who for each in found if not each.reasons)
    others = "; ".join(f"{each.who} ({', '.join(each.reasons)})" for each in found if each.reasons)
    return fitting, others


def _find_reasons(convention: Convention, score: Score, data: Data) -> Iterable[str]:
    if convention.protocol != score.protocol:
        frame = load_protocol(convention.protocol).FRAME
        where = "" if frame in {None, score.frame} else f", frame {frame}"
        yield f"protocol {convention.protocol}{where}"
    if convention.labels != score.labels:
        yield f"{convention.labels} labels"
    if convention.split and convention.split != data.split:
        yield f"split {convention.split}"
    usual = USUAL_BY.get(data.set, "")
    if data.by not in {"", usual}:
        yield f"split by {usual}"
    if convention.format and convention.format != data.format:
        yield f"phrases of format {convention.format}"
    elif data.limited:
        yield "all phrases"
    elif not convention.format and not data.whole:
        yield "the published count of phrases"
    if score.unasked:
        yield "every phrase asked"
