"""A picture that was looked at: what all its phrases share, and how much of that is kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypedDict

import numpy as np
from PIL import Image

from gap_runtime.bundle.hashes import hash_bytes
from gap_runtime.bundle.manifest import RatioEntry
from gap_runtime.pictures.boxes import Box, PictureFrame

DEFAULT_KEPT_MIB: Final = 256
"""Memory for pictures that may be asked about again."""


class AnswerFacts(TypedDict):
    """What was found for a phrase. `boxes` are left, top, right, bottom in pixels of the picture.

    `score` in [0, 1] is how sure the model was of them; `problems` says what in `answer` was no
    usable box. `kept` of `patches` visual tokens stayed at the `ratio`. `milliseconds` is by
    stage: preprocess, vision, prefill, decode, total. `calls` of the decoder held `drafted`
    tokens, of which `accepted` turned out right.
    """

    phrase: str
    answer: str
    boxes: list[list[float]]
    score: float
    problems: list[str]
    ratio: float
    kept: int
    patches: int
    milliseconds: dict[str, float]
    calls: int
    drafted: int
    accepted: int


class GroundingFacts(AnswerFacts):
    """What was found for a phrase. `boxes` are left, top, right, bottom in pixels of the picture.

    `score` in [0, 1] is how sure the model was of them; `problems` says what in `answer` was no
    usable box. `kept` of `patches` visual tokens stayed at the `ratio`: those of `kept_index`, by
    slot. `milliseconds` is by stage: preprocess, vision, prefill, decode, total. `calls` of the
    decoder held `drafted` tokens, of which `accepted` turned out right.
    """

    kept_index: list[int]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Grounding:
    """Where a phrase is in a picture.

    `score` in [0, 1] is how sure the model was of the boxes, as gap_runtime.grounding.confidence
    has it; 0 where there is none.
    `problems` says what in the answer was no usable box. `kept_index` are the patches that
    stayed, by slot. `milliseconds` is by stage: preprocess, vision, prefill, decode, total; what
    was there from an earlier phrase took none. `calls` of the decoder, the prefill among them,
    held `drafted` tokens of which `accepted` turned out right.
    """

    phrase: str
    answer: str
    boxes: tuple[Box, ...]
    score: float
    problems: tuple[str, ...]
    ratio: float
    kept: int
    patches: int
    kept_index: tuple[int, ...]
    token_ids: tuple[int, ...]
    milliseconds: dict[str, float]
    calls: int
    drafted: int
    accepted: int

    def __repr__(self) -> str:
        """The boxes and how sure they are, on one line."""
        boxes = ", ".join(f"({' '.join(f'{value:.1f}' for value in box)})" for box in self.boxes)
        said = f"{boxes}, score {self.score:.2f}" if self.boxes else "no box"
        return f"Grounding({self.phrase!r}: {said}, kept {self.kept} of {self.patches})"

    def reject_below(self, least_score: float) -> Grounding:
        """This grounding, without its boxes where the model was less sure of them than that."""
        if not self.boxes or self.score >= least_score:
            return self
        problem = f"score {self.score:.3f} is under {least_score:g}"
        return replace(self, boxes=(), problems=(*self.problems, problem))

    def dump(self) -> GroundingFacts:
        """Plain data for JSON."""
        return {
            "answer": self.answer,
            "boxes": [list(box) for box in self.boxes],
            "score": self.score,
            "problems": list(self.problems),
            "phrase": self.phrase,
            "ratio": self.ratio,
            "kept": self.kept,
            "patches": self.patches,
            "kept_index": list(self.kept_index),
            "milliseconds": self.milliseconds,
            "calls": self.calls,
            "drafted": self.drafted,
            "accepted": self.accepted,
        }


@dataclass(slots=True, kw_only=True, eq=False)
class VisionOutput:
    """What the vision stages gave of a picture at one ratio, and the pixels that they took.

    `is_kept` says that the rows of the decoder's cache may be saved when another picture takes
    their place; `rows` are those that were, as gap_runtime.grounding.prompt_cache has them.
    """

    pixels: np.ndarray
    visual_tokens: np.ndarray
    kept_index: np.ndarray
    position_ids: np.ndarray
    preprocess_ms: float
    vision_ms: float
    is_kept: bool = False
    rows: Any = None

    def count_bytes(self) -> int:
        """Memory of what it holds, but for the pixels."""
        arrays = (self.visual_tokens, self.kept_index, self.position_ids)
        return sum(array.nbytes for array in arrays) + (self.rows.size if self.rows else 0)


class Ask(Protocol):
    """How a view has a phrase grounded."""

    def __call__(
        self, view: View, phrase: str, *, ratio: float | None, keep: int | None
    ) -> Grounding:
        """See View.ground."""


@dataclass(slots=True, kw_only=True, eq=False)
class View:
    """A picture that was looked at. What its phrases share is computed for the first of them.

    `frame` is what of it the model is shown. `outputs` are by ratio, for pruners that do not read
    the phrase. `key` says that it is kept because the picture may come again, `file` is the hash
    of the file that it was last read from.
    """

    picture: Image.Image
    bucket: str
    frame: PictureFrame
    ask: Ask
    pixels: np.ndarray | None = None
    outputs: dict[RatioEntry, VisionOutput] = field(default_factory=dict)
    key: str | None = None
    file: str | None = None

    def ground(
        self, phrase: str, *, ratio: float | None = None, keep: int | None = None
    ) -> Grounding:
        """Ask where a phrase is in this picture.

        Args:
            phrase: What to ground.
            ratio: Another of the bundle's ratios than the grounder's own.
            keep: Or a count of visual tokens that stay.

        Raises:
            InputError: The phrase cannot be used.
            EngineError: The backend failed.
        """
        return self.ask(self, phrase, ratio=ratio, keep=keep)

    def put(self, entry: RatioEntry, output: VisionOutput) -> None:
        """Keep what the vision stages gave for every phrase."""
        output.is_kept = self.key is not None
        self.outputs[entry] = output

    def count_bytes(self) -> int:
        """Memory of all that it holds."""
        pixels = 0 if self.pixels is None else self.pixels.nbytes
        own = 3 * self.picture.width * self.picture.height
        return own + pixels + sum(each.count_bytes() for each in self.outputs.values())

    def release(self) -> None:
        """Give up the rows of the cache that were saved, and save no more."""
        self.key = None
        for each in self.outputs.values():
            each.is_kept, each.rows = False, None


class KeptViews:
    """The pictures that were asked about last, by their content, within some memory.

    There may be thousands, so that only those are measured that may have grown.
    """

    def __init__(self, limit: int) -> None:
        """Keep nothing yet.

        Args:
            limit: Bytes; 0 keeps no picture.
        """
        self._limit = limit
        self._views: OrderedDict[str, View] = OrderedDict()
        self._files: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._bytes = 0
        self._last: View | None = None

    def find_file(self, data: bytes) -> View | None:
        """The view of a picture that is kept, by the bytes of the file that it was read from."""
        key = self._files.get(hash_bytes(data)) if self._files else None
        if key is None:
            return None
        self._views.move_to_end(key)
        return self._views[key]

    def find(self, view: View, data: bytes | None = None) -> View:
        """The view of the same picture that is kept; else this one, which is kept from now on.

        Args:
            view: Of a picture.
            data: The file that it was read from, which need not be read where it comes again.
        """
        if not self._limit:
            return view
        values = np.asarray(view.picture)
        key = f"{values.shape} {hash_bytes(values.data.cast('B'))}"
        found = self._views.setdefault(key, view)
        found.key = key
        if data is not None:
            self._forget_file(found)
            found.file = hash_bytes(data)
            self._files[found.file] = key
        self._views.move_to_end(key)
        # A phrase may be refused and never come to an answer; the picture lies here already.
        self._measure(found)
        self._trim()
        return found

    def note(self, view: View, *, is_held: bool) -> None:
        """A view was asked. What lay in the cache before may have been copied to its own view.

        Args:
            view: Whose phrase it was.
            is_held: Whether its rows lie in the cache now.
        """
        for each in (view, self._last):
            if each is not None:
                self._measure(each)
        if is_held:
            self._last = view if view.key is not None else None
        self._trim()

    def count_bytes(self) -> int:
        """Memory of all that is kept."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._views)

    def _measure(self, view: View) -> None:
        if view.key is not None:
            size = view.count_bytes()
            self._bytes += size - self._sizes.get(view.key, 0)
            self._sizes[view.key] = size

    def _trim(self) -> None:
        """Give up the pictures that were not asked about for longest, as far as is needed."""
        while self._views and self._bytes > self._limit:
            key, view = self._views.popitem(last=False)
            self._bytes -= self._sizes.pop(key)
            self._forget_file(view)
            view.release()
            if view is self._last:
                self._last = None

    def _forget_file(self, view: View) -> None:
        if view.file is not None:
            self._files.pop(view.file, None)
            view.file = None
