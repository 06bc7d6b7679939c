"""Rules of the house that no linter has, read from the source."""

import ast
import dataclasses
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from gap_export.family import Family
from gap_export.features import Pruner
from gap_runtime import manifest
from gap_runtime.session import Backend

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "gap_export", ROOT / "runtime" / "gap_runtime")
FILES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
PLUGINS = {
    "gap_export.models": (ROOT / "gap_export" / "models", Family),
    "gap_export.pruners": (ROOT / "gap_export" / "pruners", Pruner),
    "gap_runtime.backends": (ROOT / "runtime" / "gap_runtime" / "backends", Backend),
}
MODULES = [
    f"{package}.{path.stem}"
    for package, (folder, _) in PLUGINS.items()
    for path in sorted(folder.glob("[!_]*.py"))
]
every_file = pytest.mark.parametrize("path", FILES, ids=NAMES)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_there_is_something_to_read():
    assert len(FILES) > 40
    assert len(MODULES) >= 5


@every_file
def test_no_family_is_named_outside_its_own_file(path):
    families = [f.stem for f in (ROOT / "gap_export" / "models").glob("[!_]*.py")]
    assert "llava" in families
    if path.parent.name == "models":
        return
    text = path.read_text(encoding="utf-8").lower()
    lines = [line for line in text.splitlines() if any(name in line for name in families)]
    assert lines == []


@every_file
def test_no_function_takes_keyword_arguments_of_any_name(path):
    found = [
        node.name
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg
    ]
    assert found == []


@every_file
def test_only_the_command_lines_print(path):
    calls = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id == "print")
            or ast.unparse(node.func) in {"sys.stdout.write", "sys.stderr.write"}
        )
    ]
    assert calls == [] or path.name in {"cli.py", "optimum_command.py"}


def test_everything_is_caught_only_where_a_library_leaves_no_choice():
    broad = []
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = ast.unparse(node.type) if node.type else ""
            if not kinds or re.search(r"\b(Base)?Exception\b", kinds):
                broad.append((path.name, lines[node.lineno - 1].partition("#")[2].strip()))
    assert broad == [("prompt.py", "tokenizers raises bare Exception")]


@every_file
def test_every_module_opens_with_a_docstring(path):
    docstring = ast.get_docstring(parse(path))
    assert docstring
    assert docstring.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", ["decoder.py", "vision.py", "positions.py"])
def test_graph_files_open_with_a_table(name):
    docstring = ast.get_docstring(parse(ROOT / "gap_export" / "graph" / name))
    assert len(re.findall(r"^ {4}\S+ {2,}\S+", docstring, re.MULTILINE)) >= 4


def read_version(path):
    for node in ast.walk(parse(path)):
        targets = (
            [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        )
        if any(isinstance(t, ast.Name) and t.id == "__version__" for t in targets):
            return ast.literal_eval(node.value)
    raise AssertionError(path)


def test_all_versions_agree():
    exporter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    runtime = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    versions = {
        exporter["version"],
        runtime["version"],
        *(read_version(package / "__init__.py") for package in PACKAGES),
    }
    assert len(versions) == 1
    assert f"gap-runtime=={versions.pop()}" in exporter["dependencies"]


def members(protocol):
    """Names that a protocol asks for."""
    names = {name for name in vars(protocol) if not name.startswith("_")}
    return names | set(inspect.get_annotations(protocol))


def test_protocols_ask_for_something():
    assert members(Pruner) == {"NEEDS", "prune", "prune_eagerly"}
    assert {"EMBEDDING", "read_spec", "build_decoder", "load_eager"} <= members(Family)
    assert {"open_vision", "open_decoder"} <= members(Backend)


@pytest.mark.parametrize("name", MODULES)
def test_every_plugin_fits_its_protocol(name):
    module = importlib.import_module(name)
    protocol = PLUGINS[name.rpartition(".")[0]][1]
    for member in members(protocol):
        assert hasattr(module, member), member
        promised = getattr(protocol, member, None)
        if inspect.isfunction(promised):
            wanted = list(inspect.signature(promised).parameters)[1:]
            assert list(inspect.signature(getattr(module, member)).parameters) == wanted, member


def test_the_format_page_names_every_key_of_the_manifest():
    """What docs/bundle-format.md lists, against the types that are the format."""
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    kinds = [value for value in vars(manifest).values() if dataclasses.is_dataclass(value)]
    keys = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    named = set(re.findall(r"(\w+)`", page))
    assert keys <= named | {"size", "sha256"}
