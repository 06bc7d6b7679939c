"""Text to token IDs and back: the one place where a bundle's tokenizer is asked.

A `tokenizer.json` may fail when it is read, and one that was read over a text: a word without a
token for unknown ones, a template with a token that it lacks. The library then raises a bare
Exception, or panics with what is no Exception at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
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


def _asked(what: str) -> AskedOfTokenizer:
    return AskedOfTokenizer(
        lambda error: BundleError(f"the bundle's tokenizer {what} ({error}); export again")
    )


class AskedOfTokenizer:
    """Whatever the library raises in the block, as the error that `refuse` makes of it.

    An answer is decoded once for each of its tokens, so this is no generator, which takes as long
    as the tokenizer.
    """

    __slots__ = ("_refuse",)

    def __init__(self, refuse: Callable[[BaseException], GapError]) -> None:
        self._refuse = refuse

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, GapError):
            return
        # A bare Exception, or a panic, which is none.
        if isinstance(error, Exception) or type(error).__name__ == _PANIC:
            raise self._refuse(error) from error
