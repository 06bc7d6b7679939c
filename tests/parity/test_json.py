"""What commands print with --json is what its page says; most is held in tests/conftest.py."""

import json

import jsonschema
import pytest
from tools.places import ROOT
from tools.schemas import hold, load_maker

from gap_export.cli import main as exporter
from gap_runtime.cli import main as runtime
from gap_runtime.cli.options import ErrorResult
from gap_runtime.registry import list_plugins, load_plugin

SAMPLES = ROOT / "refshapes" / "samples"
PICTURE = SAMPLES / "test-006.png"
PHRASE = "the top yellow circle"
MAKER = load_maker()
TYPES = MAKER.list_json_types()


def takes(program, name, flag):
    command = load_plugin(program.package, name, "command")
    parser = program.make_command_parser(name, command)
    return any(flag in action.option_strings for action in parser._actions)


@pytest.mark.parametrize("program", [exporter.PROGRAM, runtime.PROGRAM], ids=lambda p: p.name)
def test_every_command_that_prints_json_says_what(program):
    commands = list_plugins(program.package)
    printing = {
        f"{program.name} {name}"
        for name in commands
        if takes(program, name, "--json") or takes(program, name, "--jsonl")
    }
    assert printing == {name for name in TYPES if name.startswith(f"{program.name} ")}


@pytest.mark.parametrize("name", TYPES)
def test_types_make_schemas_that_say_everything(name):
    for kind in TYPES[name].values():
        schema = MAKER.make_schema(kind)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert all(part["description"] for part in schema.get("$defs", {}).values())
        # Something that is there on any page.
        text = "\n".join(MAKER.tabulate(schema))
        assert all(f"`{key}`" in text for d in schema["$defs"].values() for key in d["properties"])


def test_another_output_is_noticed():
    (kind,) = TYPES["gap-runtime pull"].values()
    pulled = {"bundle": "b", "repository": "o/n", "revision": None, "files": 1, "bytes": 2}
    hold(pulled, [kind])
    for wrong in ({**pulled, "host": "h"}, {**pulled, "files": "1"}, {"bundle": "b"}):
        with pytest.raises(AssertionError):
            hold(wrong, [kind])


COMMANDS = {
    "probe": (exporter, ["probe", "BUNDLE", "--json"]),
    "count": (
        exporter,
        ["count", "refshapes", "--pruner", "prumerge", "--images", SAMPLES, "--json"],
    ),
    "export": (exporter, ["refshapes", "--no-reference", "--out", "made", "--json"]),
    "triton": (runtime, ["triton", "BUNDLE", "--out", "models", "--json"]),
    "check": (runtime, ["check", "BUNDLE", "--json"]),
    "doctor": (runtime, ["doctor", "--json"]),
    "two phrases": (runtime, ["ground", "BUNDLE", PICTURE, PHRASE, "a", "--json"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_real_outputs_fit(name, refshapes_bundle, tmp_path, monkeypatch, capsys):
    """The command fails where they do not: all that is printed in tests is held to the schemas."""
    monkeypatch.chdir(tmp_path)
    cli, arguments = COMMANDS[name]
    words = [str(refshapes_bundle) if word == "BUNDLE" else str(word) for word in arguments]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)


def test_lines_fit(refshapes_bundle, tmp_path, capsys):
    """Of a picture, and of one that is not there."""
    missing = tmp_path / "nowhere.png"
    missing.write_text("no picture", encoding="utf-8")
    arguments = ["ground", refshapes_bundle, PICTURE, missing, "--phrase", PHRASE, "--jsonl"]
    assert runtime.main([str(word) for word in arguments]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in line for line in lines] == [False, True]
    for line in lines:
        hold(line, [TYPES["gap-runtime ground"]["--jsonl, a line"]])


def test_figures_of_a_sweep_fit(swept):
    figures = json.loads((swept / "report.json").read_text(encoding="utf-8"))
    assert figures["cells"]
    assert figures["advice"]
    hold(figures, list(TYPES["gap-export sweep"].values()))


def test_errors_fit(tmp_path, capsys):
    assert runtime.main(["info", str(tmp_path / "nowhere"), "--json"]) == 4
    hold(json.loads(capsys.readouterr().out), [ErrorResult])
