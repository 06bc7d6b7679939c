"""A real shell completes what the scripts of `completion` tell it."""

import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

from gap_export.cli import main as exporter
from gap_runtime.backends import resolve_backend
from gap_runtime.cli import main as runtime
from gap_runtime.cli.completion import SHELLS
from gap_runtime.registry import list_plugins

PROGRAMS = {"gap-export": exporter, "gap-runtime": runtime}
TYPED = [
    # What is typed before the key, and the words that the program is started with.
    ("gap-runtime inf", ["info"]),
    ("gap-runtime info bund", ["info", "bundle/"]),
    ("gap-runtime ground bundle photo", ["ground", "bundle", "photo.png"]),
    ("gap-runtime check bundle --htm", ["check", "bundle", "--html"]),
    ("gap-runtime build bundle --target jetson-orin-jp7", ["build", "bundle", "--target"]),
    ("gap-export refshapes-2", ["refshapes-256"]),
    ("gap-export refshapes --dry", ["refshapes", "--dry-run"]),
    ("gap-export refshapes --positions compact-g", ["refshapes", "--positions", "compact-grid"]),
    ("gap-export sweep refshapes --pruners visionz", ["sweep", "refshapes", "--pruners"]),
    ("gap-export list prun", ["list", "pruners"]),
]


@pytest.fixture(scope="module")
def scripts():
    """The scripts by program and shell."""
    made = {}
    for name, cli in PROGRAMS.items():
        for shell in SHELLS:
            with pytest.MonkeyPatch.context() as patch:
                lines = []
                patch.setattr("builtins.print", lambda text, lines=lines: lines.append(text))
                assert cli.main(["completion", shell]) == 0
                (text,) = lines
            made[name, shell] = text
    return made


@pytest.fixture(scope="module")
def completed(scripts, tmp_path_factory):
    """What a bash at a terminal makes of each line when the tab key is pressed behind it."""
    home = tmp_path_factory.mktemp("completed")
    (home / "bundle").mkdir()
    (home / "photo.png").touch()
    start = []
    for name in PROGRAMS:
        script = home / f"{name}.bash"
        script.write_text(scripts[name, "bash"], encoding="utf-8")
        # Said instead of done, as nothing here is about the programs themselves.
        start += [f"{name}() {{ printf '<%s>' \"$@\"; echo; }}", f"source {script.name}"]
    typed = [f"{line}\t" for line, _ in TYPED]
    ours, theirs = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(home), "PS1": ""}
    with subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=home,
        env=environment,
        start_new_session=True,
    ) as bash:
        for line in [*start, *typed, "exit"]:
            os.write(ours, f"{line}\n".encode())
        said = bash.communicate(timeout=20)[0].decode()
    os.close(ours)
    os.close(theirs)
    lines = [re.findall(r"<(.*?)>", line) for line in said.splitlines() if line.startswith("<")]
    return dict(zip((line for line, _ in TYPED), lines, strict=True))


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@needs_bash
@pytest.mark.parametrize(("line", "words"), TYPED, ids=[line for line, _ in TYPED])
def test_bash_completes(completed, line, words):
    assert completed[line][: len(words)] == words


@needs_bash
def test_bash_completes_the_values_of_options(completed):
    assert completed["gap-export sweep refshapes --pruners visionz"][-1] == "visionzip"
    last = completed["gap-runtime build bundle --target jetson-orin-jp7"][-1]
    assert last.startswith("jetson-orin-jp7")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_command_and_option_is_in_the_script(scripts, name, shell):
    program = PROGRAMS[name].PROGRAM
    for command in list_plugins(program.package):
        assert command in scripts[name, shell]
    dash = "" if shell == "fish" else "--"
    assert f"{dash}json" in scripts[name, shell]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_shell_can_read_its_script(scripts, name, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} on this machine")
    done = subprocess.run(
        [shell, "-n"], input=scripts[name, shell], text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_words_are_those_that_the_commands_take(scripts):
    assert all(resolve_backend(name) for name in runtime.PROGRAM.list_words()["backend"])
    for name in runtime.PROGRAM.list_words()["backend"]:
        assert name in scripts["gap-runtime", "bash"]


def test_without_the_library_the_way_out_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.setattr("gap_runtime.cli.completion.find_spec", lambda _: None)
    assert runtime.main(["completion", "bash"]) == 2
    assert "pip install 'gap-runtime[completion]'" in capsys.readouterr().err


def test_another_shell_is_refused(capsys):
    assert runtime.main(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err
