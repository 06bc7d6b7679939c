"""What an ONNX file is made of, read without the onnx package.

Only the wire format of protocol buffers is needed, and a few field numbers of onnx.proto. No
weights are read: they lie in other files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gap_runtime.errors import BundleError
from gap_runtime.records.files import read_bytes

# Field numbers of onnx.proto, by message.
_MODEL_GRAPH: Final = 7
_MODEL_OPSET: Final = 8
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_DOMAIN = 1, 3, 4, 7
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VALUE_NAME: Final = 1

_LARGEST: Final = 2**31
"""Bytes of a file of protocol buffers at most."""
_LOOP: Final = re.compile(rb"(?:\x22|\xa2\x80*\x00)(?:\x04|\x84\x80*\x00)(Loop|Scan)")
"""An operator's field, its length, each also in the longer forms that readers take, its name."""
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxNode:
    """An operator of a graph. `inputs` are names, empty for those that are left out."""

    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxWeight:
    """A weight that lies in another file, `offset` and `length` in bytes."""

    name: str
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFile:
    """The skeleton of a graph. `opsets` is by domain, `unused` are inputs that nothing reads."""

    opsets: dict[str, int]
    nodes: tuple[OnnxNode, ...]
    weights: tuple[OnnxWeight, ...]
    inputs: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights outside the file."""
        return sum(weight.length for weight in self.weights)


def read_onnx(path: Path) -> OnnxFile:
    """The skeleton of an ONNX file.

    Raises:
        BundleError: The file is missing or no ONNX file.
    """
    try:
        data = memoryview(read_bytes(path, BundleError, limit=_LARGEST, advice="export again"))
        model = list(_fields(data))
        graphs = [value for number, value in model if number == _MODEL_GRAPH]
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs in it")
        opsets = dict(_read_opset(value) for number, value in model if number == _MODEL_OPSET)
        return _read_graph(graphs[0], opsets)
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path}: not an ONNX file ({error}); export again") from error


def require_no_loop(path: Path) -> None:
    """Refuse a graph with a loop: no export has one, and nothing could end it from within.

    It is looked for in the bytes, so that functions within the file are seen as well.

    Raises:
        BundleError: It has one, or the file cannot be read.
    """
    found = _LOOP.search(read_bytes(path, BundleError, limit=_LARGEST, advice="export again"))
    if found is not None:
        name = found[1].decode()
        raise BundleError(
            f"{path}: has the operator {name}, which no export has and which may never end; "
            "export again"
        )


def _read_graph(graph: memoryview, opsets: dict[str, int]) -> OnnxFile:
    nodes, weights, inputs, outputs = [], [], [], []
    read: set[str] = set()
    initializers: set[str] = set()
    for number, value in _fields(graph):
        if number == _GRAPH_NODE:
            node = _read_node(value)
            nodes.append(node)
            read.update(node.inputs)
        elif number == _GRAPH_INITIALIZER:
            name, weight = _read_tensor(value)
            initializers.add(name)
            weights += [weight] if weight else []
        elif number == _GRAPH_INPUT:
            inputs.append(_text(value, _VALUE_NAME))
        elif number == _GRAPH_OUTPUT:
            outputs.append(_text(value, _VALUE_NAME))
    fed = [name for name in inputs if name not in initializers]
    return OnnxFile(
        opsets=opsets,
        nodes=tuple(nodes),
        weights=tuple(weights),
        inputs=tuple(fed),
        unused=tuple(name for name in fed if name not in read and name not in outputs),
    )


def _read_node(data: memoryview) -> OnnxNode:
    texts: dict[int, list[str]] = {}
    for number, value in _fields(data):
        if number in (_NODE_INPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_DOMAIN):
            texts.setdefault(number, []).append(_decode(value))
    return OnnxNode(
        name="".join(texts.get(_NODE_NAME, [])),
        operator="".join(texts.get(_NODE_OPERATOR, [])),
        domain="".join(texts.get(_NODE_DOMAIN, [])),
        inputs=tuple(texts.get(_NODE_INPUT, [])),
    )


def _read_tensor(data: memoryview) -> tuple[str, OnnxWeight | None]:
    name, entries = "", {}
    for number, value in _fields(data):
        if number == _TENSOR_NAME:
            name = _decode(value)
        elif number == _TENSOR_EXTERNAL:
            entries[_text(value, _ENTRY_KEY)] = _text(value, _ENTRY_VALUE)
    if "location" not in entries:
        return name, None
    weight = OnnxWeight(
        name=name,
        file=entries["location"],
        offset=int(entries.get("offset", 0)),
        length=int(entries.get("length", 0)),
    )
    return name, weight


def _read_opset(data: memoryview) -> tuple[str, int]:
    versions = [_read_varint(value, 0)[0] for k, value in _fields(data) if k == _OPSET_VERSION]
    return _text(data, _OPSET_DOMAIN), versions[-1]


def _text(data: memoryview, wanted: int) -> str:
    """The text field of a message, empty where it is missing."""
    return "".join(_decode(value) for number, value in _fields(data) if number == wanted)


def _decode(value: memoryview) -> str:
    return bytes(value).decode()


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field of a message."""
    place = 0
    while place < len(data):
        key, place = _read_varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            size = _read_varint(data, place)[1] - place
        elif kind == _BYTES:
            size, place = _read_varint(data, place)
        elif kind in (_FIXED_64, _FIXED_32):
            size = 8 if kind == _FIXED_64 else 4
        else:
            raise ValueError(f"field of unknown kind {kind}")
        if place + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[place : place + size]
        place += size


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """An integer and the place behind it."""
    value, shift = 0, 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, place
        shift += 7
