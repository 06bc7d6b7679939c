"""Weights in 8 or 4 bits: which ones, how their values are found, and what graphs say of them.

Weight-only and symmetric. int8 has one scale for each output channel, int4 one for every block of
up to 128 inputs of it. In the graph a weight is a standard DequantizeLinear before a MatMul, which
TensorRT builds as it is and onnxruntime fuses to one kernel; in a dialect that has that kernel,
blocks are written for it at once, so that loading rearranges nothing. Values are found tensor by
tensor, so memory does not grow with the model.

Weights that came quantized keep their integers. They may have zero points (uint4, uint8), int8 in
blocks, and inputs that are sorted by block, which a Gather puts before the product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from gap_export.checkpoint.sources import PackedValues, TensorSource, cut_pieces, make_tensor
from gap_export.errors import ExportError
from gap_export.interfaces.dialect import FUSED
from gap_export.tracing.trace import Traced
from gap_runtime.bundle.tensors import count_bytes

VALUES: Final = ".values"
SCALES: Final = ".scales"
ZEROS: Final = ".zeros"
ORDER: Final = ".order"
"""Suffixes of the tensors that stand for a weight: always the first two."""

_ROUNDED_INPUTS: Final = 4
"""MatMulNBits' accuracy level at which inputs are rounded to 8 bits, each row in blocks."""
_LIMITS: Final = {"int8": 127, "int4": 7}
_BLOCKS: Final = (128, 64, 32, 16)
_CLIPS: Final = (1.0, 0.95, 0.9, 0.85, 0.8)

Bytes = npt.NDArray[np.uint8]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one weight [out, in] is quantized; `block` inputs share a scale, None: all of them.

    Values without a sign have zero points. `is_ordered`: they lie in an order of their own.
    `is_fused`: they lie as MatMulNBits takes them, by output, where signed ones count from the
    middle.
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
            return (outputs,)
        blocks = inputs // self.block
        return (outputs, blocks) if self.is_fused else (blocks, outputs)

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
            assert self.block is not None
            lengths = (inputs // self.block, self.block * self.bits // 8)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """What activation-aware scaling does to one weight [out, in] before it is quantized.

    `columns` [in] and `rows` [out] are factors, `importance` [in] the mean square of each input,
    by which errors count.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None
    importance: Tensor | None = None


NO_SMOOTHING: Final = Smoothing()


def choose_scheme(dtype: str, shape: tuple[int, ...]) -> Scheme | None:
    """The scheme of a weight of that shape; None where it has to stay as it is.

    The largest block that divides the inputs, and inputs in sixteens: what kernels take.
    """
    if len(shape) != 2 or shape[1] % _BLOCKS[-1]:
        return None
    if dtype == "int8":
        return Scheme(dtype=dtype, block=None)
    return Scheme(dtype=dtype, block=next(size for size in _BLOCKS if shape[1] % size == 0))


def packed_scheme(packed: PackedValues, inputs: int) -> Scheme:
    """The scheme of a weight that came quantized.

    Groups that are larger than kernels take become several blocks with the same scale.
    """
    is_whole = packed.bits == 8 and packed.group == inputs
    return Scheme(
        dtype=f"{'int' if packed.is_symmetric else 'uint'}{packed.bits}",
        block=None if is_whole else next(size for size in _BLOCKS if packed.group % size == 0),
        is_ordered=packed.order_I is not None,
    )


def quantize_graph(
    traced: Traced, choose: Callable[[str, tuple[int, ...]], Scheme | None]
) -> tuple[Traced, dict[str, Scheme]]:
    """Put quantized weights in place of those of linear layers.

    Args:
        traced: A graph, which is changed; its linear layers are Gemm with weights [out, in].
        choose: The scheme of a parameter, None to leave it.

    Returns:
        The graph with its new parameters, and the scheme of each old one by name.
    """
    graph = traced.model.graph
    schemes: dict[str, Scheme] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        if weight is None or weight.name not in traced.parameters:
            continue
        name = weight.name
        shape = _static_shape(weight)
        scheme = choose(name, shape)
        if scheme is None:
            continue
        assert node.attributes.get_int("transB", 0) == 1
        schemes[name] = scheme
        _replace_gemm(graph, node, weight, scheme)
    new = set()
    for name, scheme in schemes.items():
        weight = graph.initializers.pop(name)
        new |= {name + suffix for suffix in scheme.tensors(_static_shape(weight), "")}
    graph.sort()
    parameters = (traced.parameters - set(schemes)) | new
    return dataclasses.replace(traced, parameters=frozenset(parameters)), schemes


def _static_shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]


