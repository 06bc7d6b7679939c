"""The report as it is opened: parsed always, and in a real browser where there is one."""

import json
import re

import pytest
from tools import browser

from gap_export.analysis.report.plots import Line, draw_key, plot_accuracy, plot_bars
from gap_export.analysis.report.tables import read_published
from gap_runtime.cli import main as runtime

SECTIONS = {"accuracy", "paper", "cost", "parity", "tests", "gallery", "made"}


@pytest.fixture(scope="session")
def report(swept, pages):
    return pages.Page((swept / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def check_page(refshapes_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "check.html"
    arguments = [
        "check",
        str(refshapes_bundle),
        "--backend",
        "onnxruntime:cpu",
        "--html",
        str(out),
    ]
    assert runtime.main(arguments) == 0
    return out


def test_the_report_is_sound(report, pages):
    pages.require_sound(report)
    assert set(report.ids) >= SECTIONS
    assert {link for link in report.links if not link.startswith("#")} == {
        *("cells.csv", "sizes.csv", "comparisons.csv", "report.json")
    }


def test_links_lead_to_files_that_are_there(report, swept):
    for link in report.links:
        assert link.startswith("#") or (swept / link).is_file()


def test_the_report_shows_what_was_asked_for(report):
    # One plot for the pruner, three for what it costs.
    assert len(report.graphics) == 1 + 3
    assert "cls_attention" in report.graphics[0]["aria-label"]
    assert len(report.images) == 4
    for part in (
        *("What the figures are of", "padded-square", "nobody is known to publish figures on it"),
        "0.75 removed is the most within 100 points of the unpruned model",
    ):
        assert part in report.words, part
    for part in ("the protocol frame", "0 of 30 answers", "McNemar", "drawn at random (seed 0)"):
        assert part in report.words, part


def test_published_figures_are_marked_and_stand_apart(swept):
    text = (swept / "report.html").read_text(encoding="utf-8")
    published, measured = text.index('<div class="published">'), text.index('class="measured">')
    assert published < text.index("published, not measured here") < measured
    assert measured < text.index("measured here</span>", measured)
    for row in read_published():
        for value in (row.unpruned, row.pruned, row.gap):
            places = [found.start() for found in re.finditer(re.escape(f"{value:.2f}"), text)]
            places = [place for place in places if text[place - 4 : place] == "<td>"]
            assert len(places) == 1
            assert published < places[0] < measured


def test_figures_of_the_page_are_those_of_the_tables(report, swept):
    data = json.loads((swept / "report.json").read_text(encoding="utf-8"))
    for row in data["cells"]:
        if row["protocol"] == "frame" and row["side"] == "exported":
            shown = (
                f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
            )
            assert shown in report.words


def test_plots_take_their_colours_from_the_page():
    line = Line(
        label="gap",
        style=0,
        ratios=[0.25, 0.5],
        values=[90.0, 80.0],
        low=[85.0, 75.0],
        high=[95.0, 85.0],
        hollow=[90.0, None],
    )
    one = plot_accuracy("<one>", [line], 95.0, 'a "plot" <of> one')
    two = plot_bars("two", "ms", [0.0, 0.5], [("vision", [1.0, 2.0]), ("decode", [3.0, 4.0])], "b")
    assert one == plot_accuracy("<one>", [line], 95.0, 'a "plot" <of> one')
    for plot in (one, two):
        assert "#0102" not in plot
        assert "var(--ink)" in plot
        assert not re.search(r"#(000000|ffffff)\b", plot)
        assert not re.search(r'(?<!\w)(width|height)="[\d.]+pt"', plot)
    assert "&lt;one&gt;" in one
    ids = re.findall(r'\bid="([^"]+)"', one) + re.findall(r'\bid="([^"]+)"', two)
    assert len(ids) == len(set(ids))
    assert draw_key(0) != draw_key(1)


def require_well_shown(opened, visit, path):
    """No message, nothing asked for, nothing wider than the window."""
    assert visit.console == []
    assert visit.failed == []
    outside = [url for url in visit.requests if not url.startswith(("data:", path.as_uri()))]
    assert outside == []
    assert opened.evaluate("document.images.length") > 0
    assert opened.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    width = opened.evaluate("window.innerWidth")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.skipif(
    browser.find_browser() is None,
    reason=f"no browser here: none of {', '.join(browser.PROGRAMS)} is installed",
)
@pytest.mark.parametrize("which", ["report", "check"])
def test_a_browser_shows_it_and_asks_for_nothing(which, swept, check_page):
    path = swept / "report.html" if which == "report" else check_page
    with browser.Browser() as opened:
        backgrounds, inks = set(), set()
        for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
            opened.emulate(width, scheme)
            require_well_shown(opened, opened.visit(path), path)
            backgrounds.add(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
            if which == "report":
                inks.add(
                    opened.evaluate("getComputedStyle(document.querySelector('.plot text')).fill")
                )
        assert len(backgrounds) == 2
        assert len(inks) == (2 if which == "report" else 0)
        opened.emulate(800, "dark", "print")
        opened.visit(path)
        paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(255, 255, 255)"
        assert opened.evaluate("!document.querySelector('nav')?.offsetParent")
