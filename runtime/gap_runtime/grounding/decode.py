"""The decode loop: the prompt, then token by token, greedily; what is forced is drafted.

Position and slot are two counters: a token's slot follows the compact cache, its position goes
on from the last one that the vision graph gave, in whatever mode that was made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from gap_runtime.backends import DecoderSession
from gap_runtime.bundle.bundle import embedding_rows
from gap_runtime.errors import EngineError
from gap_runtime.grounding.confidence import find_probability
from gap_runtime.grounding.draft import Drafter

# A axes of positions, S prompt rows, D width, W width of the decoder's rows (an embedding, and
# planes of zeros behind it where it takes planes), V vocabulary, K + E visual tokens.


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A decoded answer.

    `calls` of the decoder, the prefill among them. Of the rows that they held, `drafted` were
    sent as drafts, and `accepted` of these turned out to be tokens of the answer. The first token
    was chosen by `prefill_logits` [V], the last one (or the end) by `last_logits` [V].
    `probabilities` are those of the tokens.
    """

    token_ids: list[int]
    probabilities: list[float]
    prefill_logits: np.ndarray
    last_logits: np.ndarray
    prefill_ms: float
    decode_ms: float
    calls: int
    drafted: int
    accepted: int


def splice_prompt(
    table: np.ndarray, prefix: list[int], visual: np.ndarray, suffix: list[int]
) -> np.ndarray:
    """Prompt embeddings float32 [1, S, W].

    Args:
        table: Token embeddings [V, D].
        prefix: Token IDs before the picture.
        visual: The vision graph's tokens [1, K + E, W].
        suffix: Token IDs after the picture.
    """
    before, count = len(prefix), visual.shape[1]
    rows = np.zeros((1, before + count + len(suffix), visual.shape[2]), np.float32)
    _put_text(rows[:, :before], table, prefix)
    rows[:, before : before + count] = visual
    _put_text(rows[:, before + count :], table, suffix)
    return rows


def _put_text(rows: np.ndarray, table: np.ndarray, ids: list[int]) -> None:
    """Write tokens' embeddings into rows [1, S, W] of zeros; planes of text stay zeros."""
    rows[0, :, : table.shape[1]] = embedding_rows(table, ids)


