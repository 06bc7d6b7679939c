"""One request as a user makes it, a picture and a phrase in and a box out, split by stage.

    python -m benchmarks.request [--precisions fp32 int4] [--ratios 0 0.5 0.75]
        [--backends onnxruntime openvino] [--peers NAME ...] [--picture FILE.svg]

The checkpoint is random (benchmarks.checkpoints) and answers no boxes. So the tokens of answers
are forced: every call of the decoder is made in full, then the token that is wanted is made the
most likely one. A draft is thereby accepted where it is right, as with a model that answers in its
form, and refused elsewhere. The answers are the true ones to held-out phrases of refshapes-256,
one after the other, so that what drafts guess by sizes is right as often as it is there.

First and further phrases, ratios, and answers with and without drafts take turns in one process
that has answered before. Figures are medians. Of `decode`, which differs by the answer, a run has
the mean of its answers, to the first and further phrases alike; `calls` is the mean of all.

Peers are timed by their scripts (benchmarks.runtime): on the same weights, a prompt of as many
tokens as our unpruned one, and as many tokens decoded as the answer has. They read no picture
file, so their requests are without `preprocess`, and a peer without a vision tower is compared
with our decoder alone. What they measured is kept in a file: `--resume` goes on where a run
stopped.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.checkpoints import RUN
from benchmarks.command import (
    read_home,
    read_number,
    read_output,
    read_ratio,
    read_seconds,
    read_threads,
    run_benchmark,
    run_export,
)
from benchmarks.runtime import HOME, NEEDS, Comparison, make_checkpoint
from benchmarks.suite import (
    OWN,
    PEERS,
    PRECISIONS,
    Results,
    format_table,
    list_peers,
    median,
    read_peer,
)
from gap_runtime.backends import DecoderSession
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.files import require_apart
from gap_runtime.cli.options import ArgumentParser
from gap_runtime.evaluation.refshapes import format_box
from gap_runtime.evaluation.refshapes256 import SIDE, draw_scene
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.grounding.prompt import PHRASE_FIELD, load_tokenizer
from gap_runtime.grounding.view import View

_FIRST: Final = "the red mug on the left of the table"
_FURTHER: Final = (
    "a blue plate in front of the door",
    "one green bottle behind the red lamp",
    "some ring above the white square",
    "two red cups near the blue ring",
)
"""Without a word in common at the beginning, which would not be computed again."""
_ANSWERED: Final = 32
"""Phrases before anything is timed: by then, OpenVINO compiles what it makes of calls that come
often, and sizes of boxes are known. A round of all requests follows, which is not timed either."""
_STAGES: Final = ("preprocess", "vision", "prefill", "decode")
_TARGETS: Final = {"onnxruntime": "cpu", "openvino": "openvino"}
"""What a bundle of each backend is exported for."""
_NO_DRAFTS: Final = "no drafts"
_COLORS: Final = ("#8c8c8c", "#4c78a8", "#f58518", "#54a24b")


class ForcedAnswer:
    """A decoder session whose answer is given; fits gap_runtime.backends.DecoderSession.

    `answer` is the one to force, its last token a stop token.
    """

    def __init__(self, session: DecoderSession) -> None:
        """Force none yet."""
        self._session = session
        self.answer: Sequence[int] = ()
        self._length = 0
        self.fit = session.fit

    def run(
        self,
        embeddings: np.ndarray,
        position_ids: np.ndarray,
        write_slot: int,
        logits_rows: np.ndarray,
    ) -> np.ndarray:
        """What the session gives, with the wanted token as the most likely one."""
        if embeddings.shape[1] > 8:
            # A prompt: the first row whose logits are wanted is its last one.
            self._length = write_slot + int(logits_rows[0]) + 1
        logits = self._session.run(embeddings, position_ids, write_slot, logits_rows)
        for row, slot in zip(logits, write_slot + logits_rows, strict=True):
            row[self.answer[int(slot) + 1 - self._length]] = row.max() + 1
        return logits


@dataclass(slots=True, kw_only=True)
class Case:
    """Times of one kind of request, in milliseconds by stage.

    `decode` is the mean of a run's answers, and `calls` are those of the decoder by answer.
    """

    ratio: float
    draft: bool
    first: list[dict[str, float]] = field(default_factory=list)
    further: list[dict[str, float]] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)

    @property
    def decode_ms(self) -> float:
        """Of an answer; of single ones it differs, as some take fewer calls than others."""
        return statistics.median(self.decode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A line of the table and a bar of the picture: milliseconds by stage, and calls in the mean.

    A stage that a subject has not is left out. `whole` is false for a peer without vision.
    """

    name: str
    removed: str
    calls: float
    milliseconds: Mapping[str, float]
    whole: bool = True

    @property
    def total(self) -> float:
        """Of all stages that were measured."""
        return sum(self.milliseconds.values())


