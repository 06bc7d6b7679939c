"""Proof that a graph file is what was promised, made after every export.

The rules: named inputs and outputs with the promised dtypes and shapes; every dimension a number
(but the promised free ones); only operators on the list; constant TopK sizes; as many values
behind a Reshape as before it, which the checker does not count; weights inside the bundle; and the
ONNX checker's own full check.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from gap_export.errors import GraphError, StaticShapeError, UnsupportedOpError
from gap_runtime.bundle.tensors import TensorSpec

_OWN_VERSION = 1
"""Of the operators that a dialect has besides the standard ones."""


def prove_graph(
    path: Path,
    *,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    opset: int,
    operators: frozenset[str],
    free: frozenset[str] = frozenset(),
) -> None:
    """Check a graph file against its promise.

    Args:
        path: The file; its weights must lie beside it.
        inputs: Promised inputs, in order.
        outputs: Promised outputs, in order.
        opset: Promised version of the standard operators.
        operators: Those that the dialect has; others than standard ones behind their domain.
        free: Names of dimensions that may stay open.

    Raises:
        StaticShapeError: A dimension is open that should not be.
        UnsupportedOpError: An operator is not on the list.
        GraphError: Anything else is not as promised.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    _require_interface(path, "input", graph.input, list(inputs))
    _require_interface(path, "output", graph.output, list(outputs))
    _require_operators(path, graph, operators)
    promised = {"": opset} | {
        node.domain: _OWN_VERSION
        for node in graph.node
        if _full_name(node) in operators and node.domain
    }
    found = {each.domain: each.version for each in model.opset_import}
    if found != promised:
        raise GraphError(f"{path.name}: opsets {found}, expected {promised}")
    _require_static(path, graph, free)
    _require_counts(path, graph)
    _require_weights_inside(path, graph)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).splitlines()[0]
        raise GraphError(f"{path.name}: the ONNX checker says: {reason}") from error


def _require_interface(
    path: Path, kind: str, values: Iterable[onnx.ValueInfoProto], specs: list[TensorSpec]
) -> None:
    found = [(value.name, _find_dtype(value), tuple(_list_sizes(value))) for value in values]
    promised = [(spec.name, spec.dtype, spec.shape) for spec in specs]
    for one, other in zip(found, promised, strict=False):
        if one != other:
            raise GraphError(f"{path.name}: {kind} {one}, promised {other}")
    if len(found) != len(promised):
        raise GraphError(f"{path.name}: {len(found)} {kind}s, promised {len(promised)}")


def _find_dtype(value: onnx.ValueInfoProto) -> str:
    name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return "float32" if name == "FLOAT" else name.lower()


def _list_sizes(value: onnx.ValueInfoProto) -> list[int | str | None]:
    """The dimensions of a value: numbers, names of free ones, None where there is neither."""
    return [
        size.dim_value if size.HasField("dim_value") else size.dim_param or None
        for size in value.type.tensor_type.shape.dim
    ]


def _require_operators(path: Path, graph: onnx.GraphProto, operators: frozenset[str]) -> None:
    constants = {each.name for each in graph.initializer}
    for node in graph.node:
        if _full_name(node) not in operators:
            raise UnsupportedOpError(
                f"{path.name}: node '{node.name}' is {_full_name(node)}, which the target's "
                "dialect does not have"
            )
        if node.op_type == "TopK" and node.input[1] not in constants:
            raise StaticShapeError(f"{path.name}: node '{node.name}': TopK size is not a constant")


def _full_name(node: onnx.NodeProto) -> str:
    """An operator's name, behind its domain where it is not a standard one."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _require_static(path: Path, graph: onnx.GraphProto, free: frozenset[str]) -> None:
    shaped = {
        value.name: value
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    for name in (name for node in graph.node for name in node.output):
        if name not in shaped:
            raise StaticShapeError(f"{path.name}: tensor '{name}' has no known shape")
        for axis, size in enumerate(_list_sizes(shaped[name])):
            if not isinstance(size, int) and size not in free:
                raise StaticShapeError(
                    f"{path.name}: tensor '{name}': dimension {axis} is open ({size})"
                )


def _require_counts(path: Path, graph: onnx.GraphProto) -> None:
    sizes: dict[str, Sequence[int | str | None]] = {
        value.name: _list_sizes(value)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    sizes |= {each.name: each.dims for each in graph.initializer}
    for node in graph.node:
        if _full_name(node) != "Reshape":
            continue
        before, after = (sizes.get(name, [None]) for name in (node.input[0], node.output[0]))
        known = [size for size in (*before, *after) if isinstance(size, int)]
        if len(known) == len(before) + len(after) and math.prod(before) != math.prod(after):  # type: ignore[arg-type]
            raise GraphError(
                f"{path.name}: node '{node.name}' is a Reshape of {list(before)} to {list(after)}"
            )


def _require_weights_inside(path: Path, graph: onnx.GraphProto) -> None:
    for initializer in graph.initializer:
        if initializer.data_location != onnx.TensorProto.EXTERNAL:
            continue
        tensor = ir.serde.deserialize_tensor(initializer, path.parent)
        assert isinstance(tensor, ir.ExternalTensor), initializer.name
        location = str(tensor.location)
        file = path.parent / location
        if Path(location).name != location or not file.is_file():
            raise GraphError(
                f"{path.name}: initializer '{initializer.name}' lies in '{location}', "
                "which is no file of the bundle"
            )
        if tensor.length not in (None, tensor.nbytes):
            raise GraphError(
                f"{path.name}: initializer '{initializer.name}' has {tensor.nbytes} bytes, its "
                f"place in {location} {tensor.length}"
            )
        end = (tensor.offset or 0) + tensor.nbytes
        if end > file.stat().st_size:
            raise GraphError(
                f"{path.name}: initializer '{initializer.name}' ends at byte {end} of {location}, "
                f"which has {file.stat().st_size}"
            )
