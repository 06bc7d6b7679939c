"""SentencePiece models in the words of a `tokenizer.json`."""

from __future__ import annotations

import base64
import importlib
import re
from pathlib import Path
from typing import Any, Final

from gap_export.errors import CheckpointError

_BYTE_PIECE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_BPE: Final = 2
_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6
"""Kinds of pieces in a SentencePiece model."""


def read_proto(path: Path) -> Any:
    """What a SentencePiece model's file says."""
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415 - not always needed

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: its tokenizer cannot be read ({reason:.100}); download it again"
        ) from error
    # Made at run time, so that no type of it is known.
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    return proto


def list_merges(ids: dict[str, int], atoms: set[str]) -> list[list[str]]:
    """Every pair of pieces that is a piece, as SentencePiece merges them: by the piece's number.

    The lists in files of old are neither whole nor in that order.
    """
    made = [
        (number, ids[piece[:cut]], ids[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, number in ids.items()
        if piece not in atoms and not _BYTE_PIECE.fullmatch(piece)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [pair for *_, pair in sorted(made)]


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """A SentencePiece model in the words of a `tokenizer.json`."""
    proto = read_proto(path)
    if proto.trainer_spec.model_type != _BPE:
        raise CheckpointError(
            f"{path}: a SentencePiece model that is no BPE, which no model here was trained with; "
            "give the tokenizer that belongs to this checkpoint"
        )
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    unknown = [piece.piece for piece in proto.pieces if piece.type == _UNKNOWN]
    normalizer = proto.normalizer_spec
    cleaning: list[dict[str, Any]] = []
    if normalizer.precompiled_charsmap:
        table = base64.b64encode(normalizer.precompiled_charsmap).decode()
        cleaning.append({"type": "Precompiled", "precompiled_charsmap": table})
    if normalizer.remove_extra_whitespaces:
        cleaning.append({"type": "Strip", "strip_left": True, "strip_right": True})
        cleaning.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return {
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0] if unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == _BYTE for piece in proto.pieces),
            "ignore_merges": False,
            "vocab": ids,
        },
        "atoms": [piece.piece for piece in proto.pieces if piece.type != _NORMAL],
        "cleaning": cleaning,
        "has_prefix": normalizer.add_dummy_prefix,
    }
