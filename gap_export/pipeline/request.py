"""What to export and how: the request that every command, script and test makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gap_export.config.load import load_config
from gap_export.config.records import NamedConfig
from gap_runtime.errors import ConfigError

BRINGS: Final = ("copy", "link")
"""How weights get into a bundle: copies, or hard links to the checkpoint's own files."""


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


def make_request(
    model: str | Path,
    *,
    ratios: float | Sequence[float] | None = None,
    keep: int | Sequence[int] | None = None,
    pruner: str | None = None,
    positions: str | None = None,
    extra_token: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    target: str = "cpu",
    out: str | Path | None = None,
    bring: str = "copy",
    reference: bool = True,
) -> ExportRequest:
    """The request of an export. What is not given is the model file's.

    Args:
        model: Name in export_configs/, `.toml` file, checkpoint folder or hub id.
        ratios: Shares of visual tokens to remove, in [0, 1); a graph for each.
        keep: Counts of visual tokens that stay, instead.
        pruner: What chooses the tokens that stay.
        positions: `gap`, `compact`, `permuted` or `permuted-compact`.
        extra_token: Place of the token that some pruners make of what they remove.
        dtype: `float32`, `float16` or `bfloat16`.
        quantize: `int8` or `int4`.
        settings: Any keys of the model file with dots, as `{"prompt.answer": 32}`.
        checkpoint: Folder or hub id to use instead of the model file's.
        target: Kind of machine.
        out: The bundle's folder.
        bring: How weights get into the bundle: `copy` or `link`.
        reference: Whether PyTorch's answers are recorded.

    Raises:
        ConfigError: Nothing of that name, an unknown key, or a value that cannot be used.
    """
    if bring not in BRINGS:
        raise ConfigError(f"bring '{bring}' is unknown; have {', '.join(BRINGS)}")
    given = {
        "prune.ratios": ratios,
        "prune.keep": keep,
        "prune.strategy": pruner,
        "prune.positions": positions,
        "prune.extra_token": extra_token,
        "dtype": dtype,
        "quantize.weights": quantize,
    }
    overrides = dict(settings or {}) | {k: v for k, v in given.items() if v is not None}
    place = None if checkpoint is None else str(checkpoint)
    return ExportRequest(
        named=load_config(str(model), overrides, checkpoint=place),
        target=target,
        out=None if out is None else Path(out),
        bring=bring,
        reference=reference,
    )
