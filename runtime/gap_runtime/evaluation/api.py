"""What `import gap_runtime` gives to measure with: a bundle on a data set, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gap_runtime.backends import DEFAULT_BACKEND, open_backend
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.evaluation.answer import BundleAnswerer, describe_bundle
from gap_runtime.evaluation.compare import SIGNIFICANT, Comparison, compare_rows
from gap_runtime.evaluation.data import Data, open_data
from gap_runtime.evaluation.protocol import DEFAULT_PROTOCOL, RENAMED, load_protocol
from gap_runtime.evaluation.published import list_standings
from gap_runtime.evaluation.results import Answers, Header
from gap_runtime.evaluation.run import describe_data
from gap_runtime.evaluation.run import evaluate as run_evaluation
from gap_runtime.evaluation.score import Score, score_rows
from gap_runtime.grounding.fastest import choose_backend
from gap_runtime.records import dump_record


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Evaluation:
    """What an evaluation gave: a score for each ratio and protocol, and the answers."""

    answers: Answers
    data: Data
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]

    def __repr__(self) -> str:
        """The accuracy at each ratio, on one line."""
        said = ", ".join(
            f"{each.accuracy:.1%} at {each.ratio:g} ({each.protocol})" for each in self.scores
        )
        return f"Evaluation({self.data.name!r}, {len(self.answers.rows)} answers: {said})"

    def dump(self) -> dict[str, Any]:
        """Plain data for JSON."""
        header, data = self.answers.header, self.data
        return {
            "subject": dump_record(header.subject),
            "data": {
                **dump_record(header.data),
                "set": data.set,
                "split": data.split,
                "by": data.by,
                "limited": data.limited,
                "whole": data.whole,
            },
            "notes": list(data.notes),
            "scores": [
                {**dump_record(each), "published": dump_record(list_standings(each, data))}
                for each in self.scores
            ],
            "comparisons": [
                {
                    **dump_record(each),
                    "significant": each.p < SIGNIFICANT,
                    "words": each.describe(),
                }
                for each in self.comparisons
            ],
            "unasked": [
                {"key": row.key, "ratio": row.ratio, "problem": row.problem}
                for row in self.answers.rows
                if row.problem is not None
            ],
        }


def evaluate(
    bundle: Bundle | str | Path,
    data: str | Path,
    backend: str = DEFAULT_BACKEND,
    *,
    ratios: Sequence[float] | None = None,
    protocols: Sequence[str] = (DEFAULT_PROTOCOL,),
    images: str | Path | None = None,
    limit: int | None = None,
    draft: bool = True,
) -> Evaluation:
    """Measure how well a bundle grounds the phrases of a data set.

    Args:
        bundle: Opened, or its folder.
        data: What to ask, as `--data` of `gap-runtime evaluate`: a file, `refcoco:val@DIR` or
            `refshapes:test`.
        backend: As in Grounder.
        ratios: Those of the bundle's that are measured; all by default.
        protocols: How answers are scored.
        images: Folder of the pictures; the data's own by default.
        limit: Ask the first phrases only.
        draft: As in Grounder.

    Raises:
        ConfigError: An unknown name or ratio.
        InputError: The data cannot be used.
        EngineError: The backend failed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = choose_backend(opened, backend)
    open_backend(chosen)
    wanted = opened.choose_ratios(ratios)
    names = list(dict.fromkeys(RENAMED.get(name, name) for name in protocols))
    for name in names:
        load_protocol(name)
    asked = open_data(str(data), images=None if images is None else Path(images), limit=limit)
    answers = run_evaluation(
        asked,
        Header(
            subject=describe_bundle(opened, chosen),
            data=describe_data(asked),
            box=opened.manifest.box,
        ),
        partial(BundleAnswerer, opened.folder.resolve(), chosen, draft=draft),
        ratios=wanted,
    )
    return score_answers(asked, answers, names)


def score_answers(
    data: Data,
    answers: Answers,
    protocols: Sequence[str],
    *,
    other: Answers | None = None,
    label: str = "",
) -> Evaluation:
    """Figures of answers under each protocol, and the comparison with others, called `label`."""
    scores: list[Score] = []
    comparisons: list[Comparison] = []
    asked = data.expressions
    for name in protocols:
        protocol = load_protocol(name)
        scores += score_rows(answers.rows, name, protocol, answers.header.box, asked)
        if other is not None:
            comparisons += compare_rows(answers, other, label, name, protocol, asked)
    return Evaluation(
        answers=answers, data=data, scores=tuple(scores), comparisons=tuple(comparisons)
    )
