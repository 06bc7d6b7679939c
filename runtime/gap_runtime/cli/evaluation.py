"""What the `evaluate` commands of both distributions share: their options and the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gap_runtime.cli.options import add_counts, print_json, require_outputs_apart
from gap_runtime.errors import ConfigError
from gap_runtime.evaluation import describe_formats, describe_protocols
from gap_runtime.records.files import exists

if TYPE_CHECKING:
    from gap_runtime.display import Display
    from gap_runtime.evaluation.api import Evaluation
    from gap_runtime.evaluation.data import Data
    from gap_runtime.evaluation.results import Answers, Header
    from gap_runtime.evaluation.run import Open, Spread
from gap_runtime.cli.evaluation_tables import (
    list_words,
    make_tables,
    write_evaluation,
)

_NAMED = 5
"""Bad pictures that are named; the rest is in the file."""
_SHOWN = 12
"""Pictures of what failed."""


class ListNames(argparse.Action):
    """Prints what there is to choose from, as `--help` prints help."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:  # noqa: A002
        """Take no value."""
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and end."""
        for kind, lines in (("formats", describe_formats()), ("protocols", describe_protocols())):
            print(f"{kind}:")
            width = max(map(len, lines))
            for name, line in lines.items():
                print(f"  {name:<{width}}  {line}")
        parser.exit()


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked, how answers are scored and where the work is done."""
    from gap_runtime.evaluation.protocol import DEFAULT_PROTOCOL  # noqa: PLC0415

    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="what to ask: SET:SPLIT@DIR (refcoco:val@DIR, ref-l4:all@DIR, "
        "screenspot-v2:all@DIR), a file, or refshapes:test; ,format=NAME where it is not to be "
        f"guessed ({', '.join(describe_formats())}); see docs/evaluation.md",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the pictures (default: the data's)"
    )
    parser.add_argument(
        "--protocol",
        action="append",
        metavar="NAME",
        help=f"how answers are scored: {', '.join(describe_protocols())}; give it again for more "
        f"(default: {DEFAULT_PROTOCOL})",
    )
    parser.add_argument(
        "--list", action=ListNames, help="list formats of data and protocols, a line each, and end"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N phrases only")
    parser.add_argument("--ray", action="store_true", help="work on a Ray cluster, by picture")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="with --ray: how many (default: all)"
    )


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    add_data_arguments(parser)
    add_counts(
        parser,
        ratio="shares of visual tokens removed, as 0,0.5 (default: all that there are)",
        keep="the same by counts of visual tokens that stay",
        nargs="+",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="append every answer to this file"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the file that --out names"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OTHER.jsonl",
        help="compare with these answers phrase by phrase (McNemar's test)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write all tables as one page, with pictures of what failed under the first protocol",
    )
    parser.add_argument(
        "--gallery",
        type=int,
        metavar="N",
        default=_SHOWN,
        help=f"pictures in that page (default: {_SHOWN}; 0: none of the data's)",
    )


def read_data(options: argparse.Namespace) -> Data:
    """The data, after all of `add_data_arguments` that can be checked at once.

    Raises:
        ConfigError: Options that do not go together, or an unknown name.
        InputError: A file that cannot be used.
    """
    from gap_runtime.evaluation.data import open_data  # noqa: PLC0415 - libraries when a command runs
    from gap_runtime.evaluation.protocol import RENAMED, load_protocol  # noqa: PLC0415

    if options.workers is not None and (not options.ray or options.workers < 1):
        raise ConfigError(f"--workers {options.workers}: goes with --ray, at least 1")
    for name in options.protocol or ():
        load_protocol(name)
        if name in RENAMED:
            print(f"note: --protocol {name} is now --protocol {RENAMED[name]}", file=sys.stderr)
    return open_data(options.data, images=options.images, limit=options.limit)


def choose_protocols(options: argparse.Namespace) -> list[str]:
    """Names of the protocols, each once."""
    from gap_runtime.evaluation.protocol import DEFAULT_PROTOCOL, RENAMED  # noqa: PLC0415

    asked = options.protocol or [DEFAULT_PROTOCOL]
    return list(dict.fromkeys(RENAMED.get(name, name) for name in asked))


