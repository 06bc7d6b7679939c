"""Engines on disk: what a build is asked for, where engines lie, and when one may be used.

    BUNDLE/engines/<target>[-sm89]/<stage>.engine        the compiled stage
    BUNDLE/engines/<target>[-sm89]/<stage>.engine.json   what it is: EngineRecord
    BUNDLE/engines/<runtime>-<hash>/                     what a runtime compiles and keeps itself

An engine is written aside and renamed, its record last. Without a record that fits, it is none.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from gap_runtime.bundle.bundle import Bundle, identify_files
from gap_runtime.bundle.files import user_cache, write_whole
from gap_runtime.bundle.hashes import hash_bytes, hash_file
from gap_runtime.bundle.manifest import DECODER, TEXT, VISION, BundleLayout, RatioEntry, Stage
from gap_runtime.bundle.tensors import MOST_LOGITS
from gap_runtime.errors import ConfigError, EngineError, GapError, RecordError
from gap_runtime.machines.target import Target, list_targets, load_target
from gap_runtime.records import dump_record, load_record
from gap_runtime.records.plain import read_json

ENGINES: Final = "engines"
STEP_ROWS: Final = 1
"""Rows of the decoder's profile for one token; the others are for whole prompts."""

_SEAL: Final = "sealed.json"
_HASHED_BYTES: Final = 256 * 2**20
"""Engines up to this size are hashed when they are looked at, larger ones are only measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """What an engine was built from, with what and for which machine.

    `compute_capabilities` are the GPUs that it runs on. `graph_blake3` is of the ONNX file,
    `weights_blake3` of the names and hashes of the bundle's weight files. `profiles` are the
    decoder's row counts, in the engine's order; empty for a stage without a free dimension.
    `is_cache_in_place` says that the cache's outputs are its inputs. `layers` counts the layers
    of the parsed network by kind. `blake3` is null above 256 MiB. `device_memory_bytes` is the
    scratch memory that it needs beside its weights; null where no GPU could tell.
    """

    stage: str
    target: str
    package: str
    version: str
    platform: str
    compute_capabilities: tuple[str, ...]
    precision: str
    graph_blake3: str
    weights_blake3: str
    profiles: tuple[int, ...]
    is_cache_in_place: bool
    layers: dict[str, int]
    build_seconds: float
    size: int
    blake3: str | None
    device_memory_bytes: int | None


class _Sealed(NamedTuple):
    """Size and, where it is not too large, BLAKE3 of a file that a runtime keeps."""

    size: int
    blake3: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seal:
    """What a runtime has put into its cache, by path in it."""

    files: dict[str, _Sealed]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What to build. `options` are the backend's own, by the part of their name after the dot.

    `compute_capabilities` are empty for the GPU of this machine. `timing_cache` is null for the
    one in the user's cache folder. `is_forced` builds engines anew that are good.
    """

    target: Target
    entries: tuple[RatioEntry, ...]
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    options: dict[str, str]
    is_forced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine that is there now. `is_reused` says that it was there before."""

    file: str
    is_reused: bool
    record: EngineRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """All engines that were asked for, and what built them."""

    bundle: str
    target: str
    package: str
    version: str
    compute_capabilities: tuple[str, ...]
    folder: str
    engines: tuple[BuiltEngine, ...]


def require_readable(bundle: Bundle, target: Target) -> None:
    """Refuse a bundle whose graphs are newer than what the target reads.

    Raises:
        ConfigError: The bundle has to be exported again.
    """
    found = bundle.manifest.target
    if found.opset > target.opset:
        raise ConfigError(
            f"{bundle.folder}: its graphs are of the {found.dialect} dialect, opset "
            f"{found.opset}, and target '{target.name}' reads opset {target.opset} at most "
            f"({target.dialect}); export again with gap-export MODEL --target {target.name}"
        )


def list_stages(bundle: Bundle, entries: tuple[RatioEntry, ...]) -> list[Stage]:
    """The stages that run at those ratios, each once, the smaller ones first."""
    manifest = bundle.manifest
    visions = {stage.name: stage for stage in (manifest.stage(VISION, e) for e in entries)}
    texts = [stage for stage in manifest.stages if stage.role == TEXT]
    return [*visions.values(), *texts, manifest.stage(DECODER)]


def list_profiles(layout: BundleLayout, entries: tuple[RatioEntry, ...]) -> tuple[int, ...]:
    """The decoder's row counts, ascending, and then the step.

    Drafts, the text behind a picture that is known, the length of every prompt.
    """
    prompts = {layout.at(entry).prompt for entry in entries}
    return (*sorted(prompts | {MOST_LOGITS, max(layout.suffix, MOST_LOGITS)}), STEP_ROWS)


def engine_folder(bundle: Bundle, target: str, compute_capabilities: tuple[str, ...]) -> Path:
    """Where engines lie; `compute_capabilities` are empty for this machine's GPU."""
    named = "".join(f"-sm{each.replace('.', '')}" for each in compute_capabilities)
    return bundle.folder / ENGINES / f"{target}{named}"


