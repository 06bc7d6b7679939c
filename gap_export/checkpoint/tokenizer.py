"""A checkpoint's tokenizer as one `tokenizer.json`, whatever files it came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from gap_export.errors import CheckpointError

TOKENIZER_FILE: Final = "tokenizer.json"
_OLDER_FILES: Final = ("tokenizer.model", "vocab.json")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, None where it has none.

    Raises:
        CheckpointError: Its files cannot be read.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file() and not any((folder / name).is_file() for name in _OLDER_FILES):
        return None
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        return _convert(folder)
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())
        where = path if path.is_file() else folder
        raise CheckpointError(f"{where}: its tokenizer cannot be read ({reason:.200})") from error


def load_library_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder as the library's own object."""
    from transformers import AutoTokenizer, LlamaTokenizer  # noqa: PLC0415 - not always needed

    # The library would go by the model_type of config.json, and for some it leaves out the space
    # that SentencePiece puts before every text.
    is_older = (folder / "tokenizer.model").is_file() and not (folder / TOKENIZER_FILE).is_file()
    kind = LlamaTokenizer if is_older else AutoTokenizer
    return kind.from_pretrained(folder, local_files_only=True)


def _convert(folder: Path) -> Tokenizer:
    """SentencePiece's or CLIP's files in the library's own conversion."""
    tokenizer: Tokenizer = load_library_tokenizer(folder).backend_tokenizer
    return tokenizer
