"""`--pruner ./mine.py`: the page for contributors followed word by word, and what is refused."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tools.places import ROOT

import gap_export
from gap_export.cli import main as cli
from gap_export.interfaces.pruner import load_pruner
from gap_runtime import Bundle
from gap_runtime.cli import main as runtime_cli
from gap_runtime.errors import ConfigError


def read_section():
    """The commands and the file of "Add a pruner"."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("\n## Add a pruner\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^    (gap-(?:export|runtime) .*)$", section, re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return [shlex.split(command) for command in commands], code


TEMPLATE = read_section()[1]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes mine.py into the present folder."""
    monkeypatch.chdir(tmp_path)

    def write_file(text):
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
        return tmp_path / "mine.py"

    return write_file


def test_the_page_for_contributors_is_true(write, capsys):
    commands, code = read_section()
    write(code)
    programs = {"gap-export": cli, "gap-runtime": runtime_cli}
    assert [command[0] for command in commands] == list(programs)
    for name, *arguments in commands:
        assert programs[name].main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
    bundle = Bundle.open("mine")
    assert bundle.manifest.pruning.strategy == "mine.py"
    assert [entry.kept for entry in bundle.manifest.ratios] == [32]


def test_a_changed_file_is_another_export(write):
    def export():
        return gap_export.export("refshapes", pruner="./mine.py", out="b", reference=False)

    path = write(TEMPLATE)
    assert (export().plan is None, export().plan is None) == (False, True)
    path.write_text(TEMPLATE.replace("longest", "greatest"), encoding="utf-8")
    assert export().plan is not None
    assert export().summarize()["pruner"] == "mine.py"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("NEEDS: Final", "WANTS: Final", "no NEEDS in it, which a pruner must define"),
        ("def prune_eagerly", "def prune_slowly", "no prune_eagerly in it"),
        ("frozenset({Feature.TOKENS})", "{Feature.TOKENS}", "expected a frozenset of Feature"),
        ("frozenset({Feature.TOKENS})", 'frozenset({"tokens"})', "expected a frozenset of"),
        ("EXTRA: Final = 0", "EXTRA: Final = 2", "EXTRA is 2, expected 0 or 1"),
        (
            "def prune(features: VisionFeatures, kept: int, config",
            "def prune(features: VisionFeatures, config",
            r"prune is (features, config), expected (features, kept, config)",
        ),
        ("import torch", "import trch", "line 5: ModuleNotFoundError: No module named 'trch'"),
        ("import torch", "import torch\nraise SystemError('no')", "line 6: SystemError: no"),
        ("import torch", "import torch\nraise SystemExit(3)", "line 6: SystemExit: 3"),
        ("EXTRA: Final = 0", "EXTRA: Final = ", "line 13: invalid syntax"),
        ("EXTRA: Final = 0", "EXTRA = torch.nothing", "line 13: AttributeError"),
    ],
)
def test_a_file_that_is_no_pruner(write, capsys, before, after, message):
    assert TEMPLATE.count(before) >= 1
    path = write(TEMPLATE.replace(before, after, 1))
    with pytest.raises(ConfigError) as caught:
        load_pruner(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert cli.main(["refshapes", "--pruner", "./mine.py", "--dry-run", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"] == str(caught.value)


@pytest.mark.parametrize(
    "before", ["    squares_BN = (", "    squares = vision"], ids=["graph", "reference"]
)
def test_a_pruner_that_fails_when_it_is_asked(write, capsys, before):
    """Also one whose exception is no Exception; nothing is left of the export."""
    end = "class End(BaseException): ..."
    text = f"{TEMPLATE}\n\n{end}\n".replace(before, f"    raise End('two\\nlines')\n{before}", 1)
    path = write(text)
    line = 1 + text.partition("    raise End")[0].count("\n")
    assert cli.main(["refshapes", "--pruner", "./mine.py", "--keep", "32", "--out", "b"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {path}: line {line}: End: two lines; see 'Add a pruner'")
    # Python's own cache of the file aside.
    assert {each.name for each in path.parent.iterdir()} - {"__pycache__"} == {"mine.py"}


FEATURES = "import gap_export.interfaces.features as ours"


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        ("import torch\n", "import os; os.chdir('/')", "the working folder"),
        ("    squares_BN = (", "    import os; os.chdir('/')", "the working folder"),
        ("    squares = vision", "    import os; os.chdir('/')", "the working folder"),
        (
            "EXTRA: Final = 0",
            f"{FEATURES}; ours.Feature = None",
            "gap_export.interfaces.features.Feature",
        ),
        (
            "    squares_BN = (",
            f"    {FEATURES}; del ours.Kept",
            "gap_export.interfaces.features.Kept",
        ),
    ],
)
def test_what_a_pruner_changes_of_the_process_is_undone_and_told(
    write, tmp_path, capsys, before, code, said
):
    """Given relative paths, as what is undone is found by them."""
    assert TEMPLATE.count(before) == 1
    path = write(TEMPLATE.replace(before, f"{code}\n{before}"))
    assert cli.main(["refshapes", "--pruner", "./mine.py", "--keep", "32", "--out", "b"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {path}: changed {said}; leave that as it is; see ")
    assert Path.cwd() == tmp_path
    assert {each.name for each in tmp_path.iterdir()} - {"__pycache__"} == {"mine.py"}
    # The next one finds all as it was.
    write(TEMPLATE)
    assert cli.main(["refshapes", "--pruner", "./mine.py", "--keep", "32", "--dry-run"]) == 0


def test_a_file_that_is_not_there(write, capsys):
    path = write(TEMPLATE).with_name("other.py")
    assert cli.main(["refshapes", "--pruner", "other.py", "--dry-run"]) == 2
    assert f"error: {path}: no such pruner file" in capsys.readouterr().err


def test_a_model_file_names_one_beside_it(write, tmp_path, monkeypatch):
    write(TEMPLATE)
    text = (ROOT / "export_configs" / "refshapes.toml").read_text(encoding="utf-8")
    text = text.replace("../refshapes/checkpoint", str(ROOT / "refshapes" / "checkpoint"))
    (tmp_path / "own.toml").write_text(text + '[prune]\nstrategy = "mine.py"\n', encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["../own.toml", "--dry-run"]) == 0
