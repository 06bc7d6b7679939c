"""The commands that the documents show are ones that the command lines take."""

import json
import re
import shlex
from typing import get_type_hints

import pytest
from tools.places import ROOT

from gap_export.cli import main as export_cli
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.cli import main as runtime_cli
from gap_runtime.cli import options as runtime_command
from gap_runtime.grounding.compare import TOLERANCES
from gap_runtime.grounding.view import GroundingFacts
from gap_runtime.registry import list_plugins
from gap_runtime.service import app, connections, questions
from gap_runtime.service.models import Reply
from gap_runtime.service.openapi import describe_service
from gap_runtime.service.settings import ServiceSettings

PAGES = [
    *("README.md", "CONTRIBUTING.md", "runtime/README.md", "refshapes/README.md"),
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]
COMMANDS = {"gap-export": export_cli.PROGRAM.run, "gap-runtime": runtime_cli.PROGRAM.run}


def commands():
    for page in PAGES:
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            found = re.match(r"    (?:\$ )?(gap-(?:export|runtime) .*)", line)
            if found:
                yield pytest.param(found.group(1), id=f"{page}: {found.group(1)}"[:70])


class Taken(Exception):  # noqa: N818 - no error
    """Ends a command when it has read its arguments."""


@pytest.mark.parametrize("command", list(commands()))
def test_command_of_a_document_is_taken(command, monkeypatch):
    parse = runtime_command.ArgumentParser.parse_args

    def stop(parser, arguments):
        parse(parser, arguments)
        raise Taken

    monkeypatch.setattr(runtime_command.ArgumentParser, "parse_args", stop)
    name, *arguments = shlex.split(command.partition(" > ")[0], comments=True)
    with pytest.raises(Taken):
        COMMANDS[name](arguments)


PLACES = [
    *(ROOT / place for place in ("", "gap_export", "runtime", "runtime/gap_runtime")),
    *(ROOT / "tests" / place for place in ("", "export", "runtime")),
]
"""Where a path in a document may begin."""


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_files_that_a_document_names_are_there(page):
    """Paths of code; `<name>` in one stands for any name."""
    named = set(
        re.findall(r"`(\w[\w<>.-]*/[\w./<>-]+\.(?:py|toml|css))`", page.read_text("utf-8"))
    )
    missing = {
        name
        for name in named
        if not any(next(place.glob(re.sub(r"<\w+>", "*", name)), None) for place in PLACES)
    }
    assert missing == set()


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_document_are_indented(page):
    """Else they are no code, and the test above does not see them."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"^gap-(?:export|runtime) .*", text, flags=re.MULTILINE)


def test_the_documents_show_every_command_of_the_exporter():
    shown = " ".join(str(command.values[0]) for command in commands())
    for command in ("list", "positions", "count", "evaluate", "sweep"):
        assert f"gap-export {command} " in shown


def test_every_command_of_the_runtime_is_in_its_readme():
    text = (ROOT / "runtime" / "README.md").read_text(encoding="utf-8")
    for command in list_plugins("gap_runtime.cli.commands"):
        assert f"gap-runtime {command} " in text


def test_what_check_accepts_is_in_the_readme():
    text = (ROOT / "runtime" / "README.md").read_text(encoding="utf-8")
    table = text.partition("### What check accepts")[2].partition("Pixels:")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    rows = [row for row in rows if row and row[0] in TOLERANCES]
    assert [row[0] for row in rows] == list(TOLERANCES)
    for name, *numbers, iou, misses, jaccard in rows:
        said = TOLERANCES[name]
        assert [*map(float, numbers)] == [said.pixels, said.visual, said.logits, said.near_tie]
        assert iou == ("never" if said.iou is None else f"{said.iou:g}")
        assert misses == (f"{100 * said.misses:g} in 100" if said.misses else "none")
        assert jaccard == ("never" if said.jaccard is None else f"{said.jaccard:g}")


def read_table(text, head):
    """The rows of a table of Markdown by its first line, as lists of cells."""
    table = text.partition(head)[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [row for row in rows if row and not (row[0] and set(row[0]) <= {"-"})]


def test_the_page_on_the_service_says_its_limits():
    """Every default of docs/serve.md, against the settings and the status of each error."""
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    usual = ServiceSettings()
    rows = read_table(text, "| option | default | beyond it |")
    said = {row[0].strip("`").split()[0]: int(row[1].split()[0]) for row in rows}
    assert said.pop("connections") == connections.MOST_CONNECTIONS
    assert said.pop("a") == connections.IDLE_SECONDS  # connection without a request
    assert said.pop("phrases") == usual.phrases
    assert said.pop("--keep-pictures") == 256
    assert said == {
        f"--{name.replace('_', '-')}": getattr(usual, name)
        for name in ("queue", "seconds", "body_mb", "megapixels")
    }
    assert f"{usual.phrase_length:,} characters each" in text
    assert f"`--grace` seconds ({usual.grace:g})" in text
    codes = {row[0].strip("`").split()[0]: row[2][:3] for row in rows}
    status = {kind.__name__: str(code) for kind, code in app._STATUS}
    assert codes["--queue"] == status["BusyError"]
    assert codes["--seconds"] == status["LateError"]
    assert codes["--body-mb"] == status["TooLargeError"]
    assert codes["--megapixels"] == codes["phrases"] == status["ConfigError"]


def test_the_page_on_the_service_names_its_addresses_and_keys():
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    for path in describe_service(ServiceSettings())["paths"]:
        assert path in text
    fields = read_table(text, "| field | |")
    assert {key for row in fields for key in re.findall(r"\w+", row[0])} == set(questions.KEYS)
    example = json.loads(re.search(r"```json\n(.*?)```", text, flags=re.DOTALL).group(1))
    assert set(example["results"][0]) == set(get_type_hints(GroundingFacts))
    reply = Reply(
        model="", size=(1, 1), found=(), cells=None, prompt_tokens=0, picture_ms=0.0
    ).dump({"queue": 0.0})
    assert set(example) == set(reply)
    assert set(example["milliseconds"]) == set(reply["milliseconds"])


def test_python_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1)
    (tmp_path / "refshapes").symlink_to(ROOT / "refshapes")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert [entry.ratio for entry in Bundle.open("bundle").manifest.ratios] == [0.25, 0.5, 0.75]
    assert "Box(" in capsys.readouterr().out


def read_rows(page, beginning):
    """Cells of the rows of a page's tables whose first cell begins so."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return [row for row in rows if row[0].startswith(beginning)]


