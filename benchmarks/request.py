"""One request as a user makes it, a picture and a phrase in and a box out, split by stage.

    python -m benchmarks.request [--precisions fp32 int4] [--ratios 0 0.5 0.75] [--bundle FOLDER]

The checkpoint is random (benchmarks.checkpoints) and answers no boxes. So the tokens of an answer
are forced: every call of the decoder is made in full, then the token that is wanted is made the
most likely one. A draft is thereby accepted where it is right, as with a model that answers in its
form, and refused elsewhere. First and further phrases, ratios, and answers with and without drafts
take turns in one process; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from benchmarks.runtime import HOME, make_checkpoint
from benchmarks.suite import format_table
from gap_runtime.backends import DecoderSession
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.grounding.prompt import PHRASE_FIELD, load_tokenizer

ANSWER: Final = " [0.12, 0.34, 0.56, 0.78]"
_FIRST: Final = "the red mug on the left of the table"
_FURTHER: Final = "the blue plate in front of the window"
_STAGES: Final = ("preprocess", "vision", "prefill", "decode", "total")


class ForcedAnswer:
    """A decoder session whose answer is given; fits gap_runtime.backends.DecoderSession."""

    def __init__(self, session: DecoderSession, answer: Sequence[int]) -> None:
        """Force an answer, whose last token is a stop token."""
        self._session, self._answer = session, answer
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
            row[self._answer[int(slot) + 1 - self._length]] = row.max() + 1
        return logits


@dataclass(slots=True, kw_only=True)
class Case:
    """Times of one kind of request, in milliseconds by stage; `calls` of the decoder."""

    ratio: float
    draft: bool
    first: list[dict[str, float]] = field(default_factory=list)
    further: list[dict[str, float]] = field(default_factory=list)
    calls: int = 0

    def median(self, times: list[dict[str, float]], stage: str) -> float:
        """Of a stage."""
        return statistics.median(each[stage] for each in times)


def prepare(name: str, precision: str, ratios: Sequence[float], home: Path) -> Path:
    """A bundle of a random checkpoint, exported if it is not there."""
    wanted = "-".join(f"{ratio:g}" for ratio in ratios)
    out = home / "request" / f"{name}-{precision}-{wanted}"
    if not out.exists():
        program = Path(sys.executable).parent / "gap-export"
        command = [str(program), str(make_checkpoint(name, home)), "--no-reference"]
        for ratio in ratios:
            command += ["--ratio", str(ratio)]
        command += ["--bring", "link", "--out", str(out)]
        command += ["--quantize", "int4"] if precision == "int4" else []
        subprocess.run(command, check=True)
    return out


def measure(bundle: Bundle, runs: int) -> list[Case]:
    """Time all kinds of requests on a bundle by turns, after one run that is not counted."""
    grounder = Grounder(bundle, keep_pictures=0)
    values = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    cache = grounder._open_cache()  # noqa: SLF001 - the answer is forced behind its back
    cache.session = ForcedAnswer(cache.session, _read_answer(bundle))
    entries = bundle.manifest.ratios
    cases = [Case(ratio=entry.ratio, draft=draft) for entry in entries for draft in (False, True)]
    for run in range(runs + 1):
        for case in cases:
            entry = bundle.choose_ratio(case.ratio)
            view = grounder.look(picture)
            first = grounder.run_stages(view, _FIRST, entry, draft=case.draft)
            further = grounder.run_stages(view, _FURTHER, entry, draft=case.draft)
            if run:
                case.first.append(first.milliseconds)
                case.further.append(further.milliseconds)
            case.calls = first.decoded.calls
    return cases


def _read_answer(bundle: Bundle) -> list[int]:
    """The tokens of the answer behind the prompt, as the model's tokenizer writes them."""
    prompt = bundle.manifest.prompt
    assert prompt.tokenizer is not None
    tokenizer = load_tokenizer(bundle.folder / prompt.tokenizer)
    before = prompt.template.rpartition(PHRASE_FIELD)[2]
    start, whole = (
        tokenizer.encode(text, add_special_tokens=False).ids for text in (before, before + ANSWER)
    )
    return [*whole[len(start) :], prompt.stop_ids[0]]


def tabulate(cases: list[Case]) -> list[list[str]]:
    """Rows of the table, the first one with titles."""
    titles = ["removed", "drafts", "calls", *(f"{stage}, ms" for stage in _STAGES)]
    rows = [[*titles, "further prefill, ms", "further total, ms"]]
    for case in cases:
        times = [f"{case.median(case.first, stage):.0f}" for stage in _STAGES]
        later = [f"{case.median(case.further, stage):.0f}" for stage in ("prefill", "total")]
        rows.append(
            [f"{case.ratio:g}", "yes" if case.draft else "no", str(case.calls), *times, *later]
        )
    return rows


def compare(cases: list[Case]) -> Iterator[str]:
    """Ratios that say what drafts and a known picture save."""
    for plain, drafted in zip(cases[::2], cases[1::2], strict=True):
        decode = drafted.median(drafted.first + drafted.further, "decode")
        decode /= plain.median(plain.first + plain.further, "decode")
        prefill = drafted.median(drafted.further, "prefill")
        prefill /= drafted.median(drafted.first, "prefill")
        whole = drafted.median(drafted.further, "total") / plain.median(plain.first, "total")
        yield (
            f"removed {plain.ratio:g}: decoding with drafts {decode:.2f} of that without, prefill "
            f"of a further phrase {prefill:.2f} of the first one's, all of it {whole:.2f} of a "
            "first one without drafts"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="one request, split by stage")
    parser.add_argument("--checkpoint", default="llava-185m")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int4"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--bundle", type=Path, help="measure this one instead")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--home", type=Path, default=HOME)
    options = parser.parse_args()
    os.environ["GAP_RUNTIME_THREADS"] = str(options.threads)
    for precision in options.precisions if options.bundle is None else ["as it is"]:
        folder = options.bundle or prepare(
            options.checkpoint, precision, options.ratios, options.home
        )
        cases = measure(Bundle.open(folder), options.runs)
        print(f"\n### {folder.name}, {precision}, threads: {options.threads}\n")
        print(format_table(tabulate(cases), markdown=True))
        print("\n" + "\n".join(f"- {line}" for line in compare(cases)))
        print(f"- load average at the end: {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
