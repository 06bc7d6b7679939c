"""Library modules whose parameters are in memory only while they run.

For a machine with less memory than the model: every module gets its parameters from the
checkpoint's files right before it runs and loses them after it; vectors (norms, single rows) stay,
tables of embeddings are read row by row. The same modules compute the same
numbers in the same order as those of a model that was loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from gap_export.reference.lazy import LazyTensor


def read_parameter(tensor: LazyTensor, empty: nn.Parameter) -> nn.Parameter:
    """A module's parameter in place of the one without values.

    Raises:
        ValueError: The tensor has another shape.
    """
    value = tensor.read()
    if value.shape != empty.shape:
        raise ValueError(f"a tensor of shape {[*value.shape]}, expected {[*empty.shape]}")
    return nn.Parameter(value, requires_grad=False)


class Stream:
    """Gives modules their parameters when they run."""

    def __init__(self, memory: int) -> None:
        """Begin with nothing.

        Args:
            memory: Bytes of parameters that may stay in memory; the first to run do.
        """
        self._left = memory

    def keeps(self, size: int) -> bool:
        """Whether so many bytes may stay in memory, which are then counted."""
        kept = size <= self._left
        self._left -= size if kept else 0
        return kept

    def attach(self, module: nn.Module, own: Mapping[str, LazyTensor]) -> None:
        """Give a module its own parameters, by their names in it, whenever it runs."""
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
                setattr(module, key, read_parameter(tensor, empty[key]))
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


class StreamedTensors(Mapping[str, Tensor]):
    """Tensors that are read whenever they are looked up, some of them kept."""

    def __init__(self, stream: Stream, tensors: Mapping[str, LazyTensor]) -> None:
        """Take the tensors; `stream` says how many bytes of them may be kept."""
        self._stream, self._tensors = stream, tensors
        self._kept: dict[str, Tensor] = {}
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        if key in self._kept:
            return self._kept[key]
        value = self._tensors[key].read()
        if key not in self._seen and self._stream.keeps(value.numel() * value.element_size()):
            self._kept[key] = value
        self._seen.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _row_reader(table: LazyTensor) -> Callable[[Tensor], Tensor]:
    """What an embedding module does, with the rows that are asked for."""

    def look_up(index: Tensor) -> Tensor:
        rows = table.rows(index.flatten())
        return rows.reshape(*index.shape, *rows.shape[1:])

    return look_up
