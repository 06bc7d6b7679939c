"""Strict records: plain data (from JSON or TOML) to frozen dataclasses and back.

Every key must be known, every value of the declared type; an error carries the dotted path.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from gap_runtime.errors import RecordError

Record = TypeVar("Record")


def load_record(kind: type[Record], data: Any, where: str) -> Record:
    """A dataclass of that kind from a mapping.

    Args:
        kind: A dataclass; fields may be str, bool, int, float, tuples, dicts with string keys,
            other dataclasses, or any of these or None.
        data: What a JSON or TOML reader returned.
        where: Start of the path in error messages, a file name as a rule.

    Raises:
        RecordError: A key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(data, Mapping):
        raise RecordError(f"{where}: found {_name(data)}, expected a table")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise RecordError(f"{where}: unknown key '{unknown[0]}'; have {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{where}: key '{name}' is missing")
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


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if dataclasses.is_dataclass(hint):
        return load_record(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecordError(f"{where}: found {_name(value)}, expected a table")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (type(value) is hint):
        return value
    raise RecordError(f"{where}: found {_name(value)}, expected {_hint_name(hint)}")


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in args:
        if choice is type(None) and value is None:
            return None
        if choice is not type(None) and type(value) is choice:
            return value
    for choice in args:
        if choice is not type(None):
            try:
                return _convert(choice, value, where)
            except RecordError:
                if len([a for a in args if a is not type(None)]) == 1:
                    raise
    expected = " or ".join(_hint_name(choice) for choice in args)
    raise RecordError(f"{where}: found {_name(value)}, expected {expected}")


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"{where}: found {_name(value)}, expected a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{k}]") for k, item in enumerate(value))
    if len(value) != len(args):
        raise RecordError(f"{where}: found {len(value)} values, expected {len(args)}")
    pairs = zip(args, value, strict=True)
    return tuple(_convert(arg, item, f"{where}[{k}]") for k, (arg, item) in enumerate(pairs))


def _name(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def _hint_name(hint: Any) -> str:
    return "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))