def _dequantize(
    before: ir.Node, weight: ir.Value, scheme: Scheme, found: dict[str, ir.Value]
) -> ir.Node:
    """The node that gives a weight [in, out] from what stands for it."""
    outputs, inputs = _static_shape(weight)
    attributes = {"axis": 1} if scheme.block is None else {"axis": 0, "block_size": scheme.block}
    node = ir.node(
        "DequantizeLinear", list(found.values()), attributes, name=f"{before.name}/weight"
    )
    result = node.outputs[0]
    result.name = f"{before.outputs[0].name}.weight"
    result.shape, result.type = ir.Shape((inputs, outputs)), found[SCALES].type
    return node


def _declare(graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    """An initializer without a value, once for all who use it."""
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )
    return graph.initializers[name]


def _replace_gemm(graph: ir.Graph, gemm: ir.Node, weight: ir.Value, scheme: Scheme) -> None:
    """A product and a sum instead of a Gemm, of inputs in the weight's own order."""
    x, old = gemm.inputs[0], gemm.outputs[0]
    assert x is not None
    assert weight.dtype is not None
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    tensors = scheme.tensors(_static_shape(weight), weight.dtype.name)
    found = {
        suffix: _declare(graph, f"{weight.name}{suffix}", shape, ir.DataType[dtype.upper()])
        for suffix, (dtype, shape) in tensors.items()
    }
    order = found.pop(ORDER, None)
    nodes = []
    if order is not None:
        gather = ir.node("Gather", [x, order], {"axis": 1}, name=f"{gemm.name}/order")
        gather.outputs[0].name = f"{old.name}.ordered"
        gather.outputs[0].shape, gather.outputs[0].type = x.shape, x.type
        nodes, x = [gather], gather.outputs[0]
    if scheme.is_fused:
        product = _fuse(gemm, x, weight, scheme, found)
    else:
        # One for each use: kernels fuse it with the product, and TensorRT dies of a shared one.
        nodes.append(_dequantize(gemm, weight, scheme, found))
        product = ir.node("MatMul", [x, nodes[-1].outputs[0]], name=gemm.name)
    nodes.append(product)
    result = product.outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    if bias is not None:
        result.name = f"{old.name}.product"
        added = ir.node("Add", [result, bias], name=f"{gemm.name}/bias")
        added.outputs[0].name, added.outputs[0].shape = old.name, old.shape
        added.outputs[0].type = old.type
        nodes.append(added)
    ir.convenience.replace_nodes_and_values(
        graph, gemm, [gemm], nodes, [old], [nodes[-1].outputs[0]]
    )


def _fuse(
    gemm: ir.Node, x: ir.Value, weight: ir.Value, scheme: Scheme, found: dict[str, ir.Value]
) -> ir.Node:
    """The product with what stands for a weight, in one node."""
    outputs, inputs = _static_shape(weight)
    domain, _, op_type = FUSED.rpartition(".")
    assert gemm.graph is not None
    gemm.graph.opset_imports.setdefault(domain, 1)
    return ir.node(
        op_type,
        [x, *found.values()],
        {
            "K": inputs,
            "N": outputs,
            "bits": scheme.bits,
            "block_size": scheme.block,
            "accuracy_level": _ROUNDED_INPUTS,
        },
        domain=domain,
        name=gemm.name,
    )


