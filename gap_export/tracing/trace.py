"""Torch modules to ONNX graphs without any weights: the one room that knows torch.onnx.

Modules are built under fake tensors, so neither memory nor time depends on the size of the
weights. Initializers come out as names and shapes; gap_export.weights.bind binds them to files.
"""

from __future__ import annotations

import ast
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.values import Opset
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gap_export.errors import ExportError
from gap_export.interfaces.dialect import Dialect, multiply_patches
from gap_export.tracing.choices import (
    choose_determinantal_whole,
    choose_farthest_whole,
    write_out,
)
from gap_export.tracing.converter import quick_conversion
from gap_export.tracing.graph import Traced, named_values
from gap_export.tracing.tidy import quiet, tidy
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.errors import GapError

_BFLOAT16_CONV: Final = 22
"""The first opset whose `Conv` takes bfloat16."""
_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_NO_SCOPE: Final = "_empty_nn_module_stack"
"""Begins what torch calls the module of nodes that are of none."""


def trace(
    build: Callable[[], nn.Module],
    *,
    dtype: str,
    dialect: Dialect,
    opset: int,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    finish: Callable[[nn.Module], None] | None = None,
    nested: int | None = None,
    before: Callable[[nn.Module, Sequence[Any]], None] | None = None,
) -> Traced:
    """Trace a module.

    Args:
        build: Makes the module; runs where parameters have no memory.
        dtype: Of the module's parameters.
        dialect: What the graph is written in.
        opset: One of the dialect's.
        inputs: Inputs by position; a named dimension stays free.
        outputs: Outputs by position, with the dtypes and shapes that the graph must have.
        finish: Gives values to buffers; runs where memory is real.
        nested: How many of the last inputs the module takes as one list (None: no list).
        before: Takes the module and its arguments before it is traced, and may change it.

    Raises:
        ExportError: torch.onnx could not trace it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _default_dtype(getattr(torch, dtype)):
        module = build().eval()
    with mode:
        examples = [_example(spec) for spec in inputs]
    if finish is not None:
        finish(module)
    arguments: tuple[Any, ...] = tuple(examples)
    free: tuple[Any, ...] = tuple(_free_dimensions(spec) for spec in inputs)
    if nested is not None:
        alone = len(examples) - nested
        arguments = (*examples[:alone], list(examples[alone:]))
        free = (*free[:alone], list(free[alone:]))
    if before is not None:
        with mode:
            before(module, arguments)
    try:
        with mode, quiet(), quick_conversion():
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=free,
                custom_translation_table=_translations(dialect, opset, dtype),
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, GapError):
                # Our own refusal within the module says more.
                raise cause from error
            cause = cause.__cause__
        said = error.__cause__ or error
        reason = (str(said).splitlines() or [type(said).__name__])[0]
        raise ExportError(f"torch.onnx could not trace the graph: {reason}") from error
    assert program is not None
    model = program.model
    parameters = frozenset(name for name, _ in module.named_parameters())
    _name_parameters(model.graph, module)
    traced = tidy(
        Traced(model=model, inputs=tuple(inputs), outputs=tuple(outputs), parameters=parameters)
    )
    write_out(model)
    _name_nodes(model.graph)
    common.ClearMetadataAndDocStringPass()(model)
    _set_interface(model.graph, inputs, outputs)
    return traced


def _name_parameters(graph: ir.Graph, module: nn.Module) -> None:
    """Give each parameter one initializer, under the first of its names and without a value.

    Without one nothing takes it for a constant before it is bound. A parameter that is registered
    twice may come out under any of its names, or under several.
    """
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        own = first.setdefault(id(parameter), name)
        value = graph.initializers.get(name)
        if value is None:
            continue
        value.const_value = None
        if name == own:
            continue
        del graph.initializers[name]
        if own in graph.initializers:
            ir.convenience.replace_all_uses_with(value, graph.initializers[own])
        else:
            value.name = own
            graph.initializers[own] = value


def _translations(dialect: Dialect, opset: int, dtype: str) -> dict[Any, Any]:
    """Torch operators that are written otherwise than the converter would."""
    op: Any = Opset("", opset)

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        return linear_as_gemm(op, x, weight, bias)

    def subtract_from(x: Any, scalar: float, alpha: float = 1) -> Any:
        assert alpha == 1, alpha
        return op.Sub(op.Constant(value=ir.tensor(scalar, dtype=x.dtype)), x)

    table: dict[Any, Any] = {
        torch.ops.aten.linear.default: linear,
        torch.ops.aten.rsub.Scalar: subtract_from,
        torch.ops.gap.choose_determinantal.default: choose_determinantal_whole,
        torch.ops.gap.choose_farthest.default: choose_farthest_whole,
    }
    embed = dialect.translate_convolution
    if embed is None and dtype == "bfloat16" and opset < _BFLOAT16_CONV:
        embed = multiply_patches
    if embed is not None:

        def convolve(
            x: Any,
            weight: Any,
            bias: Any = None,
            stride: Sequence[int] = (1, 1),
            padding: Sequence[int] | str = (0, 0),
            dilation: Sequence[int] = (1, 1),
            groups: int = 1,
        ) -> Any:
            # Every convolution of ours cuts a picture into patches.
            assert tuple(stride) == tuple(weight.shape[2:]), (stride, weight.shape)
            assert padding == "valid" or not any(map(int, padding)), padding
            assert {*map(int, dilation), groups} == {1}, (dilation, groups)
            return embed(op, x, weight, bias)

        conv2d = torch.ops.aten.conv2d
        table |= dict.fromkeys((conv2d.default, conv2d.padding), convolve)
    translate = dialect.translate_attention
    if translate is None:
        return table

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - the operator's own arguments
        scale: Any = None,
    ) -> Any:
        assert (dropout_p, is_causal) == (0.0, False)
        return translate(op, query, key, value, attn_mask, scale or query.shape[-1] ** -0.5)

    return table | {torch.ops.aten.scaled_dot_product_attention.default: attention}


def linear_as_gemm(op: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """aten.linear as Gemm(transB=1), which takes weights [out, in] as checkpoints hold them.

    MatMul would need a Transpose, which runtimes fold into a second copy of the weight.
    """
    width, rank = weight.shape[1], len(x.shape)
    if rank == 2:
        return op.Gemm(x, weight, bias, transB=1)
    assert rank == 3, x.shape
    # ONNX shape inference loses a free dimension here; beside a batch of one it stays known.
    sizes = [size for size in x.shape[:-1] if size != 1] or [1]
    assert len(sizes) == 1 or all(isinstance(size, int) for size in sizes), x.shape
    count = sizes[0] if len(sizes) == 1 else sizes[0] * sizes[1]
    rows = op.Reshape(x, op.Constant(value_ints=[-1, width]))
    product = op.Gemm(rows, weight, bias, transB=1)
    rows.shape = ir.Shape([count, width])
    product.shape = ir.Shape([count, weight.shape[0]])
    rows.dtype = product.dtype = x.dtype
    leading = [size if isinstance(size, int) else -1 for size in x.shape[:-1]]
    return op.Reshape(product, op.Constant(value_ints=[*leading, weight.shape[0]]))


def _set_interface(
    graph: ir.Graph, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """Give the free dimensions their names everywhere; torch numbers them."""
    names: dict[str, str] = {}
    for value, spec in zip(graph.inputs, inputs, strict=True):
        assert value.shape is not None
        for size, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names[str(size.value)] = str(wanted)
    for value in named_values(graph):
        if value.shape is not None:
            value.shape = ir.Shape(names.get(str(size), size) for size in value.shape)
    for value, spec in zip(graph.outputs, outputs, strict=True):
        value.shape = ir.Shape(spec.shape)


def _name_nodes(graph: ir.Graph) -> None:
    """Name nodes after the module that they come from, for those who read a parser's errors.

    A node that the optimizer made is of no module; it gets the one that reads it.
    """
    scopes: dict[ir.Node, str] = {}
    for node in reversed(graph):
        kept = node.metadata_props.get(_SCOPES)
        readers = (use.node for value in node.outputs for use in value.uses())
        scopes[node] = (
            next((scopes[reader] for reader in readers), "")
            if kept is None
            else next(iter(ast.literal_eval(kept)[-2:-1]), "")
        )
    counts: Counter[str] = Counter()
    for node in graph:
        scope = scopes[node]
        name = node.op_type if scope.startswith(_NO_SCOPE) else f"{scope}/{node.op_type}"
        name = name.lstrip("/")
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


def _example(spec: TensorSpec) -> Tensor:
    """An input without values; a free dimension gets any size above 1."""
    shape = [size if isinstance(size, int) else 7 for size in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _free_dimensions(spec: TensorSpec) -> dict[int, Any] | None:
    named = {k: size for k, size in enumerate(spec.shape) if isinstance(size, str)}
    return {k: torch.export.Dim(size, min=1, max=2**20) for k, size in named.items()} or None


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters get this dtype; converting them afterwards fails without memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
