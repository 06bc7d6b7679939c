"""The bundles that a service answers with, and the one place where they are asked."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from gap_runtime.errors import ConfigError, InputError, suggest
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.grounding.view import Grounding, View
from gap_runtime.pictures.drawing import find_patches
from gap_runtime.pictures.load import fitting_size, read_picture
from gap_runtime.service.pictures import open_sent_picture
from gap_runtime.service.questions import Question
from gap_runtime.service.settings import ServiceSettings
from gap_runtime.service.worker import GoneError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What was found. `cells` are places of visual tokens, by index, where they were wanted.

    `prompt_tokens` are counted where they were wanted. `picture_ms` is what it took to read the
    picture.
    """

    model: str
    size: tuple[int, int]
    found: tuple[Grounding, ...]
    cells: dict[int, tuple[float, ...]] | None
    prompt_tokens: int | None
    picture_ms: float

    def dump(self, waited: Mapping[str, float]) -> dict[str, Any]:
        """Plain data for JSON; `waited` are milliseconds before the worker began, by cause."""
        data: dict[str, Any] = {
            "model": self.model,
            "width": self.size[0],
            "height": self.size[1],
            "results": [each.dump() for each in self.found],
            "milliseconds": {**waited, "picture": self.picture_ms},
        }
        if self.cells is not None:
            data["cells"] = {str(index): list(cell) for index, cell in self.cells.items()}
        return data


class Models:
    """Grounders by the names of their bundles; one thread asks them."""

    def __init__(self, grounders: Sequence[Grounder], settings: ServiceSettings) -> None:
        """Take grounders; the first one answers requests that name no model.

        Raises:
            ConfigError: Two bundles have the same name.
        """
        self._settings = settings
        self._grounders: dict[str, Grounder] = {}
        self.began = int(time.time())
        for grounder in grounders:
            name = grounder.bundle.folder.resolve().name
            if name in self._grounders:
                raise ConfigError(f"two bundles are called {name}; rename one of the folders")
            self._grounders[name] = grounder

    @property
    def names(self) -> tuple[str, ...]:
        """All models, the usual one first."""
        return tuple(self._grounders)

    def find(self, name: str | None) -> tuple[str, Grounder]:
        """A model by its name, or the usual one.

        Raises:
            InputError: There is none of that name.
        """
        chosen = self.names[0] if name is None else name
        if chosen not in self._grounders:
            raise InputError(f"unknown model {chosen!r:.80}; {suggest(chosen, self.names)}")
        return chosen, self._grounders[chosen]

    def require_ratio(self, question: Question) -> None:
        """Refuse a ratio that a model was not exported with, before anything waits for it.

        Raises:
            ConfigError: There is none like that.
        """
        _, grounder = self.find(question.model)
        if question.ratio is not None or question.keep is not None:
            grounder.bundle.choose_ratio(question.ratio, keep=question.keep)

    def describe(self) -> list[dict[str, Any]]:
        """Every model with its ratios, in OpenAI's form of a list of models."""
        described = []
        for name, grounder in self._grounders.items():
            manifest = grounder.bundle.manifest
            default = grounder.default_ratio
            described.append(
                {
                    "id": name,
                    "object": "model",
                    "created": self.began,
                    "owned_by": "gap-runtime",
                    "family": manifest.family,
                    "precision": manifest.precision,
                    "pruner": manifest.pruning.strategy,
                    "positions": manifest.pruning.positions,
                    "default_ratio": default.ratio,
                    "ratios": [
                        {
                            "ratio": entry.ratio,
                            "kept": entry.kept,
                            "patches": entry.patches,
                            "bucket": entry.bucket,
                        }
                        for entry in manifest.ratios
                    ],
                }
            )
        return described

    def warm_up(self) -> None:
        """Load every graph that a request without wishes needs.

        Raises:
            GapError: A bundle cannot be run.
        """
        # Pillow looks for its formats when it opens the first file: a tenth of a second.
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, "png")
        read_picture(file, "the first picture")
        for grounder in self._grounders.values():
            manifest = grounder.bundle.manifest
            bucket = manifest.bucket(grounder.default_ratio.bucket)
            width, height = fitting_size(bucket, manifest.preprocess)
            values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            grounder.look(Image.fromarray(values)).ground("it")

    def answer(self, question: Question, given_up: threading.Event) -> Reply:
        """Ask all phrases of a question, whose picture is there; in the worker's thread.

        Raises:
            GoneError: Nobody waits for the answer any more.
            GapError: The picture or a phrase cannot be used, or the backend failed.
        """
        name, grounder = self.find(question.model)
        began = time.perf_counter()
        assert isinstance(question.image, bytes)
        view = grounder.look_at_file(question.image, self._open)
        picture_ms = (time.perf_counter() - began) * 1e3
        found = []
        for phrase in question.phrases:
            if given_up.is_set():
                raise GoneError("nobody waits for the answer")
            grounding = view.ground(phrase, ratio=question.ratio, keep=question.keep)
            found.append(grounding.reject_below(question.least_score))
        return Reply(
            model=name,
            size=view.picture.size,
            found=tuple(found),
            cells=_find_cells(grounder, view) if question.cells else None,
            prompt_tokens=(
                sum(_count_prompt(grounder, each) for each in found) if question.counts else None
            ),
            picture_ms=picture_ms,
        )

    def _open(self, data: bytes) -> Image.Image:
        return open_sent_picture(data, self._settings)

    def count_kept(self) -> tuple[int, int]:
        """Pictures that are kept and their bytes; in the worker's thread."""
        counts = [grounder.count_kept() for grounder in self._grounders.values()]
        return sum(count for count, _ in counts), sum(size for _, size in counts)

    def close(self) -> None:
        """Give up all models."""
        for grounder in self._grounders.values():
            grounder.close()


def _find_cells(grounder: Grounder, view: View) -> dict[int, tuple[float, ...]]:
    manifest = grounder.bundle.manifest
    places = find_patches(view.picture.size, manifest.preprocess, manifest.buckets)
    return {index: tuple(round(value, 2) for value in place) for index, place in places.items()}


def _count_prompt(grounder: Grounder, found: Grounding) -> int:
    """Tokens of a prompt, text and picture."""
    encoded = grounder.encoder.encode(found.phrase)
    return len(encoded.prefix) + found.kept + len(encoded.suffix)