def open_cluster(options: argparse.Namespace) -> Spread | None:
    """The cluster that is to do the work; None for this process."""
    if not options.ray:
        return None
    from gap_runtime.evaluation.spread import RayCluster  # noqa: PLC0415

    return RayCluster(options.workers)


def read_request(options: argparse.Namespace) -> tuple[Data, Answers | None]:
    """The data, and the answers to compare with, after all that can be checked at once.

    Raises:
        ConfigError: Options that do not go together, or an unknown name.
        InputError: A file that cannot be used.
    """
    from gap_runtime.bundle.files import require_apart  # noqa: PLC0415
    from gap_runtime.evaluation.expression import FilePicture  # noqa: PLC0415
    from gap_runtime.evaluation.results import read_answers  # noqa: PLC0415
    from gap_runtime.report.page import require_writable  # noqa: PLC0415

    if options.resume and options.out is None:
        raise ConfigError("--resume: which file? name it with --out")
    if options.out is not None and exists(options.out) and not options.resume:
        raise ConfigError(
            f"{options.out}: exists; go on with it by --resume, or give another --out"
        )
    if options.gallery < 0:
        raise ConfigError(f"--gallery {options.gallery}: at least 0 is needed")
    if options.html is not None:
        require_writable(options.html)
        answers = [path for path in (options.out, options.compare) if path is not None]
        require_apart(options.html, answers, "--html")
    other = None if options.compare is None else read_answers(options.compare)
    data = read_data(options)
    require_outputs_apart(options, data.paths)
    if options.html is not None and exists(options.html):
        pictures = [each.picture for each in data.expressions]
        files = {each.path for each in pictures if isinstance(each, FilePicture)}
        require_outputs_apart(options, files)
    return data, other


def run_evaluation(
    options: argparse.Namespace,
    display: Display,
    data: Data,
    *,
    header: Header,
    ratios: Sequence[float],
    open_answerer: Open,
) -> Answers:
    """Ask everything that is not yet answered."""
    from gap_runtime.display import Pace  # noqa: PLC0415
    from gap_runtime.evaluation.run import evaluate  # noqa: PLC0415

    spread = open_cluster(options)
    for note in data.notes:
        display.say(f"note: {note}")
    total = len(data.expressions) * len(ratios)
    with display.progress("asking") as show:

        def begin(left: int) -> Callable[[int], None]:
            if left < total:
                display.say(f"{total - left:,} of {total:,} answers were there already")
            return Pace(show, left, "answers")

        return evaluate(
            data,
            header,
            open_answerer,
            ratios=tuple(ratios),
            path=options.out,
            resume=options.resume,
            spread=spread,
            begin=begin,
        )


def finish(
    options: argparse.Namespace,
    display: Display,
    data: Data,
    answers: Answers,
    other: Answers | None,
) -> int:
    """Score, show, and the exit code."""
    from gap_runtime.evaluation.api import score_answers  # noqa: PLC0415

    protocols = choose_protocols(options)
    label = "" if options.compare is None else options.compare.name
    found = score_answers(data, answers, protocols, other=other, label=label)
    if options.json:
        print_json(found.dump())
    else:
        _show(found)
    if options.html is not None:
        with display.step("writing the page"):
            write_evaluation(found, options.html, protocols[0], pictures=options.gallery)
        display.say(f"report: {options.html}")
    _name_problems(display, answers, options.out)
    return 0


def _name_problems(display: Display, answers: Answers, out: Path | None) -> None:
    """Pictures and phrases that could not be asked, the first few by name."""
    problems = [row for row in answers.rows if row.problem is not None]
    for problem in list(dict.fromkeys(str(row.problem) for row in problems))[:_NAMED]:
        display.say(f"could not be asked: {problem}")
    if problems:
        where = "" if out is None else f"; all are in {out}"
        display.say(f"answers that could not be had, in no figure: {len(problems)}{where}")


def _show(found: Evaluation) -> None:
    from gap_runtime.display import print_table  # noqa: PLC0415

    for table in make_tables(found):
        print_table(table.title, table.header, table.rows)
    for line in list_words(found):
        print(line)
