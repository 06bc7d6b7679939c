"""The file of answers: a line that says of what, then one line for each phrase and ratio.

    {"gap_answers": 1, "subject": {...}, "data": {...}, "box": {...}}
    {"key", "ratio", "picture", "phrase", "size", "box", "answer", "token_ids", "milliseconds",
     "found", "calls", "drafted", "accepted"}, and "frame" where boxes depend on it
    {"key", "ratio", "picture", "phrase", "problem"}

Answers know nothing of protocols: the same file is scored by any. Every line is written at once,
so that a run may be killed at any time; a torn last line is dropped when it goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

from gap_runtime.errors import ConfigError, InputError, RecordError
from gap_runtime.evaluation.files import LINE_BYTES, unreadable
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame
from gap_runtime.records import dump_record, load_record

SCHEMA: Final = 1
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


def dump_row(row: Row) -> bytes:
    """The line of a row."""
    data = dump_record(row)
    known = _COUNTED if row.frame is None else _FRAMED
    for name in data.keys() - (_FAILED if row.problem is not None else known):
        del data[name]
    return (json.dumps(data, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _dump_header(header: Header) -> bytes:
    data = {_MARK: SCHEMA, **dump_record(header)}
    return (json.dumps(data, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_answers(path: Path) -> Answers:
    """A file of answers; a torn last line is left out.

    Raises:
        InputError: It cannot be read, or is no file of answers.
    """
    try:
        with path.open("rb") as file:
            read = _read_whole(file, path)
    except OSError as error:
        raise unreadable(path, error) from error
    if read is None:
        raise InputError(f"{path}: empty; expected a file that `evaluate --out` wrote")
    header, rows, _ = read
    return Answers(header=header, rows=tuple(rows))


def _read_whole(file: BinaryIO, path: Path) -> tuple[Header, list[Row], int] | None:
    """Header, rows and the bytes of whole lines; None where not even the first is whole."""
    rows: list[Row] = []
    header: Header | None = None
    length = 0
    seen: set[tuple[str, float]] = set()
    for number, (line, is_last) in enumerate(_split_lines(file, path), start=1):
        where = f"{path}:{number}"
        try:
            data = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if is_last:
                # A machine that lost power may leave anything in the last line.
                break
            raise InputError(f"{where}: not valid JSON; the file was changed") from error
        if header is None:
            header = _read_header(data, where)
        else:
            row = _read_row(data, where)
            if (row.key, row.ratio) in seen:
                raise InputError(
                    f"{where}: '{row.key:.60}' at ratio {row.ratio:g} comes twice; was the file "
                    "joined of two?"
                )
            seen.add((row.key, row.ratio))
            rows.append(row)
        length += len(line)
    return None if header is None else (header, rows, length)


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
    if found != SCHEMA:
        raise InputError(f"{where}: answers of version {found!r:.20}, this version reads {SCHEMA}")
    try:
        return load_record(Header, data, where)
    except RecordError as error:
        raise InputError(str(error)) from error


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
        width, height = data["size"]
        x0, y0, x1, y1 = map(float, data["box"])
        if not (x0 < x1 and y0 < y1 and width > 0 and height > 0):
            raise ValueError("its box or size spans no area")
        return Row(
            **_plain(data),
            size=(int(width), int(height)),
            box=Box(x0, y0, x1, y1),
            answer=_require_text(data["answer"]),
            token_ids=tuple(data["token_ids"]),
            milliseconds=_require_times(data["milliseconds"]),
            found=tuple(Box(a, b, c, d) for a, b, c, d in data["found"]),
            calls=int(data.get("calls", 0)),
            drafted=int(data.get("drafted", 0)),
            accepted=int(data.get("accepted", 0)),
            frame=_read_frame(data["frame"]) if "frame" in data else None,
        )
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
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
        "ratio": float(data["ratio"]),
        "picture": _require_text(data["picture"]),
        "phrase": _require_text(data["phrase"]),
    }


def _require_times(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError("expected milliseconds by stage")
    # Fails where one is no number.
    sum(value.values())
    return value


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
        if path is None:
            return
        if path.exists() and not resume:
            raise ConfigError(f"{path}: exists; go on with it by --resume, or give another --out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is with the system as soon as it is written.
            self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
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
        with path.open("rb") as file:
            read = _read_whole(file, path)
        if read is None:
            start = self._file.read(len(_START)) or b""
            if not start.startswith(_START) and not _START.startswith(start):
                raise InputError(f"{path}: no file of answers; give another --out")
            self._file.seek(0)
            self._file.truncate(0)
            self._file.write(_dump_header(header))
            return
        found, self.rows, length = read
        _require_same(found, header, path)
        self._file.truncate(length)
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
                line = dump_row(row)
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
