"""Data by one line of text: what to read, from where, and how much of it.

    SET:SPLIT@PLACE   a published set in a folder or file: refcoco:val@DIR
    PATH              a file; its format is recognised, or named with ,format=NAME
    NAME:SPLIT        a generator: refshapes:test

Settings follow after commas: `format=NAME`, and `by=unc|umd|google` for who split it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import ConfigError, InputError
from gap_runtime.evaluation import READERS
from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.files import LINE_BYTES, read_json, read_lines
from gap_runtime.evaluation.parquet import read_columns
from gap_runtime.evaluation.source import Reader, Source
from gap_runtime.evaluation.splits import COUNTS, USUAL_BY, compare_counts
from gap_runtime.records.files import exists, is_folder, open_file
from gap_runtime.registry import list_plugins, load_plugin

MOST: Final = 2_000_000
"""Phrases that are read at most: they are held in memory while they are asked."""

_SETTINGS: Final = ("format", "by")
_EXPECTED: Final = "expected a file, SET:SPLIT@PLACE or a generator such as refshapes:test"
_NAMED: Final = re.compile(r"([a-z][a-z0-9+_-]*):([A-Za-z0-9_-]+)(?:@(.+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Phrases to ask. `sha256` is of them, not of the pictures' bytes.

    `set`, `split` and `by` are as in Source. `limited` says that the user asks for the first
    phrases only, `whole` that these are as many as were published, as far as anybody knows.
    `notes` is what the user should know: counts that are not the published ones. `paths` are the
    files that the phrases were read from.
    """

    name: str
    format: str
    expressions: tuple[Expression, ...]
    sha256: str
    notes: tuple[str, ...]
    set: str
    split: str
    by: str
    limited: bool
    whole: bool
    paths: tuple[Path, ...] = ()

    def describe(self) -> str:
        """Set, split, who split it, and how many phrases of how many that were published."""
        by = self.by or USUAL_BY.get(self.set, "")
        known = COUNTS.get((self.set, self.split)) if by == USUAL_BY.get(self.set, "") else None
        count = len(self.expressions)
        of = "" if known is None or known[0] == count else f" of {known[0]:,} published"
        return f"{self.name}{f' (split by {by})' if by else ''}, {count:,}{of} phrases"


def open_data(spec: str, *, images: Path | None = None, limit: int | None = None) -> Data:
    """Read the phrases that a line of text names, and nothing of the pictures.

    Args:
        spec: As in the table above.
        images: Folder of the pictures; that of the data file by default.
        limit: Most phrases, the first ones; all by default.

    Raises:
        InputError: A file or a record in it cannot be used.
        ConfigError: The line of text cannot be understood.
    """
    if images is not None and not is_folder(images):
        raise InputError(f"{images}: no such folder of pictures; give another with --images")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: at least 1 is needed")
    name, source, wanted = _parse(spec, images)
    chosen, reader, source = _choose(source, wanted, spec)
    most = limit or reader.USUAL
    expressions = tuple(islice(reader.read(source), min(most or MOST + 1, MOST + 1)))
    where = ", ".join(str(path) for path in source.paths) or spec
    if not expressions:
        raise InputError(f"{where}: no phrase in it")
    if len(expressions) > MOST:
        raise InputError(f"{where}: more than {MOST:,} phrases; take some with --limit")
    _require_distinct(expressions, where)
    _require_pixels(expressions, where)
    targets = [each.target for each in expressions]
    note = compare_counts(source.name, source.split, source.by, targets)
    notes = [*source.notes, *([note] if note and limit is None else [])]
    return Data(
        name=name,
        format=chosen,
        expressions=expressions,
        sha256=_hash(expressions),
        notes=tuple(notes),
        set=source.name,
        split=source.split,
        by=source.by,
        limited=limit is not None,
        whole=note is None,
        paths=source.paths,
    )


def _parse(spec: str, images: Path | None) -> tuple[str, Source, str]:
    """A name for people, what to read (its paths still as given), and the format that is named."""
    # A file is a file, whatever characters are in its name.
    text, settings = (spec, {}) if exists(spec) else _split_settings(spec)
    by, wanted = settings.get("by", ""), settings.get("format", "")
    match = None if exists(text) else _NAMED.fullmatch(text)
    if match is None:
        path = Path(text)
        if not exists(path):
            raise InputError(f"--data {text}: no such file; {_EXPECTED}")
        source = Source(paths=(path,), name="", split="", by=by, images=images)
        return path.name, source, wanted
    name, split, place = match.group(1), match.group(2), match.group(3)
    paths: tuple[Path, ...] = (Path(place),) if place else ()
    if paths and not exists(paths[0]):
        raise InputError(f"--data {text}: {place}: no such file or folder")
    source = Source(paths=paths, name=name, split=split, by=by, images=images)
    return f"{name}:{split}", source, wanted


