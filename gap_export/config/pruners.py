"""Which pruner a name stands for."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Final

from gap_runtime.errors import ConfigError, UnknownNameError, describe_unknown
from gap_runtime.records.files import expand, is_file, resolve
from gap_runtime.registry import list_plugins, read_constant

PRUNERS: Final = "gap_export.pruners"
USUAL: Final = "cls_attention"
"""The pruner of a family that names none of its own."""
OPEN: Final = ""
"""In place of a pruner: the family's own, as long as the family is not known."""
IVC: Final = "+ivc"
"""Behind a pruner's name: tokens at extreme rotary positions stay whatever it chooses."""


def resolve_pruner(name: str) -> str:
    """The strategy that a name stands for: its own, a published one, or a file's whole path.

    `+ivc` may stand behind it. A name that is not known comes back as it is.
    """
    if name.endswith(IVC):
        return resolve_pruner(name.removesuffix(IVC)) + IVC
    if is_pruner_file(name):
        return str(resolve(expand(name)))
    names = list_plugins(PRUNERS)
    if name in names:
        return name
    for each in names:
        if _plain(name) in {_plain(known) for known in (each, *_published_as(each))}:
            return each
    return name


def is_pruner_file(strategy: str) -> bool:
    """Whether a pruner is a file of the user's, not one of those that are shipped."""
    return strategy.removesuffix(IVC).endswith(".py")


def _plain(name: str) -> str:
    """A name without what people write in different ways."""
    return re.sub(r"[-_ ]", "", name).casefold()


def require_strategy(strategy: str) -> None:
    """Reject a pruner that is neither shipped nor a file."""
    names = list_plugins(PRUNERS)
    strategy = strategy.removesuffix(IVC)
    if is_pruner_file(strategy):
        if not is_file(strategy):
            raise ConfigError(f"{strategy}: no such pruner file")
    elif strategy not in names:
        published = {_plain(each): each for name in names for each in _published_as(name)}
        near = get_close_matches(_plain(strategy), published, n=1, cutoff=0.75)
        hint = describe_unknown("pruner", strategy, names)
        if near and "did you mean" not in hint:
            have = ", ".join(names)
            hint = f"unknown pruner '{strategy}'; did you mean {published[near[0]]}? have {have}"
        raise UnknownNameError(f"{hint}; or give a file of your own: --pruner ./mine.py")


def _published_as(name: str) -> list[str]:
    """The name that a shipped pruner was published under, where it is another."""
    found = read_constant(PRUNERS, name, "PUBLISHED_AS")
    return [] if found is None else [str(found)]
