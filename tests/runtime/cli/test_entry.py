"""Ctrl-C while a command is still loading is one line and the exit code of shells."""

import os
import subprocess
import sys

import pytest

from gap_runtime.cli import main as cli
from gap_runtime.cli.commands import info

BEGIN = """
import os, signal, sys
from {package}.cli import entry
signal.signal(signal.SIGINT, signal.{handler})
class Interrupter:
    left = {imports}
    def find_spec(self, *_):
        Interrupter.left -= 1
        if Interrupter.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
sys.argv = ["command", *{arguments!r}]
sys.exit(entry.main())
"""


def begin(package, imports, *arguments, handler="default_int_handler"):
    code = BEGIN.format(package=package, imports=imports, arguments=arguments, handler=handler)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "imports",
    [1, 60, *(pytest.param(each, marks=pytest.mark.matrix) for each in range(2, 100, 7))],
)
def test_ctrl_c_at_any_import_is_one_line(imports):
    done = begin("gap_runtime", imports, "info", "nothing")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_who_has_ctrl_c_ignored_is_not_stopped():
    done = begin("gap_runtime", 3, "info", "nothing", handler="SIG_IGN")
    assert done.returncode == 4
    assert done.stderr.startswith("error: nothing: ")


SWALLOWED = """
import os, signal, sys, time
from gap_runtime.cli import entry
from gap_runtime.cli.commands import info
signal.signal(signal.SIGINT, signal.default_int_handler)
def run(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        raise ImportError("numpy's C-extensions failed") from None
info.run = run
sys.argv = ["gap-runtime", "info", "nothing"]
sys.exit(entry.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_that_a_library_takes_for_its_own_failure_is_one_line():
    command = [sys.executable, "-c", SWALLOWED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "gap_runtime.cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_code_that_ends_the_program_is_told(monkeypatch, capsys):
    def leave(_):
        raise SystemExit(3)

    monkeypatch.setattr(info, "run", leave)
    assert cli.main(["info", "nothing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: code that gap-runtime ran wanted to end the program")
    assert said.count("\n") == 1
