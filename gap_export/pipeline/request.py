"""What to export and how: the request that every command, script and test makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

from gap_export.config.load import load_config, name_settings
from gap_export.config.records import NamedConfig
from gap_runtime.errors import ConfigError, describe_unknown

BRINGS: Final = ("copy", "link")
"""How weights get into a bundle: copies, or hard links to the checkpoint's own files."""


class ExportOptions(TypedDict, total=False):
    """What may be said of an export in Python; `gap_export.export` describes each."""

    ratios: float | Sequence[float] | None
    keep: int | Sequence[int] | None
    pruner: str | None
    positions: str | None
    extra_token: str | None
    dtype: str | None
    quantize: str | None
    kv_cache: str | None
    settings: Mapping[str, Any] | None
    checkpoint: str | Path | None
    target: str
    out: str | Path | None
    bring: str
    reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export and how, besides the configuration.

    `out` is the bundle's folder; null for the usual name in the present one. `bring` is one of
    `BRINGS`. `reference`: record PyTorch's answers, and compare the graphs with them.
    """

    named: NamedConfig
    target: str = "cpu"
    out: Path | None = None
    bring: str = "copy"
    reference: bool = True

    def __post_init__(self) -> None:
        """Refuse another way to bring weights."""
        if self.bring not in BRINGS:
            raise ConfigError(f"bring '{self.bring}' is unknown; have {', '.join(BRINGS)}")


def make_request(model: str | Path, **options: Unpack[ExportOptions]) -> ExportRequest:
    """The request of an export. What is not given is the model file's.

    Args:
        model: Name in export_configs/, `.toml` file, checkpoint folder or hub id.
        **options: As for `gap_export.export`.

    Raises:
        ConfigError: Nothing of that name, an unknown option or key, or a value that cannot be
            used.
    """
    known = sorted(ExportOptions.__annotations__)
    for name in options:
        if name not in known:
            raise ConfigError(describe_unknown("option", name, known))
    overrides = dict(options.get("settings") or {}) | name_settings(options)
    checkpoint, out = options.get("checkpoint"), options.get("out")
    return ExportRequest(
        named=load_config(
            str(model), overrides, checkpoint=None if checkpoint is None else str(checkpoint)
        ),
        target=options.get("target", "cpu"),
        out=None if out is None else Path(out),
        bring=options.get("bring", "copy"),
        reference=options.get("reference", True),
    )
