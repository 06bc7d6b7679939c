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
from gap_runtime.evaluation.published import Standing, list_standings
from gap_runtime.evaluation.results import Answers, DataFacts, Header, Subject
from gap_runtime.evaluation.run import describe_data
from gap_runtime.evaluation.run import evaluate as run_evaluation
from gap_runtime.evaluation.score import Score, score_rows
from gap_runtime.grounding.fastest import choose_backend
from gap_runtime.records import dump_record, extend_record


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedData(DataFacts):
    """What was asked. `sha256` is of ids, phrases and boxes.

    `set`, `split` and `by`, who split it, are empty where the data have none. `limited` says that
    the first phrases only were asked, `whole` that these are as many as were published.
    """

    set: str
    split: str
    by: str
    limited: bool
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingScore(Score):
    """A score, and the published figures on the set with what they are of and it is not."""

    published: tuple[Standing, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WordedComparison(Comparison):
    """A comparison and what it says in words; `significant`: p is under 0.05."""

    significant: bool
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unasked:
    """A phrase that could not be asked, and why."""

    key: str
    ratio: float
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFacts:
    """What an evaluation gave but for its answers, which lie in the file of `--out`.

    `notes` is what is to be known of the data. `comparisons` are those of `--compare`.
    """

    subject: Subject
    data: AskedData
    notes: tuple[str, ...]
    scores: tuple[StandingScore, ...]
    comparisons: tuple[WordedComparison, ...]
    unasked: tuple[Unasked, ...]


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
        """Plain data for JSON, as EvaluationFacts has it."""
        facts: dict[str, Any] = dump_record(self.list_facts())
        return facts

    def list_facts(self) -> EvaluationFacts:
        """All figures, and what was asked."""
        header, data = self.answers.header, self.data
        return EvaluationFacts(
            subject=header.subject,
            data=extend_record(
                AskedData,
                header.data,
                {name: getattr(data, name) for name in ("set", "split", "by", "limited", "whole")},
            ),
            notes=data.notes,
            scores=tuple(
                extend_record(StandingScore, each, {"published": list_standings(each, data)})
                for each in self.scores
            ),
            comparisons=tuple(
                extend_record(
                    WordedComparison,
                    each,
                    {"significant": each.p < SIGNIFICANT, "words": each.describe()},
                )
                for each in self.comparisons
            ),
            unasked=tuple(
                Unasked(key=row.key, ratio=row.ratio, problem=row.problem)
                for row in self.answers.rows
                if row.problem is not None
            ),
        )


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
