"""A checkpoint's tokenizer as one `tokenizer.json` that encodes as the model's authors did.

Models of one kind were asked with tokenizers of different times, which differ in what they do
around added tokens. The rules are those of docs/models.md, "Prompts"; `TokenizerFiles.rule` names
one of them:

| rule | files | around an added token |
|---|---|---|
| `file` | `tokenizer.json`, else `tokenizer.model` | as `tokenizer.json` says |
| `pieces` | `tokenizer.model`, else `tokenizer.json` | the text right of it begins a sentence |
| `stripped` | the same | the same, and the spaces beside it go |

`pieces` is what slow tokenizers of transformers 4.34 to 4.39 do, `stripped` those before 4.34.
Where `legacy` is false, `pieces` means that a text begins a sentence as a whole and is cut after
that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from gap_export.checkpoint.added_tokens import AddedToken, find_controls, read_added_tokens
from gap_export.checkpoint.sentencepiece import list_merges, read_sentencepiece
from gap_export.checkpoint.tokenizer_files import (
    SENTENCEPIECE_FILE,
    SPACE,
    TOKENIZER_FILE,
    TokenizerFiles,
)
from gap_export.errors import CheckpointError
from gap_runtime.errors import PatternError
from gap_runtime.grounding.tokens import (
    AskedOfTokenizer,
    WithoutPanics,
    require_quick,
    try_tokenizer,
)
from gap_runtime.records.plain import read_table

_SPACES: Final = {
    "type": "Metaspace",
    "replacement": SPACE,
    "prepend_scheme": "never",
    "split": False,
}
"""Writes spaces as SentencePiece does, and cuts nothing."""


def read_tokenizer(files: TokenizerFiles | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, None where it has none.

    Args:
        files: The folder; alone, its `tokenizer.json` is taken as it is.

    Raises:
        CheckpointError: Its files cannot be read.
    """
    if isinstance(files, Path):
        files = TokenizerFiles(folder=files)
    folder = files.folder
    path = folder / TOKENIZER_FILE

    def refuse(error: BaseException) -> CheckpointError:
        reason, where = " ".join(str(error).split()), path if path.is_file() else folder
        return CheckpointError(f"{where}: its tokenizer cannot be read ({reason:.200})")

    with WithoutPanics(), AskedOfTokenizer(refuse):
        tokenizer = _read(files, path)
        try:
            if tokenizer is not None:
                require_quick(tokenizer)
        except PatternError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if tokenizer is not None:
            try_tokenizer(tokenizer)
    return tokenizer


def _read(files: TokenizerFiles, path: Path) -> Tokenizer | None:
    """The tokenizer of whatever there is."""
    folder = files.folder
    if files.reads_sentencepiece:
        return _build(files, read_sentencepiece(folder / SENTENCEPIECE_FILE))
    if path.is_file():
        data = read_table(path, CheckpointError)
        return (_load if files.takes_file else _build)(files, data)
    return _convert_clip(folder) if files.exists else None


def write_tokenizer(files: TokenizerFiles, tokenizer: Tokenizer, path: Path) -> None:
    """Write what `read_tokenizer` gave, byte by byte where it is the folder's own file."""
    own = files.folder / TOKENIZER_FILE
    if files.takes_file and own.is_file() and find_controls(files) is None:
        shutil.copyfile(own, path)
    else:
        tokenizer.save(str(path))


def find_added(tokenizer: Tokenizer, token_id: int) -> str | None:
    """What a token looks like in a text.

    The tokenizer's own answer may be what its normalizer makes of that.
    """
    added = tokenizer.get_added_tokens_decoder().get(token_id)
    found: str | None = tokenizer.id_to_token(token_id) if added is None else added.content
    return found


def load_library_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder as the library's own object."""
    from transformers import (  # noqa: PLC0415 - not always needed
        AutoTokenizer,
        LlamaTokenizer,
        PreTrainedTokenizerFast,
    )

    if (folder / TOKENIZER_FILE).is_file():
        # The library's classes of single models build a tokenizer of their own from it.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    # Elsewhere the library goes by the model_type of config.json.
    kind = LlamaTokenizer if (folder / SENTENCEPIECE_FILE).is_file() else AutoTokenizer
    return kind.from_pretrained(folder, local_files_only=True)


def _load(files: TokenizerFiles, data: dict[str, Any]) -> Tokenizer:
    """A `tokenizer.json` as it is, but for what begins and ends a prompt."""
    if find_controls(files) is not None:
        data["post_processor"] = _wrap(files)
    return Tokenizer.from_str(json.dumps(data))


def _build(files: TokenizerFiles, data: dict[str, Any]) -> Tokenizer:
    """A SentencePiece vocabulary with the added tokens of a folder, by its rule.

    Args:
        files: Of the folder.
        data: A `tokenizer.json` whose vocabulary counts; or what `read_sentencepiece` gives.
    """
    model = data["model"]
    tokens = sorted(read_added_tokens(files), key=lambda token: token.id)
    atoms = {token.content for token in tokens} | set(data.get("atoms", ()))
    has_prefix, cleaning = data.get("has_prefix", True), data.get("cleaning", [])
    if files.is_legacy:
        prefix = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
        normalizers, cut = [*cleaning, *prefix, _replace(" ", SPACE)], None
    else:
        # Before the text is cut: a normalizer cannot tell the first piece from another.
        prefix = _begin_whole(tokens) if has_prefix else []
        normalizers, cut = [_replace(SPACE, " "), *cleaning, *prefix], _SPACES
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token.id,
                "content": token.content,
                "single_word": False,
                "lstrip": token.strips_left,
                "rstrip": token.strips_right,
                "normalized": not files.is_legacy,
                "special": token.is_special,
            }
            for token in tokens
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": cut,
        "post_processor": _wrap(files),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**model, "merges": list_merges(model["vocab"], atoms)},
    }
    return Tokenizer.from_str(json.dumps(made))


def _begin_whole(tokens: list[AddedToken]) -> list[dict[str, Any]]:
    """Normalizers that put a space before a whole text, but for one that a named token begins.

    Added tokens are looked for behind the normalizer in the form that it gives them, so a text
    that is one of them and nothing else must stay as it is.
    """
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    kept = [
        (r" *" if token.strips_left else "") + re.escape(token.content)
        if token.is_named
        else re.escape(token.content) + r"\z"
        for token in longest_first
    ]
    space = {"type": "Prepend", "prepend": SPACE}
    return [space, _replace(rf"\A{SPACE}(?={'|'.join(kept)})", "", kind="Regex")]


def _replace(pattern: str, content: str, *, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _wrap(files: TokenizerFiles) -> dict[str, Any]:
    """What puts the tokens around a prompt that begin and end it."""
    contents = {token.id: token.content for token in read_added_tokens(files)}
    controls = find_controls(files)
    assert controls is not None
    start, end = controls
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {number: contents[number] for number in (*start, *end)}

    def frame(sequences: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        marks = [
            [{"SpecialToken": {"id": tokens[number], "type_id": 0}} for number in side]
            for side in (start, end)
        ]
        return [part for each in sequences for part in (*marks[0], each, *marks[1])]

    return {
        "type": "TemplateProcessing",
        "single": frame([text]),
        "pair": frame([text, {"Sequence": {"id": "B", "type_id": 1}}]),
        "special_tokens": {
            content: {"id": content, "ids": [number], "tokens": [content]}
            for number, content in tokens.items()
        },
    }


def _convert_clip(folder: Path) -> Tokenizer:
    """CLIP's files of old in the library's own conversion."""
    tokenizer: Tokenizer = load_library_tokenizer(folder).backend_tokenizer
    return tokenizer
