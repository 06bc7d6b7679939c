"""What a client asks for, read from JSON or from a form; anything unusual is one clear line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gap_runtime.errors import InputError, suggest
from gap_runtime.service.pictures import decode_picture, is_remote, require_allowed
from gap_runtime.service.settings import ServiceSettings

KEYS: Final = ("image", "phrase", "ratio", "keep", "model", "least_score", "cells")
"""Of a request to /v1/ground."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A picture, by its bytes or its address, and phrases to be asked about it.

    `cells` says that the places of the visual tokens are wanted too, `counts` that the tokens of
    the prompts are counted.
    """

    image: bytes | str
    phrases: tuple[str, ...]
    model: str | None = None
    ratio: float | None = None
    keep: int | None = None
    least_score: float = 0.0
    cells: bool = False
    counts: bool = False


def read_json_question(data: object, settings: ServiceSettings) -> Question:
    """A question from a JSON body.

    Raises:
        InputError: It cannot be understood; the message names the key.
    """
    if not isinstance(data, dict):
        raise InputError(f"the body is a JSON {type(data).__name__}, expected an object")
    _require_known(data)
    image = data.get("image")
    if not isinstance(image, str) or not image:
        raise InputError("'image' has to be the picture in base64 or as a data URL")
    phrases = data.get("phrase")
    return _make_question(
        data,
        read_image(image, settings),
        [phrases] if isinstance(phrases, str) else phrases,
        settings,
    )


def read_form_question(
    fields: Mapping[str, Sequence[str | bytes]], settings: ServiceSettings
) -> Question:
    """A question from a form: the values of every field, files as bytes.

    Raises:
        InputError: It cannot be understood; the message names the field.
    """
    _require_known(fields)
    images = fields.get("image", ())
    if len(images) != 1 or not images[0]:
        raise InputError(f"{len(images)} fields 'image' with a picture; expected one")
    image = images[0]
    data: dict[str, Any] = {}
    for name, values in fields.items():
        if name in {"image", "phrase"}:
            continue
        if len(values) > 1 or not isinstance(values[0], str):
            raise InputError(f"the field '{name}' has to be one text")
        data[name] = values[0] if name == "model" else _read_value(name, values[0])
    return _make_question(
        data,
        image if isinstance(image, bytes) else read_image(image, settings),
        list(fields.get("phrase", ())),
        settings,
    )


def _read_value(name: str, text: str) -> float | bool | None:
    """A number or a switch of a form; an empty field counts as none."""
    if not text.strip():
        return None
    if name == "cells" and text in {"true", "false"}:
        return text == "true"
    try:
        return int(text) if name == "keep" else float(text)
    except ValueError as error:
        raise InputError(f"'{name}' is {text!r:.40}, expected a number") from error


def read_image(text: str, settings: ServiceSettings) -> bytes | str:
    """Bytes of a picture, or its address where that is allowed.

    Raises:
        InputError: It is neither.
    """
    if is_remote(text):
        require_allowed(text, settings.allowed_urls)
        return text
    return decode_picture(text)


def _require_known(keys: Mapping[str, Any]) -> None:
    for key in keys:
        if key not in KEYS:
            raise InputError(f"unknown key {key!r:.60}; {suggest(key, KEYS)}")


def _make_question(
    data: Mapping[str, Any],
    image: bytes | str,
    phrases: object,
    settings: ServiceSettings,
) -> Question:
    model, cells = data.get("model"), data.get("cells")
    if model is not None and not isinstance(model, str):
        raise InputError("'model' has to be the name of a model; see /v1/models")
    if cells is not None and not isinstance(cells, bool):
        raise InputError("'cells' has to be true or false")
    return Question(
        image=image,
        phrases=require_phrases(phrases, settings),
        model=model,
        ratio=read_number(data, "ratio"),
        keep=_read_count(data),
        least_score=_read_score(data),
        cells=bool(cells),
    )


def require_phrases(phrases: object, settings: ServiceSettings) -> tuple[str, ...]:
    """Phrases within the limits.

    Raises:
        InputError: They are none, too many or too long.
    """
    if (
        not isinstance(phrases, list)
        or not phrases
        or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases)
    ):
        raise InputError("'phrase' has to be a text that is not empty, or a list of such texts")
    if len(phrases) > settings.phrases:
        raise InputError(f"{len(phrases)} phrases, at most {settings.phrases} in a request")
    for phrase in phrases:
        if len(phrase) > settings.phrase_length:
            raise InputError(
                f"a phrase of {len(phrase)} characters, at most {settings.phrase_length} are read"
            )
    return tuple(phrases)


def read_number(data: Mapping[str, Any], key: str) -> float | None:
    """A number under a key, None where there is none.

    Raises:
        InputError: It is no finite number.
    """
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise InputError(f"'{key}' has to be a number")
    return float(value)


def _read_count(data: Mapping[str, Any]) -> int | None:
    value = data.get("keep")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InputError("'keep' has to be a count of visual tokens that stay")
    return value


def _read_score(data: Mapping[str, Any]) -> float:
    score = read_number(data, "least_score")
    if score is not None and not 0 <= score <= 1:
        raise InputError("'least_score' has to lie in [0, 1]")
    return score or 0.0
