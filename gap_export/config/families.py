"""Which family a checkpoint is of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from gap_export.config.folders import describe_folder, describe_strays, holds_weights
from gap_export.config.pruners import USUAL
from gap_export.config.shipped import list_configs
from gap_runtime.errors import ConfigError, UnknownNameError
from gap_runtime.records.files import exists
from gap_runtime.records.plain import read_json
from gap_runtime.registry import list_plugins, read_constant

FAMILIES: Final = "gap_export.models"
NO_WAY: Final = (
    "`gap-export list` shows their models, and CONTRIBUTING.md says how a family is added"
)
"""What to do about a model that no family has a word for."""


def resolve_family(folder: Path) -> str:
    """The family that the `model_type` of a folder's config.json names."""
    path = folder / "config.json"
    if not exists(path):
        strays = None if holds_weights(folder) else describe_strays(folder)
        advice = describe_folder(folder) or (
            f"no model in it; {strays}"
            if strays
            else "no config.json in it that tells the family; give the model's name and the "
            f"folder: gap-export NAME --checkpoint {folder} (NAME: {', '.join(list_configs())})"
        )
        raise ConfigError(f"{folder}: {advice}")
    data = read_json(path, ConfigError, advice="download it again")
    found = str(data.get("model_type", "")) if isinstance(data, dict) else ""
    family = find_family(found)
    if family is None:
        raise UnknownNameError(f"{path}: {describe_model_type(found)}")
    return family


def find_family(model_type: str) -> str | None:
    """The family that reads checkpoints of a `model_type`; None where none does."""
    name = model_type.replace("-", "_")
    names = list_plugins(FAMILIES)
    if name in names:
        return name
    further = (each for each in names if name in (read_constant(FAMILIES, each, "TYPES") or ()))
    return next(further, None)


def find_usual_pruner(family: str) -> str:
    """The pruner of a family where none is asked for."""
    known = family in list_plugins(FAMILIES)
    return str((read_constant(FAMILIES, family, "PRUNER") if known else None) or USUAL)


def describe_model_type(found: str) -> str:
    """One line about a `model_type` that no family reads: which there are, the nearest way."""
    names = list_plugins(FAMILIES)
    if found in {"", "None"}:
        # Missing, or null.
        return (
            f"no model_type in it that tells which of the families it is ({', '.join(names)}); "
            "name the model: gap-export NAME --checkpoint FOLDER, `gap-export list` has them"
        )
    ways = (read_constant(FAMILIES, name, "NEIGHBOURS") or {} for name in names)
    advice = next(
        (text for way in ways for pattern, text in way.items() if re.search(pattern, found)),
        NO_WAY,
    )
    return (
        f"model_type '{found}' is none of the families that there are ({', '.join(names)}); "
        f"{advice}"
    )
