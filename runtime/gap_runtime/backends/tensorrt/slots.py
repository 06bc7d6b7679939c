"""Attention of a decoder over the slots in use, where a TensorRT has it.

A graph says with a mask which slots of the cache a row sees, which every version reads; attention
then works on all slots, used or not. Later versions (11, RTX 1.7) have attention that is told how
many slots are in use. They get it here, in the network that was parsed: so one bundle serves all
versions, and the mask is computed for none that does not need it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

_ROWS_AXIS: Final = 1
"""Of the embeddings [1, S, D]."""


def attend_to_used_slots(trt: ModuleType, network: Any) -> int:
    """Put attention with lengths in place of attention with a mask.

    Args:
        trt: The package.
        network: Of a decoder, parsed; it is changed.

    Returns:
        How many attentions were replaced: those are still in the network, and nothing reads them.
    """
    if not hasattr(getattr(trt, "IAttention", None), "key_value_lengths"):
        return 0
    layers = [network.get_layer(k) for k in range(network.num_layers)]
    found = [each for each in map(_find_attention(trt), layers) if each is not None]
    if not found:
        return 0
    readers = _list_readers(layers)
    lengths = _count_slots(trt, network)
    for masked in found:
        query, key, value = (masked.get_input(k) for k in range(3))
        attention = network.add_attention_v2(
            query, key, value, masked.norm_op, trt.CausalMaskKind.LOWER_RIGHT
        )
        attention.key_value_lengths = lengths
        for layer, index in readers[masked.get_output(0).name]:
            layer.set_input(index, attention.get_output(0))
    return len(found)


def _find_attention(trt: ModuleType) -> Callable[[Any], Any]:
    """What gives the attention with a mask that a layer ends; None for other layers."""

    def find(layer: Any) -> Any:
        if layer.type != trt.LayerType.ATTENTION_OUTPUT:
            return None
        # The binding gives every layer as one of the base class.
        layer.__class__ = trt.IAttentionOutputLayer
        return None if layer.attention.mask is None else layer.attention

    return find


def _list_readers(layers: list[Any]) -> dict[str, list[tuple[Any, int]]]:
    """Who reads each tensor, by its name: layers and the places of their inputs."""
    readers: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for layer in layers:
        for k in range(layer.num_inputs):
            tensor = layer.get_input(k)
            if tensor is not None:
                readers[tensor.name].append((layer, k))
    return readers


def _count_slots(trt: ModuleType, network: Any) -> Any:
    """Slots in use when the rows of a call are written, int32 [1]."""
    inputs = (network.get_input(k) for k in range(network.num_inputs))
    named = {tensor.name: tensor for tensor in inputs}
    sizes = network.add_shape(named["embeddings"]).get_output(0)
    rows = network.add_slice(sizes, (_ROWS_AXIS,), (1,), (1,)).get_output(0)
    used = network.add_elementwise(named["write_slot"], rows, trt.ElementWiseOperation.SUM)
    return network.add_cast(used.get_output(0), trt.int32).get_output(0)
