"""Rules of the house that no linter has, read from the source."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import tomllib

import pytest
from tools.places import ROOT
from tools.protocols import OPTIONS, PROTOCOLS, members

from gap_export.interfaces.decoder import Decoder
from gap_export.interfaces.family import Family, FamilyOptions
from gap_export.interfaces.features import AdaptivePruner, Feature, Pruner
from gap_runtime.backends import Backend
from gap_runtime.bundle import manifest
from gap_runtime.evaluation.protocol import ScoringProtocol
from gap_runtime.evaluation.source import Reader
from gap_runtime.pictures.preprocess import PictureMode
from gap_runtime.registry import list_plugins

PACKAGES = (ROOT / "gap_export", ROOT / "runtime" / "gap_runtime")
FILES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
MODULES = [f"{package}.{name}" for package in PROTOCOLS for name in list_plugins(package)]
FAMILIES = sorted(path.stem for path in (ROOT / "gap_export" / "models").glob("[!_]*.py"))
FAMILY_NAMES = sorted({name for stem in FAMILIES for name in (stem, stem.replace("_", "-"))})


@functools.cache
def read(path):
    return path.read_text(encoding="utf-8")


@functools.cache
def parse(path):
    return ast.parse(read(path))


def in_every_file(find):
    """What a rule finds against a file, by file; empty where all keep it."""
    found = {str(path.relative_to(ROOT)): find(path) for path in FILES}
    return {name: what for name, what in found.items() if what}


def test_there_is_something_to_read():
    assert len(FILES) > 40
    assert len(MODULES) >= 5
    assert len(FAMILIES) == len(set(FAMILIES)) >= 2


def test_families_are_told_from_other_words():
    """Names are looked for as they are written in code, in configurations and on the hub."""
    assert {"llava"} <= set(FAMILIES)
    assert {stem.replace("_", "-") for stem in FAMILIES} <= set(FAMILY_NAMES)
    assert set(FAMILIES) <= set(FAMILY_NAMES)


def find_family_names(path):
    # A published format or script has the name of the model that it came with.
    if path.parent.name in {"models", "readers", "protocols"}:
        return []
    # The library calls the type of a decoder after a model: `NAME_text`.
    text = re.sub(r"\w+_text\b", "", read(path).lower())
    return [line for line in text.splitlines() if any(name in line for name in FAMILY_NAMES)]


def test_no_family_is_named_outside_its_own_file():
    assert in_every_file(find_family_names) == {}


def find_open_keywords(path):
    return [
        node.name
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.args.kwarg
        # A TypedDict says which names there are.
        and not ast.unparse(node.args.kwarg.annotation or node).startswith("Unpack[")
    ]


def test_no_function_takes_keyword_arguments_of_any_name():
    assert in_every_file(find_open_keywords) == {}


def find_unix_imports(path):
    names = set()
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & {"fcntl", "grp", "pty", "pwd", "resource", "termios"}


def test_what_windows_lacks_is_imported_where_it_can_be_missing():
    """A target is for Windows, and an import at the top would end every command there."""
    assert in_every_file(find_unix_imports) == {}


def find_prints(path):
    if "cli" in path.relative_to(ROOT).parts or path == ROOT / "runtime/gap_runtime/display.py":
        return []
    return [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id == "print")
            or ast.unparse(node.func) in {"sys.stdout.write", "sys.stderr.write"}
        )
    ]


def test_only_the_command_lines_and_the_display_print():
    assert in_every_file(find_prints) == {}


def test_everything_is_caught_only_where_a_library_leaves_no_choice():
    broad = []
    for path in FILES:
        lines = read(path).splitlines()
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = ast.unparse(node.type) if node.type else ""
            if not kinds or re.search(r"\b(Base)?Exception\b", kinds):
                broad.append((path.name, lines[node.lineno - 1].partition("#")[2].strip()))
    assert broad == [
        ("chat.py", "a template is a program, which can fail in every way"),
        ("torch_pickle.py", "a damaged pickle can fail in every way"),
        ("pruner.py", "noqa: BLE001 - a user's own file can fail in every way"),
        ("pruner.py", "noqa: BLE001 - whatever the file's class raises"),
        ("options.py", "a library may take Ctrl-C for a failure of its own"),
        ("app.py", "noqa: BLE001 - a client is answered whatever goes wrong"),
    ]


OWN_PATTERNS = {
    # Not written where they are run, and yet ours.
    ("families.py", "pattern"),
    ("memory.py", r"f'^{name}\\s+(\\d+)\\s'"),
    ("packed.py", "'|'.join(ignored) or '(?!)'"),
    ("patterns.py", "text"),
    ("sizes.py", "_IN_ANSWER.join(map(re.escape, around)) + end"),
    ("sources.py", "'|'.join(ignored) or '(?!)'"),
    ("tokenizer.py", "f'({pattern})'"),
}
"""Of `patterns`: `re` compiles what `regex` will run, and runs it never."""


def is_own_pattern(node):
    """Whether a pattern is written by us: constants, names of them, and escaped text."""
    if isinstance(node, ast.JoinedStr):
        return all(map(is_own_pattern, node.values))
    if isinstance(node, ast.FormattedValue):
        return is_own_pattern(node.value)
    return (
        isinstance(node, ast.Constant)
        or (isinstance(node, ast.Name) and node.id.isupper())
        or ast.unparse(node).startswith("re.escape(")
    )


def test_a_strangers_regular_expression_is_run_by_its_gate_alone():
    found, readers, importers = set(), set(), set()
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and node.attr in {"attempt", "pattern"}:
                readers.add(path.name)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = node.func.value
                is_re = isinstance(of, ast.Name) and of.id == "re" and node.func.attr != "escape"
                if is_re and not is_own_pattern(node.args[0]):
                    found.add((path.name, ast.unparse(node.args[0])))
            elif isinstance(node, ast.Import) and node.names[0].name == "regex":
                importers.add(path.name)
    assert found == OWN_PATTERNS
    assert readers == {"boxes.py", "validation.py"}
    assert importers == {"patterns.py"}


OWN_FILES = {
    # Parts of the distributions, and what the system says of a machine.
    *("gauges.py", "huge_pages.py", "memory.py", "page.py", "published.py", "registry.py"),
    *("shapes.py", "survey.py", "tables.py"),
}


def test_a_strangers_file_is_read_by_its_gate_alone():
    """Pathlib's own reading waits for pipes, and reads what has no end."""
    readers = set()
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                # The gate's functions are called by their names, with a path.
                is_pathlib = node.func.attr in {"read_text", "read_bytes"} and (
                    ast.unparse(node.func.value) not in {"files", "gauge", "self.gauge"}
                )
                if is_pathlib and not ast.unparse(node.func.value).startswith("resources."):
                    readers.add(path.name)
    assert readers == OWN_FILES


