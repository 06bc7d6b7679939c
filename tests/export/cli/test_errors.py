"""Errors: exit codes, one clear line each, the same as JSON."""

import json
import re
import subprocess
import sys

import pytest

TEMPLATE = "prompt.template=USER: <image>\nWhere is {phrase}? ASSISTANT:"


def error_lines(err):
    """The lines of stderr that are no finished step with its time."""
    return [line for line in err.splitlines() if not re.fullmatch(r"[\w ]+ \(\d+\.\d s\)", line)]


SWEEP = ("sweep", "refshapes", "--data", "refshapes:val", "--limit", "1")
ERRORS = [
    (["refshaps"], 2, "unknown-name", "did you mean refshapes"),
    (["./nowhere"], 2, "config", "no such folder"),
    (["nowhere.toml"], 2, "config", "no such configuration file"),
    (["refshapes", "--ratio", "1"], 2, "config", "outside [0, 1)"),
    (["refshapes", "--ratio", "-0.1"], 2, "config", "outside [0, 1)"),
    (["refshapes", "--ratio", "nan"], 2, "config", "outside [0, 1)"),
    (["refshapes", "--ratio", "0.999"], 2, "config", "leaves none of 64"),
    (["refshapes", "--ratio", "0.5", "--ratio", "0.501"], 2, "config", "both keep 32"),
    (["refshapes", "--ratio", "half"], 2, "config", "'half' is no share of visual tokens"),
    (["refshapes", "--ratio", "50"], 2, "config", "did you mean 0.5 or --keep 50?"),
    (["refshapes", "--ratio", "50%"], 2, "config", "did you mean 0.5?"),
    (["refshapes", "--ratio", "0.5", "0.75"], 2, "config", "as --ratio 0.25,0.5; see"),
    (["refshapes", "--ratio", "0,5"], 2, "config", "did you mean 0.5?"),
    (["refshapes", "--ratio", "0.5,"], 2, "config", "'' is no share of visual tokens"),
    (
        ["refshapes", "--keep", "0.25"],
        2,
        "config",
        "did you mean --ratio 0.75, the share to remove?",
    ),
    (["refshapes", "--keep", "25%"], 2, "config", "did you mean --ratio 0.75"),
    (["refshapes", "--keep", "0"], 2, "config", "keep 0: at least 1"),
    (["refshapes", "--keep", "-3"], 2, "config", "--keep"),
    (["refshapes", "--keep", "65"], 2, "config", "keep 65: there are 64 visual tokens"),
    (["refshapes", "--keep", "16,16"], 2, "config", "keep 16 is given twice"),
    (["refshapes", "--keep", "16", "--ratio", "0.5"], 2, "config", "not allowed with"),
    (["refshapes", "--keep", "16", "--set", "prune.ratios=[0.5]"], 2, "config", "give one"),
    (["refshapes", "--pruner", "spacial"], 2, "unknown-name", "did you mean spatial"),
    (["refshapes", "--positions", "gaps"], 2, "config", "prune.positions 'gaps'"),
    (["refshapes", "--dtype", "int8"], 2, "config", "dtype 'int8'"),
    (["refshapes", "--target", "gpu"], 2, "unknown-name", "unknown target 'gpu'"),
    (["refshapes", "--bring", "move"], 2, "config", "bring 'move'"),
    (["refshapes", "--weights", "copy"], 2, "config", "--weights"),
    (["refshapes", "--set", "prompt.answer"], 2, "config", "KEY=VALUE"),
    (["refshapes", "--set", "prompt.anser=3"], 2, "record", "unknown key 'prompt.anser'"),
    (["refshapes", "--set", "prompt.answer=long"], 2, "record", "expected int"),
    (["refshapes", "--set", "prune.seed=-1", "--pruner", "random"], 2, "config", "seed"),
    (["refshapes", "--set", f"prune.seed={2**40}", "--pruner", "random"], 2, "config", "seed"),
    (["refshapes", "--set", f"prompt.answer={2**40}"], 2, "config", "expected 1 to 100000"),
    (
        ["refshapes", "--set", "prompt.template=<image>\udcff{phrase}"],
        2,
        "config",
        "UTF-8 text",
    ),
    (["refshapes", "--checkpoint", "nowhere"], 3, "checkpoint", "no such checkpoint folder"),
    (["refshapes", "--out", "file"], 2, "config", "exists and is no bundle"),
    (["refshapes", "--speed", "9"], 2, "config", "--speed"),
    (["refshapes", "--extra-token", "first"], 2, "config", "prune.extra_token 'first'"),
    (["refshapes", "--set", "prune.phrase=words"], 2, "config", "prune.phrase 'words'"),
    (["refshapes", "--set", "parts.wheel=x"], 2, "unknown-name", "unknown part 'wheel'"),
    (["refshapes", "--set", "parts.clip=nowhere"], 3, "checkpoint", "no such part 'clip'"),
    (["positions"], 2, "config", "MODEL"),
    (["positions", "refshaps"], 2, "unknown-name", "did you mean refshapes"),
    (["positions", "refshapes", "--ratio", "1"], 2, "config", "outside [0, 1)"),
    (["evaluate", "refshapes", "--data", "refshapes:val", "--ratio", "50%"], 2, "config", "0.5?"),
    ([*SWEEP, "--ratio", "0.5", "--keep", "32"], 2, "config", "not allowed with"),
    ([*SWEEP, "--keep", "65"], 2, "config", "keep 65: there are 64 visual tokens"),
    (["positions", "refshapes", "--image", "nowhere.png"], 2, "input", "nowhere.png"),
    (["evaluate", "refshapes"], 2, "config", "--data"),
    (["evaluate", "refshapes", "--data", "nowhere.csv"], 2, "input", "no such file"),
    (["evaluate", "refshaps", "--data", "refshapes:val"], 2, "unknown-name", "refshapes"),
    (["sweep", "refshapes"], 2, "config", "--data"),
    (["sweep", "refshaps", "--data", "refshapes:val"], 2, "unknown-name", "refshapes"),
    ([*SWEEP, "--pruners", "spacial"], 2, "unknown-name", "did you mean spatial"),
    ([*SWEEP, "--set", "parts.clip=nowhere"], 3, "checkpoint", "no such part 'clip'"),
    ([*SWEEP, "--positions", "gaps"], 2, "config", "'gaps' is unknown; did you mean gap"),
    ([*SWEEP, "--ratios", "0.5", "1"], 2, "config", "outside [0, 1)"),
    ([*SWEEP, "--protocol", "theirs"], 2, "unknown-name", "theirs"),
    ([*SWEEP, "--backend", "onxruntime"], 2, "unknown-name", "onnxruntime"),
    ([*SWEEP, "--gallery", "-1"], 2, "config", "--gallery -1"),
    ([*SWEEP, "--workers", "2"], 2, "config", "goes with --ray"),
    ([*SWEEP, "--out", "file"], 2, "config", "exists and is no sweep"),
    ([*SWEEP, "--out", "."], 2, "config", "exists and is no sweep"),
    (["count", "refshapes"], 2, "config", "--images"),
    (["count", "refshapes", "--images", "."], 2, "config", "no adaptive rule"),
    (
        ["count", "refshapes", "--images", "nowhere", "--pruner", "prumerge"],
        2,
        "input",
        "no such folder",
    ),
    ([], 2, "config", "MODEL"),
    (["swep", "refshapes"], 2, "unknown-name", "unknown command 'swep'; did you mean sweep?"),
    (["exprot", "refshapes"], 2, "unknown-name", "did you mean export"),
    (["evaluat"], 2, "unknown-name", "did you mean evaluate?"),
    (["lava-1.5-7b"], 2, "unknown-name", "unknown model 'lava-1.5-7b'; did you mean llava-1.5-7b"),
    (["xyzzy"], 2, "unknown-name", "unknown model 'xyzzy'"),
    (["export"], 2, "config", "MODEL"),
    (["export", "swep"], 2, "unknown-name", "unknown model 'swep'"),
]


