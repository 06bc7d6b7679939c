"""Where the tensors of a model come from: as they lie in a file, or made of several.

A family matches the keys of its checkpoints with the names of its modules here, before any work,
so that a checkpoint that does not fit is refused at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy.typing as npt
import torch
from torch import Tensor, nn

from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.tensor import TensorLocation, cut_rows, read_tensor
from gap_export.config.records import DTYPES
from gap_export.errors import CheckpointError

Make = Callable[..., Tensor]
Shapes = dict[str, tuple[int, ...]]
Encode = Callable[[], npt.NDArray[Any]]
_PIECE_VALUES: Final = 4 * 2**20
"""Values that are made at a time: 16 MiB in float32."""
NOT_FINITE: Final = "values that are no finite numbers; give the checkpoint as it was published"
"""What a tensor holds that is refused, and what helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedValues:
    """The integers that a checkpoint holds in place of a weight [out, in].

    The weight is (value - zero) * scale; `group` inputs of an output share a zero and a scale.
    `is_symmetric` says that all zeros are the middle, 2 ** (bits - 1). `scales` lie as
    [in / group, out]; `read_values` gives uint8 [in, out], sorted by group, and `read_zeros` uint8
    [in / group, out]. `order_I` has the input of each row of values, None where they lie in order.
    """

    bits: int
    group: int
    is_symmetric: bool
    scales: TensorLocation
    order_I: Tensor | None
    read_values: Callable[[], Tensor]
    read_zeros: Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """A tensor of the model.

    `make` takes the inputs' values, which it may change, integers as they are and all else in
    float32, and gives the tensor in float32; where it is None, the tensor is the one input as it
    lies. `cut` says which inputs may be given in the same rows as those of the tensor that are
    wanted; where it is empty, the tensor is only made whole. `encode` is for tensors that are no
    floating-point numbers, of `dtype` (else the model's): it gives the bytes as they will lie in
    the file. `packed` is there where the tensor is a weight that came quantized.
    """

    shape: tuple[int, ...]
    inputs: tuple[TensorLocation, ...]
    make: Make | None = None
    cut: tuple[bool, ...] = ()
    dtype: str | None = None
    encode: Encode | None = None
    packed: PackedValues | None = None

    def rows(self, start: int, stop: int) -> TensorSource:
        """The source of some rows of the tensor."""
        inputs = tuple(
            cut_rows(each, start, stop) if cut else each
            for each, cut in zip(self.inputs, self.cut, strict=True)
        )
        return dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), inputs=inputs)


def stored(location: TensorLocation) -> TensorSource:
    """A tensor as it lies in its file."""
    return TensorSource(shape=location.shape, inputs=(location,), cut=(True,))


def make_tensor(source: TensorSource) -> Tensor:
    """A tensor's values, in the stored dtype where it is used as it lies, else in float32."""
    values = [read_tensor(location) for location in source.inputs]
    if source.make is None:
        return values[0]
    made = source.make(
        *(value.float() if value.is_floating_point() else value for value in values)
    )
    assert tuple(made.shape) == source.shape
    return made


def cut_pieces(source: TensorSource) -> Iterator[TensorSource]:
    """A tensor's rows in pieces of a size that memory hardly notices; whole where it must be."""
    if not (source.cut and source.shape):
        yield source
        return
    rows = max(1, _PIECE_VALUES // max(math.prod(source.shape[1:]), 1))
    for start in range(0, source.shape[0], rows):
        yield source.rows(start, min(start + rows, source.shape[0]))


def build_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters have shapes and no values."""
    with torch.device("meta"):
        return build()


def shapes_of(module: nn.Module) -> Shapes:
    """Shape of each parameter of a module, by name."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def linear_weights(module: nn.Module) -> list[str]:
    """Names of the weights of a module's linear layers."""
    return [
        f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)
    ]


def expected_shapes(build: Callable[[], nn.Module]) -> Shapes:
    """Names and shapes of a module's parameters, without any memory for them.

    Raises:
        CheckpointError: There is no such module; numbers of the configuration are beyond sizes
            that a tensor can have, for example.
    """
    try:
        return shapes_of(build_without_memory(build))
    except (RuntimeError, ArithmeticError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"no module can be built by the checkpoint's configuration ({reason:.200}); "
            "download it again"
        ) from error


def match_tensors(
    checkpoint: Checkpoint,
    expected: dict[str, tuple[int, ...]],
    *,
    rename: Callable[[str], str],
    ignored: Iterable[str] = (),
    optional: frozenset[str] = frozenset(),
) -> dict[str, TensorLocation]:
    """The tensors of a checkpoint by their names in the modules.

    Args:
        checkpoint: The index of tensors.
        expected: Shapes by name.
        rename: Name of a checkpoint key.
        ignored: Patterns of keys that no module has and that are no mistake.
        optional: Names that may be missing.

    Raises:
        CheckpointError: A tensor is missing, misshapen, unknown, of a dtype that cannot be used,
            or there under two keys.
    """
    skip = re.compile("|".join(ignored) or r"(?!)")
    found: dict[str, TensorLocation] = {}
    for key, tensor in checkpoint.tensors.items():
        if skip.search(key):
            continue
        name = rename(key)
        if name not in expected:
            raise CheckpointError(
                f"{tensor.shown}: tensor '{tensor.key}' is none that this model has; is it a "
                "checkpoint of the configured family?"
            )
        if name in found:
            raise CheckpointError(
                f"{checkpoint.folder}: '{found[name].key}' and '{key}' are the same tensor under "
                "two names; remove one"
            )
        if tensor.dtype not in DTYPES:
            raise _unusable(str(tensor.shown), tensor.key, tensor.dtype)
        require_shape(tensor, expected[name])
        found[name] = tensor
    for key, dtype in checkpoint.unreadable.items():
        # Also of an optional one, which something else would stand in for.
        if not skip.search(key) and rename(key) in expected:
            raise _unusable(str(checkpoint.folder), key, dtype)
    for name in expected:
        if name not in found and name not in optional:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor '{name}' is missing among "
                f"{len(checkpoint.tensors)} others; download the checkpoint again, or is it one "
                "of another family?"
            )
    return found


def require_shape(tensor: TensorLocation, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the config says.

    Raises:
        CheckpointError: It has another shape.
    """
    if tensor.shape == shape:
        return
    hint = "; it lies transposed" if tensor.shape == shape[::-1] else ""
    raise CheckpointError(
        f"{tensor.shown}: tensor '{tensor.key}' has shape {list(tensor.shape)}, expected "
        f"{list(shape)} by the config{hint}"
    )


def _unusable(where: str, key: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: tensor '{key}' is stored as {dtype}, which cannot be used; give a checkpoint "
        "in float32, float16 or bfloat16"
    )