@pytest.mark.parametrize("side", ["PyTorch", "exported ONNX"])
def test_the_front_page_has_the_figures_of_the_model_s_own_page(side):
    (front,) = read_rows("README.md", side)
    assert len(front) == 5
    assert front[1:] in [row[1:] for row in read_rows("refshapes/README.md", side)]


def test_the_front_page_has_the_figures_of_the_page_on_performance():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = read_table(page, "| precision | removed | request | calls |")
    start = next(k for k, row in enumerate(rows) if row[0] == "int4")
    whole, *_, quarter, further = rows[start + 1 : start + 9]
    assert (whole[2], quarter[2], further[2]) == ("drafts", "drafts", "further")
    peers = read_table(page, "| precision | peer, nothing removed |")
    (peer,) = (row for row in peers if row[:2] == ["int4", "OpenVINO GenAI"])
    seconds = [f"{int(row[-1].replace(',', '')) / 1000:.1f} s" for row in (quarter, whole, peer)]
    assert f"takes {seconds[0]} with three quarters of 576 visual tokens removed" in text
    assert f"{seconds[1]} with all of them, and {seconds[2]} in OpenVINO GenAI" in text
    again = [
        int(row[column].replace(",", "")) / 1000
        for row in rows[start:]
        for column in (7, 11)
        if row[2] == "further"
    ]
    assert f"same picture {min(again):.1f} to {max(again):.1f} s" in text
    half_cache, whole_cache = (
        float(
            next(row for row in read_rows("docs/performance.md", removed) if row[1] == prompt)[8]
        )
        for removed, prompt in (("0.5", "336"), ("0", "624"))
    )
    assert f"its KV cache takes {half_cache:.0f} MB instead of {whole_cache:.0f} MB" in text
    (row,) = read_rows("docs/performance.md", "transformers.exporters 5.23")
    times, share = (float(re.search(r"\(([\d.]+)x\)", cell)[1]) for cell in row[1:3])
    assert f"is {times} times as fast as transformers' exporter, in {1 / share:.2f} of" in text
