"""Phrases to token IDs with a tokenizer of twelve words (conftest.WORDS)."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from gap_runtime.bundle.manifest import PhraseInput
from gap_runtime.errors import BundleError, InputError
from gap_runtime.grounding.prompt import PhraseEncoder, PromptEncoder, load_tokenizer
from gap_runtime.grounding.tokens import encode_text

ROWS = 10**6


@pytest.fixture
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file)


@pytest.fixture
def encoder(tokenizer, prompt):
    return PromptEncoder(tokenizer, prompt, rows=ROWS)


@pytest.fixture
def imageless(tokenizer_file):
    """The same words but `<image>`, which is text to it; every text begins with token 12."""
    data = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    data["added_tokens"] = [each for each in data["added_tokens"] if each["id"] != 1]
    data["model"]["vocab"]["<other>"] = data["model"]["vocab"].pop("<image>")
    tokenizer = Tokenizer.from_str(json.dumps(data))
    assert tokenizer.token_to_id("<image>") is None
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 12)]
    )
    return tokenizer


@pytest.fixture
def make_apart(imageless, prompt):
    """A function that gives an encoder for models without an image token."""

    def make(template=prompt.template):
        spec = dataclasses.replace(prompt, template=template, image_token=None)
        return PromptEncoder(imageless, spec, rows=ROWS)

    return make


@pytest.fixture
def apart(make_apart):
    return make_apart()


def test_prompt_is_split_at_the_image_token(encoder):
    encoded = encoder.encode("the red mug")
    assert encoded.prefix == [2]
    assert encoded.suffix == [4, 5, 6, 7, 8, 9, 3]


def test_text_before_the_image_goes_into_the_prefix(tokenizer, prompt):
    template = "Where is {phrase} USER: <image> ASSISTANT:"
    other = PromptEncoder(tokenizer, dataclasses.replace(prompt, template=template), rows=ROWS)
    encoded = other.encode("the mug")
    assert (encoded.prefix, encoded.suffix) == ([4, 5, 6, 8, 2], [3])


def test_white_space_of_the_phrase_is_collapsed(encoder):
    assert encoder.encode("  the\tred\n mug ") == encoder.encode("the red mug")


def test_unknown_words_become_the_unknown_token(encoder):
    assert encoder.encode("zebra").suffix == [4, 5, 0, 9, 3]


@pytest.mark.parametrize("phrase", ["", " ", "\n\t "])
def test_empty_phrase_is_refused(encoder, phrase):
    with pytest.raises(InputError, match="the phrase is empty"):
        encoder.encode(phrase)


@pytest.mark.parametrize("phrase", ["<image>", "the <image> mug", "the<image>mug"])
def test_phrase_with_the_image_token_is_refused(encoder, phrase):
    with pytest.raises(InputError, match="holds the image token '<image>'"):
        encoder.encode(phrase)


def test_phrase_that_is_no_valid_text_is_refused(encoder):
    # What Python makes of a command-line argument in Latin-1.
    with pytest.raises(InputError):
        encoder.encode("the caf\udce9")


def test_braces_in_the_phrase_are_text(encoder):
    assert encoder.encode("{phrase}").suffix == [4, 5, 0, 9, 3]


def test_prompt_that_just_fits(encoder, layout):
    assert len(encoder.encode_within("the red mug", layout).suffix) == layout.suffix == 7


def test_phrase_too_long_for_the_bundle_is_refused(encoder, layout):
    with pytest.raises(
        InputError, match=r"8 tokens after the image, this bundle takes 7"
    ) as caught:
        encoder.encode_within("the red red mug", layout)
    assert "--set prompt.suffix=8" in str(caught.value)


def test_prefix_of_another_length_is_refused(encoder, layout):
    with pytest.raises(BundleError, match="1 tokens before the image, the graphs were made for 2"):
        encoder.encode_within("the red mug", dataclasses.replace(layout, prefix=2))


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"}', "not a tokenizer"])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=r"broken\.json: not a tokenizer"):
        load_tokenizer(path)


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"nowhere\.json: no such file"):
        load_tokenizer(tmp_path / "nowhere.json")


def test_tokenizer_without_the_image_token_is_refused(tokenizer, prompt):
    other = dataclasses.replace(prompt, image_token="<picture>")
    with pytest.raises(BundleError, match=r"no token '<picture>', which .*; export again"):
        PromptEncoder(tokenizer, other, rows=ROWS)


def test_answer_is_decoded_without_special_tokens(encoder):
    assert encoder.decode([6, 7, 8, 10]) == "the red mug"


def test_padding_of_the_tokenizer_file_is_switched_off(tokenizer, tokenizer_file, prompt):
    tokenizer.enable_padding(length=32, pad_id=0, pad_token="<unk>")
    tokenizer.save(str(tokenizer_file))
    encoder = PromptEncoder(load_tokenizer(tokenizer_file), prompt, rows=ROWS)
    assert len(encoder.encode("mug").suffix) == 5


def test_truncation_of_the_tokenizer_file_is_switched_off(tokenizer, tokenizer_file, prompt):
    tokenizer.enable_truncation(max_length=4)
    tokenizer.save(str(tokenizer_file))
    encoder = PromptEncoder(load_tokenizer(tokenizer_file), prompt, rows=ROWS)
    assert len(encoder.encode("mug").suffix) == 5


@pytest.mark.parametrize("phrase", ["the red </s>", "<unk>"])
def test_phrase_with_a_special_token_is_refused(encoder, phrase):
    with pytest.raises(InputError, match="special token"):
        encoder.encode(phrase)


def test_apart_the_prefix_alone_has_the_special_tokens(apart):
    encoded = apart.encode("the red mug")
    assert encoded.prefix == [12, 2]
    assert encoded.suffix == [4, 5, 6, 7, 8, 9, 3]


def test_apart_both_sides_are_those_of_a_tokenizer_that_has_the_image_token(apart, encoder):
    together = encoder.encode("the red mug")
    encoded = apart.encode(" the  red mug ")
    assert (encoded.prefix, encoded.suffix) == ([12, *together.prefix], together.suffix)


def test_apart_text_joins_no_token_over_the_picture(make_apart, imageless):
    assert imageless.encode("USER:<image>ASSISTANT:").ids == [12, 0]
    encoded = make_apart("USER:<image>ASSISTANT: {phrase}").encode("mug")
    assert (encoded.prefix, encoded.suffix) == ([12, 2], [3, 8])


def test_apart_text_before_the_image_goes_into_the_prefix(make_apart):
    encoded = make_apart("Where is {phrase} USER: <image> ASSISTANT:").encode("the mug")
    assert (encoded.prefix, encoded.suffix) == ([12, 4, 5, 6, 8, 2], [3])


def test_apart_a_special_token_stands_before_a_picture_that_comes_first(make_apart):
    encoded = make_apart("<image> {phrase}").encode("mug")
    assert (encoded.prefix, encoded.suffix) == ([12], [8])


@pytest.mark.parametrize("phrase", ["<image>", "the <image> mug", "the<image>mug", "<s> mug"])
def test_apart_a_phrase_with_the_image_or_a_special_token_is_refused(apart, phrase):
    with pytest.raises(InputError, match=r"holds the special token '<(image|s)>'; leave it out"):
        apart.encode(phrase)


@pytest.mark.parametrize("phrase", ["", " ", "the caf\udce9"])
def test_apart_a_phrase_that_is_no_text_is_refused(apart, phrase):
    with pytest.raises(InputError):
        apart.encode(phrase)


def test_apart_the_layout_is_kept_too(apart, layout):
    wide = dataclasses.replace(layout, prefix=2)
    assert len(apart.encode_within("the red mug", wide).suffix) == 7
    with pytest.raises(InputError, match="8 tokens after the image, this bundle takes 7"):
        apart.encode_within("the red red mug", wide)
    with pytest.raises(BundleError, match="2 tokens before the image, the graphs were made for 1"):
        apart.encode_within("the red mug", layout)


def test_phrase_alone_has_no_special_tokens(apart):
    assert apart.encode_phrase("the red mug") == [6, 7, 8]


def test_phrase_alone_is_collapsed_like_in_the_prompt(encoder):
    # A tokenizer that sees white space as it is.
    encoder._tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    assert encoder.encode_phrase(" red  mug\n") == encoder.encode_phrase("red mug")


START, END = 0, 1
CLIP_WORDS = ("t", "h", "e</w>", "th", "the</w>", "r", "e", "re", "d</w>", "red</w>", "m", "u")
CLIP_VOCABULARY = ("<|startoftext|>", "<|endoftext|>", *CLIP_WORDS, "mu", "g</w>", "mug</w>")
THE, RED, MUG = (CLIP_VOCABULARY.index(f"{word}</w>") for word in ("the", "red", "mug"))


@pytest.fixture
def clip_tokenizer():
    """CLIP's tokenizer in small: lower case, pairs of letters, a start and an end token."""
    merges = [("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("m", "u")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: k for k, token in enumerate(CLIP_VOCABULARY)},
            merges=[*merges, ("mu", "g</w>")],
            unk_token="<|endoftext|>",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", END), ("<|startoftext|>", START), add_prefix_space=False
    )
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def make_phrases(tokenizer, length=7):
    spec = PhraseInput(source="clip", tokenizer="words.json", length=length, end_id=END)
    return PhraseEncoder(tokenizer, spec)


def test_clip_phrase_is_padded_with_the_end_token(clip_tokenizer):
    ids = make_phrases(clip_tokenizer).encode("the red mug")
    assert ids.tolist() == [[START, THE, RED, MUG, END, END, END]]
    assert ids.dtype == np.int64


@pytest.mark.parametrize("length", [2, 3, 5, 77])
@pytest.mark.parametrize("phrase", ["mug", "the red mug", "the red " * 60])
def test_clip_phrase_has_always_the_same_length_and_an_end(clip_tokenizer, phrase, length):
    ids = make_phrases(clip_tokenizer, length).encode(phrase)
    assert ids.shape == (1, length)
    assert ids.dtype == np.int64
    assert ids[0, 0] == START
    assert ids[0, -1] == END


def test_longer_clip_phrase_is_cut_before_its_end_token(clip_tokenizer):
    ids = make_phrases(clip_tokenizer, 4).encode("the red mug")
    assert ids.tolist() == [[START, THE, RED, END]]


def test_clip_phrase_that_just_fits_is_whole(clip_tokenizer):
    ids = make_phrases(clip_tokenizer, 5).encode("the red mug")
    assert ids.tolist() == [[START, THE, RED, MUG, END]]


def test_white_space_and_case_of_a_clip_phrase_do_not_matter(clip_tokenizer):
    phrases = make_phrases(clip_tokenizer)
    assert np.array_equal(phrases.encode(" The\tRED\n mug "), phrases.encode("the red mug"))


def test_each_clip_phrase_is_encoded_on_its_own(clip_tokenizer):
    phrases = make_phrases(clip_tokenizer)
    phrases.encode("the red red red red red mug")
    assert phrases.encode("mug").tolist() == [[START, MUG, END, END, END, END, END]]


def test_padding_and_truncation_of_the_clip_tokenizer_file_are_replaced(clip_tokenizer, tmp_path):
    clip_tokenizer.enable_padding(length=32, pad_id=START, pad_token="<|startoftext|>")
    clip_tokenizer.enable_truncation(max_length=3)
    path = tmp_path / "clip.json"
    clip_tokenizer.save(str(path))
    ids = make_phrases(load_tokenizer(path)).encode("the red mug")
    assert ids.tolist() == [[START, THE, RED, MUG, END, END, END]]


@pytest.mark.parametrize("phrase", ["the <|endoftext|> mug", "<|startoftext|>mug"])
def test_clip_phrase_with_a_special_token_is_refused(clip_tokenizer, phrase):
    with pytest.raises(InputError, match=r"holds the special token '<\|(start|end)oftext\|>'"):
        make_phrases(clip_tokenizer).encode(phrase)


@pytest.mark.parametrize("image_token", ["<image>", None])
def test_a_tokenizer_that_fails_over_a_text_is_one_line(tokenizer_file, prompt, image_token):
    """As a stranger may have written it: the library raises a bare Exception, or panics."""
    spec = dataclasses.replace(prompt, image_token=image_token)
    data = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    begin = [
        {"SpecialToken": {"id": "lost", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    template = {"type": "TemplateProcessing", "single": begin, "pair": [], "special_tokens": {}}
    panics = {**data, "post_processor": template}
    unknown = {**data, "model": {**data["model"], "unk_token": "lost"}}
    for broken in (panics, unknown):
        encoder = PromptEncoder(Tokenizer.from_str(json.dumps(broken)), spec, rows=ROWS)
        with pytest.raises(BundleError, match=r"tokenizer cannot read '.*; export again"):
            encoder.encode("a blue cup")


def test_a_tokenizer_that_panics_as_it_is_read_is_one_line(tokenizer_file):
    data = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    tokenizer_file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError, match=r"words\.json: not a tokenizer"):
        load_tokenizer(tokenizer_file)


def test_ctrl_c_is_no_fault_of_the_tokenizer():
    class Stopped:
        def encode(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_text(Stopped(), "a")
