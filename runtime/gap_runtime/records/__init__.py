"""Strict records: plain data (from JSON or TOML) to frozen dataclasses and back.

A file to read is opened in `records.files`, JSON and TOML are parsed in `records.plain`, and
nowhere else. Every key must be known, every value of the declared type and among the declared
words; an error carries the dotted path.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gap_runtime.errors import RecordError, WordError, suggest

Record = TypeVar("Record")
_BEYOND: Final = 2**63
"""Above what any size, count or seed can be."""


def load_record(kind: type[Record], data: Any, where: str) -> Record:
    """A dataclass of that kind from a mapping.

    Args:
        kind: A dataclass; fields may be str, bool, int, float, a Literal, tuples (named ones too),
            dicts with string keys, other dataclasses, or any of these or None.
        data: What a JSON or TOML reader returned.
        where: Start of error messages, a file name as a rule; the path of the key follows.

    Raises:
        RecordError: A key is unknown or missing, or a value has the wrong type.
        WordError: A value is none of the words that there are.
    """
    return _load(kind, data, _Place(where))


_hints: dict[Any, dict[str, Any]] = {}


def _find_hints(kind: Any) -> dict[str, Any]:
    """The types of a class's fields; they are text, and evaluating it takes half of the time."""
    if kind not in _hints:
        _hints[kind] = get_type_hints(kind)
    return _hints[kind]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a value stands: the start of messages, and its path of keys."""

    start: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.start}: {self.path}" if self.path else self.start

    def key(self, name: str) -> _Place:
        """A key of the table that stands here."""
        return _Place(self.start, f"{self.path}.{name}" if self.path else name)

    def item(self, index: int) -> _Place:
        """An item of the list that stands here."""
        return _Place(self.start, f"{self.path}[{index}]")


def _load(kind: type[Record], data: Any, place: _Place) -> Record:
    if not isinstance(data, Mapping):
        raise RecordError(f"{place}: found {_name(data)}, expected a table")
    hints = _find_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        path = place.key(unknown[0]).path
        raise RecordError(f"{place.start}: unknown key '{path}'; {suggest(unknown[0], fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], place.key(name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{place.start}: key '{place.key(name).path}' is missing")
    return kind(**values)


def dump_record(record: Any) -> Any:
    """The plain data of a record: dicts, lists, strings, numbers, booleans and None."""
    if dataclasses.is_dataclass(record):
        return {
            field.name: dump_record(getattr(record, field.name))
            for field in dataclasses.fields(record)
        }
    if isinstance(record, Mapping):
        return {key: dump_record(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [dump_record(value) for value in record]
    return record


def extend_record(kind: type[Record], record: Any, more: Mapping[str, Any]) -> Record:
    """A dataclass of that kind: the values of a record of the kind that it extends, and more."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return kind(**values, **more)


def _convert(hint: Any, value: Any, place: _Place) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in _COMPOSED:
        return _COMPOSED[origin](args, value, place)
    if dataclasses.is_dataclass(hint):
        return _load(hint, value, place)  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return hint(*_convert_tuple(tuple(_find_hints(hint).values()), value, place))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < _BEYOND else math.inf
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{place}: found {_name(value)}, expected a finite number")
    if hint is int and type(value) is int and abs(value) >= _BEYOND:
        raise RecordError(f"{place}: found {_name(value)}, expected a number of 64 bits")
    if hint is Any or (type(value) is hint):
        return value
    raise RecordError(f"{place}: found {_name(value)}, expected {_hint_name(hint)}")


def _convert_dict(args: tuple[Any, ...], value: Any, place: _Place) -> Any:
    if not isinstance(value, Mapping):
        raise RecordError(f"{place}: found {_name(value)}, expected a table")
    return {key: _convert(args[1], item, place.key(key)) for key, item in value.items()}


def _choose(words: tuple[Any, ...], value: Any, place: _Place) -> Any:
    if not isinstance(value, str):
        raise RecordError(f"{place}: found {_name(value)}, expected one of {', '.join(words)}")
    if value not in words:
        raise WordError(f"{place} '{value:.60}' is unknown; {suggest(value, words)}")
    return value


def _convert_union(args: tuple[Any, ...], value: Any, place: _Place) -> Any:
    for choice in args:
        if choice is type(None) and value is None:
            return None
        if choice is not type(None) and type(value) is choice:
            return _convert(choice, value, place)
    for choice in args:
        if choice is not type(None):
            try:
                return _convert(choice, value, place)
            except RecordError:
                if len([a for a in args if a is not type(None)]) == 1:
                    raise
    expected = " or ".join(_hint_name(choice) for choice in args)
    raise RecordError(f"{place}: found {_name(value)}, expected {expected}")


def _convert_tuple(args: tuple[Any, ...], value: Any, place: _Place) -> Any:
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"{place}: found {_name(value)}, expected a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, place.item(k)) for k, item in enumerate(value))
    if len(value) != len(args):
        raise RecordError(f"{place}: found {len(value)} values, expected {len(args)}")
    pairs = zip(args, value, strict=True)
    return tuple(_convert(arg, item, place.item(k)) for k, (arg, item) in enumerate(pairs))


_COMPOSED: Final[dict[Any, Callable[[tuple[Any, ...], Any, _Place], Any]]] = {
    Union: _convert_union,
    types.UnionType: _convert_union,
    Literal: _choose,
    tuple: _convert_tuple,
    dict: _convert_dict,
}


def _name(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def _hint_name(hint: Any) -> str:
    return "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))
