"""Who answers: a picture and a phrase in, an answer out. Bundles here, PyTorch in the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.evaluation.results import Subject
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.grounding.view import View
from gap_runtime.pictures.boxes import PictureFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer. `milliseconds` by stage; what the phrases of a picture share, the first one has.

    `frame` is what of the picture the model was shown; null where that is all of it.

    `calls`, `drafted` and `accepted` as in gap_runtime.grounding.view.Grounding; 0 where
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


class BundleAnswerer:
    """A bundle on a backend; fits Answerer."""

    def __init__(
        self, folder: Path, backend: str, *, draft: bool = True, keep_pictures: int = 0
    ) -> None:
        """Open the bundle; its graphs are loaded at the first question.

        A view lasts until its last phrase, so pictures are kept only if they come again.
        """
        self._grounder = Grounder(
            Bundle.open(folder), backend, draft=draft, keep_pictures=keep_pictures
        )

    def look(self, picture: Image.Image) -> View:
        """Find the picture's bucket."""
        return self._grounder.look(picture)

    def answer(self, view: View, phrase: str, ratio: float) -> Answer:
        """Ask; what all phrases of a picture share at a ratio is computed for the first one."""
        found = view.ground(phrase, ratio=ratio)
        return Answer(
            text=found.answer,
            frame=view.frame,
            token_ids=found.token_ids,
            milliseconds=found.milliseconds,
            calls=found.calls,
            drafted=found.drafted,
            accepted=found.accepted,
        )


def describe_bundle(bundle: Bundle, backend: str) -> Subject:
    """A bundle as the subject of an evaluation."""
    manifest = bundle.manifest
    return Subject(
        name=manifest.name,
        sha256=bundle.hash_manifest(),
        engine=backend,
        strategy=manifest.pruning.strategy,
        positions=manifest.pruning.positions,
        dtype=manifest.dtype,
    )
