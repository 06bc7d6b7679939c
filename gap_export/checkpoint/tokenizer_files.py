"""Which files a tokenizer is read from, and what they say of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from gap_export.checkpoint.folder import read_json

TOKENIZER_FILE: Final = "tokenizer.json"
SENTENCEPIECE_FILE: Final = "tokenizer.model"
_CLIP_FILE: Final = "vocab.json"
_FILES: Final = (TOKENIZER_FILE, SENTENCEPIECE_FILE, _CLIP_FILE)
_CONFIG_FILE: Final = "tokenizer_config.json"
SPACE: Final = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """Where a tokenizer lies and how it reads.

    `added` are tokens that the authors' code adds where the files do not have them, in this order.
    """

    folder: Path
    rule: Literal["file", "pieces", "stripped"] = "file"
    added: tuple[str, ...] = ()

    @property
    def reads_sentencepiece(self) -> bool:
        """Whether `tokenizer.model` is what counts."""
        has_json = (self.folder / TOKENIZER_FILE).is_file()
        return (self.folder / SENTENCEPIECE_FILE).is_file() and not (
            self.rule == "file" and has_json
        )

    @property
    def exists(self) -> bool:
        """Whether the folder has a tokenizer at all."""
        return any((self.folder / name).is_file() for name in _FILES)

    @property
    def takes_file(self) -> bool:
        """Whether `tokenizer.json` is taken as it is."""
        if self.reads_sentencepiece:
            return False
        path = self.folder / TOKENIZER_FILE
        return self.rule == "file" or not path.is_file() or not is_sentencepiece(read_object(path))

    @property
    def is_legacy(self) -> bool:
        """Whether text right of every added token begins a sentence.

        Where the files do not say, it does: they are from before there was another way.
        """
        return self.rule == "stripped" or read_config(self.folder).get("legacy") is not False


def is_sentencepiece(data: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` holds what was a SentencePiece model of Llama's kind."""
    model, cut = data.get("model") or {}, data.get("pre_tokenizer") or {"type": "Metaspace"}
    is_bpe = model.get("type") == "BPE" and bool(model.get("byte_fallback"))
    return is_bpe and SPACE in model["vocab"] and cut["type"] == "Metaspace"


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `tokenizer_config.json`, empty where there is none."""
    return read_object(folder / _CONFIG_FILE)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return read_json(path) if path.is_file() else {}