def decode_greedily(
    decoder: DecoderSession,
    table: np.ndarray,
    prompt: np.ndarray,
    position_ids: np.ndarray,
    *,
    held: int = 0,
    most: int,
    capacity: int,
    stop_ids: tuple[int, ...],
    drafter: Drafter | None = None,
) -> Decoded:
    """Answer tokens, the most likely one at each place, without the stop token.

    Every call holds the rows that are known and a draft of what follows them. A drafted token
    counts if it is the most likely one at its place; what comes after one that is not is lost.

    Args:
        decoder: A session; its cache is written from slot `held` on.
        table: Token embeddings [V, D].
        prompt: Embeddings [1, S, W] of what the cache does not hold.
        position_ids: Of the whole prompt, int64 [A, held + S]; columns behind it are not looked
            at.
        held: Slots of the cache that hold the prompt's beginning already.
        most: Most tokens to decode.
        capacity: Slots of the cache.
        stop_ids: Token IDs that end the answer.
        drafter: Makes the drafts; None for one token at a time.

    Raises:
        EngineError: The decoder gave values that are not finite.
    """
    began = time.perf_counter()
    caller = _Caller(decoder, table, prompt, position_ids, held, capacity)
    answer: list[int] = []
    probabilities: list[float] = []
    calls = drafted = accepted = 0
    while True:
        before = tuple(answer)
        draft = drafter.propose(before, most - len(before) - 1) if drafter else []
        logits, draft = caller.run(before, draft)
        if not calls:
            prefill_logits, prefilled = logits[0].copy(), time.perf_counter()
        news = _read(logits, draft, most - len(before), stop_ids)
        answer += news.token_ids
        probabilities += news.probabilities
        calls, drafted = calls + 1, drafted + len(draft)
        accepted += news.accepted
        if drafter and draft:
            drafter.learn(before, news.accepted)
        if news.is_last:
            break
    return Decoded(
        token_ids=answer,
        probabilities=probabilities,
        prefill_logits=prefill_logits,
        last_logits=news.last_logits.copy(),
        prefill_ms=(prefilled - began) * 1e3,
        decode_ms=(time.perf_counter() - prefilled) * 1e3,
        calls=calls,
        drafted=drafted,
        accepted=accepted,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _News:
    """What one call adds to an answer, and whether it ends it."""

    token_ids: list[int]
    probabilities: list[float]
    accepted: int
    is_last: bool
    last_logits: np.ndarray


def _read(logits: np.ndarray, draft: list[int], most: int, stop_ids: tuple[int, ...]) -> _News:
    """The most likely tokens [1 + drafted, V], as far as the draft agrees with them."""
    found: list[int] = []
    sure: list[float] = []
    for row, drafted in zip(logits, [*draft, None], strict=True):
        token = _choose(row) if len(found) < most else None
        if token is None or token in stop_ids:
            return _News(
                token_ids=found,
                probabilities=sure,
                accepted=len(found),
                is_last=True,
                last_logits=row,
            )
        found.append(token)
        sure.append(find_probability(row, token))
        if token != drafted:
            break
    is_last = len(found) == most
    return _News(
        token_ids=found,
        probabilities=sure,
        accepted=len(found) - 1,
        is_last=is_last,
        last_logits=row,
    )


class _Caller:
    """Calls of the decoder for one prompt: the rows that are known, a draft, and their places."""

    def __init__(
        self,
        decoder: DecoderSession,
        table: np.ndarray,
        prompt: np.ndarray,
        position_ids: np.ndarray,
        held: int,
        capacity: int,
    ) -> None:
        self._decoder, self._table, self._capacity = decoder, table, capacity
        self._prompt, self._held = prompt, held
        self._length = held + prompt.shape[1]
        self._positions = position_ids[:, : self._length]
        self._is_prefilled = False

    def run(self, answer: tuple[int, ...], draft: list[int]) -> tuple[np.ndarray, list[int]]:
        """Logits [1 + drafted, V] behind an answer so far, and the draft that there was room for.

        Rows that only fill a call up come last, so that no other sees them; later calls write
        over their slots, as over those of a refused draft.
        """
        if self._is_prefilled:
            # The last token has been chosen, but not been seen by the decoder yet.
            given, slot = len(answer) - 1, self._length + len(answer) - 1
            count, known_positions = 1, self._behind(np.array([given]))
        else:
            count, slot = self._prompt.shape[1], self._held
            known_positions = self._positions[:, slot:]
        rows = self._decoder.fit(count + len(draft))
        if rows is None or slot + rows > self._capacity:
            draft = []
            rows = self._decoder.fit(count) or count
        embeddings = np.zeros((1, rows, self._prompt.shape[2]), np.float32)
        if self._is_prefilled:
            _put_text(embeddings[:, : 1 + len(draft)], self._table, [answer[-1], *draft])
        else:
            embeddings[:, :count] = self._prompt
            _put_text(embeddings[:, count : count + len(draft)], self._table, draft)
        self._is_prefilled = True
        # Rows that fill the call up stay at the last one: another may be beyond the model's.
        steps = np.minimum(np.arange(rows - count), len(draft) - 1)
        behind = self._behind(slot + count - self._length + steps)
        positions = np.concatenate([known_positions, behind], axis=1)
        wanted = np.arange(count - 1, count + len(draft))
        return self._decoder.run(embeddings, positions, slot, wanted), draft

    def _behind(self, places: np.ndarray) -> np.ndarray:
        """Position IDs [A, P] of tokens of the answer, by their places [P] in it."""
        ids: np.ndarray = self._positions[:, -1:] + 1 + places
        return ids


def _choose(logits: np.ndarray) -> int:
    """The most likely token; a value that is no number would be the largest to numpy."""
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        raise EngineError(
            "the decoder gave values that are not finite; export with --dtype bfloat16 or float32 "
            "(gap-export probe names the first tensor)"
        )
    return token
