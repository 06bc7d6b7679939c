"""From a model's name, its file, flags and `--set` to one configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gap_export.config.families import FAMILIES, find_usual_pruner, resolve_family
from gap_export.config.files import find_model
from gap_export.config.pruners import OPEN, require_strategy, resolve_pruner
from gap_export.config.records import ExportConfig, NamedConfig, PruneConfig
from gap_runtime.bundle.layout import require_ratio
from gap_runtime.errors import ConfigError, UnknownNameError, describe_unknown
from gap_runtime.records import load_record
from gap_runtime.records.plain import parse_toml
from gap_runtime.registry import list_plugins

_DTYPE_NAMES: Final = {
    "fp32": "float32",
    "float": "float32",
    "single": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}
"""Names under which dtypes are known elsewhere."""
_LONGEST: Final = 100_000
"""Tokens, tiles or pixels: more than any model takes."""
_LARGEST: Final = 2**31 - 1
OPTIONS: Final = {
    "ratios": "prune.ratios",
    "keep": "prune.keep",
    "pruner": "prune.strategy",
    "positions": "prune.positions",
    "extra_token": "prune.extra_token",
    "dtype": "dtype",
    "quantize": "quantize.weights",
    "kv_cache": "kv_cache",
}
"""Key of a model file by the option that stands for it, in commands and in Python."""
_RATIOS: Final = "prune.ratios"
_KEEP: Final = "prune.keep"


def load_config(
    model: str, overrides: dict[str, Any], *, checkpoint: str | None = None
) -> NamedConfig:
    """The configuration of a model.

    Args:
        model: A name in export_configs/, a `.toml` path, a checkpoint folder or a hub id.
        overrides: Values by dotted key that win over the file's.
        checkpoint: A folder or hub id to use instead of the configured one.

    Raises:
        ConfigError: Nothing of that name, an unknown key, or a value that cannot be used.
    """
    name, data, where = find_model(model)
    if checkpoint is not None:
        data["checkpoint"] = checkpoint
    if _KEEP in overrides and _RATIOS in overrides:
        raise ConfigError(f"{_KEEP} and {_RATIOS} are two ways to say one thing; give one")
    for key, value in overrides.items():
        _assign(data, key, value)
    if "prompt.template" in overrides and "prompt.yields" not in overrides:
        _assign(data, "prompt.yields", value=False)
    _settle_counts(data, overrides, where)
    _settle_pruner(data)
    _settle_names(data)
    config = load_record(ExportConfig, data, where)
    _require_usable(config, where)
    return NamedConfig(name=name, config=config)


def settle_family(named: NamedConfig, checkpoint: Path) -> NamedConfig:
    """The configuration with the checkpoint's family, and what follows from that, in it.

    Args:
        named: Its family is unknown where the model is a hub id.
        checkpoint: Its folder, or a file.

    Raises:
        ConfigError: The folder does not tell its family.
        UnknownNameError: It is of none that there is.
    """
    config = named.config
    if config.family:
        return named
    family = resolve_family(checkpoint)
    prune = config.prune
    if prune.strategy == OPEN:
        prune = replace(prune, strategy=find_usual_pruner(family))
    return replace(named, config=replace(config, family=family, prune=prune))


def name_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key of the model file, from values by option; what is None is not given."""
    return {key: options[name] for name, key in OPTIONS.items() if options.get(name) is not None}


def _settle_counts(data: dict[str, Any], overrides: dict[str, Any], where: str) -> None:
    """One of shares and counts; what is asked for wins over the file's other one."""
    prune = data.setdefault("prune", {})
    if not isinstance(prune, dict):
        return
    for name in ("ratios", "keep"):
        value = prune.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            prune[name] = [value]
        elif isinstance(value, str) and re.fullmatch(r"(\d+(\.\d+)?,)+\d+(\.\d+)?", value):
            prune[name] = [float(n) if "." in n else int(n) for n in value.split(",")]
    if "keep" in prune and _RATIOS in overrides:
        del prune["keep"]
    elif "keep" in prune and "ratios" in prune and _KEEP not in overrides:
        raise ConfigError(
            f"{where}: {_KEEP} and {_RATIOS} are two ways to say one thing; give one"
        )
    if prune.get("keep"):
        prune["ratios"] = []


