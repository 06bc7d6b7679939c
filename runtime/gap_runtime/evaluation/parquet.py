"""Tables in parquet files, a group of rows at a time. Needs pyarrow, which is an extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from gap_runtime.errors import ConfigError, InputError

_BROKEN: Final = (OSError, ValueError, TypeError, KeyError, NotImplementedError, MemoryError)
"""What pyarrow raises on files that are damaged; its own errors are of these classes."""


def read_columns(path: Path) -> list[str]:
    """Names of the columns of a parquet file.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: The file cannot be read.
    """
    with _open(path) as file:
        names: list[str] = file.schema_arrow.names
        return names


def require_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse a file that lacks a column.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: It does, or cannot be read.
    """
    names = read_columns(path)
    lacking = [name for name in columns if name not in names]
    if lacking:
        raise InputError(f"{path}: no column '{lacking[0]}'; have {', '.join(names):.300}")


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Group, place in the group and values of every row.

    Args:
        path: The file.
        columns: Those that are read; all have to be there.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: The file cannot be read, or lacks a column.
    """
    require_columns(path, columns)
    with _open(path) as file:
        for group in range(file.num_row_groups):
            for row, record in enumerate(_read_group(file, path, group, columns)):
                yield group, row, record


def read_group(path: Path, group: int, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one group.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: The file cannot be read.
    """
    with _open(path) as file:
        return _read_group(file, path, group, columns)


def _read_group(file: Any, path: Path, group: int, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = file.read_row_group(group, columns=list(columns)).to_pylist()
    except _BROKEN as error:
        raise InputError(f"{path}: broken ({_shorten(error)})") from error
    return rows


def _open(path: Path) -> Any:
    parquet = _import_parquet()
    try:
        return parquet.ParquetFile(path)
    except _BROKEN as error:
        raise InputError(f"{path}: cannot be read as parquet ({_shorten(error)})") from error


def _shorten(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.100}"


def _import_parquet() -> ModuleType:
    try:
        from pyarrow import parquet  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            "parquet files need pyarrow: pip install 'gap-runtime[evaluate]'"
        ) from error
    module: ModuleType = parquet
    return module
