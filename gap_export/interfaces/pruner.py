"""Pruners by name or by file: loaded, and held against what a pruner must be and give."""

from __future__ import annotations

import builtins
import functools
import inspect
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final, TypeVar, cast

import numpy as np
import torch

from gap_export.config.pruners import IVC, PRUNERS, is_pruner_file
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import (
    AdaptivePruner,
    EagerChoice,
    EagerVision,
    Feature,
    Kept,
    Pruner,
    VisionFeatures,
)
from gap_runtime.errors import ConfigError, GapError
from gap_runtime.records.files import is_file
from gap_runtime.registry import load_plugin

T = TypeVar("T")
_OURS: Final = ("gap_export.", "gap_runtime.")
_LONGEST_REASON: Final = 300
_HELP: Final = "see 'Add a pruner' in CONTRIBUTING.md"


def load_pruner(strategy: str) -> Pruner:
    """The pruner that a configuration names, shipped or in a file of the user's.

    What stays whatever it chooses is no matter here, see `PruneConfig.keeps_coordinates`.

    Raises:
        UnknownNameError: No pruner of that name is shipped.
        ConfigError: The file cannot be loaded, or is no pruner.
    """
    strategy = strategy.removesuffix(IVC)
    if not is_pruner_file(strategy):
        return cast("Pruner", load_plugin(PRUNERS, strategy, "pruner"))
    path = Path(strategy)
    module = _load_file(path)
    with _told(path):
        _require_pruner(module, strategy)
        extra = int(module.EXTRA)
        for name, check in _CHECKS.items():
            setattr(module, name, _watch(getattr(module, name), path, partial(check, extra)))
        if hasattr(module, _COUNT):
            setattr(module, _COUNT, _watch(getattr(module, _COUNT), path, _find_fault_of_count))
    return cast("Pruner", module)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever a user's file raises in the block is one line with its place.

    Raises:
        ConfigError: It did, or it changed what the whole process goes by.
    """
    folder, known, kind = _working_folder(), _list_values(), _usual_tensor()
    changed: list[str] = []
    try:
        try:
            yield
        finally:
            changed = _restore(folder, known, kind)
    except (KeyboardInterrupt, GapError):
        raise
    except BaseException as error:  # noqa: BLE001 - a user's own file can fail in every way
        # What cannot be shown is no cause: whoever shows causes would fail over it.
        cause = None if _say(error) is None else error
        raise ConfigError(f"{path}: {_locate(error, path)}; {_HELP}") from cause
    if changed:
        raise ConfigError(
            f"{path}: changed {', '.join(changed)[:200]}; leave that as it is; {_HELP}"
        )


def _working_folder() -> str | None:
    """Where relative paths begin; None where it has been removed."""
    try:
        return os.getcwd()  # noqa: PTH109 - only to go back there
    except OSError:
        return None


def _list_values() -> list[tuple[ModuleType, str, object]]:
    """What our modules, and those that all code goes by, call by which names."""
    ours = [each for name, each in sys.modules.items() if name.startswith(_OURS)]
    # What putting back needs comes first.
    return [
        (module, name, value)
        for module in (builtins, sys, os, time, json, np, torch, *ours)
        for name, value in list(module.__dict__.items())
        if not name.startswith("__")
    ]


def _restore(
    folder: str | None,
    known: list[tuple[ModuleType, str, object]],
    kind: tuple[torch.dtype, torch.device],
) -> list[str]:
    """Undo what a user's file did to the whole process; what that was, in words."""
    changed = []
    for module, name, value in known:
        if module.__dict__.get(name) is not value:
            module.__dict__[name] = value
            changed.append(f"{module.__name__}.{name}")
    if folder is not None and _working_folder() != folder:
        # Else relative paths would lead elsewhere, those of what is to be undone among them.
        os.chdir(folder)
        changed.append("the working folder")
    if _usual_tensor() != kind:
        torch.set_default_dtype(kind[0])
        # With a device by name, all calls would take a way around.
        torch.set_default_device(None if kind[1].type == "cpu" else kind[1])
        changed.append("torch's usual dtype or device")
    return changed


def _usual_tensor() -> tuple[torch.dtype, torch.device]:
    """What a tensor is and where, of which nothing else is said."""
    return torch.get_default_dtype(), torch.get_default_device()


def _load_file(path: Path) -> ModuleType:
    """The module in a file, loaded anew each time."""
    name = f"gap_export_own_pruner_{path.stem}"
    if not is_file(path):
        raise ConfigError(f"{path}: no such pruner file")
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Where classes that are pickled or printed look for their module.
    sys.modules[name] = module
    try:
        with _told(path):
            spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    return module


def _watch(
    function: Callable[..., T], path: Path, check: Callable[..., str | None]
) -> Callable[..., T]:
    """A function of a user's file whose failures, and what it gives amiss, are one line."""

    @functools.wraps(function)
    def call(*seen: object) -> T:
        with _told(path):
            found = function(*seen)
            wrong = check(found, *seen)
        if wrong is not None:
            raise ConfigError(f"{path}: {function.__name__} gave {wrong}; {_HELP}")
        return found

    return call


def _locate(error: BaseException, path: Path) -> str:
    """What went wrong in a file's code, and in which of its lines."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}" if error.lineno else error.msg
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f"line {lines[-1]}: " if lines else ""
    said = _say(error)
    return f"{where}{type(error).__name__}" + (f": {said}" if said else "")


def _say(error: BaseException) -> str | None:
    """An error's text in one line; None where its own class fails to give it."""
    try:
        return " ".join(str(error).split())[:_LONGEST_REASON]
    except Exception:  # noqa: BLE001 - whatever the file's class raises
        return None