def quantize_sources(
    sources: Mapping[str, TensorSource],
    schemes: Mapping[str, Scheme],
    smoothings: Mapping[str, Smoothing],
    *,
    dtype: str,
) -> dict[str, TensorSource]:
    """Where the values and scales of quantized weights come from, by name.

    Args:
        sources: Of the weights as they are.
        schemes: Of those that are quantized.
        smoothings: What is done to them before.
        dtype: Of the scales.
    """
    made: dict[str, TensorSource] = {}
    for name, scheme in schemes.items():
        source = sources[name]
        if source.packed is not None:
            made |= _packed_sources(name, source, source.packed, scheme)
            continue
        pair = _Pair(name, source, scheme, smoothings.get(name, NO_SMOOTHING), dtype)
        tensors = scheme.tensors(source.shape, dtype)
        made[name + VALUES] = TensorSource(
            shape=tensors[VALUES][1],
            inputs=source.inputs,
            dtype=tensors[VALUES][0],
            encode=pair.take_values,
        )
        made[name + SCALES] = TensorSource(
            shape=tensors[SCALES][1], inputs=source.inputs, encode=pair.take_scales
        )
    return made


def _packed_sources(
    name: str, source: TensorSource, packed: PackedValues, scheme: Scheme
) -> dict[str, TensorSource]:
    """Where the integers of a weight that came quantized come from: its checkpoint's own."""
    outputs, inputs = source.shape
    shape = scheme.scales_shape(outputs, inputs)
    repeats = packed.group // (scheme.block or inputs)
    middle = np.uint8(2 ** (packed.bits - 1))

    def values() -> Bytes:
        found = packed.read_values().numpy()
        if scheme.is_fused:
            return _pack(found.T, scheme.dtype)
        # What is less than nothing wraps around, as signed values do.
        return _pack(found if scheme.has_zeros else found - middle, scheme.dtype)

    def zeros() -> Bytes:
        found = packed.read_zeros().repeat_interleave(repeats, 0).numpy()
        if scheme.is_fused:
            # Every output begins with a byte of its own.
            found = np.pad(found.T, ((0, 0), (0, found.shape[0] % (8 // scheme.bits))))
        return _pack(found, scheme.dtype)

    def order() -> Bytes:
        assert packed.order_I is not None
        return packed.order_I.int().view(torch.uint8).numpy()

    encodes = {VALUES: values, ZEROS: zeros, ORDER: order}
    made = {
        name + suffix: TensorSource(
            shape=size, inputs=source.inputs, dtype=dtype, encode=encodes[suffix]
        )
        for suffix, (dtype, size) in scheme.tensors(source.shape, "").items()
        if suffix != SCALES
    }
    made[name + SCALES] = TensorSource(
        shape=shape,
        inputs=(packed.scales,),
        make=lambda scales: _arrange_scales(scales.repeat_interleave(repeats, 0), shape, scheme),
    )
    return made


def _arrange_scales(scales: Tensor, shape: Shape, scheme: Scheme) -> Tensor:
    """Scales [blocks, out] in the shape in which they are stored."""
    if not scheme.is_fused:
        return scales.reshape(shape)
    # A copy in any case: one block leaves a stride that cannot be viewed as bytes.
    return scales.T.clone(memory_format=torch.contiguous_format)


class _Pair:
    """Values and scales of a weight, found together and each taken once."""

    def __init__(
        self, name: str, source: TensorSource, scheme: Scheme, smoothing: Smoothing, dtype: str
    ) -> None:
        self._arguments = (name, source, scheme, smoothing, dtype)
        self._found: dict[str, Bytes] = {}

    def take_values(self) -> Bytes:
        return self._take(VALUES)

    def take_scales(self) -> Bytes:
        return self._take(SCALES)

    def _take(self, which: str) -> Bytes:
        if which not in self._found:
            self._found[VALUES], self._found[SCALES] = _quantize(*self._arguments)
        return self._found.pop(which)


def _quantize(
    name: str, source: TensorSource, scheme: Scheme, smoothing: Smoothing, dtype: str
) -> tuple[Bytes, Bytes]:
    """Bytes of the values and of the scales of a weight, found a few rows at a time."""
    outputs, inputs = source.shape
    block = scheme.block or inputs
    # As they are stored, or turned.
    values = np.empty((outputs, inputs) if scheme.is_fused else (inputs, outputs), np.int8)
    scales = torch.empty(
        (outputs, inputs // block) if scheme.is_fused else (inputs // block, outputs),
        dtype=getattr(torch, dtype),
    )
    scales_OB = scales if scheme.is_fused else scales.T
    start = 0
    for piece in cut_pieces(source):
        rows = slice(start, start + piece.shape[0])
        weight = make_tensor(piece).float()
        if smoothing.columns is not None:
            weight = weight * smoothing.columns
        if smoothing.rows is not None:
            weight = weight * smoothing.rows[rows, None]
        found, scale = round_weight(weight, scheme, dtype, smoothing)
        # The largest of a block, and so its scale, is no number where any of its values is.
        if not bool(torch.isfinite(scale).all()):
            raise ExportError(
                f"{source.inputs[0].file.name}: tensor '{name}' holds values that are no finite "
                "numbers; give the checkpoint as it was published"
            )
        whole = found.to(torch.int8)
        if scheme.is_fused:
            values[rows] = whole.numpy() + np.int8(2 ** (scheme.bits - 1))
        else:
            # Turned before it is put in place: strided writes would take most of the time.
            values[:, rows] = whole.T.contiguous().numpy()
        scales_OB[rows] = scale.to(scales.dtype)
        start = rows.stop
    return _pack(values, scheme.dtype), scales.view(torch.uint8).numpy().reshape(-1)


def round_weight(
    weight: Tensor, scheme: Scheme, dtype: str, smoothing: Smoothing = NO_SMOOTHING
) -> tuple[Tensor, Tensor]:
    """The nearest values [rows, in] of a weight float32 [rows, in], and scales [rows, in / block].

    Where it is known how much inputs count, the scale of each block is the one of a few that
    loses least.
    """
    rows, inputs = weight.shape
    blocks = weight.reshape(rows, -1, scheme.block or inputs)
    # The scale that will be stored, so that rounding it is part of the error that is seen.
    tiny = torch.finfo(getattr(torch, dtype)).tiny
    largest = blocks.abs().amax(dim=-1, keepdim=True) / scheme.limit

    def stored(scale: Tensor) -> Tensor:
        return scale.to(getattr(torch, dtype)).float().clamp_min(tiny)

    def nearest(scale: Tensor) -> Tensor:
        return (blocks / scale).round_().clamp_(-scheme.limit, scheme.limit)

    scale = stored(largest)
    values = nearest(scale)
    if smoothing.importance is not None:
        counts = smoothing.importance
        if smoothing.columns is not None:
            counts = counts / smoothing.columns.square()
        counts = counts.reshape(1, -1, blocks.shape[-1])
        least = ((values * scale - blocks).square() * counts).sum(dim=-1, keepdim=True)
        for clip in _CLIPS[1:]:
            other = stored(largest * clip)
            tried = nearest(other)
            loss = ((tried * other - blocks).square() * counts).sum(dim=-1, keepdim=True)
            better = loss < least
            least = torch.where(better, loss, least)
            scale = torch.where(better, other, scale)
            values = torch.where(better, tried, values)
    return values.reshape(rows, inputs), scale[..., 0]


def _pack(values: npt.NDArray[np.int8] | Bytes, dtype: str) -> Bytes:
    """Values as they lie in a file: 4-bit ones two in a byte, the first in the lower half."""
    flat = np.frombuffer(values.tobytes(), np.uint8)
    if dtype.endswith("8"):
        return flat
    # There are even many: inputs come in sixteens, packed outputs in eights.
    return ((flat[0::2] & 0xF) | (flat[1::2] << 4)).astype(np.uint8)
