"""Figures of the pages, held to the files in docs/figures that the commands wrote, and to tables.

Each figure has one file or table, written by the command that the page names.
"""

import json
import re

from tools.places import ROOT

FIGURES = ROOT / "docs" / "figures"
MODES = ("unpruned", "gap", "compact", "permuted")


def read_figures(name):
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


def read_rows(page, beginning):
    """Cells of the rows of a page's tables whose first cell begins so."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return [row for row in rows if row[0].startswith(beginning)]


def read_text(page):
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_every_file_of_figures_is_named_on_a_page():
    pages = [ROOT / "refshapes/README.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    said = "".join(page.read_text(encoding="utf-8") for page in pages)
    for file in FIGURES.iterdir():
        assert f"docs/figures/{file.name}" in said


def show_share(value):
    return f"{value:.1%}".replace("%", " %")


def test_what_position_ids_do():
    """`make effect`: the tables of README.md and of refshapes/README.md."""
    found = read_figures("effect")
    assert (found["n"], found["ratio"]) == (1000, 0.75)
    shares = {
        "PyTorch": [show_share(found["pytorch"][mode]) for mode in MODES],
        "exported ONNX": [show_share(found["onnxruntime"][mode]) for mode in MODES],
    }
    for label, cells in shares.items():
        assert [row[1:] for row in read_rows("README.md", label)] == [cells]
        # The page of the models has the table of the small one before.
        assert read_rows("refshapes/README.md", label)[1:] == [[label, *cells]]
    head = f"1,000 expressions of `test`, ratio {found['ratio']}, {found['pruner']}"
    assert len(read_rows("refshapes/README.md", head)) == 1
    unpruned, gap, compact, permuted = shares["exported ONNX"]
    (shipped,) = read_rows("refshapes/README.md", "shipped")
    assert [*shipped[1:3], *shipped[4:]] == [unpruned, gap, compact, permuted]


def test_how_many_answers_differ_from_pytorchs():
    """`make effect`: what README.md and refshapes/README.md say beside the tables."""
    found = read_figures("effect")
    assert found["differing_answers"] == dict.fromkeys(MODES, 0)
    text = read_text("refshapes/README.md")
    assert "each in one thread, gave the same text to all 4,000." in text
    kept = found["pytorch"]["gap"] / found["pytorch"]["unpruned"]
    assert f"GAP keeps {kept:.0%}".replace("%", " %") + " of the unpruned accuracy." in text


def read_counts():
    """Of docs/results.md, which `make keeps` writes: unpruned, then GAP and compact by count."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    text = text.partition("<!-- counts:")[2].partition("<!-- end of counts -->")[0]
    unpruned = float(re.search(r"unpruned ([\d.]+)", text)[1])
    head = re.search(r"\| pruner \| (.*) \|", text)[1].split(" | ")
    rows = {}
    for name, cells in re.findall(r"^\| (`\w+`[^|]*) \| (.*) \|$", text, re.MULTILINE):
        pairs = [
            re.match(r"\*\*([\d.]+)\*\* \(.*\) / ([\d.]+)", cell) for cell in cells.split(" | ")
        ]
        rows[name] = {
            int(k): tuple(map(float, p.groups())) for k, p in zip(head, pairs, strict=True)
        }
    return unpruned, rows


def test_the_front_page_on_counts_of_tokens():
    unpruned, rows = read_counts()
    text = read_text("README.md")
    assert len(rows) == 10
    assert "Ten pruners on 200 new phrases, 40 to 192 of 256 tokens kept" in text
    good = [
        name for name, row in rows.items() if all(row[k][0] >= unpruned - 1 for k in (192, 128))
    ]
    assert len(good) == 5
    assert "five of them lose at most one point at 192 and 128 tokens" in text
    best = max(row[64][0] for row in rows.values())
    assert (
        f"the best is right on {best:g} % at 64, where the whole model is on {unpruned:g} %"
        in text
    )
    worst = max(row[k][1] for row in rows.values() for k in row)
    assert f"none is right on more than {worst:g} %" in text


def test_how_well_scores_tell_what_is_there():
    """`python -m benchmarks.confidence`: the table of docs/serve.md."""
    found = read_figures("confidence")
    wanted = [
        [f"{each['ratio']:g}"]
        + [f"{each[key]:.2f}" for key in ("auc", "auc_right", "threshold", "recall")]
        for each in found
    ]
    text = read_text("docs/serve.md")
    assert all(f"| {' | '.join(row)} |" in text for row in wanted)
    assert f"refshapes with {found[0]['present']} phrases of each kind" in text
    assert all(each["present"] == each["absent"] for each in found)


def show_times(times):
    return f"p50 {times['p50']:.1f} ms, p95 {times['p95']:.1f} ms, p99 {times['p99']:.1f} ms"


def test_what_the_service_takes():
    """`python -m benchmarks.service`: the table of docs/serve.md, and what was asked of it."""
    found = read_figures("service")
    assert found["statuses"] == {"200": found["requests"]}
    many = ", ".join(f"{name} {value:.0f} ms" for name, value in found["many"].items())
    memory = ", ".join(
        f"{found[f'memory_{when}']:.1f}"
        for when in ("ready", "after_first", "after_all", "after_all_again")
    )
    alone, direct = (found[name]["p50"] for name in ("alone", "alone_direct"))
    client = "one client, by its own clock"
    wanted = [
        f"| 1,000 requests of {found['clients']} clients | 1,000 answers, no error; {many} |",
        f"| {memory} MiB: ",
        f"| one client: overhead | {show_times(found['alone_inside'])} |",
        f"| 16 clients: overhead | {show_times(found['many_overhead'])} |",
        f"| the library beside its stages | {show_times(found['library'])} |",
        f" the same call of the library | p50 {alone:.1f} ms, {direct:.1f} ms |",
        f"| {client}: beyond the call | {show_times(found['alone_overhead'])} |",
        f"| the same body without a phrase, refused | {show_times(found['alone_http'])} |",
    ]
    text = read_text("docs/serve.md")
    assert [line for line in wanted if line not in text] == []
    overheads = ("alone_inside", "many_overhead", "alone_overhead")
    assert max(found[name]["p50"] for name in overheads) <= 2


def test_what_an_export_of_true_size_takes():
    """The table of docs/performance.md, and the two pages that repeat its first row."""
    ((shapes, time, memory, _),) = [
        row for row in read_rows("docs/performance.md", "LLaVA-1.5-7B, 14.1 GB") if len(row) == 4
    ]
    name, size = shapes.removesuffix(" in float16").split(", ")
    said = f"{name} ({size}) takes {time.split()[0]} s and {memory} GB of memory"
    for page in ("README.md", "docs/exporting.md"):
        assert said in read_text(page)
