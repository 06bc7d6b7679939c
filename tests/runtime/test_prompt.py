"""Phrases to token IDs with a tokenizer of twelve words (conftest.WORDS)."""

import dataclasses

import pytest

from gap_runtime.errors import BundleError, InputError
from gap_runtime.prompt import PromptEncoder


@pytest.fixture
def encoder(tokenizer_file, prompt):
    return PromptEncoder(tokenizer_file, prompt)


def test_prompt_is_split_at_the_image_token(encoder):
    encoded = encoder.encode("the red mug")
    assert encoded.prefix == [2]
    assert encoded.suffix == [4, 5, 6, 7, 8, 9, 3]


def test_text_before_the_image_goes_into_the_prefix(tokenizer_file, prompt):
    template = "Where is {phrase} USER: <image> ASSISTANT:"
    other = PromptEncoder(tokenizer_file, dataclasses.replace(prompt, template=template))
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
def test_file_that_is_no_tokenizer_is_refused(tmp_path, prompt, content):
    path = tmp_path / "broken.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=r"broken\.json: not a tokenizer"):
        PromptEncoder(path, prompt)


def test_missing_tokenizer_is_refused(tmp_path, prompt):
    with pytest.raises(BundleError, match=r"nowhere\.json: not a tokenizer"):
        PromptEncoder(tmp_path / "nowhere.json", prompt)


def test_tokenizer_without_the_image_token_is_refused(tokenizer_file, prompt):
    other = dataclasses.replace(prompt, image_token="<picture>")
    with pytest.raises(BundleError, match=r"words\.json: no token '<picture>' in it"):
        PromptEncoder(tokenizer_file, other)


def test_answer_is_decoded_without_special_tokens(encoder):
    assert encoder.decode([6, 7, 8, 10]) == "the red mug"


def test_padding_of_the_tokenizer_file_is_switched_off(tokenizer_file, prompt):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding(length=32, pad_id=0, pad_token="<unk>")
    tokenizer.save(str(tokenizer_file))
    assert len(PromptEncoder(tokenizer_file, prompt).encode("mug").suffix) == 5


def test_truncation_of_the_tokenizer_file_is_switched_off(tokenizer_file, prompt):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.save(str(tokenizer_file))
    assert len(PromptEncoder(tokenizer_file, prompt).encode("mug").suffix) == 5


@pytest.mark.parametrize("phrase", ["the red </s>", "<unk>"])
def test_phrase_with_a_special_token_is_refused(tokenizer_file, prompt, phrase):
    with pytest.raises(InputError, match="special token"):
        PromptEncoder(tokenizer_file, prompt).encode(phrase)
