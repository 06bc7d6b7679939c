"""The schemas of docs/schemas.py, and outputs that are held to them."""

import functools
import importlib.util
import json
import sys

import jsonschema

from tools.places import ROOT


def load_maker():
    """The module docs/schemas.py."""
    spec = importlib.util.spec_from_file_location("schemas", ROOT / "docs" / "schemas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def make_validator(kind):
    """A validator of a type's schema."""
    return jsonschema.Draft202012Validator(load_maker().make_schema(kind))


def hold(data, kinds):
    """Data, as they are in JSON, fit the first of some types that they fit at all."""
    problems = [
        jsonschema.exceptions.best_match(make_validator(k).iter_errors(data)) for k in kinds
    ]
    assert None in problems, problems


def hold_to_schemas(print_json):
    """`print_json`, which looks at what the command that calls it says that it prints."""

    @functools.wraps(print_json)
    def print_held(data):
        print_json(data)
        module = sys._getframe(1).f_globals
        if module["__name__"] == "gap_runtime.cli.evaluation":
            module = vars(importlib.import_module("gap_runtime.cli.commands.evaluate"))
        plain = json.loads(json.dumps(data), parse_constant=lambda _: None)
        hold(plain, [kind for when, kind in module["json_types"]().items() if "jsonl" not in when])

    return print_held