def prepare(
    name: str, precision: str, ratios: Sequence[float], home: Path, backend: str = "onnxruntime"
) -> Path:
    """A bundle of a random checkpoint for a backend, exported if it is not there."""
    wanted = "-".join(f"{ratio:g}" for ratio in ratios)
    out = home / "request" / f"{name}-{precision}-{backend}-{wanted}"
    if not out.exists():
        command = [str(make_checkpoint(name, home)), "--no-reference"]
        for ratio in ratios:
            command += ["--ratio", str(ratio)]
        command += ["--dtype", "float32", "--target", _TARGETS[backend]]
        command += ["--bring", "link", "--out", str(out)]
        if precision == "int4":
            # The tower in 8 bits, as the peers have it.
            command += ["--quantize", "int4", "--set", "quantize.vision=true"]
        run_export(command)
    return out


class Asker:
    """Requests to a Grounder whose answers are forced, one after the other."""

    def __init__(self, grounder: Grounder) -> None:
        """Take the place of its decoder."""
        self._grounder = grounder
        # Each kind has them one after the other: what one would learn of is not asked of another.
        self._answers = {draft: list_answers(grounder.bundle) for draft in (False, True)}
        cache = grounder._open_cache()  # noqa: SLF001 - the answer is forced behind its back
        cache.session = self._forced = ForcedAnswer(cache.session)

    def ask(self, view: View, phrase: str, case: Case) -> dict[str, float]:
        """Times of a request, in milliseconds by stage; its calls are noted."""
        self._forced.answer = next(self._answers[case.draft])
        if case.draft:
            found = view.ground(phrase, ratio=case.ratio)
            case.calls.append(found.calls)
            return dict(found.milliseconds)
        entry = self._grounder.bundle.choose_ratio(case.ratio)
        values = self._grounder.run_stages(view, phrase, entry, draft=False)
        case.calls.append(values.decoded.calls)
        return values.milliseconds


def measure(grounder: Grounder, runs: int) -> list[Case]:
    """Time all kinds of requests on a bundle by turns, after answers that do not count."""
    values = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    asker = Asker(grounder)
    ratios = [entry.ratio for entry in grounder.bundle.manifest.ratios]
    cases = [Case(ratio=ratio, draft=draft) for ratio in ratios for draft in (False, True)]
    view, untimed = grounder.look(picture), Case(ratio=ratios[-1], draft=True)
    for number in range(_ANSWERED):
        asker.ask(view, _FURTHER[number % len(_FURTHER)], untimed)
    for run in range(runs + 1):
        for case in cases:
            timed = case if run else replace(case, calls=[])
            view = grounder.look(picture)
            first = asker.ask(view, _FIRST, timed)
            further = [asker.ask(view, phrase, timed) for phrase in 2 * _FURTHER]
            if run:
                case.first.append(first)
                case.further += further
                case.decode.append(statistics.mean(each["decode"] for each in (first, *further)))
    return cases


def list_answers(bundle: Bundle) -> Iterator[list[int]]:
    """Tokens of one answer after the other, as the model's tokenizer writes them behind a prompt.

    They are the true ones to held-out phrases of refshapes-256, in LLaVA's form.
    """
    prompt = bundle.manifest.prompt
    assert prompt.tokenizer is not None
    tokenizer = load_tokenizer(bundle.folder / prompt.tokenizer)
    before = prompt.template.rpartition(PHRASE_FIELD)[2]
    start = tokenizer.encode(before, add_special_tokens=False).ids
    for number in itertools.count():
        scene = draw_scene("test", number)
        for question in scene.questions:
            text = f"{before} {format_box(question.box, *scene.image.size, SIDE)}"
            whole = tokenizer.encode(text, add_special_tokens=False).ids
            yield [*whole[len(start) :], prompt.stop_ids[0]]


