"""A stranger's tokenizer: what its own expressions may take, and how long a text may be."""

import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from gap_runtime.errors import BundleError, InputError, PatternError
from gap_runtime.grounding.prompt import PromptEncoder, load_tokenizer
from gap_runtime.grounding.tokens import (
    LONGEST_TEXT,
    WithoutPanics,
    encode_text,
    require_quick,
    try_tokenizer,
)

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PUBLISHED = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "clip": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "qwen": rf"{_WORD}|\p{{N}}|{_REST}",
    "llama-3": rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++"
    r"[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_END}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+"
    rf"{_LOWER}*{_END}|\p{{N}}{{1,3}}|{_REST}",
    "kimi": rf"[\p{{Han}}]+|[\p{{Lu}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]*{_LOWER}+{_END}|{_REST}",
    "bloom": " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
    "digits": r"\d{1,3}(?=(?:\d{3})*\b)",
    "lookaheads": r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|\p{N}|" + _REST,
}
SLOW = ("(a+)+$", "a*a*a*b", "(?:.|a){20}[bc]", r"\p{L}+\p{L}+\p{L}+[^\p{L}]b", "(?=(a|aa)+b)c")


@pytest.fixture
def change(tokenizer_file):
    """A function that puts parts into the tokenizer's file, and gives its path."""

    def put(**parts):
        data = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        made = {key: json.loads(part.__getstate__()) for key, part in parts.items()}
        tokenizer_file.write_text(json.dumps({**data, **made}), encoding="utf-8")
        return tokenizer_file

    return put


def split(*patterns):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_expressions_are_taken(change, name):
    path = change(
        pre_tokenizer=split(PUBLISHED[name]),
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")]),
    )
    tokenizer = load_tokenizer(path)
    started = time.process_time()
    for text in ("a" * LONGEST_TEXT, "1" * LONGEST_TEXT, "\u3042" * 500, " " * LONGEST_TEXT):
        encode_text(tokenizer, text)
    # Far below what they are told to take at most.
    assert time.process_time() - started < 5


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("where", ["pre_tokenizer", "normalizer", "decoder"])
def test_slow_expressions_are_refused_as_the_file_is_read(change, where, pattern):
    part = {
        "pre_tokenizer": split("a", pattern),
        "normalizer": normalizers.Sequence([normalizers.Replace(Regex(pattern), "x")]),
        "decoder": decoders.Sequence([decoders.Replace(Regex(pattern), "x")]),
    }[where]
    path = change(**{where: part})
    with pytest.raises(BundleError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: its regular expression ")
    assert str(caught.value).endswith(
        "may take too long; write it without repeats behind or inside of repeats"
    )


def test_many_expressions_count_together(change):
    load_tokenizer(change(pre_tokenizer=split(*[PUBLISHED["qwen"]] * 4)))
    with pytest.raises(BundleError, match="may take too long"):
        load_tokenizer(change(pre_tokenizer=split(*[PUBLISHED["qwen"]] * 40)))


def test_what_comes_before_makes_texts_longer(change):
    """Up to a limit; an expression behind it is told of the longer text."""
    lengthen = normalizers.Replace("a", "x" * 30)
    load_tokenizer(change(normalizer=lengthen))
    with pytest.raises(BundleError, match="may take too long"):
        load_tokenizer(change(normalizer=lengthen, pre_tokenizer=split(PUBLISHED["qwen"])))
    for parts in ([lengthen] * 2, [normalizers.Replace(Regex("a?"), "x" * 1000)]):
        tokenizer = Tokenizer.from_file(str(change()))
        tokenizer.normalizer = normalizers.Sequence(parts)
        with pytest.raises(PatternError, match="over 100 times as long as they are"):
            require_quick(tokenizer)


@pytest.mark.parametrize(
    "text", ["a" * (LONGEST_TEXT + 1), "\ufdfa" * (LONGEST_TEXT // 18 + 1)], ids=["long", "wide"]
)
def test_longer_texts_are_refused(tokenizer_file, prompt, text):
    tokenizer = load_tokenizer(tokenizer_file)
    encoder = PromptEncoder(tokenizer, prompt, rows=10**6)
    for encode in (encoder.encode, encoder.encode_phrase):
        with pytest.raises(InputError, match="characters, at most 4,000 are read"):
            encode(text)
    assert encode_text(tokenizer, "a" * LONGEST_TEXT)


PANICS = {
    "as it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "over a text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "over tokens": {"decoder": {"type": "Strip", "content": "?", "start": 0, "stop": 9}},
}


@pytest.mark.parametrize("when", PANICS)
def test_a_panic_is_our_line_alone(tokenizer_file, capfd, when):
    """The library writes its own to the file descriptor."""
    data = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    tokenizer_file.write_text(json.dumps({**data, **PANICS[when]}), encoding="utf-8")
    with pytest.raises(BundleError, match=r"words\.json: not a tokenizer"):
        load_tokenizer(tokenizer_file)
    assert capfd.readouterr().err == ""


def test_what_others_write_meanwhile_comes_behind(capfd):
    with WithoutPanics():
        os.write(2, b"a line\n")
    with contextlib.suppress(KeyError), WithoutPanics():
        os.write(2, b"another\n")
        raise KeyError
    os.write(2, b"the last\n")
    assert capfd.readouterr().err == "a line\nanother\nthe last\n"


def test_threads_put_back_what_was_there(capfd):
    def write(k):
        with WithoutPanics():
            os.write(2, b"%d\n" % k)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(20)))
    assert sorted(map(int, capfd.readouterr().err.split())) == list(range(20))


def test_a_trial_leaves_padding_and_truncation(tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding(length=10**12, pad_token="<unk>", direction="left")
    tokenizer.enable_truncation(5, stride=2, direction="left")
    before = tokenizer.to_str()
    try_tokenizer(tokenizer)
    assert tokenizer.to_str() == before
