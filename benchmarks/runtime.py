"""Memory and speed of the exported model beside other ways to run the same one on the CPU.

    python -m benchmarks.runtime [--peers NAME ...] [--resume] [--markdown]

All subjects get the same random weights (benchmarks.checkpoints), precision, token counts and
number of threads. They take turns, round by round, each time in a fresh process; figures are
medians over all runs of all rounds. A peer lives in an environment of its own
(benchmarks.environments), one that cannot be installed or that fails is a line that says so.
Results are kept in a JSON file: `--resume` goes on where a run stopped, `--peers` does some
subjects again and keeps the others', `--show` only prints.

gap-export itself runs on both of its backends for CPUs. For every other subject the number in
brackets says how many times better the faster one of ours is; below 1 the other is better. A peer
marked (decoder) has no vision tower; its load time and memory are compared with those of our
decoder alone, while its export is compared with ours of the whole model.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.checkpoints import RUN, write_checkpoint
from benchmarks.command import (
    read_count,
    read_home,
    read_number,
    read_output,
    read_seconds,
    read_threads,
    run_benchmark,
)
from benchmarks.suite import (
    OURS,
    OWN,
    PEERS,
    PRECISIONS,
    Column,
    Peer,
    PeerError,
    Results,
    find_peer_python,
    format_table,
    list_peers,
    median,
    prepare_peer,
    read_peer,
    run_peer,
    tabulate,
    turns,
)
from gap_runtime.cli.options import ArgumentParser

HOME: Final = Path("build/benchmarks")
NEEDS: Final = frozenset(
    ("checkpoint", "precision", "peer", "name", "scope", "settings", "rounds", "failed")
)
"""Of every row of the results."""
_SETTINGS: Final = ("threads", "prompts", "tokens", "runs")


def make_checkpoint(name: str, home: Path) -> Path:
    """A checkpoint's folder with its decoder, written if it is not there."""
    folder = home / "checkpoints" / name
    # The tokenizer is written last.
    if not (folder / "processor_config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(name, folder, decoder=True)
    return folder


def make_columns(prompts: list[int]) -> list[Column]:
    """Figures of the table, from a row's preparation and the medians of its rounds."""

    def prepared(name: str, title: str, digits: int = 0) -> Column:
        return Column(title=title, read=lambda row: row["prepare"].get(name), digits=digits)

    def measured(name: str, title: str, digits: int = 0) -> Column:
        return Column(
            title=title,
            read=lambda row: median(each[name] for each in row["rounds"]),
            read_decoder=lambda row: median(each.get(f"decoder_{name}") for each in row["rounds"]),
            digits=digits,
        )

    def prefill(count: int) -> Column:
        return Column(
            title=f"prefill {count}, ms",
            read=lambda row: median(
                ms for each in row["rounds"] for ms in each["prefill_ms"][str(count)]
            ),
        )

    return [
        prepared("seconds", "export, s"),
        prepared("peak_mb", "export peak, MB"),
        prepared("written_mb", "written, MB"),
        measured("load_s", "load, s", digits=2),
        measured("resident_mb", "resident, MB"),
        Column(
            title="vision, ms",
            read=lambda row: median(
                ms for each in row["rounds"] for ms in each["vision_ms"] or []
            ),
        ),
        *(prefill(count) for count in prompts),
        Column(title="tokens/s", read=read_speed, better="high", digits=1),
    ]


def read_speed(row: dict[str, Any]) -> float | None:
    """Tokens a second: the mean of the medians after each prompt."""
    rounds = row["rounds"]
    times = [
        median(ms for each in rounds for ms in each["token_ms"][count])
        for count in rounds[0]["token_ms"]
    ]
    present = [token_ms for token_ms in times if token_ms]
    return 1e3 * len(present) / sum(present) if present else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One checkpoint in one precision, and who can run it."""

    name: str
    precision: str
    peers: dict[str, Peer]
    options: argparse.Namespace
    results: Results

    def run(self) -> None:
        """Prepare all subjects, then let them take turns."""
        for subject in self.peers:
            self.prepare(subject)
        for number, subject in turns(self.options.rounds, self.peers):
            self.measure(subject, number)
        if not self.options.keep:
            for subject in self.peers:
                shutil.rmtree(self._out(subject), ignore_errors=True)

    def prepare(self, subject: str) -> None:
        """Start a subject's row and convert the checkpoint for it, unless all that is done."""
        options, peer, key = self.options, self.peers[subject], self._key(subject)
        settings = {name: getattr(options, name) for name in _SETTINGS}
        row = self.results.rows.get(key)
        if not (options.resume and row and row["settings"] == settings):
            row = {"checkpoint": self.name, "precision": self.precision, "peer": subject}
            row |= {"name": peer.name, "scope": peer.scope, "settings": settings}
            row |= {"rounds": [], "failed": None}
        elif (
            row["failed"]
            or len(row["rounds"]) >= options.rounds
            or ("prepare" in row and self._out(subject).exists())
        ):
            return
        print(f"{key}: prepare", flush=True)
        try:
            row["prepare"] = prepare_peer(
                peer,
                make_checkpoint(self.name, options.home),
                self._out(subject),
                precision=self.precision,
                home=options.home,
                threads=options.threads,
                limit_s=options.limit,
            )
        except PeerError as error:
            row["failed"] = str(error)
            print(f"{key}: {error}", flush=True)
        self.results.put(key, row)

    def measure(self, subject: str, number: int) -> None:
        """A round of a subject in a process of its own, unless it is done."""
        options, peer, key = self.options, self.peers[subject], self._key(subject)
        row = self.results.rows[key]
        if row["failed"] or len(row["rounds"]) > number:
            return
        checkpoint = make_checkpoint(self.name, options.home)
        arguments = ["measure", str(self._out(subject)), "--precision", self.precision]
        arguments += ["--checkpoint", str(checkpoint), "--threads", str(options.threads)]
        arguments += ["--prompts", *map(str, options.prompts), "--tokens", str(options.tokens)]
        arguments += ["--runs", str(options.runs)]
        load = os.getloadavg()[0]
        try:
            done = run_peer(
                find_peer_python(peer),
                peer,
                arguments,
                threads=options.threads,
                limit_s=options.limit,
            )
            ended = time.strftime("%Y-%m-%d %H:%M:%S")
            row["rounds"].append(done.answer | {"load_average": load, "ended": ended})
            # A figure that is missing is found now and not when the table is made.
            for column in make_columns(options.prompts):
                column.read(row)
        except PeerError as error:
            row["failed"] = str(error)
        except (KeyError, TypeError, IndexError) as error:
            row["failed"] = f"its answer is not as agreed: {error!r}"
        self.results.put(key, row)
        print(f"{key}: round {number + 1}, {row['failed'] or 'done'}", flush=True)

    def _key(self, subject: str) -> str:
        return f"{self.name}/{self.precision}/{subject}"

    def _out(self, subject: str) -> Path:
        home: Path = self.options.home
        return home / "prepared" / self.name / self.precision / subject


def choose_own(rows: dict[str, dict[str, Any]]) -> str:
    """Which of ours the others are compared with: the one whose request takes least time."""

    def request_ms(row: dict[str, Any]) -> float:
        count, rounds = str(row["settings"]["prompts"][0]), row["rounds"]
        stages = [
            median(ms for each in rounds for ms in each["vision_ms"] or []),
            median(ms for each in rounds for ms in each["prefill_ms"][count]),
            median(ms for each in rounds for ms in each["token_ms"][count]),
        ]
        vision, prefill, token = (ms or 0.0 for ms in stages)
        return vision + prefill + int(row["settings"]["tokens"]) * token

    ran = {key: row for key, row in rows.items() if key in OWN and not row["failed"]}
    times = {key: request_ms(row) for key, row in ran.items() if row["rounds"]}
    return min(times, key=lambda key: times[key], default=OURS)


def count_agreement(own: dict[str, Any] | None, row: dict[str, Any]) -> str:
    """How many of the decoded tokens are ours, in words; empty where that is not known.

    A token that differs changes all that follow, so tokens are counted up to there.
    """
    if own is None or own is row or not own["rounds"] or not row["rounds"]:
        return ""
    ours, theirs = (each["rounds"][-1].get("token_ids") for each in (own, row))
    if not ours or not theirs:
        return ""
    same = 0
    for count in ours:
        pairs = zip(ours[count], theirs.get(count, []), strict=False)
        same += len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return f"decodes {same} of {sum(map(len, ours.values()))} tokens as {own['name']} does"


def print_tables(results: Results, options: argparse.Namespace) -> None:
    """A table for each checkpoint and precision that there are results for."""
    order = list_peers()
    for name in options.checkpoints:
        for precision in options.precisions:
            found = {
                row["peer"]: row
                for row in results.rows.values()
                if (row["checkpoint"], row["precision"]) == (name, precision)
                # `--rounds 0` only prepares.
                and (row["rounds"] or row["failed"])
            }
            rows = {key: found[key] for key in order if key in found}
            if not rows:
                continue
            settings = next(iter(rows.values()))["settings"]
            rounds = [each for row in rows.values() for each in row["rounds"]]
            loads = [each["load_average"] for each in rounds] or [0.0]
            title = f"{name}, {precision}, threads: {settings['threads']}"
            print(f"\n{'### ' if options.markdown else ''}{title}\n")
            chosen = choose_own(rows)
            table = tabulate(rows, make_columns(settings["prompts"]), ours=chosen)
            print(format_table(table, markdown=options.markdown))
            print(f"\nload average while measuring: {min(loads):.1f} to {max(loads):.1f}")
            for row in rows.values():
                notes = [row.get("prepare", {}).get("note"), *(e["note"] for e in row["rounds"])]
                said = "; ".join(dict.fromkeys(note for note in notes if note))
                versions = row["rounds"][-1]["versions"] if row["rounds"] else {}
                listed = ", ".join(f"{key} {value}" for key, value in versions.items())
                same = count_agreement(rows.get(chosen), row)
                print(f"- {row['name']}: {'; '.join(filter(None, [listed, said, same])) or '-'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison."""
    parser.add_argument("--checkpoints", nargs="+", default=list(RUN), choices=list(RUN))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--peers", nargs="+", default=list_peers(), choices=list_peers())
    parser.add_argument("--threads", type=read_threads, default=1)
    parser.add_argument(
        "--prompts", type=read_number, nargs="+", default=[624, 336], help="tokens"
    )
    parser.add_argument("--tokens", type=read_number, default=32, help="decoded after each prompt")
    parser.add_argument("--runs", type=read_number, default=5, help="in one process")
    parser.add_argument("--rounds", type=read_count, default=3, help="processes of each subject")
    parser.add_argument(
        "--limit", type=read_seconds, default=3600.0, help="seconds for one process"
    )
    parser.add_argument("--home", type=read_home, default=HOME)
    parser.add_argument("--out", type=read_output, default=HOME / "runtime.json")
    parser.add_argument("--resume", action="store_true", help="keep what is there, do the rest")
    parser.add_argument("--keep", action="store_true", help="keep converted models (many GB)")
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--markdown", action="store_true")


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="memory and speed beside peers, on the CPU")
    add_arguments(parser)
    options = parser.parse_args()
    results = Results(options.out, NEEDS)
    if not options.show:
        wanted = [name for name in list_peers() if name in options.peers]
        peers = [read_peer(PEERS / f"{name}.py") for name in wanted]
        for name in options.checkpoints:
            for precision in options.precisions:
                Comparison(
                    name=name,
                    precision=precision,
                    peers={peer.key: peer for peer in peers if precision in peer.precisions},
                    options=options,
                    results=results,
                ).run()
    print_tables(results, options)


if __name__ == "__main__":
    run_benchmark(main)
