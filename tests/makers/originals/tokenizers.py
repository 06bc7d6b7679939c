"""Small trained tokenizers in the files of Vicuna, of LLaMA and of CLIP."""

import functools
import io
import itertools
import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from makers.originals.files import (
    write_json,
)

SPACE = "\u2581"


def make_sentencepiece(folder, *, vocabulary=400, added=(), legacy=True, max_length=2048):
    """Write the files of a small trained LLaMA tokenizer and return the folder.

    Args:
        folder: Is created where it is missing; other files in it stay.
        vocabulary: Pieces, 320 to 680: 259 control and byte pieces, letters, merges.
        added: Tokens that `added_tokens.json` numbers from `vocabulary` on.
        legacy: `tokenizer_config.json`'s key of that name, left out where None (as in files
            from before transformers 4.31).
        max_length: `model_max_length`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(vocabulary))
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        f"{name}_token": {"content": content} | plain
        for name, content in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    config |= {name: {"__type": "AddedToken"} | token for name, token in special.items()}
    config |= {} if legacy is None else {"legacy": legacy}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special | {"pad_token": "<unk>"})
    if added:
        numbers = {token: vocabulary + k for k, token in enumerate(added)}
        write_json(folder / "added_tokens.json", numbers)
    return folder


@functools.cache
def train_sentencepiece(vocabulary):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _sentences():
    colours = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
    shapes = ("circle", "square", "triangle", "star", "ring", "cross", "box", "hexagon")
    places = ("left of", "right of", "above", "below", "next to")
    for k, (colour, shape) in enumerate(itertools.product(colours, shapes)):
        other = f"{colours[(k + 3) % 8]} {shapes[(k + 5) % 8]}"
        x, y = k * 37 % 1000, k * 91 % 1000
        yield f"Please provide the bounding box coordinate of the large {colour} {shape}."
        yield f"Where is the small {colour} {shape} {places[k % 5]} the {other}?"
        yield f"The {colour} {shape} is at [0.{x:03d},0.{y:03d},0.{999 - x:03d},0.{999 - y:03d}]."
        yield f"USER: In this image, find the {other}. ASSISTANT: [0.{x % 100:02d}, 0.5, 0.75, 1]"
        yield f"[INST] [refer] give me the location of {colour} {shape} [/INST] {{<{x % 101}>}}"


def clip_vocabulary():
    """CLIP's byte-level pieces: 512 of bytes, a few merged ones, then the two control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + k) for k in range(len(rest))]
    merges = []
    for word in ("the", "red", "green", "blue", "circle", "square", "star", "left", "right", "of"):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    merges = list(dict.fromkeys(merges))
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += dict.fromkeys(a + b for a, b in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return tokens, merges


def write_clip_tokenizer(folder, tokens, merges):
    write_json(folder / "vocab.json", {token: k for k, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        "bos_token": {"content": "<|startoftext|>"} | plain,
        "eos_token": {"content": "<|endoftext|>"} | plain,
        "unk_token": {"content": "<|endoftext|>"} | plain,
    }
    config = {name: {"__type": "AddedToken"} | token for name, token in special.items()} | {
        "pad_token": "<|endoftext|>",
        "add_prefix_space": False,
        "errors": "replace",
        "do_lower_case": True,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special | {"pad_token": "<|endoftext|>"})


def make_tokenizer_json(folder, *, added=(), form="prepend", normalized=True, whole=False):
    """Write a `tokenizer.json` beside a `tokenizer.model`, and return its path.

    Args:
        folder: With a `tokenizer.model`.
        added: Tokens behind the vocabulary, all special.
        form: How a text gets its first space: `prepend`, a normalizer (transformers before 4.40),
            or `metaspace`, a pre-tokenizer (later ones, where `legacy` is false).
        normalized: Whether added tokens are looked for after the normalizer. The authors' delta
            script wrote such.
        whole: Whether the first merged piece has its merges, which transformers before 4.31 left
            out, since its score is zero.
    """
    folder = Path(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = processor.get_piece_size()
    vocabulary = {processor.id_to_piece(number): number for number in range(size)}
    scores = {piece: processor.get_score(number) for piece, number in vocabulary.items()}
    pairs = [
        (scores[piece], [piece[:cut], piece[cut:]])
        for piece, number in vocabulary.items()
        if not (processor.is_byte(number) or processor.is_control(number))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: -pair[0])
    merges = [f"{left} {right}" for score, (left, right) in pairs if score or whole]
    tokens = [("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    tokens += [(content, size + place) for place, content in enumerate(added)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    prepend = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first"}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": k}} for k, name in enumerate("AB")]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    is_prepend = form == "prepend"
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": content, "normalized": normalized} | flags
            for content, number in tokens
        ],
        "normalizer": {"type": "Sequence", "normalizers": prepend} if is_prepend else None,
        "pre_tokenizer": None if is_prepend else metaspace | {"split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, texts[0]],
            "pair": [start, texts[0], start, texts[1]],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def make_byte_tokenizer(folder, *, special, marks, vocabulary=360):
    """Write a small trained tokenizer in the files of Qwen2's, and return its special tokens.

    Digits are tokens of their own, as Qwen's are.

    Args:
        folder: That exists.
        special: Tokens behind the vocabulary.
        marks: Names of some of them, which go into `tokenizer_config.json`.
        vocabulary: Pieces, at least 256.
    """
    cut = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "extra_special_tokens": marks,
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    return {token: tokenizer.token_to_id(token) for token in special}