def lacks_docstring(path):
    return not (ast.get_docstring(parse(path)) or "").partition("\n")[0].endswith(".")


def test_every_module_opens_with_a_docstring():
    assert in_every_file(lacks_docstring) == {}


# A header, then a row for each tensor or rule.
TABLE_ROWS = {
    "coordinates.py": 4,
    "decoder.py": 4,
    "positions.py": 4,
    "text.py": 3,
    "vision.py": 4,
}


@pytest.mark.parametrize("name", TABLE_ROWS)
def test_graph_files_open_with_a_table(name):
    docstring = ast.get_docstring(parse(ROOT / "gap_export" / "graph" / name))
    rows = re.findall(r"^ {4}\S+ {2,}\S+", docstring, re.MULTILINE)
    assert len(rows) >= TABLE_ROWS[name]


def test_every_graph_file_is_looked_at():
    assert {path.name for path in (ROOT / "gap_export" / "graph").glob("[!_]*.py")} == set(
        TABLE_ROWS
    )


def test_the_pipeline_says_what_is_decided_where():
    """Each of its files in one line, and none of them longer than one reads through."""
    room = ROOT / "gap_export" / "pipeline"
    files = {path.stem: path for path in room.glob("[!_]*.py")}
    listed = re.findall(
        r"^ {4}(\w+) {2,}\S+", ast.get_docstring(parse(room / "__init__.py")), re.MULTILINE
    )
    assert sorted(listed) == sorted(files)
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in files.items()}
    assert {name for name, length in lengths.items() if length > 400} == set()


def test_a_file_can_be_read_through():
    """What is longer holds several things, each of which somebody will look for by itself."""
    assert in_every_file(lambda path: len(read(path).splitlines()) > 500) == {}


def test_tests_lie_where_a_reader_looks_for_them():
    """In folders named as the packages, in files that one can read through."""
    for tests, package in zip(("export", "runtime"), PACKAGES, strict=True):
        folders = {path.parent.name for path in (ROOT / "tests" / tests).glob("*/test_*.py")}
        assert folders <= {path.parent.name for path in package.glob("*/__init__.py")}
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert len(lengths) > 100
    assert {name for name, length in lengths.items() if length > 600} == set()


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


def test_protocols_ask_for_something():
    assert members(Pruner) == {"NEEDS", "EXTRA", "prune", "prune_eagerly"}
    assert members(AdaptivePruner) == members(Pruner) | {"count_adaptively"}
    assert members(Family) == {
        *("DECODER", "TOWER_LAYERS", "PARTS", "find_parts", "read_spec", "find_weights"),
        *("build_tower", "build_projector", "load_eager"),
    }
    assert members(FamilyOptions) == {
        "NEIGHBOURS",
        "PRUNER",
        "TYPES",
        "build_fixed_tokens",
        "build_text_tower",
    }
    assert members(Decoder) == {
        *("EMBEDDING", "LAYERS", "read_decoder", "tensor_shapes", "linear_layers"),
        *("smoothing_groups", "rotary_tables", "build"),
    }
    assert members(Backend) == {"open_stage", "open_decoder", "find_missing"}
    assert members(PictureMode) == {
        *("is_usable", "pixel_shape", "find_bucket", "fitting_size", "make_pixels"),
        *("frame_picture", "find_cells"),
    }
    assert members(Reader) == {"SUFFIXES", "USUAL", "recognise", "locate", "read"}
    assert members(ScoringProtocol) == {"SUMMARY", "STRICT", "FRAME", "MEASURE", "judge"}


