"""The commands that the documents show are ones that the command lines take."""

import re
import shlex
from pathlib import Path

import pytest

from gap_export import cli as export_cli
from gap_runtime import cli as runtime_cli
from gap_runtime.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "runtime/README.md", "refshapes/README.md"]
PARSERS = {"gap-export": export_cli._parser, "gap-runtime": runtime_cli._parser}


def commands():
    for page in PAGES:
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            found = re.match(r"    (?:\$ )?(gap-(?:export|runtime) .*)", line)
            if found:
                yield pytest.param(found.group(1), id=f"{page}: {found.group(1)}"[:70])


@pytest.mark.parametrize("command", list(commands()))
def test_command_of_a_document_is_taken(command):
    name, *arguments = shlex.split(command, comments=True)
    PARSERS[name]().parse_args(arguments)


def test_every_command_of_the_runtime_is_in_its_readme():
    text = (ROOT / "runtime" / "README.md").read_text(encoding="utf-8")
    for command in ("ground", "check", "info", "bench"):
        assert f"gap-runtime {command} " in text


def test_python_example_of_the_readme_runs(refshapes_bundle, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1)
    opened = Bundle.open(refshapes_bundle)
    monkeypatch.setattr(Bundle, "open", lambda _: opened)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert "Box(" in capsys.readouterr().out
