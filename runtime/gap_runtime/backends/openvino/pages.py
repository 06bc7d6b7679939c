"""A decoder whose cache is pages, which OpenVINO's own attention writes in place.

A portable graph makes a new cache of the old one in every call, slot by slot, which costs several
times as much as the rest of a step, and its attention reads a mask. OpenVINO's processor plugin
has an attention over a cache of pages: it is told how many slots are filled, writes new rows
behind them, and lets each row see what is before it. So the cache's inputs, outputs, choices and
the two products around the softmax are replaced by that.

The operator is written down by OpenVINO's pass for language models and has no public constructor.
Inputs were added to it at its end from version to version (14 in 2025.2, 28 in 2026.4); all of
them are for what is not needed here, and empty.
Shape letters: G key/value heads, H query heads, P pages, S rows of a call, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.backends._kv_cache import cache_specs
from gap_runtime.bundle.manifest import Stage

KEPT_INPUTS: Final = ("embeddings", "position_ids", "logits_rows")
"""What is left of the graph's own inputs."""
PAGE_INPUTS: Final = {
    "past_lens": [-1],
    "subsequence_begins": [-1],
    "block_indices": [-1],
    "block_indices_begins": [-1],
    "max_context_len": [],
}
"""Where a call writes, by the operator's own names, int32: slots that are filled; where each
sequence begins in the call's rows, and its end; the pages in the order of their slots; where each
sequence begins among them, and its end; slots that are filled after the call."""
PAGE: Final = 32
"""Slots of a page, which the plugin does not leave open."""
_OPERATORS: Final = "openvino.opset13"
_LEAST_INPUTS: Final = 14
"""Inputs of the operator in OpenVINO 2025.2, the least version."""
_UNUSED: Final = (
    *((np.int32, (0,)), (np.int32, (0,)), (np.int32, (0,)), (np.float32, (0,))),
    *((np.float32, (0,)), (np.int32, ()), (np.int32, ()), (np.float32, (0, 0, 0, 0))),
    *((np.int32, ()), (np.int32, (0,)), (np.int32, (0,)), (np.int32, (0,)), (np.int32, (0,))),
    *((np.uint8, (0,)), (np.int32, (0,))),
)
"""Its inputs behind `max_context_len`: rotation and eviction of pages, scores, sparse attention,
sinks, diversity of keys, token types, trees of drafts."""


_SWAPPED: Final = [0, 2, 1, 3]
"""[1, S, H, d] of [1, H, S, d], and back."""
_BETWEEN: Final = ["Multiply", "Select", "Softmax"]
"""What lies between a layer's two products: scale, mask of what comes later, softmax."""
_FORM: Final = "the graph's attention is of another form"


class OtherFormError(Exception):
    """A graph, or OpenVINO's operator, is not of the form that is known here; says what is not."""


def move_cache_into_pages(ov: ModuleType, model: Any, stage: Stage) -> Any:
    """A model whose cache is pages [P, G, PAGE, d], with PAGE_INPUTS as further inputs.

    Args:
        ov: The library.
        model: A decoder graph of the portable dialect, as it was read; its nodes are used again,
            so that it is of no more use afterwards.
        stage: Its entry in the manifest.

    Raises:
        OtherFormError: The graph is of another form, or OpenVINO has the operator in a form that
            is not known.
    """
    specs = cache_specs(stage)
    if not specs or len(specs) % 2:
        raise OtherFormError(_FORM)
    inputs = {each.get_any_name(): each.get_node() for each in model.inputs}
    results = {each.get_any_name(): each.get_node() for each in model.outputs}
    layers = [
        _Layer(key=_Write(inputs, results, key.name), value=_Write(inputs, results, value.name))
        for key, value in zip(specs[::2], specs[1::2], strict=True)
    ]
    op = import_module(_OPERATORS)
    places = [_make_input(op, name, shape, np.int32) for name, shape in PAGE_INPUTS.items()]
    attentions = [layer.make_attention(op, places) for layer in layers]
    for layer, attention in zip(layers, attentions, strict=True):
        layer.put(attention)
    kept = [inputs[name] for name in KEPT_INPUTS]
    caches = [each for layer in layers for each in layer.caches]
    return ov.Model([results["logits"]], [*kept, *places, *caches], model.get_friendly_name())


class _Write:
    """Where a portable graph writes a tensor of the cache: a choice for each slot."""

    def __init__(self, inputs: Mapping[str, Any], results: Mapping[str, Any], name: str) -> None:
        """Find it.

        Raises:
            OtherFormError: It is not written so.
        """
        if name not in inputs or f"next_{name}" not in results:
            raise OtherFormError(_FORM)
        choice = results[f"next_{name}"].input_value(0).get_node()
        if choice.get_type_name() != "Select":
            raise OtherFormError(_FORM)
        if (
            choice.input_value(2).get_node().get_friendly_name()
            != inputs[name].get_friendly_name()
        ):
            raise OtherFormError(_FORM)
        moved = choice.input_value(1).get_node()
        if moved.get_type_name() != "Gather":
            raise OtherFormError(_FORM)
        self.name = name
        self.shape = inputs[name].get_output_shape(0)
        self.rows = moved.input_value(0)
        self.product = _follow(choice)

    def make_pages(self, op: Any) -> Any:
        """The cache's input."""
        _, heads, _, width = self.shape
        return _make_input(op, self.name, [-1, heads, PAGE, width], np.float32)


