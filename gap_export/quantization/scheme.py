"""Which scheme a weight is stored in: how many bits, and what else stands for it in the graph.

Weight-only and symmetric. int8 has one scale for each output channel, int4 one for every block of
up to 128 inputs of it, or of fewer where a target says so; a vision tower is int8 beside both.
Weights that came quantized keep their integers: they may have zero points (uint4, uint8), int8 in
blocks, and inputs that are sorted by block, which a Gather puts before the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from gap_export.checkpoint.sources import PackedValues, TensorSource
from gap_runtime.bundle.manifest import Quantization
from gap_runtime.bundle.tensors import count_bytes

VALUES: Final = ".values"
SCALES: Final = ".scales"
ZEROS: Final = ".zeros"
ORDER: Final = ".order"
"""Suffixes of the tensors that stand for a weight: always the first two."""

_LIMITS: Final = {"int8": 127, "int4": 7}
_BLOCKS: Final = (128, 64, 32, 16)
WHOLE_BLOCK: Final = 32
"""Inputs of a kernel's block where all share a scale, as onnxruntime would cut them itself."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one weight [out, in] is quantized; `block` inputs share a scale, None: all of them.

    Values without a sign have zero points. `is_ordered`: they lie in an order of their own.
    `is_fused`: they lie as MatMulNBits takes them, by output, where signed ones count from the
    middle. The kernel wants blocks in any case: one scale of all inputs is then that of each.
    """

    dtype: str
    block: int | None
    is_ordered: bool = False
    is_fused: bool = False

    @property
    def bits(self) -> int:
        """Of a value."""
        return count_bytes((8,), self.dtype)

    @property
    def limit(self) -> int:
        """The largest value."""
        return _LIMITS[self.dtype]

    def scales_shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """Shape of the scales, and of the zero points."""
        if self.block is None:
            return (outputs, 1) if self.is_fused else (outputs,)
        blocks = inputs // self.block
        return (outputs, blocks) if self.is_fused else (blocks, outputs)

    @property
    def kernel_block(self) -> int:
        """Inputs of a block of values that are fused."""
        return self.block or WHOLE_BLOCK

    @property
    def needs_blocks(self) -> bool:
        """Whether only later opsets can say it: 4 bits, or blocks of inputs."""
        return self.block is not None or self.dtype.endswith("4")

    @property
    def has_zeros(self) -> bool:
        """Whether there are zero points."""
        return self.dtype.startswith("u")

    def tensors(self, shape: Shape, dtype: str) -> dict[str, tuple[str, Shape]]:
        """Dtype and shape of what stands for a weight, by suffix; `dtype` is that of scales."""
        outputs, inputs = shape
        scales = self.scales_shape(outputs, inputs)
        found = {VALUES: (self.dtype, (inputs, outputs)), SCALES: (dtype, scales)}
        if self.is_fused:
            lengths = (inputs // self.kernel_block, self.kernel_block * self.bits // 8)
            found[VALUES] = ("uint8", (outputs, *lengths))
        if self.has_zeros:
            found[ZEROS] = (self.dtype, scales)
        if self.has_zeros and self.is_fused:
            found[ZEROS] = ("uint8", (outputs, -(-scales[1] * self.bits // 8)))
        if self.is_ordered:
            # Four bytes, which is what all tensors of the file are aligned to.
            found[ORDER] = ("int32", (inputs,))
        return found

    def count_bytes(self, shape: Shape, dtype: str) -> int:
        """Size of all that stands for a weight; `dtype` is that of scales."""
        return sum(count_bytes(size, kind) for kind, size in self.tensors(shape, dtype).values())


def choose_schemes(
    linear: Mapping[str, str],
    sources: Mapping[str, TensorSource],
    quantization: Quantization | None,
    *,
    fuses: bool,
    fuses_whole: bool,
    block: int,
) -> dict[str, Scheme]:
    """The scheme of every weight that is quantized, by canonical name: the one table of them.

    Args:
        linear: Weights of linear layers, each with the part of the model that it is of.
        sources: Where they come from.
        quantization: What is wanted.
        fuses: Whether the graphs are written with onnxruntime's own product.
        fuses_whole: Whether they are where all inputs share a scale, too.
        block: The largest number of inputs that may share a scale.
    """
    if quantization is None:
        return {}
    schemes = {}
    for name, part in linear.items():
        source = sources[name]
        if source.packed is not None:
            scheme: Scheme | None = packed_scheme(source.packed, source.shape[1], block)
        elif quantization.method == "checkpoint" or part not in quantization.parts:
            scheme = None
        else:
            # A tower in 4 bits gives scores by which other tokens are kept.
            weights = "int8" if part == "vision" else quantization.weights
            scheme = choose_scheme(weights, source.shape, block)
        if scheme is not None:
            fused = fuses
            if scheme.block is None:
                whole = source.shape[1] % WHOLE_BLOCK == 0 and not scheme.has_zeros
                fused = fuses_whole and whole
            schemes[name] = replace(scheme, is_fused=fused)
    return schemes


def choose_scheme(dtype: str, shape: tuple[int, ...], block: int = 128) -> Scheme | None:
    """The scheme of a weight of that shape; None where it has to stay as it is.

    The largest block, up to a given one, that divides the inputs, and inputs in sixteens: what
    kernels take.
    """
    if len(shape) != 2 or shape[1] % _BLOCKS[-1]:
        return None
    if dtype == "int8":
        return Scheme(dtype=dtype, block=None)
    return Scheme(dtype=dtype, block=_largest_block(shape[1], block))


def _largest_block(inputs: int, most: int) -> int:
    """The largest block of up to so many inputs; the least one divides all that are quantized.

    Kernels that are made for small blocks take two of them at a time.
    """
    step = 1 if most == _BLOCKS[0] else 2
    fitting = (size for size in _BLOCKS if size <= most and inputs % (step * size) == 0)
    return next(fitting, _BLOCKS[-1])


def packed_scheme(packed: PackedValues, inputs: int, block: int = 128) -> Scheme:
    """The scheme of a weight that came quantized.

    Groups that are larger than kernels take become several blocks with the same scale.
    """
    is_whole = packed.bits == 8 and packed.group == inputs
    return Scheme(
        dtype=f"{'int' if packed.is_symmetric else 'uint'}{packed.bits}",
        block=None if is_whole else _largest_block(packed.group, block),
        is_ordered=packed.order_I is not None,
    )
