"""torch.onnx without what it does again and again: its table of operators, a capture, signatures.

The converter captures a module, captures the result a second time to write operators that it has
no translation for in others, looks all translations up anew, and reads the signature of an ONNX
operator for every node. The graphs here need none of it: each operator is either translated as it
is or is one of a few that are rewritten in place. A program that holds another operator is
captured a second time, as torch.onnx would do.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import torch
from onnx.defs import OpSchema
from onnx_ir.schemas import OpSignature
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration
from torch.onnx._internal.exporter._registration import ONNXRegistry

_ATEN: Final[Any] = torch.ops.aten
_apis: Final[Any] = vars(_registration)["onnxscript_apis"]
_COPY: Final[Any] = _ATEN._to_copy.default  # noqa: SLF001 - the operator's name
_SAME: Final[dict[Any, Any]] = {
    _ATEN.detach_.default: _ATEN.alias.default,
    _ATEN.__and__.Tensor: _ATEN.bitwise_and.Tensor,
}
"""Operators without a translation, and those with one that compute the same."""
_MAY_BE_NOTHING: Final = {_COPY, _ATEN.reshape.default, _ATEN.view.default}
_operators: dict[int, ONNXRegistry] = {}
_signatures: dict[tuple[str, str, int], OpSignature] = {}


@contextlib.contextmanager
def quick_conversion() -> Iterator[None]:
    """Convert with one table of operators and one capture a graph, where these are enough."""
    build, read = ONNXRegistry.from_torchlib, OpSignature.from_op_schema
    decompose = _fx_passes.decompose_with_registry

    def find_known(opset_version: int) -> ONNXRegistry:
        if opset_version not in _operators:
            with _replaced(_apis, "get_torchlib_ops", _list_translations):
                _operators[opset_version] = build(opset_version=opset_version)
        # A graph's own translations go into a table of its own.
        found = copy.copy(_operators[opset_version])
        found.functions = {name: list(each) for name, each in found.functions.items()}
        return found

    def read_once(schema: OpSchema) -> OpSignature:
        key = schema.domain, schema.name, schema.since_version
        if key not in _signatures:
            _signatures[key] = read(schema)
        return _signatures[key]

    def rewrite_or_decompose(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        _fx_passes.remove_assertion_nodes(program.graph_module)
        rewrite(program.graph)
        if find_untranslated(program.graph, registry):
            return decompose(program, registry)
        program.graph_module.recompile()
        return program

    with (
        _replaced(ONNXRegistry, "from_torchlib", staticmethod(find_known)),
        _replaced(OpSignature, "from_op_schema", staticmethod(read_once)),
        _replaced(_fx_passes, "decompose_with_registry", rewrite_or_decompose),
        # Lines of Python that led to a node, which no graph keeps.
        _replaced(fx.config, "do_not_emit_stack_traces", value=True),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a class or module with another value for a while."""
    is_own = name in vars(owner)
    before = vars(owner)[name] if is_own else None
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _list_translations() -> list[SimpleNamespace]:
    """The library's translations; it would read the source of each for facts that nobody asks."""
    from onnxscript.function_libs.torch_lib import ops, registration  # noqa: F401, PLC0415 - slow

    return [
        SimpleNamespace(qualified_name=name, function=function, is_complex=is_complex)
        for name, found in registration.default_registry.items()
        if not name.startswith("internal::")
        for is_complex, functions in ((False, found.overloads), (True, found.complex))
        for function in functions
    ]


def rewrite(graph: fx.Graph) -> None:
    """Write operators that the converter does not know, or writes longer, in others."""
    sizes: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        value, target = node.meta.get("val"), node.target
        if isinstance(value, torch.SymInt):
            sizes.setdefault(value.node.expr, node)
        if target is _ATEN.to.dtype:
            _put(node, _COPY, dtype=value.dtype)
        elif target is _ATEN.flatten.using_ints:
            _put(node, _ATEN.reshape.default, _find_shape(node, sizes))
        elif target in {_ATEN.reshape.default, _ATEN.view.default}:
            # A -1 is a number where it is known: parsers of engines ask for it.
            given = zip(node.args[1], value.shape, strict=True)
            shape = [size if isinstance(known, torch.SymInt) else known for size, known in given]
            _put(node, target, shape)
        elif target in {_ATEN.numpy_T.default, _ATEN.mT.default}:
            axes = [*range(value.dim())]
            axes[-2:] = reversed(axes[-2:])
            assert target is _ATEN.mT.default or len(axes) == 2, axes
            _put(node, _ATEN.permute.default, axes)
        elif target is _ATEN.conv2d.padding and node.args[4:] == ("valid",):
            _put(node, _ATEN.conv2d.default, *node.args[1:4])
        else:
            node.target = _SAME.get(target, target)
        if node.target in _MAY_BE_NOTHING:
            before = node.args[0].meta["val"]
            if (before.dtype, before.shape) == (value.dtype, value.shape):
                _put(node, _ATEN.alias.default)
    graph.eliminate_dead_code()


def _put(node: fx.Node, target: Any, *arguments: Any, dtype: torch.dtype | None = None) -> None:
    """Make a node another operator of the same first argument."""
    node.target, node.args = target, (node.args[0], *arguments)
    node.kwargs = {} if dtype is None else {"dtype": dtype}


def _find_shape(node: fx.Node, sizes: dict[Any, fx.Node]) -> list[Any]:
    """Shape of what a node gives; `sizes` are the free ones that nodes before it computed."""
    source: Any = node.args[0]
    given = [
        size.node.expr if isinstance(size, torch.SymInt) else size
        for size in source.meta["val"].shape
    ]
    shape: list[Any] = []
    for size in node.meta["val"].shape:
        if not isinstance(size, torch.SymInt):
            shape.append(size)
            continue
        free = size.node.expr
        if free not in sizes and free in given:
            with node.graph.inserting_before(node):
                asked = node.graph.call_function(_ATEN.sym_size.int, (source, given.index(free)))
            asked.meta = {**node.meta, "val": size}
            sizes[free] = asked
        shape.append(sizes.get(free, -1))
    return shape


def find_untranslated(graph: fx.Graph, registry: ONNXRegistry) -> set[str]:
    """Names of the operators that the converter has no translation for, or that write in place."""
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    called = {node.target for node in graph.nodes if node.op == "call_function"}
    return {
        str(target)
        for target in called
        if target not in known or (isinstance(target, OpOverload) and target._schema.is_mutable)  # noqa: SLF001
    }