class _Layer:
    """The attention of a layer, written out by the portable dialect."""

    def __init__(self, *, key: _Write, value: _Write) -> None:
        """Find what is asked, and by what factor its products are scaled.

        Raises:
            OtherFormError: It is written otherwise.
        """
        self._key, self._value = key, value
        self._query = key.product.input_value(0)
        width = key.shape[-1]
        factor = _read_factor(key.product)
        if factor is None or not np.isclose(factor, width**-0.5, rtol=1e-6):
            raise OtherFormError(_FORM)
        if _list_between(key.product, value.product) != _BETWEEN:
            raise OtherFormError(_FORM)

    def make_attention(self, op: Any, places: Sequence[Any]) -> Any:
        """What takes the place of the products, [1, H, S, d] or [1, G, H / G, S, d].

        Raises:
            OtherFormError: OpenVINO has the operator in another form.
        """
        _, groups, _, width = self._key.shape
        shape = self._query.get_partial_shape()
        shares = shape[2].get_length() if len(shape) == 5 else 1
        heads = groups * shares
        self.caches = [each.make_pages(op) for each in (self._key, self._value)]
        query = self._query
        if len(shape) == 5:
            query = op.reshape(query, [1, heads, -1, width], special_zero=False)
        *where, filled = places
        attention = _make_operator(
            op,
            [
                *(
                    _put_in_rows(op, query, heads, width),
                    _put_in_rows(op, self._key.rows, groups, width),
                ),
                *(_put_in_rows(op, self._value.rows, groups, width), *self.caches, *where),
                # The scale, no sliding window, no ALiBi.
                *(op.constant(np.float32(width**-0.5)), op.constant(np.int32(0))),
                *(op.constant(np.zeros(0, np.float32)), filled),
            ],
        )
        # Without these the plugin does not know what its flat rows are.
        facts = {"num_k_heads": groups, "num_v_heads": groups}
        facts |= {"k_head_size": width, "v_head_size": width}
        for name, value in facts.items():
            attention.get_rt_info()[name] = value
        mixed = op.reshape(attention.output(0), [1, -1, heads, width], special_zero=False)
        mixed = op.transpose(mixed, op.constant(_SWAPPED))
        if len(shape) == 5:
            mixed = op.reshape(mixed, [1, groups, shares, -1, width], special_zero=False)
        return mixed

    def put(self, attention: Any) -> None:
        """Let the attention take the place of the products."""
        for user in self._value.product.output(0).get_target_inputs():
            user.replace_source_output(attention.output(0))


def _read_factor(product: Any) -> float | None:
    """What a product is multiplied by, if it is one number."""
    scale = _single_user(product)
    if scale.get_type_name() == "Convert":
        scale = _single_user(scale)
    if scale.get_type_name() != "Multiply":
        return None
    factor = scale.input_value(1).get_node()
    if factor.get_type_name() != "Constant" or factor.get_data().size != 1:
        return None
    return float(factor.get_data().item())


def _list_between(first: Any, last: Any) -> list[str]:
    """Types of the nodes between two products, but for changes of dtype."""
    types, node = [], _single_user(first)
    while node.get_type_name() != "MatMul":
        types.append(node.get_type_name())
        node = _single_user(node)
    if node.get_friendly_name() != last.get_friendly_name():
        raise OtherFormError(_FORM)
    return [each for each in types if each != "Convert"]


def _put_in_rows(op: Any, heads_first: Any, heads: int, width: int) -> Any:
    """[1, H, S, d] as the operator wants it: [S, H * d]."""
    rows = op.transpose(heads_first, op.constant(_SWAPPED))
    return op.reshape(rows, [-1, heads * width], special_zero=False)


def _make_operator(op: Any, known: Sequence[Any]) -> Any:
    """The attention, with as many unused inputs as the installed version has.

    Raises:
        OtherFormError: It has none, or with other inputs.
    """
    make = getattr(import_module("openvino.op"), "_PagedAttentionExtension", None)
    if make is None:
        raise OtherFormError("this version has no attention over pages")
    unused = [op.constant(np.zeros(shape, dtype)) for dtype, shape in _UNUSED]
    given = [node.output(0) if hasattr(node, "output") else node for node in (*known, *unused)]
    for count in range(len(given), _LEAST_INPUTS - 1, -1):
        with suppress(RuntimeError):
            return make(given[:count])
    raise OtherFormError("its attention over pages takes other inputs")


def _make_input(op: Any, name: str, shape: list[int], dtype: Any) -> Any:
    node = op.parameter(shape, dtype, name=name)
    node.output(0).set_names({name})
    return node


def _follow(choice: Any) -> Any:
    """The product that a written cache goes into."""
    node = choice
    while node.get_type_name() != "MatMul":
        users = [
            user.get_node()
            for user in node.output(0).get_target_inputs()
            if user.get_node().get_type_name() not in {"Result", "ShapeOf"}
        ]
        if len(users) != 1:
            raise OtherFormError(_FORM)
        node = users[0]
    return node


def _single_user(node: Any) -> Any:
    users = list(node.output(0).get_target_inputs())
    if len(users) != 1:
        raise OtherFormError(_FORM)
    return users[0].get_node()
