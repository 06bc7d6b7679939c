"""The decode loop: prefill once, then one token at a time, greedily.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A decoded answer."""

    token_ids: list[int]
    prefill_logits: np.ndarray
    prefill_ms: float
    decode_ms: float


def splice_prompt(
    table: np.ndarray, prefix: list[int], visual: np.ndarray, suffix: list[int], rows: int
) -> np.ndarray:
    """Prompt embeddings float32 [1, rows, D], zero rows after the last token.

    Args:
        table: Token embeddings [V, D].
        prefix: Token IDs before the picture.
        visual: The vision graph's tokens [1, K + E, D].
        suffix: Token IDs after the picture.
        rows: Length to pad to.
    """
    embeddings = np.zeros((1, rows, visual.shape[-1]), np.float32)
    start, end = len(prefix), len(prefix) + visual.shape[1]
    embeddings[0, :start] = embedding_rows(table, prefix)
    embeddings[0, start:end] = visual[0]
    embeddings[0, end : end + len(suffix)] = embedding_rows(table, suffix)
    return embeddings


def decode_greedily(
    decoder: DecoderSession,
    table: np.ndarray,
    embeddings: np.ndarray,
    position_ids: np.ndarray,
    *,
    length: int,
    most: int,
    stop_ids: tuple[int, ...],
) -> Decoded:
    """Answer tokens, the most likely one at each step, without the stop token.

    Args:
        decoder: A session; its cache is overwritten from slot 0.
        table: Token embeddings [V, D].
        embeddings: Padded prompt [1, S, D].
        position_ids: Of the padded prompt, int64 [1, S].
        length: Tokens of the prompt without padding.
        most: Most tokens to decode.
        stop_ids: Token IDs that end the answer.

    Raises:
        EngineError: The decoder gave values that are not finite.
    """
    began = time.perf_counter()
    # Padded rows come after the real ones, so that none of those sees them; decoding
    # overwrites their cache slots one by one.
    logits = decoder.run(embeddings, position_ids, write_slot=0, logits_row=length - 1).copy()
    prefilled = time.perf_counter()
    token_ids: list[int] = []
    token = _choose(logits)
    first_position = int(position_ids[0, length - 1]) + 1
    while token not in stop_ids and len(token_ids) < most:
        token_ids.append(token)
        if len(token_ids) == most:
            break
        step = len(token_ids) - 1
        token = _choose(
            decoder.run(
                embedding_rows(table, [token])[None],
                np.array([[first_position + step]]),
                write_slot=length + step,
                logits_row=0,
            )
        )
    ended = time.perf_counter()
    return Decoded(
        token_ids=token_ids,
        prefill_logits=logits,
        prefill_ms=(prefilled - began) * 1e3,
        decode_ms=(ended - prefilled) * 1e3,
    )


def _choose(logits: np.ndarray) -> int:
    """The most likely token; a value that is no number would be the largest to numpy."""
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        raise EngineError(
            "the decoder gave values that are not finite; export with --dtype bfloat16 or float32 "
            "(gap-export probe names the first tensor)"
        )
    return token
