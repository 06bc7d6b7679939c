"""PyTorch as the one who answers an evaluation: the reference, asked like a bundle is."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Final

import torch
from PIL import Image

from gap_export.pipeline.asking import open_reference
from gap_export.pipeline.fingerprint import describe_pruner
from gap_export.pipeline.plan import ExportPlan, plan_export
from gap_export.pipeline.request import ExportRequest
from gap_export.reference.answers import Question
from gap_export.reference.memory import REFERENCE_DTYPE
from gap_runtime.bundle.manifest import RatioEntry
from gap_runtime.display import Display
from gap_runtime.errors import ConfigError
from gap_runtime.evaluation.answer import Answer
from gap_runtime.evaluation.results import Subject
from gap_runtime.pictures.load import frame_picture
from gap_runtime.pictures.preprocess import Bucket
from gap_runtime.records import dump_record

ENGINE: Final = f"pytorch:{REFERENCE_DTYPE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerView:
    """A picture and, once it was asked about, what the tower gave of it.

    `asked` holds the first question about it, and the time that took in milliseconds; `ratios`
    are those that were asked at.
    """

    picture: Image.Image
    bucket: Bucket
    asked: list[tuple[Question, float]] = field(default_factory=list)
    ratios: set[float] = field(default_factory=set)


class EagerAnswerer:
    """The checkpoint in PyTorch; fits gap_runtime.evaluation.answer.Answerer."""

    def __init__(
        self,
        plan: ExportPlan,
        *,
        threads: int | None = None,
        display: Display | None = None,
    ) -> None:
        """Load the checkpoint.

        Args:
            plan: Of an export, which is not made.
            threads: Of PyTorch in this process; as many as it likes by default.
            display: Says so where weights are read layer by layer.

        Raises:
            GapError: The checkpoint cannot be used, or its layers do not fit in memory.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        if plan.tokenizer is None:
            raise ConfigError(
                f"{plan.spec.tokenizer.folder}: no tokenizer in it, so it takes no phrase; add "
                "the model's tokenizer"
            )
        self._plan = plan
        self._encoder = plan.encoder
        self._reference = open_reference(plan, display)

    def look(self, picture: Image.Image) -> EagerView:
        """Find the picture's bucket."""
        return EagerView(picture=picture, bucket=self._reference.find_bucket(picture))

    def answer(self, view: EagerView, phrase: str, ratio: float) -> Answer:
        """Ask; the tower runs once for all phrases and ratios of a picture."""
        plan = self._plan
        # The bundle's own rules say which phrases it would take.
        self._encoder.encode_within(phrase, plan.layout)
        began = time.perf_counter()
        before = view.asked[0] if view.asked else None
        question = self._reference.ask(
            view.picture, phrase, view.bucket, before=before[0] if before else None
        )
        looked = time.perf_counter()
        if before is None:
            before = question, (looked - began) * 1e3
            view.asked.append(before)
        # What the phrases share, the first one at each ratio has, as with a bundle.
        vision_ms = 0.0 if ratio in view.ratios else before[1]
        view.ratios.add(ratio)
        given = self._reference.answer(question, _find_entry(plan, view.bucket, ratio))
        decode_ms = (time.perf_counter() - looked) * 1e3
        return Answer(
            text=given.text,
            frame=frame_picture(view.picture.size, plan.spec.preprocess, view.bucket),
            token_ids=tuple(given.token_ids),
            milliseconds={
                "vision": vision_ms,
                "decode": decode_ms,
                "total": vision_ms + decode_ms,
            },
        )


def open_answerer(request: ExportRequest, *, threads: int | None = None) -> EagerAnswerer:
    """The answerer of a request, which is smaller than its plan to send to another machine.

    Raises:
        GapError: As for `plan_export` and `EagerAnswerer`.
    """
    return EagerAnswerer(plan_export(request), threads=threads)


def _find_entry(plan: ExportPlan, bucket: Bucket, ratio: float) -> RatioEntry:
    return next(e for e in plan.entries if (e.ratio, e.bucket) == (ratio, bucket.name))


def describe_plan(plan: ExportPlan) -> Subject:
    """A checkpoint with the settings of an export as the subject of an evaluation."""
    config = plan.config
    files = sorted({tensor.file for source in plan.sources.values() for tensor in source.inputs})
    facts = {
        "index": plan.checkpoint.index_sha256,
        # Not their bytes, which take long to read: another training has another time.
        "files": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "prune": {
            **dump_record(config.prune),
            "strategy": describe_pruner(config.prune),
            "ratios": None,
            "keep": None,
        },
        "prompt": dump_record(plan.prompt),
        "box": dump_record(plan.spec.box),
        "answer": plan.layout.answer,
        "suffix": plan.layout.suffix,
        "buckets": dump_record(plan.spec.buckets),
    }
    text = json.dumps(facts, sort_keys=True)
    return Subject(
        name=plan.name,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        engine=ENGINE,
        strategy=config.prune.name,
        positions=config.prune.positions,
        dtype=REFERENCE_DTYPE,
    )