def _settle_pruner(data: dict[str, Any]) -> None:
    """The family's own pruner where none is asked for; `settle_family` finds one of a hub id."""
    prune, family = data["prune"], data.get("family")
    if isinstance(prune, dict) and "strategy" not in prune:
        prune["strategy"] = find_usual_pruner(str(family)) if family else OPEN


def _settle_names(data: dict[str, Any]) -> None:
    """The project's own names for what was asked for under others."""
    dtype, prune = data.get("dtype"), data["prune"]
    if isinstance(dtype, str):
        data["dtype"] = _DTYPE_NAMES.get(dtype.lower(), dtype)
    if isinstance(prune, dict) and isinstance(prune.get("strategy"), str):
        prune["strategy"] = resolve_pruner(prune["strategy"])


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of one `--set KEY=VALUE`; the value is TOML, or a bare string.

    Raises:
        ConfigError: There is no `=`.
    """
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for example prompt.answer=32")
    try:
        return key, parse_toml(f"value = {value}", f"--set {key}", ConfigError)["value"]
    except ConfigError:
        return key, value


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables."""
    *tables, last = key.split(".")
    for name in tables:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {key}: '{name}' is a value, not a table")
    data[last] = value


def _require_usable(config: ExportConfig, where: str) -> None:
    """Reject values that no model could use."""
    if config.family or config.prune.strategy != OPEN:
        require_strategy(config.prune.strategy)
    families = list_plugins(FAMILIES)
    if config.family and config.family not in families:
        raise UnknownNameError(f"{where}: {describe_unknown('family', config.family, families)}")
    _require_counted(config.prune, where)
    for key, count, least, most in (
        ("prune.seed", config.prune.seed, 0, _LARGEST),
        ("prompt.prefix", config.prompt.prefix, 0, _LONGEST),
        ("prompt.suffix", config.prompt.suffix, 1, _LONGEST),
        ("prompt.answer", config.prompt.answer, 1, _LONGEST),
        ("check.memory_mib", config.check.memory_mib, 0, _LARGEST),
        ("image.tiles", config.image.tiles, 1, _LONGEST),
        ("vision.heads", config.vision.heads, 1, _LONGEST),
        ("vision.side", config.vision.side, 1, _LONGEST),
    ):
        if count is not None and not least <= count <= most:
            raise ConfigError(f"{where}: {key} is {count}, expected {least} to {most}")
    if not 0 < config.prune.ivc < 0.5:  # NaN is neither
        raise ConfigError(
            f"{where}: prune.ivc is {config.prune.ivc:g}, expected a share of the visual tokens "
            "above 0 and below 0.5, as 0.05"
        )
    if config.prompt.template is not None:
        _require_template(config.prompt.template, where)


def _require_counted(prune: PruneConfig, where: str) -> None:
    """Reject shares and counts that no model could use."""
    if not (prune.ratios or prune.keep):
        raise ConfigError(f"{where}: prune.ratios is empty; give at least one")
    for ratio in prune.ratios:
        require_ratio(ratio)
    for kept in prune.keep:
        if kept < 1:
            raise ConfigError(f"keep {kept}: at least 1 visual token is needed")


def _require_template(template: str, where: str) -> None:
    """Reject a template without the phrase or the image, or with text that varies before it."""
    from gap_runtime.grounding.prompt import (  # noqa: PLC0415 - numpy, which --help does without
        IMAGE_FIELD,
        PHRASE_FIELD,
    )

    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: prompt.template is not valid UTF-8 text") from error
    for part in (IMAGE_FIELD, PHRASE_FIELD):
        if template.count(part) != 1:
            raise ConfigError(f"{where}: prompt.template must hold {part} once")
    if template.index(IMAGE_FIELD) > template.index(PHRASE_FIELD):
        raise ConfigError(
            f"{where}: prompt.template must hold {IMAGE_FIELD} before {PHRASE_FIELD}"
        )
