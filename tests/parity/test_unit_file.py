"""contrib/gap-runtime.service under a real systemd: started, killed, restarted, stopped."""

import base64
import json
import re

import pytest
from tools import systemd
from tools.places import ROOT

UNIT = ROOT / "contrib" / "gap-runtime.service"
SAMPLE = ROOT / "refshapes" / "samples" / "test-006.png"
_ASK = """
import sys, urllib.request
body = sys.stdin.buffer.read()
head = {"content-type": "application/json"}
request = urllib.request.Request("http://127.0.0.1:8765" + sys.argv[1], body or None, head)
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=30).read())
"""

_OWN_PYTHON = """
cd /opt/gap-runtime
export LD_LIBRARY_PATH=$PWD/python/lib PYTHONHOME=$PWD/python
exec python/bin/python3 -c "$0" "$1"
"""
"""Where this test's own lies, the machine may have an empty folder."""

pytestmark = pytest.mark.skipif(bool(systemd.say_why_not()), reason=systemd.say_why_not())


@pytest.fixture(scope="module")
def machine(refshapes_bundle, tmp_path_factory):
    with systemd.machine(UNIT, refshapes_bundle, tmp_path_factory.mktemp("machine")) as begun:
        yield begun


def ask(machine, path, **data):
    """What the service answers, from a process beside it; None where nobody does."""
    given = json.dumps(data).encode() if data else b""
    printed, code = machine.run("sh", "-c", _OWN_PYTHON, _ASK, path, given=given)
    return json.loads(printed) if code == 0 else None


def ground(machine):
    image = base64.b64encode(SAMPLE.read_bytes()).decode()
    (found,) = ask(machine, "/v1/ground", image=image, phrase="the top yellow circle")["results"]
    return found["answer"], found["boxes"]


def is_ready(machine):
    return ask(machine, "/readyz") == {"status": "ready"}


def test_the_unit_file_has_no_mistake_and_little_reach(machine):
    """By systemd's own words; 10 is the worst exposure. The devices of GPUs stay open."""
    assert machine.run("systemd-analyze", "verify", f"/run/units/{UNIT.name}") == (b"", 0)
    command = ("systemd-analyze", "security", "--offline=true", "--threshold=25")
    printed, code = machine.run(*command, f"/run/units/{UNIT.name}")
    assert code == 0, printed.decode()


def test_it_comes_back_when_it_is_killed_and_stops_when_it_is_told(machine):
    machine.wait_for(lambda: is_ready(machine))
    first = machine.show(UNIT.name)
    answer = ground(machine)
    assert answer[1]
    status = machine.run("cat", f"/proc/{first['MainPID']}/status")[0].decode()
    assert int(re.search(r"^Uid:\t(\d+)", status, re.MULTILINE)[1]) > 1000
    assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
    assert machine.run("kill", "-KILL", first["MainPID"])[1] == 0
    machine.wait_for(lambda: machine.show(UNIT.name)["NRestarts"] == "1")
    machine.wait_for(lambda: is_ready(machine))
    second = machine.show(UNIT.name)
    assert second["ActiveState"] == "active"
    assert second["MainPID"] not in {"0", first["MainPID"]}
    assert ground(machine) == answer
    assert machine.run("systemctl", "stop", UNIT.name)[1] == 0
    last = machine.show(UNIT.name)
    assert last["ExecMainPID"] == second["MainPID"]
    ended = last["ActiveState"], last["Result"], last["ExecMainStatus"]
    assert ended == ("inactive", "success", "0")
    said = machine.run("cat", systemd.LOG)[0].decode().splitlines()
    assert said == ["serving bundle at http://127.0.0.1:8765 (Ctrl-C stops it)"] * 2
