"""Phrases to token IDs and answers back to text, with the model's own tokenizer file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer

from gap_runtime.bundle.manifest import BundleLayout, PhraseInput, Prompt
from gap_runtime.errors import BundleError, InputError, PatternError
from gap_runtime.grounding.draft import Drafter
from gap_runtime.grounding.tokens import (
    AskedOfTokenizer,
    WithoutPanics,
    decode_tokens,
    encode_text,
    require_quick,
    try_tokenizer,
)
from gap_runtime.records.files import read_text

PHRASE_FIELD: Final = "{phrase}"
IMAGE_FIELD: Final = "<image>"
"""Stands for the picture in a template, whatever the tokenizer calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """Token IDs before and after the visual tokens."""

    prefix: list[int]
    suffix: list[int]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        BundleError: The file is no tokenizer, or one that may take too long for a text.
    """
    text = read_text(path, BundleError, advice="copy the bundle again or export again")
    with (
        WithoutPanics(),
        AskedOfTokenizer(lambda error: BundleError(f"{path}: not a tokenizer ({error})")),
    ):
        tokenizer = Tokenizer.from_str(text)
        try:
            require_quick(tokenizer)
        except PatternError as error:
            raise BundleError(f"{path}: {error}") from error
        try_tokenizer(tokenizer)
    return tokenizer


class PromptEncoder:
    """Fills a template with a phrase and splits its tokens at the image token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, *, rows: int) -> None:
        """Prepare the tokenizer.

        Args:
            tokenizer: The model's own.
            prompt: How it is asked.
            rows: Of the embedding table, which may be fewer than the tokenizer's tokens.

        Raises:
            BundleError: It does not know the image token.
        """
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._prompt, self._rows = prompt, rows
        self._image_id: int | None = None
        if prompt.image_token is not None:
            self._image_id = _find_token(tokenizer, prompt.image_token)
            if self._image_id is None:
                raise BundleError(
                    f"the tokenizer has no token '{prompt.image_token}', which stands for the "
                    "picture; export again"
                )
        added = tokenizer.get_added_tokens_decoder().items()
        self._special_ids = {token_id for token_id, token in added if token.special}
        self._special = _special_tokens(tokenizer) - {prompt.image_token}
        if prompt.image_token is None:
            self._special |= {IMAGE_FIELD}

    def encode(self, phrase: str) -> EncodedPrompt:
        """Token IDs of the prompt for a phrase.

        Raises:
            InputError: The phrase is empty, not text, or holds the image token or one without a
                row in the embedding table.
        """
        phrase = collapse(phrase)
        if not phrase:
            raise InputError(
                "the phrase is empty; say what to look for, for example 'the red mug'"
            )
        _require_plain(phrase, self._special)
        try:
            phrase.encode()
        except UnicodeEncodeError as error:
            raise InputError("the phrase is not valid UTF-8 text") from error
        if self._image_id is None:
            encoded = self._encode_apart(phrase)
            self._require_rows(encoded.prefix + encoded.suffix)
            return encoded
        text = self._prompt.template.replace(PHRASE_FIELD, phrase)
        ids = encode_text(self._tokenizer, text, special=True)
        if ids.count(self._image_id) != 1:
            raise InputError(
                f"the phrase {phrase!r:.60} holds the image token '{self._prompt.image_token}'; "
                "leave it out"
            )
        at = ids.index(self._image_id)
        self._require_rows(ids[:at] + ids[at + 1 :])
        return EncodedPrompt(prefix=ids[:at], suffix=ids[at + 1 :])

    def _encode_apart(self, phrase: str) -> EncodedPrompt:
        """Both sides of the picture one by one, as models without an image token were trained."""
        before, _, after = self._prompt.template.partition(IMAGE_FIELD)
        before, after = (side.replace(PHRASE_FIELD, phrase) for side in (before, after))
        return EncodedPrompt(
            prefix=encode_text(self._tokenizer, before, special=True),
            suffix=encode_text(self._tokenizer, after),
        )

    def encode_phrase(self, phrase: str) -> list[int]:
        """Token IDs of the phrase alone."""
        ids = encode_text(self._tokenizer, collapse(phrase))
        self._require_rows(ids)
        return ids

    def _require_rows(self, ids: list[int]) -> None:
        """Refuse tokens that came after the model was trained, of which it knows nothing."""
        for token_id in ids:
            if token_id >= self._rows:
                shown = _show_token(self._tokenizer, token_id)
                raise InputError(
                    f"the prompt holds {shown}, token {token_id}, but the model has rows for "
                    f"{self._rows} tokens alone; leave it out"
                )

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

    def make_drafter(self, form: str | None, *, follow: bool = False) -> Drafter | None:
        """A drafter of answers of that form behind this prompt; None where there is no form."""
        if form is None:
            return None
        before = self._prompt.template.rpartition(PHRASE_FIELD)[2]
        return Drafter(self._tokenizer, form, before, follow=follow)

    def decode(self, token_ids: list[int]) -> str:
        """Text of an answer, without special tokens."""
        # By number: the tokenizer itself misses special tokens that its normalizer changes.
        plain = [token_id for token_id in token_ids if token_id not in self._special_ids]
        return decode_tokens(self._tokenizer, plain, skip_special=True).strip()


class PhraseEncoder:
    """The phrase as CLIP's text tower reads it: a fixed number of tokens, padded at the end."""

    def __init__(self, tokenizer: Tokenizer, spec: PhraseInput) -> None:
        """Prepare CLIP's tokenizer."""
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.length)
        self._special = _special_tokens(tokenizer)
        self._spec = spec

    def encode(self, phrase: str) -> np.ndarray:
        """Token IDs int64 [1, length]; a longer phrase is cut.

        Raises:
            InputError: The phrase holds a special token, which would end it for CLIP.
        """
        phrase = collapse(phrase)
        _require_plain(phrase, self._special)
        ids = encode_text(self._tokenizer, phrase, special=True)
        padded = np.full((1, self._spec.length), self._spec.end_id, np.int64)
        padded[0, : len(ids)] = ids
        return padded


def collapse(phrase: str) -> str:
    """The phrase with single spaces, as every tokenizer here sees it."""
    return " ".join(phrase.split())


def _find_token(tokenizer: Tokenizer, content: str) -> int | None:
    """The ID of a token by what it looks like in a text.

    The tokenizer itself may know it only as its normalizer would write it.
    """
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token.content == content:
            return int(token_id)
    found: int | None = tokenizer.token_to_id(content)
    return found


def _show_token(tokenizer: Tokenizer, token_id: int) -> str:
    added = tokenizer.get_added_tokens_decoder().get(token_id)
    return repr(tokenizer.id_to_token(token_id) if added is None else added.content)


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    """What a tokenizer takes for more than text."""
    added = tokenizer.get_added_tokens_decoder().values()
    return {token.content for token in added if token.special}


def require_text(phrase: object) -> None:
    """Refuse what is no phrase, before a picture is opened for it.

    Raises:
        InputError: It is no text.
    """
    if not isinstance(phrase, str):
        raise InputError(f"a phrase of type {type(phrase).__name__}; expected a str")
    try:
        phrase.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the phrase {phrase!r:.60} is no text: it holds half a character"
        ) from error


def _require_plain(phrase: str, special: set[str]) -> None:
    """Refuse a phrase with special tokens.

    Raises:
        InputError: It holds one.
    """
    held = sorted(token for token in special if token in phrase)
    if held:
        raise InputError(
            f"the phrase {phrase!r:.60} holds the special token '{held[0]}'; leave it out"
        )
