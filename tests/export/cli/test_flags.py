"""The flags of every command: a new one is a decision."""

import pytest

from gap_export.cli import main as cli
from gap_runtime.cli import main as runtime_cli
from gap_runtime.registry import list_plugins, load_plugin


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
COUNTS = {"--ratio", "--ratios", "--keep", "--keeps"}
"""Shares to remove, or counts that stay: the same everywhere."""


def test_the_flags_of_gap_export_are_these():
    """A new flag is a decision: it is made here as well."""
    parser = find_parser(cli.PROGRAM, "export")
    assert positionals(parser) == ["model"]
    assert flags(parser) == HELP | {
        *(
            *COUNTS,
            "--pruner",
            "--positions",
            "--extra-token",
            "--dtype",
            "--quantize",
            "--kv-cache",
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
        *("--push", "--private", "--license", "--accept-license"),
        *("-v", "--verbose"),
    }


EVALUATE = {
    *("--data", "--images", "--protocol", *COUNTS, "--limit", "--out", "--resume", "--compare"),
    *("--ray", "--workers", "--list", "--html", "--gallery"),
}
SWEEP_FLAGS = {
    *("--data", "--images", "--protocol", "--limit", "--ray", "--workers", *COUNTS),
    *("--list", "--within", "--seeds"),
    *("--pruners", "--positions", "--pytorch", "--gallery", "--out", "--resume", "--backend"),
    *("--extra-token", "--dtype", "--target", "--checkpoint", "--set", "--json"),
    *("-v", "--verbose"),
}
PROBE = {"--json", "--ratio", "--keep", "--image", "--phrase"}
SURVEYS = ["positions", "count", "evaluate"]


def test_the_commands_that_export_nothing_have_these_flags():
    shared = {"--pruner", "--checkpoint", "--set", "--json", "-v", "--verbose"}
    own = {
        "positions": {*COUNTS, "--extra-token", "--image", "--phrase"},
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
            ["bundle", "inputs"],
            {
                *("--json", "--ratio", "--keep", "--draw", "--backend", "--no-draft"),
                *("--keep-pictures", "--phrase", "--least-score", "--jsonl"),
            },
        ),
        "check": (["bundle"], {"--json", *COUNTS, "--backend", "--html"}),
        "info": (["bundle"], {"--json"}),
        "build": (
            ["bundle"],
            {
                *("--json", "--target", *COUNTS, "--compute-capability", "--timing-cache"),
                *("--set", "--force"),
            },
        ),
        "doctor": ([], {"--json", "--all"}),
        "completion": (["shell"], set()),
        "pull": (["name"], {"--json", "--out"}),
        "push": (
            ["bundle", "name"],
            {"--accept-license", "--accuracy", "--backend", "--json"}
            | {"--license", "--no-check", "--private"},
        ),
        "watch": (
            ["bundle", "source"],
            {
                *("--json", "--ratio", "--keep", "--backend", "--no-draft", "--least-score"),
                *("--phrase", "--every", "--change", "--seconds", "--out", "--jsonl"),
            },
        ),
        "triton": (["bundle"], {"--json", "--out", "--backend"}),
        "serve": (
            ["bundles"],
            {
                *("--host", "--port", "--host-name", "--token-file", "--allow-url", "--queue"),
                *("--seconds", "--body-mb", "--megapixels", "--grace", "--ratio", "--keep"),
                *("--backend", "--no-draft", "--keep-pictures"),
            },
        ),
        "bench": (
            ["bundle"],
            {"--json", *COUNTS, "--runs", "--warmup", "--backend", "--all", "--no-draft"},
        ),
        "evaluate": (
            ["bundle"],
            {"--json", "--backend", "--no-draft", "--keep-pictures"} | EVALUATE,
        ),
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
