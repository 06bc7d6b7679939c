"""Commands whose own streams are closed or full, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NEW = "import sys; from gap_runtime.cli.entry import main; sys.exit(main())"
FULL = "/dev/full"
needs_full = pytest.mark.skipif(not Path(FULL).exists(), reason="there is no full device")
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes them")


def run(*arguments, redirect="", code=NEW):
    """A command line whose streams a shell has redirected."""
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run([*shell, *command], capture_output=True, text=True, check=False)


@needs_shell
@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_if_nobody_looked(make_bundle, redirect):
    done = run("info", make_bundle(), redirect=redirect)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("tiny-8of16" in done.stdout) == (">&- " not in f"{redirect} ".replace("2>&- ", ""))


@needs_shell
@pytest.mark.parametrize("redirect", ["2>&-", "<&- >&- 2>&-"])
def test_an_error_that_nobody_sees_has_its_exit_code(tmp_path, redirect):
    done = run("info", tmp_path / "no", redirect=redirect)
    assert (done.returncode, done.stdout, done.stderr) == (4, "", "")


@needs_shell
@needs_full
def test_a_full_stderr_takes_no_answer_away(make_bundle, tmp_path):
    done = run("info", make_bundle(), redirect=f"2> {FULL}")
    assert (done.returncode, "tiny-8of16" in done.stdout) == (0, True)
    assert run("info", tmp_path / "no", redirect=f"2> {FULL}").returncode == 4


@needs_shell
@needs_full
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_stdout_is_one_line(make_bundle, tmp_path, more):
    done = run("info", make_bundle(), *more, redirect=f"> {FULL}")
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")
    done = run("info", tmp_path / "no", *more, redirect=f"> {FULL}")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert done.stderr.startswith(f"error: {tmp_path}")


@needs_shell
def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path):
    """Else what a library prints would be written into it."""
    code = (
        "import sys; from gap_runtime.cli.streams import prepare_streams; prepare_streams(); "
        "sys.exit(open(sys.argv[1], 'w').fileno())"
    )
    assert run(tmp_path / "a", redirect="<&- >&- 2>&-", code=code).returncode == 3


@pytest.mark.parametrize("option", ["", "-u"])
def test_a_line_for_people_is_there_at_once(option):
    """Whoever waits behind a pipe for a service's address would wait for ever."""
    code = (
        "import os; from gap_runtime.cli.streams import prepare_streams; prepare_streams(); "
        "from gap_runtime.display import Display; Display().say('at once'); os._exit(0)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, *filter(None, [option]), "-c", code]
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.stderr.splitlines() == [b"at once"]
