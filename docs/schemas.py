"""JSON Schemas of what `--json` prints, from the types that the commands name."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: dict[Any, Schema] = {
    str: {"type": "string"},
    Path: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    # JSON has no infinity and no NaN.
    float: {"type": ["number", "null"]},
    type(None): {"type": "null"},
}


def list_json_types() -> dict[str, dict[str, Any]]:
    """By command, `gap-runtime check` for example, what it prints by what decides it."""
    from gap_export.cli.main import PROGRAM as EXPORTER  # noqa: PLC0415 - only where it is asked
    from gap_runtime.cli.main import PROGRAM as RUNTIME  # noqa: PLC0415
    from gap_runtime.registry import list_plugins, load_plugin  # noqa: PLC0415

    found = {}
    for program in (EXPORTER, RUNTIME):
        for name in list_plugins(program.package):
            command: Any = load_plugin(program.package, name, "command")
            if hasattr(command, "json_types"):
                found[f"{program.name} {name}"] = command.json_types()
    return found


def make_schema(kind: Any) -> Schema:
    """The schema of a type: dataclasses and typed dictionaries stand in it by their names.

    Objects have the keys that the type declares and no others.
    """
    definitions: dict[str, Schema] = {}
    schema = _describe(kind, definitions)
    return {"$schema": DIALECT, **schema, **({"$defs": definitions} if definitions else {})}


def _describe(kind: Any, definitions: dict[str, Schema]) -> Schema:
    if kind is Any:
        return {}
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    if get_origin(kind) is not None:
        return _describe_composed(get_origin(kind), get_args(kind), definitions)
    if isinstance(kind, type) and issubclass(kind, tuple):
        return _describe_tuple(get_type_hints(kind).values(), definitions)
    if not (dataclasses.is_dataclass(kind) or is_typeddict(kind)):
        raise TypeError(f"{kind}: no JSON is known for it")
    if kind.__name__ not in definitions:
        # Before its parts, which may hold it again.
        definitions[kind.__name__] = {}
        definitions[kind.__name__].update(_describe_object(kind, definitions))
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _describe_composed(
    origin: Any, args: tuple[Any, ...], definitions: dict[str, Schema]
) -> Schema:
    if origin is Literal:
        return {"enum": list(args)}
    parts = [_describe(arg, definitions) for arg in args if arg is not ...]
    if origin in {Union, types.UnionType}:
        return {"anyOf": parts}
    if origin in {dict, Mapping}:
        return {"type": "object", "additionalProperties": parts[1]}
    if origin is tuple and args[-1] is not ...:
        return _describe_tuple(args, definitions)
    return {"type": "array", "items": parts[0]}


def _describe_tuple(parts: Iterable[Any], definitions: dict[str, Schema]) -> Schema:
    items = [_describe(part, definitions) for part in parts]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}


def _describe_object(kind: Any, definitions: dict[str, Schema]) -> Schema:
    hints = get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        hints = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    required = kind.__required_keys__ if is_typeddict(kind) else set(hints)
    return {
        "type": "object",
        "description": inspect.getdoc(kind) or "",
        "properties": {name: _describe(hint, definitions) for name, hint in hints.items()},
        "required": [name for name in hints if name in required],
        "additionalProperties": False,
    }


def tabulate(schema: Schema) -> list[str]:
    """A schema as Markdown: what each object is, and a table of its keys."""
    lines = []
    if "$ref" not in schema:
        said = _name(schema)
        lines += [f"{said[0].upper()}{said[1:]}.", ""]
    for name, part in schema.get("$defs", {}).items():
        lines += [f"**{name}.** {_flow(part['description'])}", "", "| key | value |", "|---|---|"]
        for key, value in part["properties"].items():
            may = "" if key in part["required"] else ", may be missing"
            lines.append(f"| `{key}` | {_name(value)}{may} |")
        lines.append("")
    return lines


def _flow(text: str) -> str:
    """A docstring as paragraphs."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _name(schema: Schema) -> str:
    """A value in words."""
    if "$ref" in schema:
        said = schema["$ref"].rpartition("/")[2]
    elif "anyOf" in schema:
        said = " or ".join(_name(part) for part in schema["anyOf"])
    elif "enum" in schema:
        said = ", ".join(f"`{word}`" for word in schema["enum"])
    elif "prefixItems" in schema:
        said = f"list of {', '.join(_name(part) for part in schema['prefixItems'])}"
    elif "items" in schema:
        said = f"list of {_name(schema['items'])}"
    elif "additionalProperties" in schema:
        said = f"object, each value {_name(schema['additionalProperties'])}"
    else:
        kind = schema.get("type", "anything")
        said = kind[0] if isinstance(kind, list) else kind
    return str(said)
