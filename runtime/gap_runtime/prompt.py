"""Phrases to token IDs and answers back to text, with the model's own tokenizer file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from gap_runtime.errors import BundleError, InputError
from gap_runtime.manifest import BundleLayout, Prompt

PHRASE_FIELD = "{phrase}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """Token IDs before and after the visual tokens."""

    prefix: list[int]
    suffix: list[int]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        BundleError: The file is no tokenizer.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{path}: not a tokenizer ({error})") from error


class PromptEncoder:
    """Fills a template with a phrase and splits its tokens at the image token."""

    def __init__(self, tokenizer_file: Path, prompt: Prompt) -> None:
        """Load the tokenizer.

        Raises:
            BundleError: The file is no tokenizer, or does not know the image token.
        """
        self._tokenizer = load_tokenizer(tokenizer_file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._prompt = prompt
        image_id = self._tokenizer.token_to_id(prompt.image_token)
        if image_id is None:
            raise BundleError(f"{tokenizer_file}: no token '{prompt.image_token}' in it")
        self._image_id: int = image_id
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = [
            token.content
            for token in added
            if token.special and token.content != prompt.image_token
        ]

    def encode(self, phrase: str) -> EncodedPrompt:
        """Token IDs of the prompt for a phrase.

        Raises:
            InputError: The phrase is empty, not text, or holds the image token.
        """
        phrase = " ".join(phrase.split())
        if not phrase:
            raise InputError(
                "the phrase is empty; say what to look for, for example 'the red mug'"
            )
        special = [token for token in self._special if token in phrase]
        if special:
            raise InputError(
                f"the phrase {phrase!r:.60} holds the special token '{special[0]}'; leave it out"
            )
        try:
            phrase.encode()
        except UnicodeEncodeError as error:
            raise InputError("the phrase is not valid UTF-8 text") from error
        text = self._prompt.template.replace(PHRASE_FIELD, phrase)
        ids: list[int] = self._tokenizer.encode(text).ids
        if ids.count(self._image_id) != 1:
            raise InputError(
                f"the phrase {phrase!r:.60} holds the image token '{self._prompt.image_token}'; "
                "leave it out"
            )
        at = ids.index(self._image_id)
        return EncodedPrompt(prefix=ids[:at], suffix=ids[at + 1 :])

    def encode_within(self, phrase: str, layout: BundleLayout) -> EncodedPrompt:
        """Token IDs of a prompt that fits a bundle's layout.

        Raises:
            InputError: The phrase is too long for the bundle.
            BundleError: The prefix is not the one that the graphs were made for.
        """
        encoded = self.encode(phrase)
        if len(encoded.prefix) != layout.prefix:
            raise BundleError(
                f"the prompt has {len(encoded.prefix)} tokens before the image, the graphs were "
                f"made for {layout.prefix}; export again"
            )
        if len(encoded.suffix) > layout.suffix:
            raise InputError(
                f"the prompt has {len(encoded.suffix)} tokens after the image, this bundle takes "
                f"{layout.suffix}; use a shorter phrase or export with --set prompt.suffix="
                f"{len(encoded.suffix)}"
            )
        return encoded

    def decode(self, token_ids: list[int]) -> str:
        """Text of an answer, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()