def provider_cache(bundle: Bundle, runtime: str) -> Path | None:
    """Where a runtime keeps what it compiles: in the bundle, else in the user's cache, or nowhere.

    The folder's name changes with any file of the bundle, so that nothing outlives its weights.
    What is no file there is removed.

    Args:
        bundle: The opened bundle.
        runtime: Of the backend and its device, for example `onnxruntime-tensorrt`.
    """
    leaf = f"{runtime}-{identify_files(bundle)}"
    homes = [bundle.folder.resolve() / ENGINES]
    with contextlib.suppress(OSError):
        homes.append(user_cache() / bundle.manifest.name)
    for home in homes:
        folder = home / leaf
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.rglob("*"):
                if not path.is_file() and not path.is_dir():
                    # A pipe, for which a library would wait without end.
                    path.unlink()
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None


def prove_cache(folder: Path) -> None:
    """Remove from a cache what is not as `seal_cache` saw it, for a runtime that trusts it.

    What a process that was killed has half written goes, too.

    Raises:
        OSError: It cannot be removed.
    """
    try:
        sealed = load_record(_Seal, read_json(folder / _SEAL, RecordError), _SEAL).files
    except RecordError:
        sealed = {}
    for path in _list_cache(folder):
        kept = sealed.get(path.relative_to(folder).as_posix())
        try:
            is_same = kept is not None and kept == _Sealed(*describe_engine(path))
        except GapError:
            is_same = False
        if not is_same:
            path.unlink()


def seal_cache(folder: Path) -> None:
    """Write down what a runtime has put into its cache, as far as that can be written."""
    with contextlib.suppress(OSError, GapError):
        files = {
            path.relative_to(folder).as_posix(): _Sealed(*describe_engine(path))
            for path in _list_cache(folder)
        }
        text = json.dumps(dump_record(_Seal(files=files)), indent=2, sort_keys=True) + "\n"
        with write_whole(folder / _SEAL) as aside:
            aside.write_text(text, encoding="utf-8")


def _list_cache(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _SEAL]


def find_engine_folder(bundle: Bundle, name: str, backend: str) -> Path:
    """The folder of that name, or without one that of the bundle's target, or the only one.

    Args:
        bundle: The opened bundle.
        name: Of the folder; empty where none is named.
        backend: What builds engines, and for which targets.

    Raises:
        EngineError: There is none.
    """
    home = bundle.folder / ENGINES
    found = sorted(path.name for path in home.glob("*") if any(path.glob("*.engine.json")))
    own = bundle.manifest.target.name
    if name and name in found:
        return home / name
    if not name and own in found:
        return home / own
    if not name and len(found) == 1:
        return home / found[0]
    wanted = name or own
    choices = f"; have {', '.join(found)}, to be chosen by --backend NAME:FOLDER" if found else ""
    target = wanted.partition("-sm")[0]
    raise EngineError(
        f"{home / wanted}: no engines there{choices}; {_advise(bundle, target, backend)}"
    )


