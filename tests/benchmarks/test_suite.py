"""The comparison with peers, with made-up peers: no environments, no network."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import environments, runtime, suite

FAKE = """
import json, os, sys, time
NAME = {name!r}
SCOPE: str = {scope!r}
PRECISIONS = ("fp32",)
command = sys.argv[1]
with open({log!r}, "a") as log:
    print(NAME, command, os.environ.get("OMP_NUM_THREADS"), file=log)
{body}
if command == "prepare":
    os.makedirs(sys.argv[3])
    open(os.path.join(sys.argv[3], "weights"), "wb").write(bytes(10**6))
    print(json.dumps({{"note": "made"}}))
else:
    print("noise")
    print(json.dumps({{
        "load_s": {ms} / 10, "resident_mb": 100 * {ms}, "peak_mb": 1, "vision_ms": None,
        "prefill_ms": {{"8": [{ms}, {ms}, 99]}}, "token_ms": {{"8": [{ms}]}},
        "token_ids": {{"8": [1, 2, int({ms})]}}, "versions": {{"fake": "1"}}, "note": "",
    }}))
"""


@pytest.fixture
def make_peer(tmp_path, monkeypatch):
    """Writes the script of a made-up subject, which the tests' own python runs."""
    folder = tmp_path / "peers"
    folder.mkdir()
    monkeypatch.setattr(suite, "find_python", lambda _: Path(sys.executable))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(key, *, ms=1.0, scope="whole", body=""):
        script = folder / f"{key}.py"
        log = str(tmp_path / "log")
        text = FAKE.format(name=key.upper(), scope=scope, log=log, body=body, ms=ms)
        script.write_text(text, encoding="utf-8")
        return suite.read_peer(script)

    return make


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Runs made-up subjects and gives the rows by subject."""
    (tmp_path / "checkpoints" / "x").mkdir(parents=True)
    (tmp_path / "checkpoints" / "x" / "processor_config.json").touch()
    monkeypatch.setattr(suite, "read_through", lambda _: None)

    def run(*peers, rounds=1, resume=False):
        options = argparse.Namespace(
            threads=3, prompts=[8], tokens=1, runs=3, rounds=rounds, limit=60.0, home=tmp_path
        )
        options.resume, options.keep = resume, False
        results = suite.Results(tmp_path / "runtime.json")
        runtime.Comparison(
            name="x",
            precision="fp32",
            peers={peer.key: peer for peer in peers},
            options=options,
            results=results,
        ).run()
        kept = json.loads((tmp_path / "runtime.json").read_text(encoding="utf-8"))["rows"]
        return {row["peer"]: row for row in kept.values()}

    return run


def test_subjects_take_turns_and_one_that_fails_is_a_row(make_peer, compare, tmp_path, capsys):
    dead = 'if command == "measure": sys.exit("RuntimeError: no kernel\\n")'
    rows = compare(
        make_peer("gap_export", ms=2.0), make_peer("fast"), make_peer("dead", body=dead), rounds=2
    )
    log = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ")[:2] for line in log] == [
        [name, command]
        for command, names in (
            ("prepare", ("GAP_EXPORT", "FAST", "DEAD")),
            ("measure", ("GAP_EXPORT", "FAST", "DEAD", "GAP_EXPORT", "FAST")),
        )
        for name in names
    ]
    assert {line.split(" ")[2] for line in log} == {"3"}
    assert rows["dead"]["failed"] == "RuntimeError: no kernel"
    assert [len(rows[key]["rounds"]) for key in ("gap_export", "fast", "dead")] == [2, 2, 0]
    assert rows["fast"]["prepare"]["written_mb"] == pytest.approx(1.0)
    assert rows["fast"]["rounds"][0]["load_average"] >= 0
    assert not (tmp_path / "prepared" / "x" / "fp32" / "fast").exists()
    table = suite.tabulate(rows, runtime.make_columns([8]))
    lines = {line[0]: line for line in table}
    prefill = table[0].index("prefill 8, ms")
    assert lines["GAP_EXPORT"][prefill] == "2"
    assert lines["FAST"][prefill] == "1 (0.50x)"
    assert lines["FAST"][-1] == "1,000.0 (0.50x)"
    assert lines["DEAD"] == ["DEAD", "failed: RuntimeError: no kernel"]
    assert lines["best peer"][prefill] == "FAST (0.50x)"
    assert runtime.count_agreement(rows["gap_export"], rows["fast"]).startswith("decodes 2 of 3")
    assert "dead: round 1, RuntimeError" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_single_peers_are_done_again(make_peer, compare, tmp_path):
    ours, peer = make_peer("gap_export"), make_peer("peer")
    compare(ours, peer, rounds=1)
    log = tmp_path / "log"
    log.unlink()
    rows = compare(ours, peer, rounds=2, resume=True)
    words = log.read_text(encoding="utf-8").split()
    assert words[1::3] == ["prepare", "prepare", "measure", "measure"]
    assert [len(row["rounds"]) for row in rows.values()] == [2, 2]
    rows = compare(make_peer("peer", ms=7.0))
    assert [len(rows[key]["rounds"]) for key in ("gap_export", "peer")] == [2, 1]
    assert rows["peer"]["rounds"][0]["load_s"] == pytest.approx(0.7)


def test_every_way_to_fail_is_a_line(make_peer, compare, monkeypatch):
    broken = make_peer("broken")
    broken.script.write_text("NAME = 'Broken'", encoding="utf-8")
    mute = make_peer("mute", body='if command == "measure": sys.exit()')
    other = make_peer("other", body='if command == "measure": print("{}"); sys.exit()')
    rows = compare(suite.read_peer(broken.script), mute, other)
    assert rows["broken"]["failed"] == "broken.py has no readable 'SCOPE'"
    assert rows["mute"]["failed"].startswith("no JSON object as the last line")
    assert "not as agreed" in rows["other"]["failed"]

    def refuse(_):
        raise environments.UnavailableError("No matching distribution found for nothing==1")

    monkeypatch.setattr(suite, "find_python", refuse)
    rows = compare(make_peer("missing"))
    assert rows["missing"]["failed"] == (
        "cannot be installed: No matching distribution found for nothing==1"
    )


def test_building_tools_is_no_part_of_an_export(make_peer, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_SAMPLE_SECONDS", 0.01)
    build = """
