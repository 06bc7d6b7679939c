"""A decoder whose cache is OpenVINO's own: states that grow by the rows of each call.

A portable graph makes a new cache of the old one in every call, slot by slot, which costs several
times as much as the rest of a step. OpenVINO's processor plugin has an attention that puts new
rows behind old ones in place, for models whose cache is a state that a Concat makes longer. So the
cache's inputs, outputs and choices are replaced by that, as OpenVINO's own converters do it.

What a state holds cannot be written over; see `state_decoder` for the rows of a refused draft.
Shape letters: G key/value heads, H query heads, P columns of a state, S rows of a call, d width
of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.backends._kv_cache import cache_specs
from gap_runtime.bundle.manifest import Stage

MASK: Final = "gap_mask"
BEAMS: Final = "gap_beams"
KEPT_INPUTS: Final = ("embeddings", "position_ids", "logits_rows")
"""What is left of the graph's own inputs: where rows are written is behind all others."""
_OPERATORS: Final = "openvino.opset13"
"""The first set of operators that has scaled dot product attention."""
_STATES: Final = "openvino.opset6"
"""The one that reads and writes states."""


class _OtherFormError(Exception):
    """The graph is not of the form that is rewritten here."""


def move_cache_into_states(ov: ModuleType, model: Any, stage: Stage) -> Any | None:
    """A model whose cache is states, with a mask [1, 1, S, P + S] as a further input.

    Args:
        ov: The library.
        model: A decoder graph of the portable dialect, as it was read; its nodes are used again.
        stage: Its entry in the manifest.

    Returns:
        None where the graph is of another form: then the model is as it was.
    """
    specs = cache_specs(stage)
    if {spec.dtype for spec in specs} != {"float32"} or len(specs) % 2:
        return None
    inputs = {each.get_any_name(): each.get_node() for each in model.inputs}
    results = {each.get_any_name(): each.get_node() for each in model.outputs}
    try:
        layers = [
            _Layer(
                key=_Write(inputs, results, key.name), value=_Write(inputs, results, value.name)
            )
            for key, value in zip(specs[::2], specs[1::2], strict=True)
        ]
    except _OtherFormError:
        return None
    op = import_module(_OPERATORS)
    mask = _make_input(op, MASK, [1, 1, -1, -1], np.float32)
    # Which beam goes on: the only one. The plugin takes no state for a cache without this input.
    beams = _make_input(op, BEAMS, [1], np.int32)
    sinks = [sink for layer in layers for sink in layer.rewrite(ov, op, mask, beams)]
    kept = [inputs[name] for name in KEPT_INPUTS]
    return ov.Model([results["logits"]], sinks, [*kept, mask, beams], model.get_friendly_name())


class _Write:
    """Where a portable graph writes a tensor of the cache: a choice for each slot."""

    def __init__(self, inputs: Mapping[str, Any], results: Mapping[str, Any], name: str) -> None:
        """Find it.

        Raises:
            _OtherFormError: It is not written so.
        """
        if name not in inputs or f"next_{name}" not in results:
            raise _OtherFormError
        choice = results[f"next_{name}"].input_value(0).get_node()
        if choice.get_type_name() != "Select":
            raise _OtherFormError
        if (
            choice.input_value(2).get_node().get_friendly_name()
            != inputs[name].get_friendly_name()
        ):
            raise _OtherFormError
        moved = choice.input_value(1).get_node()
        if moved.get_type_name() != "Gather":
            raise _OtherFormError
        self.name = name
        self.shape = inputs[name].get_output_shape(0)
        self.rows = moved.input_value(0)
        self.product = _follow(choice)

    def grow(self, ov: ModuleType, op: Any, beams: Any) -> tuple[Any, Any]:
        """The tensor [1, G, P + S, d], and what keeps it for the next call."""
        _, heads, _, width = self.shape
        util = ov.op.util
        info = util.VariableInfo()
        info.data_shape = ov.PartialShape([1, heads, -1, width])
        info.data_type, info.variable_id = ov.Type.f32, self.name
        variable = util.Variable(info)
        none = op.broadcast(
            op.constant(np.float32(0)), op.constant([1, heads, 0, width], np.int64)
        )
        states = import_module(_STATES)
        held = op.gather(states.read_value(none, variable), beams, op.constant(np.int64(0)))
        grown = op.concat([held, self.rows], 2)
        return grown, states.assign(grown, variable)


class _Layer:
    """The attention of a layer, written out by the portable dialect."""

    def __init__(self, *, key: _Write, value: _Write) -> None:
        """Find what is asked, and by what factor its products are scaled.

        Raises:
            _OtherFormError: It is written otherwise.
        """
        self._key, self._value = key, value
        self._query = key.product.input_value(0)
        width = key.shape[-1]
        factor = _read_factor(key.product)
        if factor is None or not np.isclose(factor, width**-0.5, rtol=1e-6):
            raise _OtherFormError

    def rewrite(self, ov: ModuleType, op: Any, mask: Any, beams: Any) -> list[Any]:
        """Put an attention over states in the place of the products; the states' ends."""
        key, keep_key = self._key.grow(ov, op, beams)
        value, keep_value = self._value.grow(ov, op, beams)
        _, groups, _, width = self._key.shape
        query = self._query
        shape = query.get_partial_shape()
        shares = shape[2].get_length() if len(shape) == 5 else 1
        if len(shape) == 5:
            # [1, G, H / G, S, d]; the plugin reads a key for several queries from this form.
            query = op.reshape(query, [1, groups * shares, -1, width], special_zero=False)
            key, value = (_share(op, each, groups, shares, width) for each in (key, value))
        mixed = op.scaled_dot_product_attention(
            query, key, value, mask, op.constant(np.float32(width**-0.5))
        )
        if len(shape) == 5:
            mixed = op.reshape(mixed, [1, groups, shares, -1, width], special_zero=False)
        for user in self._value.product.output(0).get_target_inputs():
            user.replace_source_output(mixed.output(0))
        return [keep_key, keep_value]


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


def _share(op: Any, grown: Any, groups: int, shares: int, width: int) -> Any:
    """Keys or values [1, G, P, d] once for each query head: [1, H, P, d]."""
    apart = op.unsqueeze(grown, op.constant(np.int64(2)))
    each = op.broadcast(apart, op.constant([1, 1, shares, 1, 1]), broadcast_spec="BIDIRECTIONAL")
    return op.reshape(each, [1, groups * shares, -1, width], special_zero=False)


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
            raise _OtherFormError
        node = users[0]
    return node


def _single_user(node: Any) -> Any:
    users = list(node.output(0).get_target_inputs())
    if len(users) != 1:
        raise _OtherFormError
    return users[0].get_node()
