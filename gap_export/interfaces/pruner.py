"""Pruners by name or by file: loaded, and held against what a pruner must be."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final, TypeVar, cast

from gap_export.config.pruners import IVC, PRUNERS, is_pruner_file
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import Feature, Pruner
from gap_runtime.errors import ConfigError, GapError
from gap_runtime.registry import load_plugin

S = TypeVar("S")
T = TypeVar("T")
_FUNCTIONS: Final = ("prune", "prune_eagerly")
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
    _require_pruner(module, strategy)
    for name in _FUNCTIONS:
        setattr(module, name, _tell_failures(getattr(module, name), path))
    return cast("Pruner", module)


def _load_file(path: Path) -> ModuleType:
    """The module in a file, loaded anew each time."""
    name = f"gap_export_own_pruner_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Where classes that are pickled or printed look for their module.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such pruner file") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's own file can fail in every way
        del sys.modules[name]
        raise ConfigError(f"{path}: {_locate(error, path)}; {_HELP}") from error
    return module


def _tell_failures(
    function: Callable[[S, int, PruneConfig], T], path: Path
) -> Callable[[S, int, PruneConfig], T]:
    """A function of a user's file whose failures are one line with its place."""

    @functools.wraps(function)
    def call(seen: S, kept: int, config: PruneConfig) -> T:
        try:
            return function(seen, kept, config)
        except (KeyboardInterrupt, GapError):
            raise
        except BaseException as error:  # as a user's own file can
            raise ConfigError(f"{path}: {_locate(error, path)}; {_HELP}") from error

    return call


def _locate(error: BaseException, path: Path) -> str:
    """What went wrong in a file's code, and in which of its lines."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"


def _require_pruner(module: ModuleType, where: str) -> None:
    """Refuse a module that does not fit `Pruner`."""
    for name in ("NEEDS", "EXTRA", *_FUNCTIONS):
        if not hasattr(module, name):
            raise ConfigError(f"{where}: no {name} in it, which a pruner must define; {_HELP}")
    needs = module.NEEDS
    if not isinstance(needs, frozenset) or not all(isinstance(each, Feature) for each in needs):
        raise ConfigError(f"{where}: NEEDS is {needs!r:.60}, expected a frozenset of Feature")
    if module.EXTRA not in {0, 1}:
        raise ConfigError(f"{where}: EXTRA is {module.EXTRA!r:.60}, expected 0 or 1")
    for name in _FUNCTIONS:
        wanted = list(inspect.signature(getattr(Pruner, name)).parameters)[1:]
        function = getattr(module, name)
        found = list(inspect.signature(function).parameters) if callable(function) else None
        if found != wanted:
            shown = "no function" if found is None else f"({', '.join(found)})"
            raise ConfigError(f"{where}: {name} is {shown}, expected ({', '.join(wanted)})")