@pytest.mark.parametrize(("arguments", "code", "kind", "part"), ERRORS)
def test_errors(run, tmp_path, arguments, code, kind, part):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    found, out, err = run(*arguments, "--json")
    assert found == code
    error = json.loads(out)
    assert set(error) == {"error"}
    assert set(error["error"]) == {"kind", "message"}
    assert error["error"]["kind"] == kind
    assert part in error["error"]["message"]
    assert error_lines(err) == [f"error: {error['error']['message']}"]
    assert "\n" not in error["error"]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bundle_goes_to_no_circle_of_links(run, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    code, _, err = run("refshapes", "--out", "circle")
    assert code == 2
    assert "circle: is a link that leads nowhere; remove it" in err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["refshaps"], ["refshapes", "--ratio", "2"]])
def test_errors_without_json_leave_stdout_empty(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert len(error_lines(err)) == 1


def test_a_truncated_checkpoint(run, tiny_llava, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    for path in tiny_llava.iterdir():
        data = path.read_bytes()
        (folder / path.name).write_bytes(data[:-100] if path.suffix == ".safetensors" else data)
    code, out, _ = run("./cut", "--json", "--no-reference")
    assert code == 3
    assert json.loads(out)["error"]["kind"] == "checkpoint"
    assert "model.safetensors" in json.loads(out)["error"]["message"]


def test_a_hub_that_cannot_be_reached(run, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        del args, kwargs
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    code, _, err = run("llava-1.5-7b")
    assert code == 3
    assert "llava-hf/llava-1.5-7b-hf" in err
    assert "local checkpoint folder" in err


def test_the_exit_code_reaches_the_shell(tmp_path):
    done = run_python(
        "import sys; from gap_export.cli.main import main; sys.exit(main())",
        "./nowhere",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "error: ./nowhere: no such folder"
    assert "Traceback" not in done.stderr


def test_stopping_by_keyboard_is_no_traceback(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gap_export.config.files.is_model", stop)
    assert run("refshapes") == (130, "", "stopped\n")


def run_python(code, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
