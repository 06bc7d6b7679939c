"""Nothing that runs a bundle or makes one talks to anybody: no socket is opened."""

import contextlib
import json
import socket
import subprocess
import sys

from tools.places import ROOT
from tools.sockets import watched

SPY = """
import ctypes, json, platform, struct, sys
opened = []
def spy(event, arguments):
    if event in {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"}:
        opened.append((event, repr(arguments[1:])[:80]))
sys.addaudithook(spy)

def forbid():
    # The kernel ends the process at a socket of the internet, whichever library asks for it.
    class Filter(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                    ("k", ctypes.c_uint32)]
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filters", ctypes.POINTER(Filter))]
    if platform.machine() != "x86_64":
        return False
    load, equal, give = 0x20, 0x15, 0x06
    rules = (Filter * 7)(
        Filter(load, 0, 0, 0), Filter(equal, 0, 4, 41), Filter(load, 0, 0, 16),
        Filter(equal, 1, 0, 2), Filter(equal, 0, 1, 10), Filter(give, 0, 0, 0x80000000),
        Filter(give, 0, 0, 0x7FFF0000),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(7, rules)
    return libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program)) == 0

forbidden = forbid()
"""
WORK = """
import contextlib, io
from gap_runtime.cli.main import main
codes = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        codes.append(main(command))
print(json.dumps([forbidden, opened, codes]))
"""
PROBE = """
import socket
with contextlib.suppress(OSError):
    socket.socket(socket.AF_INET).connect(("127.0.0.1", 9))
print(json.dumps([forbidden, opened]))
"""


def run(code, *arguments):
    command = [sys.executable, "-c", SPY + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_spy_sees_a_socket():
    done = run("import contextlib" + PROBE)
    if done.returncode == 0:
        forbidden, opened = json.loads(done.stdout)
        assert not forbidden
        assert opened[0][0] == "socket.connect"
    else:
        assert done.returncode == -31  # SIGSYS


def test_check_ground_and_evaluate_open_no_socket(refshapes_bundle, tmp_path):
    picture, phrase = ROOT / "refshapes" / "samples" / "test-006.png", "the top yellow circle"
    bundle = str(refshapes_bundle)
    commands = [
        ["check", bundle, "--ratio", "0.5"],
        [
            "ground",
            bundle,
            str(picture),
            phrase,
            "--ratio",
            "0",
            "--draw",
            str(tmp_path / "o.png"),
        ],
        ["evaluate", bundle, "--data", "refshapes:test", "--limit", "2", "--ratio", "0.5"],
        ["bench", bundle, "--runs", "1", "--ratio", "0.5"],
    ]
    done = run(WORK, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    _, opened, codes = json.loads(done.stdout.splitlines()[-1])
    assert opened == []
    assert codes == [0, 0, 0, 0]


def test_export_opens_no_socket(refshapes_export):
    assert refshapes_export[1] == []


def test_the_watch_sees_a_socket():
    with watched() as opened, socket.socket() as ours, contextlib.suppress(OSError):
        ours.connect(("127.0.0.1", 9))
    assert opened == [("connect", "(('127.0.0.1', 9),)")]
    with socket.socket() as ours, contextlib.suppress(OSError):
        ours.connect(("127.0.0.1", 9))
    assert len(opened) == 1
