"""Text to token IDs and back: the one place where a bundle's tokenizer is asked.

A `tokenizer.json` may fail when it is read, and one that was read over a text: a word without a
token for unknown ones, a template with a token that it lacks. The library then raises a bare
Exception, or panics with what is no Exception at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from tokenizers import Tokenizer

from gap_runtime.errors import BundleError, GapError

_PANIC: Final = "PanicException"


def encode_text(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Token IDs of a text; `special` with what the tokenizer puts before and behind it.

    Raises:
        BundleError: The tokenizer fails over it.
    """
    with _asked(f"cannot read {text!r:.60}"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    return ids


def decode_tokens(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special: bool) -> str:
    """Text of tokens.

    Raises:
        BundleError: The tokenizer fails over them.
    """
    with _asked(f"cannot write {len(token_ids)} tokens"):
        text: str = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
    return text


def _asked(what: str) -> contextlib.AbstractContextManager[None]:
    return asked_of_tokenizer(
        lambda error: BundleError(f"the bundle's tokenizer {what} ({error}); export again")
    )


@contextlib.contextmanager
def asked_of_tokenizer(refuse: Callable[[BaseException], GapError]) -> Iterator[None]:
    """Whatever the library raises in the block, as the error that `refuse` makes of it."""
    try:
        yield
    except GapError:
        raise
    except BaseException as error:  # a bare Exception, or a panic, which is none
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise refuse(error) from error
