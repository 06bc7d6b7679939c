"""Model files, and what else a word on the command line may lead to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from gap_export.config.families import resolve_family
from gap_export.config.folders import describe_file
from gap_export.config.pruners import is_pruner_file
from gap_export.config.records import ExportConfig
from gap_export.config.shipped import list_configs, package_data
from gap_runtime.errors import ConfigError, RecordError, UnknownNameError, describe_unknown
from gap_runtime.records import load_record
from gap_runtime.records.files import exists, expand, is_file, is_folder, resolve
from gap_runtime.records.plain import read_toml

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


def is_model(word: str) -> bool:
    """Whether a word leads to a model: a name, a file, a folder, or the form of a hub id."""
    return (
        word.endswith(".toml")
        or word.startswith((".", "/", "~"))
        or word in list_configs()
        or is_folder(word)
        or _HUB_ID.fullmatch(word) is not None
    )


def read_config_file(name: str) -> ExportConfig:
    """The configuration of a name in export_configs/, as the file has it."""
    path = package_data("export_configs") / f"{name}.toml"
    return load_record(ExportConfig, _read_model_file(path), path.name)


def find_model(model: str) -> tuple[str, dict[str, Any], str]:
    """Bundle name, raw data and the source's name for messages."""
    if model.endswith(".toml"):
        path = Path(model)
        if not exists(path):
            raise ConfigError(f"{model}: no such configuration file")
        return path.stem, _read_model_file(path), path.name
    if model in list_configs():
        # Before folders: one of the same name can still be given as ./NAME.
        path = package_data("export_configs") / f"{model}.toml"
        return model, _read_model_file(path), path.name
    folder = expand(model)
    if is_folder(folder):
        data = {"family": resolve_family(folder), "checkpoint": str(folder)}
        return resolve(folder).name, data, str(folder)
    if is_file(folder):
        raise ConfigError(f"{model}: {describe_file(folder)}")
    if model.startswith((".", "/", "~")):
        raise ConfigError(f"{model}: no such folder")
    if _HUB_ID.fullmatch(model):
        return model.rpartition("/")[2], {"family": "", "checkpoint": model}, model
    hint = describe_unknown("model", model, list_configs())
    raise UnknownNameError(f"{hint}; or give a .toml file, a checkpoint folder or a hub id")


def _read_model_file(path: Path) -> dict[str, Any]:
    """A model file; relative folders in it are relative to the file."""
    data = read_toml(path, RecordError)
    checkpoint = data.get("checkpoint")
    check = data.get("check")
    if isinstance(check, dict) and isinstance(check.get("samples"), str):
        check["samples"] = str(resolve(path).parent / expand(check["samples"]))
    prune = data.get("prune")
    if isinstance(prune, dict) and is_pruner_file(str(prune.get("strategy"))):
        prune["strategy"] = str(resolve(path).parent / expand(prune["strategy"]))
    if isinstance(checkpoint, str):
        beside = resolve(path).parent / checkpoint
        if checkpoint.startswith(".") or is_folder(beside):
            data["checkpoint"] = str(resolve(beside))
    return data
