"""The beginning of a prompt in the decoder's KV cache, which further phrases need not compute.

The text before the picture is the same for all prompts of a bundle, picture and text before it
for all phrases at one ratio; behind the picture, two prompts begin alike with what the template
says before the phrase. Rows depend on nothing that follows, so they stay where they are; steps,
drafts and the next phrase write behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import numpy as np

from gap_runtime.backends import DecoderSession, SavedSlots, SlotSaver
from gap_runtime.bundle.manifest import CacheShape
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.grounding.view import VisionOutput

_PAIR: Final = 2
"""Rows that onnxruntime's products of int4 weights take together; one that is left over, and a
single row in any dtype, is rounded otherwise. Behind an even number of rows the same ones are
pairs, so that a prompt has the same bits as if it were computed whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRows:
    """Rows of a text before the picture, the picture and a text behind it, outside the cache."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    slots: SavedSlots

    @property
    def size(self) -> int:
        """In bytes."""
        return self.slots.size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What the first slots hold: token IDs before the picture, the picture, those behind it."""

    prefix: tuple[int, ...]
    vision: VisionOutput
    suffix: tuple[int, ...]

    @property
    def picture_end(self) -> int:
        return len(self.prefix) + int(self.vision.visual_tokens.shape[1])

    @property
    def end(self) -> int:
        return self.picture_end + len(self.suffix)


class PromptCache:
    """A decoder session, and which beginning of a prompt its cache holds."""

    def __init__(
        self, session: DecoderSession, shape: CacheShape, *, capacity: int, limit: int
    ) -> None:
        """Begin with an empty cache.

        Args:
            session: The decoder's; nobody else may run it.
            shape: Of its cache.
            capacity: Slots of its cache.
            limit: Bytes that the rows of one picture may have to be saved.
        """
        self.session = session
        self._capacity, self._limit = capacity, limit
        self._slot_bytes = (
            2 * shape.layers * shape.heads * shape.head_dim * ITEM_BYTES[shape.dtype]
        )
        self._held: _Held | None = None

    @contextmanager
    def begin(
        self, prefix: Sequence[int], vision: VisionOutput, suffix: Sequence[int]
    ) -> Iterator[int]:
        """How many slots hold a prompt's beginning already; the caller runs the rest.

        Args:
            prefix: Token IDs before the picture.
            vision: The picture.
            suffix: Token IDs behind it.
        """
        wanted = _Held(prefix=tuple(prefix), vision=vision, suffix=tuple(suffix))
        before, self._held = self._held, None
        ends = self._find(wanted, before)
        # An engine may have no profile that would fit behind so many.
        held = next(
            (slots for slots in _list_counts(ends, wanted.end) if self._fits(wanted, slots)), 0
        )
        yield held
        self._held = wanted

    def _fits(self, wanted: _Held, slots: int) -> bool:
        """Whether the session takes what is left of a prompt behind so many slots."""
        rows = self.session.fit(wanted.end - slots)
        return rows is not None and slots + rows <= self._capacity

    def _find(self, wanted: _Held, held: _Held | None) -> Sequence[int]:
        """How many slots may be taken for what is wanted, most first.

        Rows that were saved are put back for it. `held` is what the cache holds.
        """
        saved = wanted.vision.rows
        if held is not None and held.vision is not wanted.vision:
            self._save(held)
        if held is not None and held.prefix == wanted.prefix:
            if held.vision is wanted.vision:
                return _list_ends(wanted, held.suffix)
            length = len(held.prefix)
            before, now = (each.vision.position_ids[:, :length] for each in (held, wanted))
            if saved is None and np.array_equal(before, now):
                return (length,)
        if saved is not None and saved.prefix == wanted.prefix:
            assert isinstance(self.session, SlotSaver)
            self.session.put_slots(saved.slots)
            return _list_ends(wanted, saved.suffix)
        return ()

    def _save(self, held: _Held) -> None:
        """Copy the rows of a picture that gives way, if it may be asked about again."""
        vision = held.vision
        is_wanted = vision.is_kept and vision.rows is None
        is_small = held.end * self._slot_bytes <= self._limit
        if is_wanted and is_small and isinstance(self.session, SlotSaver):
            slots = self.session.copy_slots(held.end)
            # A session may compute in another dtype than the manifest's.
            if slots.size <= self._limit:
                vision.rows = SavedRows(prefix=held.prefix, suffix=held.suffix, slots=slots)


def _list_counts(ends: Sequence[int], end: int) -> Iterator[int]:
    """How many rows of a prompt may be taken from the cache, in the order of what is tried.

    The last rows are run in any case, as logits are wanted. An odd number is tried where an even
    one does not fit: the rows of an engine are as many as a profile has, so none is left over.
    """
    for each in ends:
        slots = min(each, end - _PAIR)
        yield slots // _PAIR * _PAIR
        yield slots


def _list_ends(wanted: _Held, suffix: Sequence[int]) -> tuple[int, ...]:
    """Ends of what two prompts have in common: text behind the picture, picture, text before."""
    # The last row of the earlier prompt may have been left over by the pairs.
    both = zip(wanted.suffix, suffix[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    return wanted.picture_end + shared, wanted.picture_end, len(wanted.prefix)
