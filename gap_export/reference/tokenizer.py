"""A tokenizer as a model's authors ran it, independent of the one in the bundle.

Text is cut at the added tokens here, and what lies between them is encoded alone: by SentencePiece
itself where its model is there, else by the plainest loop over the vocabulary. A `tokenizer.json`
that is taken as it is goes through the library's own object.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from gap_export.checkpoint.added_tokens import find_controls, read_added_tokens
from gap_export.checkpoint.sentencepiece import read_proto
from gap_export.checkpoint.tokenizer import load_library_tokenizer
from gap_export.checkpoint.tokenizer_files import (
    SENTENCEPIECE_FILE,
    SPACE,
    TOKENIZER_FILE,
    TokenizerFiles,
)
from gap_export.errors import CheckpointError
from gap_runtime.records.plain import read_table

Encode = Callable[[str], list[int]]


class EagerTokenizer:
    """Text to token IDs and back."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Read the folder's files."""
        self._library = load_library_tokenizer(files.folder)
        self._controls = find_controls(files)
        self._added = {token.content: token for token in read_added_tokens(files)}
        self._is_whole = files.takes_file
        self._special = {token.id for token in self._added.values() if token.is_special}
        self._is_legacy = files.is_legacy
        self._piece: Encode | None = None if self._is_whole else _open(files)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token IDs of a text, with those that begin and end every prompt where `special`."""
        if self._controls is None:
            whole: list[int] = self._library(text, add_special_tokens=special)["input_ids"]
            return whole
        start, end = self._controls if special else ([], [])
        if self._is_whole:
            return [*start, *self._library(text, add_special_tokens=False)["input_ids"], *end]
        return [*start, *self._encode_pieces(text), *end]

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""
        plain = [token_id for token_id in token_ids if token_id not in self._special]
        text: str = self._library.decode(
            plain, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    def _encode_pieces(self, text: str) -> list[int]:
        assert self._piece is not None
        if not self._is_legacy and text:
            text = SPACE + text.replace(SPACE, " ")
        longest_first = sorted(self._added, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        pieces = re.split(f"({pattern})", text)
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(self._added[piece].id)
                continue
            right = self._added[pieces[place + 1]] if place + 1 < len(pieces) else None
            if place and self._added[pieces[place - 1]].strips_right:
                piece = piece.lstrip()  # noqa: PLW2901 - what is left of it
            if right is not None and right.strips_left:
                piece = piece.rstrip()  # noqa: PLW2901 - what is left of it
            is_alone = not self._is_legacy and place == 0 and piece == SPACE
            if piece and not (is_alone and right is not None and right.is_named):
                ids += self._piece(piece)
        return ids


def _open(files: TokenizerFiles) -> Encode:
    """What encodes the text between two added tokens; where `legacy` is false, as it stands."""
    prefix = SPACE if files.is_legacy else ""
    if not files.reads_sentencepiece:
        path = files.folder / TOKENIZER_FILE
        vocabulary = read_table(path, CheckpointError)["model"]["vocab"]
        alone = {piece for piece in vocabulary if re.fullmatch(r"<0x..>", piece)}
        alone |= {token.content for token in read_added_tokens(files)}
        return lambda text: _merge(prefix + text, vocabulary, alone)
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415 - not always needed

    proto = read_proto(files.folder / SENTENCEPIECE_FILE)
    if files.is_legacy:
        sentence: Encode = SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
        return sentence
    proto.normalizer_spec.add_dummy_prefix = False
    rest: Encode = SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
    guard = ">"  # Keeps first spaces, which some models clean away at the start of a text.
    length = len(rest(guard))
    return lambda text: rest(guard + text)[length:] if text[0] in {" ", SPACE} else rest(text)


def _merge(text: str, vocabulary: dict[str, int], alone: set[str]) -> list[int]:
    """SentencePiece's BPE: the two neighbours whose piece has the lowest number, until none is."""
    symbols = list(text.replace(" ", SPACE))
    while True:
        offers: list[tuple[int, int]] = [
            (vocabulary[joined], place)
            for place, joined in enumerate(map(str.__add__, symbols, symbols[1:]))
            if joined in vocabulary and joined not in alone
        ]
        if not offers:
            break
        _, place = min(offers)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    ids: list[int] = []
    for symbol in symbols:
        found: Any = vocabulary.get(symbol)
        ids += [found] if found is not None else _spell(symbol, vocabulary)
    return ids


def _spell(symbol: str, vocabulary: dict[str, int]) -> list[int]:
    """The bytes of a character that has no piece."""
    return [vocabulary[f"<0x{byte:02X}>"] for byte in symbol.encode()]
