"""The command line: exit codes, one clear line per error, JSON, flags and quick help."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from truths import pruners as pruner_formulas

from gap_export.cli import main as cli
from gap_export.config import POSITION_MODES, list_configs, package_data
from gap_runtime.bundle.layout import count_kept
from gap_runtime.cli import main as runtime_cli
from gap_runtime.machines.target import list_targets
from gap_runtime.registry import list_plugins, load_plugin

TEMPLATE = "prompt.template=USER: <image>\nWhere is {phrase}? ASSISTANT:"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run gap-export in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_in_process(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run_in_process


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
    (["refshapes", "--ratio", "half"], 2, "config", "--ratio"),
    (["refshapes", "--pruner", "spacial"], 2, "unknown-name", "did you mean spatial"),
    (["refshapes", "--positions", "gaps"], 2, "config", "prune.positions 'gaps'"),
    (["refshapes", "--dtype", "int8"], 2, "config", "dtype 'int8'"),
    (["refshapes", "--target", "gpu"], 2, "unknown-name", "unknown target 'gpu'"),
    (["refshapes", "--bring", "move"], 2, "config", "--bring"),
    (["refshapes", "--weights", "copy"], 2, "config", "--weights"),
    (["refshapes", "--set", "prompt.answer"], 2, "config", "KEY=VALUE"),
    (["refshapes", "--set", "prompt.anser=3"], 2, "record", "unknown key 'prompt.anser'"),
    (["refshapes", "--set", "prompt.answer=long"], 2, "record", "expected int"),
    (["refshapes", "--set", "prune.seed=-1", "--pruner", "random"], 2, "config", "seed"),
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

    monkeypatch.setattr("gap_export.config.is_model", stop)
    assert run("refshapes") == (130, "", "stopped\n")


def test_dry_run_facts(run, tiny_llava, tmp_path):
    code, out, err = run(
        *(tiny_llava, "--dry-run", "--json", "--ratio", "0.5", "--ratio", "0.75"),
        *("--set", TEMPLATE, "--set", "prompt.suffix=24", "--set", "prompt.answer=8"),
        *("--positions", "compact", "--dtype", "float16"),
    )
    facts = json.loads(out)
    assert code == 0
    assert "Traceback" not in err
    assert facts["bundle"] == "tiny-llava-13-6of25"
    assert facts["ratios"] == [
        {"ratio": 0.5, "bucket": "", "patches": 25, "kept": 13, "extra": 0},
        {"ratio": 0.75, "bucket": "", "patches": 25, "kept": 6, "extra": 0},
    ]
    layout = facts["layout"]
    assert layout["capacity"] == layout["prefix"] + 13 + 24 + 8
    assert set(layout) == {"prefix", "suffix", "answer", "capacity"}
    assert (layout["suffix"], layout["answer"]) == (24, 8)
    # Keys and values of 2 layers, 2 heads of 16, 2 bytes each.
    assert facts["cache_bytes"] == layout["capacity"] * 2 * 2 * 2 * 16 * 2
    assert facts["dtype"] == "float16"
    assert facts["config"]["prune"]["positions"] == "compact"
    assert facts["checkpoint"] == str(tiny_llava)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rule", "extra"), [("append", 1), ("drop", 0)])
def test_dry_run_counts_the_token_that_is_made_of_the_rest(run, tiny_llava, rule, extra):
    """Only where something is removed."""
    code, out, err = run(
        *(tiny_llava, "--dry-run", "--json", "--set", TEMPLATE, "--set", "prompt.suffix=24"),
        *("--pruner", "prumerge", "--extra-token", rule, "--ratio", "0.5", "--ratio", "0"),
    )
    facts = json.loads(out)
    layout = facts["layout"]
    assert code == 0
    assert [entry["extra"] for entry in facts["ratios"]] == [extra, 0]
    assert layout["capacity"] == layout["prefix"] + 25 + 24 + layout["answer"]
    assert ("13 + 1 of 25" in err) == (extra == 1)


def test_dry_run_for_people(run, tiny_llava, tmp_path):
    code, out, err = run(tiny_llava, "--dry-run", "--set", TEMPLATE, "--ratio", "0.75")
    assert (code, out) == (0, "tiny-llava-6of25\n")
    assert "6 of 25" in err
    assert "note:" not in err
    assert not list(tmp_path.iterdir())


def test_more_positions_than_the_model_was_made_for_are_noted(run, tiny_llava):
    code, _, err = run(
        *(tiny_llava, "--dry-run", "--set", TEMPLATE),
        *("--set", "prompt.suffix=24", "--set", "prompt.answer=500"),
    )
    assert code == 0
    # 4 before, 25 patches, 24 after and 500 of answer; the first position is 0.
    assert "reach position 552" in " ".join(err.split())
    assert "512 positions" in " ".join(err.split())


def test_dry_run_refuses_what_the_export_would(run, tiny_llava, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    code, _, err = run(tiny_llava, "--dry-run", "--out", "file", "--set", TEMPLATE)
    assert code == 2
    assert "exists and is no bundle" in err


def test_export_with_json(run, tiny_llava, tmp_path):
    code, out, err = run(
        *(tiny_llava, "--json", "--no-reference", "--out", "bundle", "--bring", "link"),
        *("--set", TEMPLATE, "--pruner", "spatial", "--ratio", "0.75"),
    )
    result = json.loads(out)
    assert code == 0
    assert "tracing the decoder" in err
    assert result["bundle"] == "bundle"
    assert result["ratios"] == [
        {"ratio": 0.75, "bucket": "", "patches": 25, "kept": 6, "extra": 0}
    ]
    assert result["checked"] is False
    assert (result["pruner"], result["positions"]) == ("spatial", "gap")
    assert (tmp_path / "bundle" / "manifest.json").is_file()


@pytest.mark.parametrize("rule", ["last-visual", "append", "centroid", "drop"])
@pytest.mark.parametrize("pruner", ["random", "prumerge"])
def test_positions_are_the_oracles(run, tiny_llava, pruner, rule):
    code, out, _ = run(
        *("positions", tiny_llava, "--json", "--set", TEMPLATE, "--phrase", "the mug"),
        *("--pruner", pruner, "--extra-token", rule, "--ratio", "0", "--ratio", "0.75"),
    )
    mappings = json.loads(out)
    assert code == 0
    assert [(m["kept"], m["patches"]) for m in mappings] == [(25, 25), (6, 25)]
    # Without a picture the extra token is said to be made of what is in the middle.
    weights = [int(index == 25 // 2) for index in range(25)]
    for mapping in mappings:
        made = pruner == "prumerge" and rule != "drop" and mapping["kept"] < 25
        assert mapping["extra"] == int(made)
        modes = {mode["mode"]: mode for mode in mapping["modes"]}
        assert list(modes) == list(POSITION_MODES)
        order = [token for token in modes["permuted"]["visual_slots"] if token != -1]
        for name, mode in modes.items():
            before, after = len(mode["prefix_ids"]), len(mode["suffix_ids"])
            slots, ids, first = pruner_formulas.place(
                before, 25, after, order, name, rule if made else None, weights
            )
            shown = [pruner_formulas.EXTRA if s == -1 else s for s in mode["visual_slots"]]
            assert shown == slots
            assert mode["prefix_ids"] + mode["visual_ids"] + mode["suffix_ids"] == ids
            assert mode["first_answer_id"] == first


def test_positions_of_a_picture_are_those_of_its_answer(run, refshapes_samples):
    picture = refshapes_samples / "test-006.png"
    code, out, _ = run(
        *("positions", "refshapes", "--json", "--image", picture, "--phrase", "the red one"),
        *("--ratio", "0.5"),
    )
    mapping = json.loads(out)[0]
    assert code == 0
    assert picture.name in mapping["example"]
    modes = {mode["mode"]: mode for mode in mapping["modes"]}
    order = modes["permuted"]["visual_slots"]
    assert sorted(order) == modes["gap"]["visual_slots"]
    assert order != sorted(order)
    assert len(set(order)) == 32


def test_positions_for_people_are_one_table_a_ratio(run, tiny_llava):
    code, out, _ = run(
        *("positions", tiny_llava, "--set", TEMPLATE, "--ratio", "0.5", "--ratio", "0.75")
    )
    assert code == 0
    assert "13 of 25" in out
    assert "6 of 25" in out
    for mode in POSITION_MODES:
        assert out.count(mode) >= 2


@pytest.fixture
def refshapes_samples():
    return package_data("refshapes") / "samples"


@pytest.mark.parametrize("listed", [True, False])
def test_count_proposes_ratios_that_keep_what_the_rule_kept(
    run, tmp_path, refshapes_samples, listed
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures = sorted(refshapes_samples.glob("*.png"))
    for path in [*pictures, *([refshapes_samples / "samples.json"] if listed else [])]:
        shutil.copyfile(path, folder / path.name)
    if not listed:
        (folder / "broken.png").write_bytes(b"no picture")
    code, out, err = run(
        "count", "refshapes", "--json", "--images", folder, "--pruner", "prumerge"
    )
    found = json.loads(out)
    assert code == 0
    assert found["pruner"] == "prumerge"
    assert (len(found["skipped"]), "broken.png" in err) == (int(not listed), not listed)
    (bucket,) = found["buckets"]
    assert (bucket["bucket"], bucket["patches"]) == ("", 64)
    assert bucket["pictures"] >= len(pictures)
    assert 1 <= bucket["least"] <= bucket["mean"] <= bucket["most"] <= 64
    for ratio, count in (
        (bucket["ratio_of_mean"], bucket["mean"]),
        (bucket["ratio_of_ninth_decile"], bucket["ninth_decile"]),
    ):
        assert count_kept(64, ratio) == round(count)


def run_python(code, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def test_list_says_what_there_is_with_a_line_from_its_own_file(run):
    code, out, _ = run("list", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == ["models", "pruners", "positions", "targets"]
    assert [model["name"] for model in found["models"]] == list_configs()
    assert [pruner["name"] for pruner in found["pruners"]] == list_plugins("gap_export.pruners")
    assert [target["name"] for target in found["targets"]] == list_targets()
    assert [mode["name"] for mode in found["positions"]] == list(POSITION_MODES)
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


def flags(parser):
    return {option for action in parser._actions for option in action.option_strings}


def positionals(parser):
    return [action.dest for action in parser._actions if not action.option_strings]


def find_parser(program, name):
    """The parser of a command."""
    return program.make_command_parser(name, load_plugin(program.package, name, "command"))


def find_parsers(program):
    return {name: find_parser(program, name) for name in list_plugins(program.package)}


HELP = {"-h", "--help"}


@pytest.mark.parametrize("program", [cli.PROGRAM, runtime_cli.PROGRAM], ids=["export", "runtime"])
def test_help_shows_every_command_with_what_it_does(program):
    text = " ".join(program.make_parser().format_help().split())
    for name in list_plugins(program.package):
        command = load_plugin(program.package, name, "command")
        assert f" {name} {command.SUMMARY}" in text
    assert flags(program.make_parser()) == HELP | {"--version"}


def test_a_folder_that_is_called_like_a_misspelt_command_is_a_model(run, tmp_path):
    (tmp_path / "swep").mkdir()
    code, _, err = run("swep", "--dry-run")
    assert code == 2
    assert "swep: no config.json in it" in err


def test_a_word_is_needed(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("error: give MODEL or a command (count, evaluate, export, ")


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


def test_the_flags_of_gap_export_are_these():
    """A new flag is a decision: it is made here as well."""
    parser = find_parser(cli.PROGRAM, "export")
    assert positionals(parser) == ["model"]
    assert flags(parser) == HELP | {
        *(
            "--ratio",
            "--pruner",
            "--positions",
            "--extra-token",
            "--dtype",
            "--quantize",
            "--target",
            "--set",
        ),
        *(
            *("--bring", "--weights"),
            "--no-reference",
            "--checkpoint",
            "--out",
            "--force",
            "--dry-run",
            "--json",
        ),
        *("-v", "--verbose"),
    }


EVALUATE = {
    *("--data", "--images", "--protocol", "--ratio", "--limit", "--out", "--resume", "--compare"),
    *("--ray", "--workers"),
}
SWEEP_FLAGS = {
    *("--data", "--images", "--protocol", "--limit", "--ray", "--workers", "--ratios"),
    *("--pruners", "--positions", "--pytorch", "--gallery", "--out", "--resume", "--backend"),
    *("--extra-token", "--dtype", "--target", "--checkpoint", "--set", "--json"),
    *("-v", "--verbose"),
}
PROBE = {"--json", "--ratio", "--image", "--phrase"}
SURVEYS = ["positions", "count", "evaluate"]


def test_the_commands_that_export_nothing_have_these_flags():
    shared = {"--pruner", "--checkpoint", "--set", "--json", "-v", "--verbose"}
    own = {
        "positions": {"--ratio", "--extra-token", "--image", "--phrase"},
        "count": {"--images", "--phrase"},
        "evaluate": {"--positions", "--extra-token"} | EVALUATE,
    }
    for command in SURVEYS:
        parser = find_parser(cli.PROGRAM, command)
        assert positionals(parser) == ["model"]
        assert flags(parser) == HELP | shared | own[command]
    sweep = find_parser(cli.PROGRAM, "sweep")
    assert (positionals(sweep), flags(sweep)) == (["model"], HELP | SWEEP_FLAGS)
    probe = find_parser(cli.PROGRAM, "probe")
    assert (positionals(probe), flags(probe)) == (["bundle"], HELP | PROBE)


def test_the_commands_and_flags_of_gap_runtime_are_these():
    commands = find_parsers(runtime_cli.PROGRAM)
    assert {name: (positionals(p), flags(p) - HELP) for name, p in commands.items()} == {
        "ground": (
            ["bundle", "image", "phrase"],
            {"--json", "--ratio", "--draw", "--backend"},
        ),
        "check": (["bundle"], {"--json", "--backend", "--html"}),
        "info": (["bundle"], {"--json"}),
        "build": (
            ["bundle"],
            {
                *("--json", "--target", "--ratio", "--compute-capability", "--timing-cache"),
                *("--set", "--force"),
            },
        ),
        "doctor": ([], {"--json"}),
        "bench": (["bundle"], {"--json", "--runs", "--backend"}),
        "evaluate": (["bundle"], {"--json", "--backend"} | EVALUATE),
    }


@pytest.mark.parametrize("arguments", [["--rat", "0.5"], ["--no-ref"], ["--js"]])
def test_flags_are_not_abbreviated(run, arguments):
    """An abbreviation that works today would break when another flag is added."""
    code, _, err = run("refshapes", "--dry-run", *arguments)
    assert code == 2
    assert arguments[0] in err


@pytest.mark.parametrize(
    "arguments",
    [["positions", "--rat", "0.5"], ["count", "--image", "x"], ["positions", "--js"]],
)
def test_flags_of_other_commands_are_not_abbreviated(run, arguments):
    code, _, err = run(arguments[0], "refshapes", *arguments[1:])
    assert code == 2
    assert "--" in err


def test_every_flag_says_what_it_does():
    for program in (cli.PROGRAM, runtime_cli.PROGRAM):
        for parser in find_parsers(program).values():
            for action in parser._actions:
                assert action.help, action


def test_weights_are_copied_and_answers_recorded_by_default():
    options = find_parser(cli.PROGRAM, "export").parse_args(["refshapes"])
    assert (options.bring, options.reference, options.target) == ("copy", True, "cpu")
    assert (options.ratios, options.pruner, options.positions, options.dtype) == (None,) * 4
    assert options.extra_token is None