def count_prompt(grounder: Grounder) -> int:
    """Tokens of the first phrase's prompt with all of the picture's."""
    bundle = grounder.bundle
    prompt = grounder.encoder.encode_within(_FIRST, bundle.manifest.layout)
    return len(prompt.prefix) + bundle.choose_ratio(0.0).kept + len(prompt.suffix)


def list_requests(name: str, cases: Sequence[Case]) -> Iterator[Request]:
    """Ours: the first phrase on a picture, and a further one where drafts are sent."""
    for case in cases:
        drafts = "drafts" if case.draft else _NO_DRAFTS
        kinds = [("", case.first), (", further phrase", case.further)][: 1 + case.draft]
        for kind, times in kinds:
            yield Request(
                name=f"{name}, {drafts}{kind}",
                removed=f"{case.ratio:g}",
                calls=statistics.mean(case.calls),
                milliseconds={
                    stage: statistics.median(each.get(stage, 0.0) for each in times)
                    for stage in _STAGES
                }
                | {"decode": case.decode_ms},
            )


def list_peer_requests(rows: Sequence[Mapping[str, Any]], calls: int) -> Iterator[Request]:
    """Peers': they see all tokens of the picture, and each token of the answer is a call."""
    for row in rows:
        if row["failed"] or not row["rounds"]:
            continue
        count = str(row["settings"]["prompts"][0])
        stages = {
            "vision": median(ms for each in row["rounds"] for ms in each["vision_ms"] or []),
            "prefill": median(ms for each in row["rounds"] for ms in each["prefill_ms"][count]),
            "decode": median(ms for each in row["rounds"] for ms in each["token_ms"][count]),
        }
        known = {stage: ms for stage, ms in stages.items() if ms is not None}
        known["decode"] *= calls
        yield Request(
            name=row["name"],
            removed="0",
            calls=calls + 1,
            milliseconds=known,
            whole=row["scope"] == "whole",
        )


def measure_peers(
    options: argparse.Namespace, precision: str, *, prompt: int, calls: int
) -> list[Mapping[str, Any]]:
    """Rows of the peers' rounds, which take turns; those that cannot be had say why."""
    peers = [read_peer(PEERS / f"{name}.py") for name in options.peers]
    settings = argparse.Namespace(**vars(options), prompts=[prompt], tokens=calls, keep=True)
    comparison = Comparison(
        name=options.checkpoint,
        precision=precision,
        peers={peer.key: peer for peer in peers if precision in peer.precisions},
        options=settings,
        results=Results(options.home / "request.json", NEEDS),
    )
    comparison.run()
    return [
        row
        for row in comparison.results.rows.values()
        if (row["checkpoint"], row["precision"]) == (options.checkpoint, precision)
    ]


def tabulate(requests: Sequence[Request]) -> list[list[str]]:
    """Rows of the table, the first one with titles; peers stand above ours."""
    rows = [["request", "removed", "calls", *(f"{stage}, ms" for stage in _STAGES), "total, ms"]]
    for each in requests:
        times = [
            f"{each.milliseconds[stage]:,.0f}" if stage in each.milliseconds else "-"
            for stage in _STAGES
        ]
        name = each.name if each.whole else f"{each.name} (decoder)"
        rows.append([name, each.removed, f"{each.calls:.3g}", *times, f"{each.total:,.0f}"])
    return rows


def compare(cases: Sequence[Case]) -> Iterator[str]:
    """Ratios that say what drafts and a known picture save."""

    def mid(times: list[dict[str, float]], stage: str) -> float:
        return statistics.median(each[stage] for each in times)

    def whole(times: list[dict[str, float]], case: Case) -> float:
        before = statistics.median(each["total"] - each["decode"] for each in times)
        return before + case.decode_ms

    for plain, drafted in zip(cases[::2], cases[1::2], strict=True):
        decode = drafted.decode_ms / plain.decode_ms
        prefill = mid(drafted.further, "prefill") / mid(drafted.first, "prefill")
        first, further = whole(drafted.first, drafted), whole(drafted.further, drafted)
        seven = 7 * whole(plain.first, plain) / (first + 6 * further)
        yield (
            f"removed {plain.ratio:g}: decoding with drafts {decode:.2f} of that without, prefill "
            f"of a further phrase {prefill:.2f} of the first one's, seven phrases on a picture "
            f"{seven:.1f} times as fast as without drafts and with nothing kept"
        )


