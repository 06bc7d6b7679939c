"""huggingface_hub, which is an extra, and what its errors mean; light to import."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from gap_runtime.errors import ConfigError, HubError

_STATUSES: Final = {
    401: "the token is not valid; run `hf auth login`, or set HF_TOKEN",
    403: "the token may not do that; make one with the right to write",
    409: "somebody else changed it meanwhile; try again",
    412: "somebody else changed it meanwhile; try again",
}

_NO_HUB: Final = "what answers there is no hub; see HF_ENDPOINT and proxies"
_MISSHAPEN: Final = (LookupError, TypeError, AttributeError, AssertionError)
"""What Python says where data has another shape than it is taken for."""


def load_library() -> Any:
    """huggingface_hub, with its errors and its checks of names.

    Raises:
        HubError: It is not installed.
        ConfigError: As for `load_constants`.
    """
    load_constants()
    import huggingface_hub.errors  # noqa: PLC0415 - slow to import
    import huggingface_hub.utils  # noqa: PLC0415 - loaded by name alone

    return huggingface_hub


def load_constants() -> Any:
    """What huggingface_hub reads from the environment; takes no time to import.

    What loads libraries that load it, as transformers does, calls this first.

    Raises:
        HubError: It is not installed.
        ConfigError: It cannot read a variable of the environment.
    """
    try:
        from huggingface_hub import constants  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise HubError(
            "the hub is reached by huggingface_hub, which is not installed; "
            "pip install 'gap-runtime[hub]'"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"huggingface_hub cannot read the variables HF_... of the environment ({error})"
        ) from error
    return constants


def library_failures() -> tuple[type[Exception], ...]:
    """What calls of huggingface_hub may raise where the world, and not the caller, is wrong.

    It takes replies and cards for what they should be: others end in errors of Python's own, or
    of the library that reads cards.
    """
    errors = load_library().errors
    # What it lacks for a proxy of the environment it tells as it needs it.
    world = (
        _http_errors(),
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
        errors.XetDownloadError,
    )
    # An address that is none: in httpx no error of HTTP, elsewhere one.
    package = import_module(_http_errors().__module__.partition(".")[0])
    no_address = getattr(package, "InvalidURL", OSError)
    return (*world, *_MISSHAPEN, no_address, import_module("yaml").YAMLError)


def _http_errors() -> type[Exception]:
    """Base of what its HTTP library raises, which differs between its releases."""
    base: type[Exception] = load_library().errors.HfHubHTTPError.__bases__[0]
    return base


def describe_failure(error: Exception) -> str:
    """What huggingface_hub's error means, in a few words and on one line."""
    errors = load_library().errors
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return describe_failure(error.__cause__)
    # A gated repository is one that is not found, too.
    kinds = {
        errors.GatedRepoError: "its authors ask who wants it: accept their terms on its page",
        errors.RepositoryNotFoundError: (
            "no such repository, or a private one that your token does not open"
        ),
        errors.RevisionNotFoundError: "no such branch, tag or commit in it",
        **dict.fromkeys((errors.FileMetadataError, *_MISSHAPEN), _NO_HUB),
    }
    if isinstance(error.__cause__, errors.FileMetadataError):
        error = error.__cause__
    for kind, words in kinds.items():
        if isinstance(error, kind):
            return words
    response = getattr(error, "response", None)
    if response is not None and response.status_code in _STATUSES:
        return _STATUSES[response.status_code]
    if type(error).__name__ == "IncompleteSnapshotError":
        return "only a part of it is here, and the hub cannot be reached; pull again to go on"
    is_missing = isinstance(error, errors.LocalEntryNotFoundError)
    unanswered = error.__cause__ if is_missing else error
    if unanswered is not None and response is None and isinstance(unanswered, _http_errors()):
        return f"no network to the hub ({type(unanswered).__name__})"
    # The first sentence, whole: the library's go on about its own arguments.
    reason = next(iter(str(error).splitlines()), "").partition(". ")[0]
    return f"{reason or type(error).__name__:.300}"