if command == "prepare":
    tools = sys.argv[sys.argv.index("--build") + 1]
    time.sleep(0.1)
    os.makedirs(tools, exist_ok=True)
"""
    peer = make_peer("tool", body=build)
    for _ in range(2):
        found = suite.prepare_peer(
            peer,
            tmp_path,
            tmp_path / "out" / "tool",
            precision="fp32",
            home=tmp_path,
            threads=None,
            limit_s=60.0,
        )
        assert found["seconds"] > 0.1
        assert found["peak_mb"] > 1
    words = (tmp_path / "log").read_text(encoding="utf-8").split()
    assert words == ["TOOL", "prepare", "None"] * 3


def test_a_subject_that_takes_too_long_is_ended(make_peer):
    peer = make_peer("slow", body="time.sleep(60)")
    with pytest.raises(suite.PeerError, match=r"ended after 0 s"):
        suite.run_peer(Path(sys.executable), peer, ["measure"], threads=None, limit_s=0.3)


def test_a_decoder_is_compared_with_our_decoder():
    column = suite.Column(
        title="MB", read=lambda row: row["mb"], read_decoder=lambda row: row["decoder_mb"]
    )
    ours = {"name": "ours", "scope": "whole", "mb": 300.0, "decoder_mb": 100.0}
    whole = {"name": "whole", "scope": "whole", "mb": 450.0}
    alone = {"name": "alone", "scope": "decoder", "mb": 120.0}
    assert suite.find_gain(column, ours, whole) == (450.0, 1.5)
    assert suite.find_gain(column, ours, alone) == (120.0, 1.2)
    rows = {"gap_export": ours, "whole": whole, "alone": alone}
    # The strongest peer is the one that leaves us the smallest advantage.
    assert suite.find_best(column, rows) == "alone (1.20x)"
    assert suite.find_best(column, {"whole": whole, "alone": alone}) == "alone"


def test_the_faster_one_of_ours_is_compared_and_the_other_is_no_peer(make_peer, compare):
    fast, slow = make_peer("gap_export_openvino", ms=1.0), make_peer("gap_export", ms=4.0)
    rows = compare(slow, fast, make_peer("peer", ms=2.0), rounds=1)
    chosen = runtime.choose_own(rows)
    assert chosen == "gap_export_openvino"
    assert runtime.choose_own({key: rows[key] for key in ("gap_export", "peer")}) == "gap_export"
    column = suite.Column(title="s", read=lambda row: row["rounds"][0]["load_s"], digits=1)
    assert suite.tabulate(rows, [column], ours=chosen) == [
        ["", "s"],
        ["GAP_EXPORT", "0.4 (4.00x)"],
        ["GAP_EXPORT_OPENVINO", "0.1"],
        ["PEER", "0.2 (2.00x)"],
        ["best peer", "PEER (2.00x)"],
    ]
    # One that failed after a round is not asked how fast it was.
    broken = rows | {chosen: rows[chosen] | {"failed": "no", "rounds": [{}]}}
    assert runtime.choose_own(broken) == "gap_export"
    own = {key: rows[key] for key in suite.OWN}
    assert suite.tabulate(own, [column], ours=chosen)[-1][0] != "best peer"


def test_tables_have_a_long_cell_for_a_failure():
    table = [["", "s", "MB"], ["a", "1", "22"], ["b", "failed: no"], ["best peer", "a", "-"]]
    assert suite.format_table(table).splitlines() == [
        "   s  MB",
        "a  1  22",
        "b  failed: no",
        "best peer by figure: s: a; MB: -",
    ]
    assert suite.format_table(table, markdown=True).splitlines() == [
        "|  | s | MB |",
        "|---|---:|---:|",
        "| a | 1 | 22 |",
        "| b | failed: no |  |",
        "| best peer | a | - |",
    ]


def test_medians_and_turns():
    assert suite.median([3.0, None, 1.0, 2.0]) == 2.0
    assert suite.median([None]) is None
    assert suite.turns(2, "ab") == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


def test_all_scripts_say_what_they_are():
    names = suite.list_peers()
    assert {*names[: len(suite.OWN)]} == suite.OWN
    for name in names:
        peer = suite.read_peer(suite.PEERS / f"{name}.py")
        assert not peer.fault
        assert peer.scope in {"whole", "decoder"}
        assert set(peer.precisions) <= {*suite.PRECISIONS, suite.STORED}
        requirements = environments.REQUIREMENTS / f"{name}.txt"
        assert requirements.is_file() == (name not in suite.OWN)
        if name not in suite.OWN:
            lines = environments.read_requirements(requirements)
            assert all("==" in line for line in lines), name


def test_an_environment_is_made_once_and_shared(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("# why\nx==1\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("-r a.txt\n", encoding="utf-8")
    ran = []

    def run(command, **_):
        ran.append(command[1:4])
        if "venv" in command:
            folder = tmp_path / "home" / command[-1].rpartition("/")[2]
            folder.mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.subprocess, "run", run)
    places = {"requirements": tmp_path, "home": tmp_path / "home"}
    python = environments.find_python("a", **places)
    assert python == environments.find_python("b", **places)
    assert ran == [["-m", "venv", str(python.parents[1])], ["-m", "pip", "install"]]


def test_an_environment_that_cannot_be_made_says_why_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x==1\n", encoding="utf-8")
    errors = "ERROR: no version of x\nERROR: No matching distribution found for x==1\n\n[notice] y"
    failed = subprocess.CompletedProcess([], 1, "Collecting x", errors)
    monkeypatch.setattr(environments.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(environments.UnavailableError, match=r"^No matching .* for x==1$"):
        environments.find_python("a", requirements=tmp_path, home=tmp_path / "home")
    with pytest.raises(environments.UnavailableError, match=r"no requirements file b\.txt"):
        environments.find_python("b", requirements=tmp_path, home=tmp_path / "home")
