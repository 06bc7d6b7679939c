"""The published splits and how much they hold: phrases and the objects that they refer to.

Each row of the evaluation files is one phrase. A file of another count is another split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

COUNTS: Final[dict[tuple[str, str], tuple[int, int | None]]] = {
    ("refcoco", "val"): (10834, 3811),
    ("refcoco", "testA"): (5657, 1975),
    ("refcoco", "testB"): (5095, 1810),
    ("refcoco+", "val"): (10758, 3805),
    ("refcoco+", "testA"): (5726, 1975),
    ("refcoco+", "testB"): (4889, 1798),
    ("refcocog", "val"): (4896, 2573),
    ("refcocog", "test"): (9602, 5023),
    ("ref-l4", "val"): (13420, None),
    ("ref-l4", "test"): (31921, None),
    ("ref-l4", "all"): (45341, None),
    ("screenspot-v2", "all"): (1272, None),
    ("screenspot-pro", "all"): (1581, None),
}
"""Phrases and objects (None: nobody says) by set and split.

UNC's splits of RefCOCO and RefCOCO+, UMD's of RefCOCOg.
"""

USUAL_BY: Final = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
"""Who made the split that is meant where none is named."""


def compare_counts(name: str, split: str, by: str, targets: Sequence[str]) -> str | None:
    """A line about data that are not what was published, None where they are or nobody knows.

    Args:
        name: Of the set.
        split: Of the set.
        by: Who split it.
        targets: The object of every phrase, empty text where the data do not tell.
    """
    known = COUNTS.get((name, split))
    if known is None or by not in {"", USUAL_BY.get(name)}:
        return None
    phrases, about = known
    objects = len(set(targets)) if all(targets) and about is not None else None
    if len(targets) == phrases and objects in {None, about}:
        return None
    found = "" if objects is None else f" about {objects:,} objects"
    published = f"{phrases:,}" if about is None else f"{phrases:,} about {about:,}"
    return (
        f"{name}:{split} holds {len(targets):,} phrases{found}; the published split has "
        f"{published}, so figures do not compare with published ones"
    )