def _require_pruner(module: ModuleType, where: str) -> None:
    """Refuse a module that does not fit `Pruner`."""
    for name in ("NEEDS", "EXTRA", *_CHECKS):
        if not hasattr(module, name):
            raise ConfigError(f"{where}: no {name} in it, which a pruner must define; {_HELP}")
    needs = module.NEEDS
    if not isinstance(needs, frozenset) or not all(isinstance(each, Feature) for each in needs):
        raise ConfigError(f"{where}: NEEDS is {needs!r:.60}, expected a frozenset of Feature")
    if type(module.EXTRA) is not int or module.EXTRA not in {0, 1}:
        raise ConfigError(f"{where}: EXTRA is {module.EXTRA!r:.60}, expected 0 or 1")
    draws = getattr(module, "DRAWS", False)
    if not isinstance(draws, bool):
        raise ConfigError(f"{where}: DRAWS is {draws!r:.60}, expected True or False")
    for name in (*_CHECKS, *([_COUNT] if hasattr(module, _COUNT) else [])):
        wanted = list(inspect.signature(getattr(AdaptivePruner, name)).parameters)[1:]
        function = getattr(module, name)
        is_plain = inspect.isfunction(function) and not inspect.iscoroutinefunction(function)
        found = list(inspect.signature(function).parameters) if is_plain else None
        if found != wanted:
            shown = "no function" if found is None else f"({', '.join(found)})"
            raise ConfigError(f"{where}: {name} is {shown}, expected ({', '.join(wanted)})")


def _find_fault(
    extra: int, choice: object, features: VisionFeatures, kept: int, config: PruneConfig
) -> str | None:
    """What is wrong with a choice in the graph; None where nothing is."""
    del config
    tokens = features.geometry.tokens
    if not isinstance(choice, Kept):
        return f"a {type(choice).__name__}, expected a Kept"
    if isinstance(choice.order, tuple):
        wrong = _find_fault_of_order(choice.order, kept, tokens)
    else:
        wrong = _find_fault_of_tensor("order", choice.order, (1, kept), torch.int64)
    if kept == tokens or wrong is not None:
        return wrong
    if choice.mix_BKN is not None:
        wrong = _find_fault_of_tensor("mix_BKN", choice.mix_BKN, (1, kept, tokens))
    if (choice.extra_BN is None) == bool(extra):
        return f"extra_BN {'without' if extra else 'with'} values, but EXTRA is {extra}"
    if extra:
        wrong = wrong or _find_fault_of_tensor("extra_BN", choice.extra_BN, (1, tokens))
    divisor = choice.extra_divisor
    if not isinstance(divisor, (int, float)) or not math.isfinite(divisor) or divisor == 0:
        return f"extra_divisor {divisor!r:.40}, expected a number that is not 0"
    return wrong


def _find_fault_of_eager(
    extra: int, choice: object, vision: EagerVision, kept: int, config: PruneConfig
) -> str | None:
    """What is wrong with a choice for the reference; None where nothing is."""
    del config
    tokens, width = vision.patches.shape
    if not isinstance(choice, EagerChoice):
        return f"a {type(choice).__name__}, expected an EagerChoice"
    scores = choice.scores
    if scores is not None and not (
        isinstance(scores, tuple)
        and len(scores) == tokens
        and all(isinstance(score, (int, float)) and not math.isnan(score) for score in scores)
    ):
        return f"scores that are no tuple of {tokens} numbers"
    wrong = _find_fault_of_order(choice.order, kept, tokens)
    if kept == tokens or wrong is not None:
        return wrong
    if choice.rows is not None:
        wrong = _find_fault_of_tensor("rows", choice.rows, (kept, width))
    for name, shape in (("extra", (width,)), ("extra_weights", (tokens,))):
        value = getattr(choice, name)
        if (value is None) == bool(extra):
            return f"{name} {'without' if extra else 'with'} values, but EXTRA is {extra}"
        if extra:
            wrong = wrong or _find_fault_of_tensor(name, value, shape)
    return wrong


def _find_fault_of_order(order: object, kept: int, tokens: int) -> str | None:
    is_order = (
        isinstance(order, tuple)
        and all(type(index) is int and 0 <= index < tokens for index in order)
        and len(order) == len(set(order)) == kept
    )
    if is_order:
        return None
    shown = f"a tuple of {len(order)}" if isinstance(order, tuple) else f"a {type(order).__name__}"
    wanted = f"{kept} integers from 0 to {tokens - 1}"
    return f"{shown} as order, expected a tuple of {wanted}, each once"


def _find_fault_of_tensor(
    name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> str | None:
    """Without a dtype, any of numbers with a point."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} as {name}, expected a tensor {list(shape)}"
    is_right = value.is_floating_point() if dtype is None else value.dtype == dtype
    if tuple(value.shape) == shape and is_right:
        return None
    kind, wanted = (str(each).removeprefix("torch.") for each in (value.dtype, dtype or "float32"))
    return f"{kind} {list(value.shape)} as {name}, expected {wanted} {list(shape)}"


def _find_fault_of_count(found: object, vision: EagerVision) -> str | None:
    """What is wrong with a number of tokens that a rule keeps; None where nothing is."""
    most = len(vision.patches)
    if type(found) is int and 0 <= found <= most:
        return None
    return f"{found!r:.60}, expected an integer from 0 to {most}"


_CHECKS: Final[dict[str, Callable[..., str | None]]] = {
    "prune": _find_fault,
    "prune_eagerly": _find_fault_of_eager,
}
_COUNT: Final = "count_adaptively"
"""What only some pruners define."""
