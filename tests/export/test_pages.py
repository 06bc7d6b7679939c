"""Pages against the code: what contributors are told, and rows for all that is shipped."""

import dataclasses
import re

import pytest
from tools.places import ROOT
from tools.protocols import all_members

from gap_export.config.load import load_config
from gap_runtime.evaluation.protocol import list_protocols
from gap_runtime.machines.target import Target, list_targets
from gap_runtime.registry import list_plugins

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = {
    "Add a dialect": "gap_export.dialects",
    "Add a pruner": "gap_export.pruners",
    "Add a model family": "gap_export.models",
    "Add a picture mode": "gap_runtime.pictures.modes",
    "Add a backend": "gap_runtime.backends",
    "Add a format of data": "gap_runtime.evaluation.readers",
    "Add a protocol of scoring": "gap_runtime.evaluation.protocols",
}


def read_section(title):
    """Of CONTRIBUTING.md, from its heading to the next."""
    section = CONTRIBUTING.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert section
    return section


def words(text):
    """All words of code in a text of Markdown."""
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}


@pytest.mark.parametrize("title", SECTIONS)
def test_contributors_are_told_all_that_a_plugin_defines(title):
    section = re.sub(r"```.*?```", "", read_section(title), flags=re.DOTALL)
    assert all_members(SECTIONS[title]) - words(section) == set()


@pytest.mark.parametrize("package", SECTIONS.values())
def test_the_design_page_says_what_a_plugin_defines(package):
    """Its table of new things, which has a row for each kind of file."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("## One new thing, one new file\n")[2].partition("\n## ")[0]
    place = package.replace(".", "/") + "/"
    (row,) = [line for line in table.splitlines() if re.search(rf"`(runtime/)?{place}<", line)]
    assert words(row.split("|")[3]) == all_members(package)


def test_the_model_file_that_contributors_are_shown_loads(tmp_path):
    """With every key that it shows as optional."""
    section = read_section("Add a model configuration")
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ") or not line]
    (tmp_path / "shown.toml").write_text("\n".join(lines), encoding="utf-8")
    named = load_config(str(tmp_path / "shown.toml"), {})
    assert (named.name, named.config.family) == ("shown", "llava")
    assert named.config.check.memory_mib == 4096


def test_the_page_on_targets_has_every_key_of_one():
    page = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    section = page.partition("\n## The keys of a target\n")[2].partition("\n## ")[0]
    keys = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(keys) == sorted({field.name for field in dataclasses.fields(Target)} - {"name"})


SHIPPED = [
    *(("targets.md", "Add a target", name) for name in list_targets()),
    *(("pruners.md", "Add a pruner", name) for name in list_plugins("gap_export.pruners")),
    *(
        ("evaluation.md", "Add a format of data", name.replace("_", "-"))
        for name in list_plugins("gap_runtime.evaluation.readers")
    ),
    *(("evaluation.md", "Add a protocol of scoring", name) for name in list_protocols()),
    *(
        ("bundle-format.md", "Add a picture mode", name)
        for name in list_plugins("gap_runtime.pictures.modes")
    ),
]


@pytest.mark.parametrize(("page", "section", "name"), SHIPPED)
def test_what_is_shipped_is_on_its_page(page, section, name):
    """In a table: in the first cell of a row, as the head of a column, or in a list of values."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert f"`{name}`" in tables, (
        f"docs/{page} has '{name}' in no table; '{section}' in CONTRIBUTING.md says what to write"
    )


def test_make_knows_what_contributors_are_told_to_make():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    told = set(re.findall(r"(?:`|^    )make ([\w-]+)", CONTRIBUTING, re.MULTILINE))
    assert {"setup", "test", "demo", "gpu-contract"} <= told
    assert told <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def test_contributors_are_shown_every_folder_of_tests():
    shown = set(re.findall(r"`tests/(\w+)/`", read_section("Set up")))
    assert shown == {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
