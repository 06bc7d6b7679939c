"""Plug-ins by file name: listed without being imported, imported one at a time."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from gap_runtime.errors import UnknownNameError, describe_unknown


def list_plugins(package: str) -> list[str]:
    """Names of the modules and packages in a package, sorted; none of them is imported."""
    spec = find_spec(package)
    assert spec is not None
    names = (found.name for found in iter_modules(spec.submodule_search_locations))
    return sorted(name for name in names if not name.startswith("_"))


def read_summary(package: str, name: str) -> str:
    """What a plug-in's file says of itself: the first line of its docstring, without the stop."""
    docstring = ast.get_docstring(_read_plugin(package, name)) or ""
    return docstring.partition("\n")[0].removesuffix(".")


def read_constant(package: str, name: str, constant: str) -> Any:
    """A plain value that a plug-in's file gives a name at its top level; None without one."""
    for node in _read_plugin(package, name).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == constant for target in targets):
            return ast.literal_eval(node.value)
    return None


def _read_plugin(package: str, name: str) -> ast.Module:
    """The syntax of a plug-in's file, which is not imported."""
    spec = find_spec(package)
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        for path in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")):
            if path.is_file():
                return ast.parse(path.read_text(encoding="utf-8"))
    raise AssertionError((package, name))


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