def draw(requests: Sequence[Request], title: str, path: Path) -> None:
    """A stacked bar for each request, the stages from left to right, as SVG."""
    # A picture is drawn on demand.
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 0.8 + 0.34 * len(requests)), layout="constrained")
    axes = figure.subplots()
    labels = [
        f"{each.name}, {float(each.removed):.0%} removed"
        if each.removed != "0"
        else each.name + ("" if each.whole else " (decoder)")
        for each in requests
    ]
    left = np.zeros(len(requests))
    for stage, color in zip(_STAGES, _COLORS, strict=True):
        seconds = np.array([each.milliseconds.get(stage, 0.0) for each in requests]) / 1e3
        bars = axes.barh(labels, seconds, left=left, color=color, label=stage)
        left += seconds
    axes.bar_label(bars, [f"{total:.1f} s" for total in left], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, left.max() * 1.15)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("seconds from picture and phrase to box")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=len(_STAGES), frameon=False, loc="outside lower center")
    with rc_context({"svg.hashsalt": "request"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="one request, split by stage")
    parser.add_argument("--checkpoint", default="llava-185m", choices=list(RUN))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int4"], choices=PRECISIONS)
    parser.add_argument("--ratios", type=read_ratio, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--backends", nargs="+", default=["onnxruntime"], choices=[*_TARGETS])
    parser.add_argument("--bundle", type=Path, help="measure this one instead")
    peers = [name for name in list_peers() if name not in OWN]
    parser.add_argument("--peers", nargs="*", default=[], choices=peers)
    parser.add_argument(
        "--picture", type=read_output, help="an SVG of stacked bars, of one precision"
    )
    parser.add_argument("--runs", type=read_number, default=5, help="in one process")
    parser.add_argument("--rounds", type=read_number, default=1, help="processes of each peer")
    parser.add_argument("--limit", type=read_seconds, default=3600.0, help="seconds for a process")
    parser.add_argument("--resume", action="store_true", help="keep what peers measured")
    parser.add_argument("--threads", type=read_threads, default=1)
    parser.add_argument("--home", type=read_home, default=HOME)
    options = parser.parse_args()
    if options.bundle is not None and options.picture is not None:
        require_apart(options.picture, [options.bundle], "--picture")
    os.environ["GAP_RUNTIME_THREADS"] = str(options.threads)
    for precision in options.precisions if options.bundle is None else ["as it is"]:
        requests: list[Request] = []
        notes: list[str] = []
        for backend in options.backends:
            folder = options.bundle or prepare(
                options.checkpoint, precision, options.ratios, options.home, backend
            )
            grounder = Grounder(Bundle.open(folder), backend, keep_pictures=0)
            cases = measure(grounder, options.runs)
            grounder.close()
            requests += list_requests(f"gap-export ({backend})", cases)
            notes += [f"{backend}, {line}" for line in compare(cases)]
        if options.peers:
            # The prefill gives the answer's first token.
            calls = len(next(list_answers(grounder.bundle))) - 1
            prompt = count_prompt(grounder)
            rows = measure_peers(options, precision, prompt=prompt, calls=calls)
            requests = [*list_peer_requests(rows, calls), *requests]
            notes += [f"{row['name']}: {row['failed']}" for row in rows if row["failed"]]
        title = f"{folder.name}, {precision}, threads: {options.threads}"
        print(f"\n### {title}\n\n{format_table(tabulate(requests), markdown=True)}\n")
        print("\n".join(f"- {line}" for line in notes))
        print(f"- load average at the end: {os.getloadavg()[0]:.1f}", flush=True)
        if options.picture is not None:
            draw(
                [each for each in requests if _NO_DRAFTS not in each.name], title, options.picture
            )


if __name__ == "__main__":
    run_benchmark(main)