def _split_settings(spec: str) -> tuple[str, dict[str, str]]:
    """The text before the settings, and the settings."""
    text, *parts = spec.split(",")
    settings: dict[str, str] = {}
    for part in parts:
        key, sign, value = part.partition("=")
        if key not in _SETTINGS or not sign or not value:
            raise ConfigError(
                f"--data {spec}: '{part}' is no setting; have {', '.join(_SETTINGS)}"
            )
        settings[key] = value
    return text, settings


def load_reader(name: str) -> Reader:
    """A reader by the name of its format.

    Raises:
        UnknownNameError: There is none.
    """
    reader: Reader = load_plugin(READERS, name.replace("-", "_"), "format")
    return reader


def _choose(source: Source, wanted: str, spec: str) -> tuple[str, Reader, Source]:
    """The reader of a source, and the source with the paths of files."""
    names = [wanted.replace("-", "_")] if wanted else list_plugins(READERS)
    readers = {name: load_reader(name) for name in names}
    if not source.paths:
        name = source.name.replace("-", "_")
        if name not in readers or readers[name].SUFFIXES:
            raise ConfigError(f"--data {spec}: '{source.name}' needs a place; {_EXPECTED}")
        return name, readers[name], source
    if is_folder(source.path):
        return _locate(source, readers, spec)
    return _recognise(source, readers)


def _locate(source: Source, readers: dict[str, Reader], spec: str) -> tuple[str, Reader, Source]:
    """The one format in which a folder holds a set."""
    folder = source.path
    if not source.name:
        raise ConfigError(f"--data {spec}: a folder; name the set, for example refcoco:val@{spec}")
    found = {name: reader.locate(folder, source) for name, reader in readers.items()}
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise InputError(
            f"{folder}: no file of {source.name}:{source.split} in it under a published name; "
            "give the file: --data SET:SPLIT@FILE"
        )
    if len(found) > 1:
        raise ConfigError(
            f"--data {spec}: {folder} holds it in several formats; choose one with "
            f",format={' or ,format='.join(found)}"
        )
    ((name, paths),) = found.items()
    return name, readers[name], replace(source, paths=paths)


def _recognise(source: Source, readers: dict[str, Reader]) -> tuple[str, Reader, Source]:
    """The format of a file, by its ending and its first record."""
    path = source.path
    suffix = path.suffix.lower()
    fitting = {name: reader for name, reader in readers.items() if suffix in reader.SUFFIXES}
    if len(readers) == 1:
        ((name, reader),) = readers.items()
        return name, reader, source
    if not fitting:
        endings = sorted({ending for reader in readers.values() for ending in reader.SUFFIXES})
        raise InputError(f"{path}: the ending is unknown; have {', '.join(endings)}")
    head = _read_head(path, suffix)
    for name, reader in fitting.items():
        if reader.recognise(head):
            return name, reader, source
    raise InputError(
        f"{path}: of no known format ({', '.join(fitting)}); found {_describe(head)}; for your "
        "own data give each line image, phrase and box"
    )


def _read_head(path: Path, suffix: str) -> Any:
    """What formats are told apart by; see Reader.recognise."""
    if suffix == ".parquet":
        return read_columns(path)
    if suffix == ".jsonl":
        return next((record for _, record in read_lines(path)), None)
    if suffix == ".json":
        return read_json(path)
    if suffix == ".csv":
        with open_file(path, InputError) as file:
            text = file.readline(LINE_BYTES).decode("utf-8-sig", "replace")
        try:
            return [cell.strip() for cell in next(csv.reader(text.splitlines()), [])]
        except csv.Error as error:
            raise InputError(f"{path}: not valid CSV ({error})") from error
    return None


def _describe(head: Any) -> str:
    if isinstance(head, list) and head and isinstance(head[0], dict):
        head = head[0]
    if isinstance(head, (dict, list)):
        return f"the fields {', '.join(str(key)[:30] for key in list(head)[:12])}"
    return "nothing" if head is None else f"a {type(head).__name__}"


def _require_pixels(expressions: tuple[Expression, ...], where: str) -> None:
    """Refuse boxes that all lie within one pixel: fractions of the picture, as a rule."""
    values = [value for each in expressions for value in each.box]
    if all(0 <= value <= 1 for value in values) and any(0 < value < 1 for value in values):
        raise InputError(
            f"{where}: all boxes lie within one pixel; are they fractions of the picture? give "
            "pixels"
        )


def _require_distinct(expressions: tuple[Expression, ...], where: str) -> None:
    seen: set[str] = set()
    for each in expressions:
        if each.key in seen:
            raise InputError(
                f"{where}: two phrases have the id '{each.key:.60}'; make them differ"
            )
        seen.add(each.key)


def _hash(expressions: tuple[Expression, ...]) -> str:
    """SHA-256 of what is asked and of the true boxes."""
    digest = hashlib.sha256()
    for each in expressions:
        fields = [each.key, each.picture.key, each.phrase, each.box, each.size]
        digest.update(json.dumps(fields).encode())
        digest.update(b"\n")
    return digest.hexdigest()
