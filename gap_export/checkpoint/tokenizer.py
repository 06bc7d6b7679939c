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
"""

from __future__ import annotations

import base64
import importlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from tokenizers import Tokenizer

from gap_export.errors import CheckpointError

TOKENIZER_FILE: Final = "tokenizer.json"
SENTENCEPIECE_FILE: Final = "tokenizer.model"
_CLIP_FILE: Final = "vocab.json"
_FILES: Final = (TOKENIZER_FILE, SENTENCEPIECE_FILE, _CLIP_FILE)
_ADDED_FILE: Final = "added_tokens.json"
_CONFIG_FILE: Final = "tokenizer_config.json"
_SPECIAL_FILE: Final = "special_tokens_map.json"
_DEFAULTS: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_SETTLED: Final = (*_DEFAULTS, "pad_token")
"""Tokens that Llama's class of old gave settings of its own."""
_NAMES: Final = (*_DEFAULTS, "sep_token", "pad_token", "cls_token", "mask_token")
_SPACE: Final = "\u2581"
_LLAMA_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast")
_BYTE_PIECE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_BPE: Final = 2
_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6
"""Kinds of pieces in a SentencePiece model."""


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
        return self.rule == "file" or not path.is_file() or not _is_sentencepiece(_read_json(path))

    @property
    def is_legacy(self) -> bool:
        """Whether text right of every added token begins a sentence.

        Where the files do not say, it does: they are from before there was another way. Where a
        prompt has no added token, as long as the code adds none, there is no difference.
        """
        if self.rule == "stripped" or (self.rule == "pieces" and not self.added):
            return True
        return _read_config(self.folder).get("legacy") is not False


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is taken out of a text before the rest is encoded."""

    content: str
    id: int
    strips_left: bool
    strips_right: bool
    is_special: bool


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
    try:
        if files.reads_sentencepiece:
            return _build(files, _read_sentencepiece(folder / SENTENCEPIECE_FILE))
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            return (_load if files.takes_file else _build)(files, data)
        return _convert_clip(folder) if files.exists else None
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())
        where = path if path.is_file() else folder
        raise CheckpointError(f"{where}: its tokenizer cannot be read ({reason:.200})") from error


def write_tokenizer(files: TokenizerFiles, tokenizer: Tokenizer, path: Path) -> None:
    """Write what `read_tokenizer` gave, byte by byte where it is the folder's own file."""
    own = files.folder / TOKENIZER_FILE
    if files.takes_file and own.is_file() and find_controls(files) is None:
        shutil.copyfile(own, path)
    else:
        tokenizer.save(str(path))


def read_added_tokens(files: TokenizerFiles) -> list[AddedToken]:
    """The added tokens of a folder as the tokenizers of the rule's time took them.

    Those that the files name as plain strings strip the spaces beside them by the rule `stripped`;
    those with settings of their own never do.
    """
    folder = files.folder
    config, given = _read_config(folder), _read_json(folder / _SPECIAL_FILE)
    vocabulary, settings = _read_vocabulary(files)
    later = {
        token["content"]: {**token, "id": int(number)}
        for number, token in (config.get("added_tokens_decoder") or {}).items()
    }
    numbers = {token["content"]: int(token["id"]) for token in [*settings, *later.values()]}
    numbers |= {
        content: int(number) for content, number in _read_json(folder / _ADDED_FILE).items()
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
            is_special=content in marked
            or content in files.added
            or bool(later.get(content, {}).get("special"))
            or any(each["content"] == content and each.get("special") for each in settings),
        )
    return list(found.values())


def find_controls(files: TokenizerFiles) -> tuple[list[int], list[int]] | None:
    """Token IDs that every prompt begins with and ends with; None where `tokenizer.json` says.

    Llama's classes of old went by their config, whatever the file said.
    """
    config = _read_config(files.folder)
    if files.takes_file and (
        config.get("tokenizer_class") not in _LLAMA_CLASSES
        or not _is_sentencepiece(_read_json(files.folder / TOKENIZER_FILE))
    ):
        return None
    tokens = {token.content: token.id for token in read_added_tokens(files)}
    given = _read_json(files.folder / _SPECIAL_FILE)
    ends: list[list[int]] = []
    for name, switch, usual in (
        ("bos_token", "add_bos_token", True),
        ("eos_token", "add_eos_token", False),
    ):
        value = given.get(name) or config.get(name) or _DEFAULTS[name]
        content = str(value["content"] if isinstance(value, dict) else value)
        ends.append([tokens[content]] if config.get(switch, usual) else [])
    return ends[0], ends[1]


def find_added(tokenizer: Tokenizer, token_id: int) -> str | None:
    """What a token looks like in a text.

    The tokenizer's own answer may be what its normalizer makes of that.
    """
    added = tokenizer.get_added_tokens_decoder().get(token_id)
    found: str | None = tokenizer.id_to_token(token_id) if added is None else added.content
    return found


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
        data: A `tokenizer.json` whose vocabulary counts; or what `_read_sentencepiece` gives.
    """
    model = data["model"]
    tokens = sorted(read_added_tokens(files), key=lambda token: token.id)
    atoms = {token.content for token in tokens} | set(data.get("atoms", ()))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if data.get("has_prefix", True) else []
    first = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "first" if prefix else "never",
        "split": False,
    }
    own = data.get("cleaning", [])
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
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
                "normalized": False,
                "special": token.is_special,
            }
            for token in tokens
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*own, *(prefix if files.is_legacy else []), replace],
        },
        "pre_tokenizer": None if files.is_legacy else first,
        "post_processor": _wrap(files),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**model, "merges": _list_merges(model["vocab"], atoms)},
    }
    return Tokenizer.from_str(json.dumps(made))


def _list_merges(ids: dict[str, int], atoms: set[str]) -> list[list[str]]:
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


def _read_sentencepiece(path: Path) -> dict[str, Any]:
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


def _read_vocabulary(files: TokenizerFiles) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Pieces by their text, and the added tokens that `tokenizer.json` has."""
    path = files.folder / TOKENIZER_FILE
    data = _read_json(path)
    if not files.reads_sentencepiece:
        return data["model"]["vocab"], data["added_tokens"]
    proto = read_proto(files.folder / SENTENCEPIECE_FILE)
    pieces = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    return pieces, data.get("added_tokens", [])


def _is_sentencepiece(data: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` holds what was a SentencePiece model of Llama's kind."""
    model, cut = data.get("model") or {}, data.get("pre_tokenizer") or {"type": "Metaspace"}
    is_bpe = model.get("type") == "BPE" and bool(model.get("byte_fallback"))
    return is_bpe and _SPACE in model["vocab"] and cut["type"] == "Metaspace"


def _convert_clip(folder: Path) -> Tokenizer:
    """CLIP's files of old in the library's own conversion."""
    tokenizer: Tokenizer = load_library_tokenizer(folder).backend_tokenizer
    return tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / _CONFIG_FILE)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
