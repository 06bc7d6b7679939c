"""Tokens that are taken out of a text before the rest is encoded, and those around a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from gap_export.checkpoint.sentencepiece import read_proto
from gap_export.checkpoint.tokenizer_files import (
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    TokenizerFiles,
    is_sentencepiece,
    read_config,
    read_object,
)
from gap_export.errors import CheckpointError

_ADDED_FILE: Final = "added_tokens.json"
_SPECIAL_FILE: Final = "special_tokens_map.json"
_DEFAULTS: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_SETTLED: Final = (*_DEFAULTS, "pad_token")
"""Tokens that Llama's class of old gave settings of its own."""
_NAMES: Final = (*_DEFAULTS, "sep_token", "pad_token", "cls_token", "mask_token")
_LLAMA_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is taken out of a text before the rest is encoded.

    `is_named` says that it has a part (`bos_token`, ..., `additional_special_tokens`), from the
    files or since the authors' code was the first to add it. Special tokens are those and others.
    """

    content: str
    id: int
    strips_left: bool
    strips_right: bool
    is_named: bool
    is_special: bool


def read_added_tokens(files: TokenizerFiles) -> list[AddedToken]:
    """The added tokens of a folder as the tokenizers of the rule's time took them.

    Those that the files name as plain strings strip the spaces beside them by the rule `stripped`;
    those with settings of their own never do.

    Raises:
        CheckpointError: A file says something else than what its library writes.
    """
    with _read_of(files):
        return _read_added_tokens(files)


def _read_added_tokens(files: TokenizerFiles) -> list[AddedToken]:
    folder = files.folder
    config, given = read_config(folder), _read_names(files)
    vocabulary, settings = _read_vocabulary(files)
    later = {
        token["content"]: {**token, "id": int(number)}
        for number, token in (config.get("added_tokens_decoder") or {}).items()
    }
    numbers = {token["content"]: int(token["id"]) for token in [*settings, *later.values()]}
    numbers |= {
        content: int(number) for content, number in read_object(folder / _ADDED_FILE).items()
    }
    marked: dict[str, dict[str, Any] | None] = {}
    for name in (*_NAMES, "additional_special_tokens"):
        default = _DEFAULTS.get(name)
        for value in _as_list(given[name] if name in given else config.get(name, default)):
            content = str(value["content"] if isinstance(value, dict) else value)
            # A plain string in the map replaces the token of the class, which has settings.
            is_given = name in given or name not in _SETTLED
            is_plain = not isinstance(value, dict) and is_given
            if marked.get(content) is None:
                own = value if isinstance(value, dict) else {"content": content}
                marked[content] = None if is_plain else own
    found: dict[str, AddedToken] = {}
    wanted = [*sorted(numbers, key=lambda content: numbers[content]), *marked, *files.added]
    for content in dict.fromkeys(wanted):
        number = numbers.get(content, vocabulary.get(content))
        if number is None:
            taken = [*vocabulary.values(), *(token.id for token in found.values())]
            number = 1 + max(taken, default=-1)
        if files.rule == "stripped":
            own = marked.get(content) or {"lstrip": True, "rstrip": True}
        else:
            own = later.get(content) or marked.get(content) or {}
        found[content] = AddedToken(
            content=content,
            id=number,
            strips_left=bool(own.get("lstrip")),
            strips_right=bool(own.get("rstrip")),
            is_named=content in marked or (content in files.added and content not in numbers),
            is_special=content in marked
            or content in files.added
            or bool(later.get(content, {}).get("special"))
            or any(each["content"] == content and each.get("special") for each in settings),
        )
    return list(found.values())


def find_controls(files: TokenizerFiles) -> tuple[list[int], list[int]] | None:
    """Token IDs that every prompt begins with and ends with; None where `tokenizer.json` says.

    Llama's classes of old went by their config, whatever the file said.

    Raises:
        CheckpointError: A file says something else than what its library writes.
    """
    with _read_of(files):
        return _find_controls(files)


def _find_controls(files: TokenizerFiles) -> tuple[list[int], list[int]] | None:
    config = read_config(files.folder)
    if files.takes_file and (
        config.get("tokenizer_class") not in _LLAMA_CLASSES
        or not is_sentencepiece(read_object(files.folder / TOKENIZER_FILE))
    ):
        return None
    tokens = {token.content: token.id for token in read_added_tokens(files)}
    given = _read_names(files)
    ends: list[list[int]] = []
    for name, switch, usual in (
        ("bos_token", "add_bos_token", True),
        ("eos_token", "add_eos_token", False),
    ):
        value = given.get(name) or config.get(name) or _DEFAULTS[name]
        content = str(value["content"] if isinstance(value, dict) else value)
        ends.append([tokens[content]] if config.get(switch, usual) else [])
    return ends[0], ends[1]


@contextmanager
def _read_of(files: TokenizerFiles) -> Iterator[None]:
    """Where files of a library are read, whose form it has written down nowhere."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(repr(error).split())
        raise CheckpointError(
            f"{files.folder}: its tokenizer's files cannot be read ({reason:.160}); download them "
            "again"
        ) from error


def _read_names(files: TokenizerFiles) -> dict[str, Any]:
    """`special_tokens_map.json`, which goes before `tokenizer_config.json`.

    Empty where the library of the rule's time did not look at it: from transformers 4.34 on, where
    the config numbers the added tokens.
    """
    if files.rule != "stripped" and read_config(files.folder).get("added_tokens_decoder"):
        return {}
    return read_object(files.folder / _SPECIAL_FILE)


def _read_vocabulary(files: TokenizerFiles) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Pieces by their text, and the added tokens that `tokenizer.json` has."""
    path = files.folder / TOKENIZER_FILE
    data = read_object(path)
    if not files.reads_sentencepiece:
        return data["model"]["vocab"], data["added_tokens"]
    proto = read_proto(files.folder / SENTENCEPIECE_FILE)
    pieces = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    return pieces, data.get("added_tokens", [])


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
