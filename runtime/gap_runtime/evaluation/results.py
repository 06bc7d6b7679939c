"""The file of answers: a line that says of what, then one line for each phrase and ratio.

    {"gap_answers": 2, "subject": {...}, "data": {...}, "box": {...}}
    {"key", "ratio", "picture", "phrase", "size", "box", "answer", "token_ids", "milliseconds",
     "found", "calls", "drafted", "accepted", "proof"}, and "frame" where boxes depend on it
    {"key", "ratio", "picture", "phrase", "problem", "proof"}

`proof` is a hash of the first line and of all before it in its own, so that a row that was
changed, or came from another file, is found. Files of version 1 have none.

Answers know nothing of protocols: the same file is scored by any. Every line is written at once,
so that a run may be killed at any time; a torn last line is dropped when it goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

from gap_runtime.bundle.hashes import hash_bytes
from gap_runtime.bundle.layout import is_ratio
from gap_runtime.errors import ConfigError, InputError, RecordError
from gap_runtime.evaluation.files import LINE_BYTES
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame
from gap_runtime.records import dump_record, load_record
from gap_runtime.records.files import exists, open_file
from gap_runtime.records.plain import parse_json

SCHEMA: Final = 2
_UNPROVEN: Final = 1
"""The version before rows were proven."""
_MARK: Final = "gap_answers"
_START: Final = f'{{"{_MARK}"'.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What answers: a bundle on a backend, or a checkpoint in PyTorch.

    `sha256` is of the bundle's manifest, or of the checkpoint's index and the settings.
    """

    name: str
    sha256: str
    engine: str
    strategy: str
    positions: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """What was asked. `sha256` is of ids, phrases and boxes."""

    name: str
    format: str
    phrases: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first line. `box` says how the subject writes boxes."""

    subject: Subject
    data: DataFacts
    box: BoxFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An answer, or the problem because of which there is none.

    `size` is (width, height) of the picture, `box` the true one and `found` those of the answer in
    the subject's own frame, all in pixels. `milliseconds` are by stage: what the phrases of a
    picture share at a ratio, the first of them has. `calls` of the decoder held `drafted` tokens,
    of which `accepted` turned out right; all 0 where nobody counts them. `frame` is what of the
    picture the model was shown, null where the subject's boxes do not depend on it.
    """

    key: str
    ratio: float
    picture: str
    phrase: str
    size: tuple[int, int] | None = None
    box: Box | None = None
    answer: str | None = None
    token_ids: tuple[int, ...] = ()
    milliseconds: dict[str, float] | None = None
    found: tuple[Box, ...] = ()
    calls: int = 0
    drafted: int = 0
    accepted: int = 0
    frame: PictureFrame | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A file of answers, read."""

    header: Header
    rows: tuple[Row, ...]


def dump_row(row: Row, mark: bytes | None) -> bytes:
    """The line of a row, with its proof; without a mark (of `mark_file`), without one."""
    data = dump_record(row)
    known = _COUNTED if row.frame is None else _FRAMED
    for name in data.keys() - (_FAILED if row.problem is not None else known):
        del data[name]
    line = json.dumps(data, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if mark is None:
        return line + b"\n"
    body = line[:-1]
    return body + _PROOF + _prove(mark, body) + b'"}\n'


def mark_file(first_line: bytes) -> bytes:
    """What the proofs of a file begin with: the hash of its first line."""
    return hash_bytes(first_line).encode()


def _prove(mark: bytes, body: bytes) -> bytes:
    return hash_bytes(mark + body)[:_PROOF_DIGITS].encode()


def _require_proof(line: bytes, mark: bytes, where: str) -> None:
    """Refuse a row that is not as it was written, in the file that it was written to.

    Raises:
        InputError: It has no proof, or another one.
    """
    body, _, end = line.rpartition(_PROOF)
    if end.rstrip(b"\r\n") != _prove(mark, body) + b'"}':
        raise InputError(
            f"{where}: not as it was written (its proof differs); remove the line, and --resume "
            "asks again"
        )


def _dump_header(header: Header) -> bytes:
    data = {_MARK: SCHEMA, **dump_record(header)}
    return (json.dumps(data, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_answers(path: Path) -> Answers:
    """A file of answers; a torn last line is left out.

    Raises:
        InputError: It cannot be read, or is no file of answers.
    """
    with open_file(path, InputError) as file:
        read = _read_whole(file, path)
    if read is None:
        raise InputError(f"{path}: empty; expected a file that `evaluate --out` wrote")
    return Answers(header=read.header, rows=tuple(read.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    """What a file holds. `length` in bytes is that of its whole lines, `mark` for their proofs."""

    header: Header
    rows: list[Row]
    length: int
    mark: bytes | None


def _read_whole(file: BinaryIO, path: Path) -> _Whole | None:
    """The whole lines of a file; None where not even the first is whole."""
    rows: list[Row] = []
    header: Header | None = None
    mark: bytes | None = None
    length = 0
    seen: set[tuple[str, float]] = set()
    for number, (line, is_last) in enumerate(_split_lines(file, path), start=1):
        where = f"{path}:{number}"
        try:
            data = parse_json(line, where, InputError, "the file was changed")
        except InputError:
            if is_last:
                # A machine that lost power may leave anything in the last line.
                break
            raise
        if header is None:
            is_proven = isinstance(data, dict) and data.get(_MARK) == SCHEMA
            mark = mark_file(line) if is_proven else None
            header = _read_header(data, where)
        else:
            if mark is not None:
                _require_proof(line, mark, where)
                del data[_PROOF_FIELD]
            row = _read_row(data, where)
            if (row.key, row.ratio) in seen:
                raise InputError(
                    f"{where}: '{row.key:.60}' at ratio {row.ratio:g} comes twice; was the file "
                    "joined of two?"
                )
            seen.add((row.key, row.ratio))
            rows.append(row)
        length += len(line)
    return None if header is None else _Whole(header=header, rows=rows, length=length, mark=mark)


def _split_lines(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, bool]]:
    """Whole lines, each with whether it is the last one."""
    line = file.readline(LINE_BYTES + 1)
    while line.endswith(b"\n"):
        following = file.readline(LINE_BYTES + 1)
        yield line, not following.endswith(b"\n")
        line = following
    if len(line) > LINE_BYTES:
        raise InputError(f"{path}: no file of answers: a line is longer than {LINE_BYTES:,} bytes")


def _read_header(data: Any, where: str) -> Header:
    found = data.pop(_MARK, None) if isinstance(data, dict) else None
    if found is None:
        raise InputError(f"{where}: expected a file that `evaluate --out` wrote")
    if type(found) is not int or found not in {SCHEMA, _UNPROVEN}:
        raise InputError(f"{where}: answers of version {found!r:.20}, this version reads {SCHEMA}")
    try:
        return load_record(Header, data, where)
    except RecordError as error:
        raise InputError(str(error)) from error


_FARTHEST: Final = 1e9
"""Pixels from the corner of a picture, beyond which nothing lies."""
_PROOF_FIELD: Final = "proof"
_PROOF: Final = f', "{_PROOF_FIELD}": "'.encode()
_PROOF_DIGITS: Final = 16
_PLAIN: Final = frozenset({"key", "ratio", "picture", "phrase"})
_ASKED: Final = _PLAIN | {"size", "box", "answer", "token_ids", "milliseconds", "found"}
_COUNTED: Final = _ASKED | {"calls", "drafted", "accepted"}
_FRAMED: Final = _COUNTED | {"frame"}
_FAILED: Final = _PLAIN | {"problem"}


def _read_row(data: Any, where: str) -> Row:
    """A row; written out, for records.load_record would be the slowest part of scoring."""
    # Files from before calls were counted have no such fields.
    if not isinstance(data, dict) or data.keys() not in (_COUNTED, _FAILED, _ASKED, _FRAMED):
        raise InputError(f"{where}: expected the fields {', '.join(sorted(_COUNTED))}")
    try:
        if "problem" in data:
            return Row(**_plain(data), problem=str(data["problem"]))
        width, height = map(_require_count, data["size"])
        box = _require_area(data["box"])
        if not (box.x0 < width and box.y0 < height and box.x1 > 0 and box.y1 > 0):
            raise ValueError("its box lies outside its picture")
        return Row(
            **_plain(data),
            size=(width, height),
            box=box,
            answer=_require_text(data["answer"]),
            token_ids=tuple(map(_require_count, data["token_ids"])),
            milliseconds=_require_times(data["milliseconds"]),
            found=tuple(map(_require_area, data["found"])),
            calls=_require_count(data.get("calls", 0)),
            drafted=_require_count(data.get("drafted", 0)),
            accepted=_require_count(data.get("accepted", 0)),
            frame=_read_frame(data["frame"]) if "frame" in data else None,
        )
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{where}: a value of the wrong kind ({error}); was it changed?"
        ) from error


def _read_frame(data: dict[str, Any]) -> PictureFrame:
    (width, height), (across, down) = data["size"], data["resized"]
    left, top, wide, high = data["shown"]
    if not (min(map(int, (width, height, across, down, wide, high))) > 0):
        raise ValueError("its frame spans no area")
    return PictureFrame(
        size=(int(width), int(height)),
        shown=(int(left), int(top), int(wide), int(high)),
        resized=(int(across), int(down)),
    )


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """What every row holds."""
    return {
        "key": _require_text(data["key"]),
        "ratio": _require_share(data["ratio"]),
        "picture": _require_text(data["picture"]),
        "phrase": _require_text(data["phrase"]),
    }


def _require_times(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError("expected milliseconds by stage")
    if not all(0 <= each < math.inf for each in value.values()):
        raise ValueError("milliseconds are numbers from 0 on")
    return value


def _require_share(value: Any) -> float:
    if isinstance(value, bool) or not is_ratio(value):
        raise ValueError("its ratio is no share in [0, 1)")
    return float(value)


def _require_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _require_area(value: Any) -> Box:
    x0, y0, x1, y1 = map(float, value)
    if not (-_FARTHEST < x0 < x1 < _FARTHEST and -_FARTHEST < y0 < y1 < _FARTHEST):
        raise ValueError("a box spans no area")
    return Box(x0, y0, x1, y1)


def _require_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    return value


class AnswerWriter:
    """Rows of a run, kept and (with a path) appended to a file, one line at a time."""

    def __init__(self, header: Header, path: Path | None, *, resume: bool) -> None:
        """Open or make the file.

        Args:
            header: Of this run.
            path: The file; None keeps the rows in memory alone.
            resume: Go on with a file that is there.

        Raises:
            ConfigError: The file is there and `resume` is false, or belongs to another run.
        """
        self.rows: list[Row] = []
        self._path, self._file = path, None
        self._mark: bytes | None = None
        if path is None:
            return
        if exists(path) and not resume:
            raise ConfigError(f"{path}: exists; go on with it by --resume, or give another --out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is with the system as soon as it is written.
            self._file = path.open("r+b" if exists(path) else "x+b", buffering=0)
            self._lock()
            self._continue(header, path)
        except OSError as error:
            self.close()
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
        except InputError:
            self.close()
            raise

    def _continue(self, header: Header, path: Path) -> None:
        assert self._file is not None
        with open_file(path, InputError) as file:
            read = _read_whole(file, path)
        if read is None:
            start = self._file.read(len(_START)) or b""
            if not start.startswith(_START) and not _START.startswith(start):
                raise InputError(f"{path}: no file of answers; give another --out")
            self._file.seek(0)
            self._file.truncate(0)
            first = _dump_header(header)
            self._mark = mark_file(first)
            self._file.write(first)
            return
        self.rows, self._mark = read.rows, read.mark
        _require_same(read.header, header, path)
        self._file.truncate(read.length)
        self._file.seek(0, os.SEEK_END)

    def _lock(self) -> None:
        """Refuse a file that another run writes to, where the system can tell."""
        assert self._file is not None
        try:
            import fcntl  # noqa: PLC0415 - not on every system
        except ImportError:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self._path}: another run is writing to it; wait, or give another --out"
            ) from error
        except OSError:
            # Some network file systems have no locks.
            return

    def add(self, row: Row) -> None:
        """Keep a row and write its line.

        Raises:
            InputError: The file cannot be written.
        """
        self.rows.append(row)
        if self._file is not None:
            try:
                line = dump_row(row, self._mark)
                while line:
                    line = line[self._file.write(line) or 0 :]
            except OSError as error:
                raise InputError(
                    f"{self._path}: cannot be written ({error.strerror or error}); "
                    "make room and go on with --resume"
                ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    # Self is not in Python 3.10.
    def __enter__(self) -> AnswerWriter:  # noqa: PYI034
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _require_same(found: Header, wanted: Header, path: Path) -> None:
    """Refuse answers of another subject or to other phrases."""
    pairs: list[tuple[str, Any, Any]] = [
        ("model or bundle", found.subject, wanted.subject),
        ("data", found.data, wanted.data),
        ("box format", found.box, wanted.box),
    ]
    for what, old, new in pairs:
        if old != new:
            before, now = dump_record(old), dump_record(new)
            field = next(name for name in now if before[name] != now[name])
            raise InputError(
                f"{path}: holds answers of another {what}: its {field} is "
                f"{str(before[field])[:64]!r}, now {str(now[field])[:64]!r}; give another --out"
            )
