"""`import gap_export`: one call from a model to a bundle, what it gives, and what it refuses."""

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import subprocess
import sys
from pathlib import Path

import pytest

import gap_export
from gap_export.config.load import OPTIONS
from gap_export.pipeline import api
from gap_export.pipeline.request import ExportOptions, ExportRequest, make_request
from gap_runtime import Bundle
from gap_runtime.grounding.check import CheckReport


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What the example of the package's docstring leaves behind: its folder, stdout, stderr."""
    home = tmp_path_factory.mktemp("example")
    code = gap_export.__doc__.partition("\n\n")[2]
    said, warned = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(home),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(warned),
    ):
        exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    return home, said.getvalue(), warned.getvalue()


def test_the_example_of_the_docstring_runs(example):
    """And no library says a word of its own."""
    home, out, said = example
    assert out == "bundle True\n"
    assert said == ""
    manifest = Bundle.open(home / "bundle").manifest
    assert [(entry.ratio, entry.kept) for entry in manifest.ratios] == [(0.25, 48), (0.5, 32)]


def test_the_same_export_again_is_found_with_its_report(example, monkeypatch, capsys):
    home = example[0]
    monkeypatch.chdir(home)
    monkeypatch.setitem(sys.modules, "gap_export.pipeline.run", None)
    result = gap_export.export("refshapes", ratios=[0.25, 0.5], out="bundle")
    assert result.folder == Path("bundle")
    assert result.plan is None
    assert isinstance(result.report, CheckReport)
    assert result.report.passed
    assert len(result.report.rows) == 6
    assert result.bundle.manifest == result.manifest
    assert repr(result) == "ExportResult('bundle', 6 of 6 answers equal PyTorch's)"
    assert result.summarize()["rows"] == 6
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("traced_anew")
def test_a_new_export_gives_the_same_result(tiny_llava, tmp_path, capsys):
    def export(**more):
        return gap_export.export(
            tiny_llava,
            ratios=0.75,
            out=tmp_path / "bundle",
            reference=False,
            bring="link",
            settings={"prompt.template": "USER: <image> {phrase}"},
            **more,
        )

    made, found, again = export(), export(), export(force=True)
    assert (made.plan is None, found.plan is None, again.plan is None) == (False, True, False)
    assert made.manifest == found.manifest == again.manifest
    assert (made.report, made.note) == (None, "no reference was recorded")
    assert "parity with PyTorch not checked: no reference was recorded" in repr(made)
    assert made.summarize() == found.summarize()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": 2}, "ratio 2 is outside"),
        ({"bring": "move"}, "bring 'move' is unknown; have copy, link"),
        ({"pruner": "spacial"}, "did you mean spatial"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"settings": {"prompt.anser": 3}}, "unknown key 'prompt.anser'"),
        ({"settings": {"a b": 3}}, "unknown key 'a b'"),
        ({"ration": 0.5}, "unknown option 'ration'; did you mean ratios"),
    ],
)
def test_what_cannot_be_is_a_gap_error(arguments, message, tmp_path):
    with pytest.raises(gap_export.GapError, match=message):
        gap_export.export("refshapes", out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_request_says_nothing_that_was_not_asked():
    request = make_request("refshapes")
    assert request == ExportRequest(named=request.named)
    assert request.named.config.prune.strategy == "cls_attention"


def test_every_option_is_described_and_stands_for_something():
    """The signature says what a type checker and an editor read; the text says it to people."""
    section = inspect.getdoc(api.export).partition("Args:\n")[2].partition("\n\n")[0]
    named = [line.strip().partition(":")[0] for line in section.splitlines() if line[4] != " "]
    options = list(ExportOptions.__annotations__)
    assert named == ["model", "force", "quiet", "**options", *options]
    of_request = {"settings", "checkpoint", *(f.name for f in dataclasses.fields(ExportRequest))}
    assert set(options) == (of_request - {"named"}) | set(OPTIONS)
    for function in (api.export, make_request):
        assert inspect.signature(function).parameters["options"].annotation == (
            "Unpack[ExportOptions]"
        )


def test_importing_the_package_loads_nothing_and_completes_its_names():
    code = (
        "import sys, gap_export\n"
        "print([name for name in ('torch', 'numpy', 'rich') if name in sys.modules])\n"
        "print({'export', 'ExportResult', 'GapError'} <= set(dir(gap_export)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True"]
    for name in gap_export.__all__:
        assert getattr(gap_export, name) is not None
    assert not hasattr(gap_export, "Exporter")


def test_the_package_is_typed():
    home = Path(importlib.util.find_spec("gap_export").origin).parent
    assert (home / "py.typed").is_file()
