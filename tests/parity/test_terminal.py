"""`gap-runtime ground` at a terminal: the drawing is shown in one that can, and nowhere else."""

import fcntl
import io
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from PIL import Image
from tools.places import ROOT

PICTURE = ROOT / "refshapes" / "samples" / "test-006.png"
PHRASE = "the top yellow circle"
COMMAND = "import sys; from gap_runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
QUESTION = b"\x1b[c"
"""What are you? A terminal with Sixel has a 4 in its answer."""


def watch(arguments, attributes, lines=40):
    """All that a program writes to a terminal that answers so, and its exit code."""
    ours, theirs = pty.openpty()
    columns = 100 if lines else 0
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 1000, 800))
    said, answered = b"", False
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color"},
        close_fds=True,
    ) as program:
        os.close(theirs)
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            ready, _, _ = select.select([ours], [], [], 0.1)
            if not ready:
                if program.poll() is not None:
                    break
                continue
            try:
                read = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not read:
                break
            said += read
            if attributes and not answered and QUESTION in said:
                answered = True
                os.write(ours, f"\x1b[?{attributes}c".encode())
    os.close(ours)
    return said, program.returncode


@pytest.fixture(scope="module")
def arguments(refshapes_bundle):
    return ["ground", refshapes_bundle, PICTURE, PHRASE]


def test_a_terminal_with_sixel_shows_the_drawing(arguments):
    said, code = watch(arguments, "62;4;22")
    assert code == 0
    start = said.index(b"\x1bP")
    sixels = said[start : said.index(b"\x1b\\", start)]
    assert b"q" in sixels[:20]
    # As large as was asked for, and of more than one colour.
    assert len(sixels) > 2000
    assert sixels.count(b"#") > 10


@pytest.mark.parametrize(
    ("more", "attributes"), [([], "62;22"), (["--json"], "62;4;22"), (["--draw"], "62;4;22")]
)
def test_else_it_does_not(arguments, more, attributes, tmp_path):
    """Another terminal; a result for a program; a drawing in a file."""
    more = [*more, tmp_path / "out.png"] if more == ["--draw"] else more
    said, code = watch([*arguments, *more], attributes)
    assert code == 0
    assert b"\x1bP" not in said
    if more and more[0] == "--draw":
        assert Image.open(io.BytesIO((tmp_path / "out.png").read_bytes())).size


def test_a_terminal_without_a_size_is_not_asked(arguments):
    """A serial line, for example."""
    said, code = watch(arguments, "62;4;22", lines=0)
    assert code == 0
    assert QUESTION not in said


def test_in_a_pipe_nothing_is_asked(arguments):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    assert b"\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 1
