"""Who answers: a picture and a phrase in, an answer out. Bundles here, PyTorch in the exporter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import MANIFEST_FILE
from gap_runtime.evaluation.results import Subject
from gap_runtime.grounding.grounder import Grounder, VisionOutput
from gap_runtime.pictures.boxes import PictureFrame
from gap_runtime.pictures.load import find_bucket, frame_picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer. `milliseconds` by stage, as if the phrase had been asked alone.

    `frame` is what of the picture the model was shown; null where that is all of it.

    `calls`, `drafted` and `accepted` as in gap_runtime.grounding.grounder.Grounding; 0 where
    nobody counts them.
    """

    text: str
    token_ids: tuple[int, ...]
    milliseconds: dict[str, float]
    calls: int = 0
    drafted: int = 0
    accepted: int = 0
    frame: PictureFrame | None = None


class Answerer(Protocol):
    """A loaded model."""

    def look(self, picture: Image.Image) -> Any:
        """Whatever several phrases of an RGB picture can share.

        Raises:
            InputError: The picture cannot be used.
        """

    def answer(self, view: Any, phrase: str, ratio: float) -> Answer:
        """Ask about a picture that was looked at.

        Raises:
            InputError: The phrase cannot be used.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A picture and what the vision stages gave of it, by ratio."""

    picture: Image.Image
    bucket: str
    frame: PictureFrame
    outputs: dict[float, VisionOutput]


class BundleAnswerer:
    """A bundle on a backend; fits Answerer."""

    def __init__(self, folder: Path, backend: str, *, draft: bool = True) -> None:
        """Open the bundle; its graphs are loaded at the first question."""
        self._grounder = Grounder(Bundle.open(folder), backend, draft=draft)

    def look(self, picture: Image.Image) -> View:
        """Find the picture's bucket."""
        manifest = self._grounder.bundle.manifest
        bucket = find_bucket(picture.size, manifest.preprocess, manifest.buckets)
        frame = frame_picture(picture.size, manifest.preprocess, bucket)
        return View(picture=picture, bucket=bucket.name, frame=frame, outputs={})

    def answer(self, view: View, phrase: str, ratio: float) -> Answer:
        """Ask; the vision stages run once for all phrases where the pruner does not read them."""
        grounder = self._grounder
        entry = grounder.bundle.choose_ratio(ratio, view.bucket)
        vision = view.outputs.get(ratio)
        if vision is None or grounder.reads_phrase(entry):
            # Before anything runs, so that a phrase of no use leaves nothing behind.
            grounder.encoder.encode_within(phrase, grounder.bundle.manifest.layout)
            other = next(iter(view.outputs.values()), None)
            vision = _keep(grounder.run_vision(view.picture, phrase, entry, before=other))
            view.outputs[ratio] = vision
        values = grounder.run_stages(view.picture, phrase, entry, vision=vision)
        return Answer(
            text=grounder.encoder.decode(values.decoded.token_ids),
            frame=view.frame,
            token_ids=tuple(values.decoded.token_ids),
            milliseconds=values.milliseconds,
            calls=values.decoded.calls,
            drafted=values.decoded.drafted,
            accepted=values.decoded.accepted,
        )


def _keep(vision: VisionOutput) -> VisionOutput:
    """A copy of what a session may write over at its next run."""
    return replace(
        vision,
        visual_tokens=vision.visual_tokens.copy(),
        kept_index=vision.kept_index.copy(),
        position_ids=vision.position_ids.copy(),
    )


def describe_bundle(bundle: Bundle, backend: str) -> Subject:
    """A bundle as the subject of an evaluation."""
    manifest = bundle.manifest
    return Subject(
        name=manifest.name,
        sha256=hashlib.sha256((bundle.folder / MANIFEST_FILE).read_bytes()).hexdigest(),
        engine=backend,
        strategy=manifest.pruning.strategy,
        positions=manifest.pruning.positions,
        dtype=manifest.dtype,
    )
