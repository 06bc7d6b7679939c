"""Targets: kinds of machine, and what graphs and engines for them have to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from gap_runtime.errors import RecordError, UnknownNameError, describe_unknown
from gap_runtime.records import load_record
from gap_runtime.records.plain import read_toml

ModelDtype = Literal["float32", "float16", "bfloat16"]
"""What a model's weights are stored in and its graphs compute in."""
_FOLDER: Final = Path(__file__).resolve().parent / "targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kind of machine; never a model.

    `packages` are those that `backend` needs, by import name in order of preference, with the
    versions that serve (PEP 440); empty where it asks for none by version. `provider` is the
    backend's device that graphs are made for, null for any. `caches_in_place` is
    whether it may write the KV cache into the memory that it reads it from, `takes_zero_points`
    whether it runs weights that came quantized with zero points, `block` the most inputs that may
    share a scale of weights in 4 bits. `dtype` is
    that of an export which names none, null for the checkpoint's own; `dtypes` are those that it
    has kernels for, empty for all. `memory_mib` is the memory
    that the smallest machine of the kind has for everything, `workspace_mib` what a build may
    use as scratch; null for no limit.
    """

    name: str
    description: str
    backend: str
    dialect: str
    opset: int
    provider: str | None = None
    dtype: ModelDtype | None = None
    compute_capabilities: tuple[str, ...] = ()
    workspace_mib: int | None = None
    memory_mib: int | None = None
    packages: dict[str, str] = field(default_factory=dict)
    caches_in_place: bool = True
    takes_zero_points: bool = True
    block: int = 128
    dtypes: tuple[ModelDtype, ...] = ()


def list_targets() -> list[str]:
    """Names of all targets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UnknownNameError: There is no such file.
        RecordError: The file is not as it should be.
    """
    if name not in list_targets():
        raise UnknownNameError(describe_unknown("target", name, list_targets()))
    path = _FOLDER / f"{name}.toml"
    return load_record(Target, {**read_toml(path, RecordError), "name": name}, path.name)
