"""Small trained tokenizers in the files of Vicuna, of LLaMA and of CLIP."""

import functools
import io
import itertools
from pathlib import Path

import sentencepiece

from makers.originals.files import (
    write_json,
)


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