@pytest.mark.parametrize("name", MODULES)
def test_every_plugin_fits_its_protocol(name):
    require_fit(importlib.import_module(name), PROTOCOLS[name.rpartition(".")[0]])


def require_fit(module, protocol, wanted=None):
    """Members of a protocol, all by default, are there and take what it says."""
    for member in members(protocol) if wanted is None else wanted:
        assert hasattr(module, member), member
        promised = getattr(protocol, member, None)
        if inspect.isfunction(promised):
            arguments = list(inspect.signature(promised).parameters)[1:]
            assert list(inspect.signature(getattr(module, member)).parameters) == arguments, member


@pytest.mark.parametrize("name", [name for name in MODULES if ".models." in name])
def test_the_decoder_of_a_family_fits_its_protocol(name):
    require_fit(importlib.import_module(name).DECODER, Decoder)


@pytest.mark.parametrize("name", [name for name in MODULES if name.rpartition(".")[0] in OPTIONS])
def test_what_a_plugin_may_have_fits_its_protocol(name):
    """It is optional, so that a wrong spelling would go unnoticed."""
    module, package = importlib.import_module(name), name.rpartition(".")[0]
    own = {
        member
        for member, value in vars(module).items()
        if member[0] != "_" and inspect.isfunction(value) and value.__module__ == name
    }
    more = own - members(PROTOCOLS[package])
    assert more <= members(OPTIONS[package])
    require_fit(module, OPTIONS[package], members(OPTIONS[package]) & set(vars(module)))


@pytest.mark.parametrize("name", [name for name in MODULES if ".pruners." in name])
def test_a_pruner_says_what_it_needs_and_makes(name):
    module = importlib.import_module(name)
    assert isinstance(module.NEEDS, frozenset)
    assert all(isinstance(need, Feature) for need in module.NEEDS)
    assert module.EXTRA in {0, 1}


def names_reached(module, starts):
    """Every name that those functions of a module use, and the module's own ones that they use."""
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    reached, waiting = set(), [name for name in starts if name in functions]
    while waiting:
        found = {n.id for n in ast.walk(functions[waiting.pop()]) if isinstance(n, ast.Name)}
        waiting += sorted((found & set(functions)) - reached)
        reached |= found
    return reached


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("gap_export/pruners/[!_]*.py")), ids=lambda p: p.stem
)
def test_a_pruners_two_forms_share_no_brick(path):
    """An error in a brick would be in the graph and in what it is compared with."""
    module = parse(path)
    origin = {
        alias.asname or alias.name: node.module
        for node in module.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    graph = {origin.get(name) for name in names_reached(module, ["prune"])}
    eager = {
        origin.get(name) for name in names_reached(module, ["prune_eagerly", "count_adaptively"])
    }
    assert "gap_export.interfaces.features" in eager
    assert not any(each and each.startswith("gap_export.reference") for each in graph)
    assert not any(each and each.startswith("gap_export.blocks") for each in eager)


@pytest.mark.parametrize("name", [name for name in MODULES if ".models." in name])
def test_a_family_says_what_it_reads(name):
    module = importlib.import_module(name)
    assert all(role.isidentifier() and place for role, place in module.PARTS.items())


def test_the_format_page_names_every_key_of_the_manifest():
    """What docs/bundle-format.md lists, against the types that are the format."""
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    kinds = [value for value in vars(manifest).values() if dataclasses.is_dataclass(value)]
    keys = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    named = set(re.findall(r"(\w+)`", page))
    assert keys <= named | {"size", "blake3"}


@pytest.mark.parametrize("package", ["gap_export", "gap_runtime"])
def test_the_design_page_shows_the_layers_that_are_enforced(package):
    """The block of docs/design.md, line by line, against the contract of import-linter."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {each["name"]: each for each in settings["tool"]["importlinter"]["contracts"]}
    layers = contracts[f"rooms of {package}"]["layers"]
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = page.partition("## Rooms, and who may import whom\n")[2].partition("\n## ")[0]
    block = section.partition(f"\n    {package}\n\n")[2].partition("\n\n")[0]
    assert [line.strip() for line in block.splitlines()] == layers
    rooms = [room for layer in layers for room in re.findall(r"\w+", layer)]
    table = section.partition(f"| in {package} |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \| \w", table, re.MULTILINE) == rooms


def test_the_runtime_stays_small_enough_to_be_kept_in_mind():
    """At most 14 rooms, its own top and the service among them, on at most 8 floors."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {each["name"]: each for each in settings["tool"]["importlinter"]["contracts"]}
    layers = contracts["rooms of gap_runtime"]["layers"]
    assert len(re.findall(r"\w+", " ".join(layers))) + 1 <= 14
    assert len(layers) <= 8
    assert not any(":" in layer for layer in layers)
