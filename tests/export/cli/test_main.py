"""Which command is meant, what help shows, and what there is to choose from."""

import json
import re
import subprocess
import sys

import pytest

from gap_export.cli import main as cli
from gap_export.config.records import POSITION_MODES
from gap_export.config.shipped import list_configs
from gap_runtime.cli import main as runtime_cli
from gap_runtime.evaluation.protocol import list_protocols
from gap_runtime.machines.target import list_targets
from gap_runtime.registry import list_plugins, load_plugin

TEMPLATE = "prompt.template=USER: <image>\nWhere is {phrase}? ASSISTANT:"


@pytest.mark.parametrize("program", [cli.PROGRAM, runtime_cli.PROGRAM], ids=["export", "runtime"])
def test_help_shows_every_command_with_what_it_does(program):
    text = " ".join(program.make_parser().format_help().split())
    for name in list_plugins(program.package):
        command = load_plugin(program.package, name, "command")
        assert f" {name} {command.SUMMARY}" in text
    assert "--version" in text


def test_a_folder_that_is_called_like_a_misspelt_command_is_a_model(run, tmp_path):
    (tmp_path / "swep").mkdir()
    code, _, err = run("swep", "--dry-run")
    assert code == 2
    assert "swep: no config.json in it" in err


def test_a_word_is_needed(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith(
        "error: give MODEL or a COMMAND (clean, completion, count, evaluate, export, "
    )


def test_the_short_form_is_the_long_one(run, tiny_llava):
    arguments = (tiny_llava, "--dry-run", "--set", TEMPLATE, "--json")
    long, short = run("export", *arguments), run(*arguments)
    assert long[:2] == short[:2]
    assert long[0] == 0
    # Options may stand before the model, too.
    assert run("--dry-run", "--json", "--set", TEMPLATE, tiny_llava)[:2] == short[:2]


def test_old_names_are_taken_with_a_line_that_says_the_new_one(run, tiny_llava):
    code, _, err = run("calibrate", "refshapes", "--images", "nowhere", "--pruner", "prumerge")
    assert (code, err.splitlines()[0]) == (
        2,
        "note: `gap-export calibrate` is now `gap-export count`",
    )
    code, _, err = run(tiny_llava, "--dry-run", "--set", TEMPLATE, "--weights", "clone")
    assert (code, err.splitlines()[0]) == (0, "note: --weights is now --bring copy")


def test_list_says_what_there_is_with_a_line_from_its_own_file(run):
    code, out, _ = run("list", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == ["formats", "models", "positions", "protocols", "pruners", "targets"]
    assert [model["name"] for model in found["models"]] == list_configs()
    assert [pruner["name"] for pruner in found["pruners"]] == list_plugins("gap_export.pruners")
    assert [target["name"] for target in found["targets"]] == list_targets()
    assert [mode["name"] for mode in found["positions"]] == list(POSITION_MODES)
    assert [each["name"] for each in found["protocols"]] == list_protocols()
    assert {"ref-l4", "screenspot-pro"} <= {each["name"] for each in found["formats"]}
    for pruner in found["pruners"]:
        module = load_plugin("gap_export.pruners", pruner["name"], "pruner")
        assert f"{pruner['description']}." == module.__doc__.splitlines()[0]
        assert pruner["published_as"] == getattr(module, "PUBLISHED_AS", None)
    assert {"FasterVLM", "PruMerge+"} <= {p["published_as"] for p in found["pruners"]}
    # For people, the same names and lines; none is cut however narrow the terminal is.
    _, shown, _ = run("list")
    for kind, entries in found.items():
        assert f"{kind}:\n" in shown
        for entry in entries:
            assert entry["description"]
            assert re.search(
                rf"^  {entry['name']} +{re.escape(entry['description'])}", shown, re.MULTILINE
            )


def test_list_of_one_kind(run):
    code, out, _ = run("list", "positions", "--json")
    assert (code, list(json.loads(out))) == (0, ["positions"])
    code, _, err = run("list", "pruner")
    assert (code, "unknown kind 'pruner'; did you mean pruners?" in err) == (2, True)


def run_python(code, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "numpy", "rich", "PIL")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("gap_export", ["--help"]),
        ("gap_export", ["refshapes", "--help"]),
        ("gap_export", ["export", "--help"]),
        ("gap_export", ["list", "--help"]),
        ("gap_export", ["--version"]),
        ("gap_export", ["positions", "--help"]),
        ("gap_export", ["count", "--help"]),
        ("gap_export", ["evaluate", "--help"]),
        ("gap_export", ["sweep", "--help"]),
        ("gap_runtime", ["--help"]),
        ("gap_runtime", ["evaluate", "--help"]),
        ("gap_runtime", ["--version"]),
    ],
)
def test_help_imports_no_library(command, arguments):
    code = (
        "import sys\n"
        f"from {command}.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = run_python(code, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
    assert ("usage:" in done.stdout) == ("--help" in arguments)


READS = "import sys; from gap_export.cli.main import main; code = main(['list', 'pruners'])"


def test_a_variable_that_the_hub_cannot_read_is_a_line(monkeypatch):
    """In a process of its own, as they are read once."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "soon")
    done = run_python(f"{READS}; sys.exit(code)")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: huggingface_hub cannot read the variables HF_... of the env")


def test_variables_of_the_hub_are_read_behind_what_quiets_libraries(monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    done = run_python(
        f"{READS}; from huggingface_hub import constants as found\n"
        "print(code, found.HF_HUB_DOWNLOAD_TIMEOUT, found.HF_HUB_DISABLE_PROGRESS_BARS)"
    )
    assert done.stdout.splitlines()[-1] == "0 20 True", done.stderr
