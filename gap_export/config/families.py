"""Which family a checkpoint is of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from gap_export.config.pruners import USUAL
from gap_export.config.shipped import list_configs
from gap_runtime.errors import ConfigError, UnknownNameError
from gap_runtime.records.files import exists, is_file, read_text
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
        advice = describe_folder(folder) or (
            "no config.json in it that tells the family; give the model's name and the folder: "
            f"gap-export NAME --checkpoint {folder} (NAME: {', '.join(list_configs())})"
        )
        raise ConfigError(f"{folder}: {advice}")
    data = read_json(path, ConfigError)
    found = str(data.get("model_type", "")) if isinstance(data, dict) else ""
    family = find_family(found)
    if family is None:
        raise UnknownNameError(f"{path}: {describe_model_type(found)}")
    return family


def describe_folder(folder: Path) -> str | None:
    """What a folder is that is no model, and what to give instead; None where nothing is known."""
    if exists(folder / "config.json"):
        return None
    adapter = folder / "adapter_config.json"
    if is_file(adapter):
        text = read_text(adapter, ConfigError)
        found = re.search(r'"base_model_name_or_path":\s*"([^"]+)"', text)
        base = found[1] if found else "FOLDER"
        return (
            "an adapter of PEFT, not a model; give the model and the adapter: gap-export NAME "
            f"--checkpoint {base} --set parts.adapter={folder}"
        )
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        head = folder / "refs" / "main"
        commits = sorted(path.name for path in (folder / "snapshots").iterdir())
        commit = read_text(head, ConfigError).strip() if is_file(head) else ""
        chosen = commit if commit in commits else commits[-1] if commits else "COMMIT"
        return f"the top of a hub cache; give the files' folder: {folder / 'snapshots' / chosen}"
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if inner:
        return (
            f"no config.json in it, but in {len(inner)} of its folders; give one, as {inner[-1]}"
        )
    return None


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
    ways = (read_constant(FAMILIES, name, "NEIGHBOURS") or {} for name in names)
    advice = next(
        (text for way in ways for pattern, text in way.items() if re.search(pattern, found)),
        NO_WAY,
    )
    return (
        f"model_type '{found}' is none of the families that there are ({', '.join(names)}); "
        f"{advice}"
    )
