"""The beginning of a prompt in the decoder's KV cache, which further phrases need not compute.

The text before the picture is the same for all prompts of a bundle, and picture and text before
it for all phrases at one ratio. Their rows depend on nothing that follows, so they stay where they
are; steps, drafts and the next phrase write behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gap_runtime.backends import DecoderSession, SavedSlots, SlotSaver
from gap_runtime.bundle.manifest import CacheShape
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.grounding.view import VisionOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRows:
    """Rows of a text before the picture and of the picture, outside the cache."""

    prefix: tuple[int, ...]
    slots: SavedSlots

    @property
    def size(self) -> int:
        """In bytes."""
        return self.slots.size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What the first slots hold: token IDs before the picture, then the picture."""

    prefix: tuple[int, ...]
    vision: VisionOutput

    @property
    def slots(self) -> int:
        return len(self.prefix) + int(self.vision.visual_tokens.shape[1])


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
        wanted = _Held(prefix=tuple(prefix), vision=vision)
        held = self._find(wanted)
        # The last row is run in any case, as its logits are wanted.
        held = min(held, wanted.slots + len(suffix) - 1)
        rows = self.session.fit(wanted.slots + len(suffix) - held)
        if rows is None or held + rows > self._capacity:
            # An engine has no profile that would fit behind them.
            held = 0
        self._held = None
        yield held
        self._held = wanted

    def _find(self, wanted: _Held) -> int:
        """How many slots hold what is wanted, after rows that were saved are put back."""
        held, rows = self._held, wanted.vision.rows
        if held is not None and held.vision is not wanted.vision:
            self._save(held)
        if held is not None and held.prefix == wanted.prefix:
            if held.vision is wanted.vision:
                return held.slots
            length = len(held.prefix)
            before, now = (each.vision.position_ids[:, :length] for each in (held, wanted))
            if rows is None and np.array_equal(before, now):
                return length
        if rows is not None and rows.prefix == wanted.prefix:
            assert isinstance(self.session, SlotSaver)
            self.session.put_slots(rows.slots)
            return wanted.slots
        return 0

    def _save(self, held: _Held) -> None:
        """Copy the rows of a picture that gives way, if it may be asked about again."""
        vision = held.vision
        is_wanted = vision.is_kept and vision.rows is None
        is_small = held.slots * self._slot_bytes <= self._limit
        if is_wanted and is_small and isinstance(self.session, SlotSaver):
            slots = self.session.copy_slots(held.slots)
            vision.rows = SavedRows(prefix=held.prefix, slots=slots)
