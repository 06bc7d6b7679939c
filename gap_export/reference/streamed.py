"""Library modules whose parameters are in memory only while they run.

For a machine with less memory than the model: every module gets its parameters from the
checkpoint's files right before it runs and loses them after it; vectors (norms, single rows) stay,
tables of embeddings are read row by row. The same modules compute the same
numbers in the same order as those of a model that was loaded whole.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from gap_export.checkpoint.index import Checkpoint, TensorLocation, cut_rows, read_tensor
from gap_export.reference.files import PACKED, dequantize, read_quantization

_PIECE_VALUES: Final = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor of the model, made when it is asked for.

    `length` is its number of rows. `read` gives it whole, `rows` gives those of an index [S]; both
    in the model's dtype.
    """

    length: int
    read: Callable[[], Tensor]
    rows: Callable[[Tensor], Tensor]


def open_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """What `files.load_tensors` gives, by the same keys, without reading it."""
    found = checkpoint.tensors
    quantization = read_quantization(checkpoint)
    tensors = {}
    for key in sorted(found):
        layer, _, part = key.rpartition(".")
        if f"{layer}.qweight" not in found or not quantization:
            tensors[key] = _stored(found[key], dtype)
        elif part == "qweight":
            packed = {each: found.get(f"{layer}.{each}") for each in PACKED}
            tensors[f"{layer}.weight"] = _packed(packed, quantization, dtype)
        elif part not in PACKED and bool(read_tensor(found[key]).any()):
            tensors[key] = _stored(found[key], dtype)
    return tensors


def sum_tensors(first: LazyTensor, second: LazyTensor) -> LazyTensor:
    """`first` with `second`, which may have fewer rows, added to its first rows."""

    def read() -> Tensor:
        made, more = first.read(), second.read()
        made[: len(more)] += more
        return made

    def rows(index_S: Tensor) -> Tensor:
        made, both = first.rows(index_S), index_S < second.length
        made[both] += second.rows(index_S[both])
        return made

    return LazyTensor(length=first.length, read=read, rows=rows)


def change_tensor(tensor: LazyTensor, change: Callable[[Tensor], Tensor]) -> LazyTensor:
    """A tensor that something is done to as a whole."""
    return LazyTensor(
        length=tensor.length,
        read=lambda: change(tensor.read()),
        rows=lambda index: change(tensor.read())[index],
    )


class Stream:
    """Gives modules their parameters when they run.

    Attributes:
        reads: How often parameters were read, for tests and progress.
    """

    def __init__(self, memory: int) -> None:
        """Begin with nothing.

        Args:
            memory: Bytes of parameters that may stay in memory; the first to run do.
        """
        self._left = memory
        self.reads = 0

    def build(
        self, kind: Any, config: Any, tensors: Mapping[str, LazyTensor], dtype: torch.dtype
    ) -> Any:
        """A library's model that reads its parameters.

        Args:
            kind: The model's class.
            config: The library's.
            tensors: By the names of the model's parameters; others are ignored.
            dtype: Of the parameters.

        Raises:
            ValueError: A parameter has no tensor.
        """
        with _without_values():
            # The library's own way to a model without weights; it changes the config.
            model = kind._from_config(  # noqa: SLF001
                copy.deepcopy(config), attn_implementation="eager", dtype=dtype
            )
        model.requires_grad_(requires_grad=False)
        sources = _match(model, tensors)
        for name, module in list(model.named_modules()):
            own = {
                key: sources[f"{name}.{key}" if name else key]
                for key, parameter in module._parameters.items()  # noqa: SLF001
                if parameter is not None
            }
            if own:
                self._attach(module, own)
        return model.eval()

    def map(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, Tensor]:
        """Tensors by key that are read whenever they are looked up."""
        return _Reading(self, tensors)

    def keeps(self, size: int) -> bool:
        """Whether so many bytes may stay in memory, which are then counted."""
        kept = size <= self._left
        self._left -= size if kept else 0
        return kept

    def _attach(self, module: nn.Module, own: dict[str, LazyTensor]) -> None:
        if isinstance(module, nn.Embedding):
            # Never whole: a prompt needs some rows.
            table = own["weight"]
            module.forward = _row_reader(table)  # type: ignore[assignment,method-assign]
            return
        empty = {key: getattr(module, key) for key in own}
        size = sum(each.numel() * each.element_size() for each in empty.values())
        kept: list[bool] = []

        def fill(*_: object) -> None:
            if kept == [True]:
                return
            for key, tensor in own.items():
                self.reads += 1
                value = tensor.read()
                assert value.shape == empty[key].shape
                setattr(module, key, nn.Parameter(value, requires_grad=False))
            if not kept:
                kept.append(self.keeps(size))

        def drop(*_: object) -> None:
            if kept != [True]:
                for key, parameter in empty.items():
                    setattr(module, key, parameter)

        if all(each.ndim < 2 for each in empty.values()):
            # Vectors take no room, and some are asked for without running the module.
            kept.append(False)
            fill()
            return
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop)


