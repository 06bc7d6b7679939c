"""Plug-ins by file name: listed without being imported, imported one at a time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType

from gap_runtime.errors import UnknownNameError


def list_plugins(package: str) -> list[str]:
    """Names of the modules and packages in a package, sorted; none of them is imported."""
    spec = find_spec(package)
    assert spec is not None
    names = (found.name for found in iter_modules(spec.submodule_search_locations))
    return sorted(name for name in names if not name.startswith("_"))


def load_plugin(package: str, name: str, noun: str) -> ModuleType:
    """The module of that name.

    Args:
        package: Import name of the package that holds the plug-ins.
        name: File name of the plug-in without its suffix.
        noun: What the plug-ins are, for the error.

    Raises:
        UnknownNameError: There is no such file; the message lists what there is.
    """
    names = list_plugins(package)
    if name not in names:
        raise UnknownNameError(describe_unknown(noun, name, names))
    return import_module(f"{package}.{name}")


def describe_unknown(noun: str, name: str, names: Iterable[str]) -> str:
    """One line that names what was asked for, the near matches and all there is."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {noun} '{name}'; {hint}have {', '.join(known) or 'none'}"