def _advise(bundle: Bundle, wanted: str, backend: str) -> str:
    """How to come to engines: build them, for a target that does, or export anew."""
    own = bundle.manifest.target
    builders = [each for each in map(load_target, list_targets()) if each.backend == backend]
    if wanted in {target.name for target in (*builders, own) if target.backend == backend}:
        return f"build them: {build_command(bundle, wanted)}"
    fitting = [
        target.name
        for target in builders
        if target.dialect == own.dialect and target.opset >= own.opset
    ]
    if fitting:
        others = f" (or {', '.join(fitting[1:])})" if fitting[1:] else ""
        return (
            f"target '{own.name}' builds none; build them for a machine that does: "
            f"{build_command(bundle, fitting[0])}{others}"
        )
    return (
        f"the graphs of target '{own.name}' are for {own.backend} alone; use --backend "
        f"{own.backend}, or export for a target that builds: gap-export MODEL --target "
        f"{builders[0].name} (or {', '.join(target.name for target in builders[1:])})"
    )


def build_command(bundle: Bundle, target: str, more: str = "") -> str:
    """The command line that makes the engines."""
    return f"gap-runtime build {bundle.folder} --target {target}{more}"


def rebuild_command(bundle: Bundle, folder: Path) -> str:
    """The command line that makes the engines of a folder again."""
    target, *named = folder.name.split("-sm")
    more = "".join(f" --compute-capability {sm[:-1]}.{sm[-1]}" for sm in named)
    return build_command(bundle, target, more)


def engine_file(folder: Path, stage: str) -> Path:
    """The engine of a stage."""
    return folder / f"{stage}.engine"


def _record_file(folder: Path, stage: str) -> Path:
    return engine_file(folder, stage).with_suffix(".engine.json")


def read_engine_record(folder: Path, stage: str) -> EngineRecord | None:
    """What is said of an engine; None where nothing is, or nothing that can be read."""
    path = _record_file(folder, stage)
    try:
        return load_record(EngineRecord, read_json(path, RecordError), str(path))
    except RecordError:
        return None


def find_fault(bundle: Bundle, stage: Stage, folder: Path) -> str | None:
    """Why the engine of a stage cannot be used; None for one that is whole and of this bundle."""
    path, record = engine_file(folder, stage.name), read_engine_record(folder, stage.name)
    if record is None:
        return "there is no record of how it was built"
    size = path.stat().st_size if path.is_file() else 0
    if size != record.size or size == 0:
        return f"the file has {size} bytes, expected {record.size}"
    if record.blake3 is not None and hash_file(path) != record.blake3:
        return "its bytes have changed since it was built"
    if record.graph_blake3 != bundle.manifest.files[stage.file].blake3:
        return f"{stage.file} is another graph than the one that it was built from"
    if record.weights_blake3 != identify_weights(bundle):
        return "the bundle's weights are other ones than those that it was built from"
    return None


def identify_weights(bundle: Bundle) -> str:
    """One hash for the names and hashes of all weight files, from the manifest."""
    files = bundle.manifest.files
    named = sorted((name, files[name].blake3) for name in files if name.endswith(".safetensors"))
    return hash_bytes(json.dumps(named).encode())


@contextmanager
def new_engine(folder: Path, stage: str) -> Iterator[Path]:
    """A file to write an engine to, in place when the block ends; its record is to follow.

    After an error nothing of it is left, not even an empty folder.

    Raises:
        EngineError: It cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with write_whole(engine_file(folder, stage)) as aside:
            yield aside
    except OSError as error:
        raise _unwritable(engine_file(folder, stage), error) from error
    finally:
        # What is not empty is not removed.
        with contextlib.suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()


def _unwritable(path: Path, error: OSError) -> EngineError:
    return EngineError(
        f"{path}: cannot be written ({error.strerror or error}); make room or mend the place, and "
        "build again"
    )


def write_engine_record(folder: Path, record: EngineRecord) -> None:
    """Say what the engine of a stage is; without that it is none.

    Raises:
        EngineError: It cannot be written there.
    """
    path = _record_file(folder, record.stage)
    text = json.dumps(dump_record(record), indent=2, sort_keys=True) + "\n"
    try:
        with write_whole(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def describe_engine(path: Path) -> tuple[int, str | None]:
    """Size and, where it is not too large, hash of an engine.

    Raises:
        EngineError: The file is empty.
    """
    size = path.stat().st_size
    if size == 0:
        raise EngineError(f"{path}: the builder wrote an empty engine")
    return size, hash_file(path) if size <= _HASHED_BYTES else None