class _Reading(Mapping[str, Tensor]):
    """Tensors that are read when they are looked up, some of them kept."""

    def __init__(self, stream: Stream, tensors: Mapping[str, LazyTensor]) -> None:
        self._stream, self._tensors = stream, tensors
        self._kept: dict[str, Tensor] = {}
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        if key in self._kept:
            return self._kept[key]
        self._stream.reads += 1
        value = self._tensors[key].read()
        if key not in self._seen and self._stream.keeps(value.numel() * value.element_size()):
            self._kept[key] = value
        self._seen.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _stored(location: TensorLocation, dtype: torch.dtype) -> LazyTensor:
    """A tensor as it lies in its file; converted in pieces, so that it is not there twice."""

    def read() -> Tensor:
        if not location.shape:
            return read_tensor(location).to(dtype)
        made = torch.empty(location.shape, dtype=dtype)
        step = max(1, _PIECE_VALUES // max(math.prod(location.shape[1:]), 1))
        for start in range(0, location.shape[0], step):
            piece = read_tensor(cut_rows(location, start, start + step))
            made[start : start + step] = piece
        return made

    def rows(index_S: Tensor) -> Tensor:
        found = [read_tensor(cut_rows(location, k, k + 1)) for k in index_S.tolist()]
        empty = torch.empty(0, *location.shape[1:], dtype=dtype)
        return torch.cat([empty, *(each.to(dtype) for each in found)])

    return LazyTensor(length=location.shape[0] if location.shape else 0, read=read, rows=rows)


def _packed(
    packed: Mapping[str, TensorLocation | None], quantization: dict[str, Any], dtype: torch.dtype
) -> LazyTensor:
    """The weight of a quantized layer."""

    def read() -> Tensor:
        values = {
            part: None if location is None else read_tensor(location)
            for part, location in packed.items()
        }
        return dequantize(values, quantization).to(dtype)

    scales = packed["scales"]
    assert scales is not None
    return LazyTensor(length=scales.shape[1], read=read, rows=lambda index: read()[index])


def _row_reader(table: LazyTensor) -> Callable[[Tensor], Tensor]:
    """What an embedding module does, with the rows that are asked for."""

    def look_up(index: Tensor) -> Tensor:
        rows = table.rows(index.flatten())
        return rows.reshape(*index.shape, *rows.shape[1:])

    return look_up


def _match(model: nn.Module, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensor of every parameter; those that are tied have that of the first name."""
    first: dict[int, LazyTensor] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = first.get(id(parameter)) or tensors.get(name)
        if tensor is None:
            raise ValueError(f"tensor '{name}' is missing")
        found[name] = first.setdefault(id(parameter), tensor)
    return found


@contextmanager
def _without_values() -> Iterator[None]:
    """Modules that are made here have parameters without memory, but all of their buffers."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
