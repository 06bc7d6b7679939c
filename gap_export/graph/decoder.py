"""The decoder graph: one for prefill and steps, for all ratios and position modes.

    name                 dtype    shape                   meaning
    in
    embeddings           float32  [1, S, D + planes * D]  prompt rows, or a token and a draft
    position_ids         int64    [axes, S]               rotary position of each row on each axis
    write_slot           int64    [1]                     cache slot of row 0
    logits_rows          int64    [R]                     rows whose logits are wanted
    cache_key_00 ...     model's  [1, G, capacity, d]     keys so far, one tensor a layer
    cache_value_00 ...   model's  [1, G, capacity, d]     values so far
    out
    logits               float32  [R, V]                  of the wanted rows
    next_cache_key_00 .. model's  [1, G, capacity, d]     the cache with the rows written
    next_cache_value_00  model's  [1, G, capacity, d]

S and R are the only free dimensions. A runtime binds each cache tensor's memory as input and as
output. Position and slot are independent: position_ids may run ahead of the slots. There is one
axis of positions but for decoders that turn each rotary frequency by a picture's row or column.
Most models have no planes. Where they do, these are added to the hidden states behind the first
layers, one behind each (DeepStack); in rows of text they are zeros.
"""

from __future__ import annotations

from torch import Tensor, nn

from gap_export.interfaces.decoder import DecoderSpec
from gap_runtime.bundle.tensors import FREE_LOGITS, FREE_ROWS, Dtype, TensorSpec

# B batch (1), S rows, D decoder width, G key/value heads, L cache slots, d head width.


class DecoderStage(nn.Module):
    """A family's decoder with its caches as a flat list: key and value of each layer in turn."""

    def __init__(self, decoder: nn.Module) -> None:
        """Wrap a decoder."""
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        write_slot: Tensor,
        logits_rows: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Logits and the written caches; see the table above."""
        outputs: tuple[Tensor, ...] = self.decoder(
            embeddings, position_ids, write_slot, logits_rows, caches
        )
        return outputs


def decoder_inputs(spec: DecoderSpec, capacity: int, dtype: Dtype) -> list[TensorSpec]:
    """The first part of the table above, with the caches of all layers."""
    return [
        TensorSpec(
            name="embeddings",
            dtype="float32",
            shape=(1, FREE_ROWS, spec.row_width),
            meaning="prompt rows, or a token and a draft",
        ),
        TensorSpec(
            name="position_ids",
            dtype="int64",
            shape=(spec.axes, FREE_ROWS),
            meaning="rotary position of each row",
        ),
        TensorSpec(name="write_slot", dtype="int64", shape=(1,), meaning="cache slot of row 0"),
        TensorSpec(
            name="logits_rows",
            dtype="int64",
            shape=(FREE_LOGITS,),
            meaning="rows whose logits are wanted",
        ),
        *_caches(spec, capacity, dtype),
    ]


def decoder_outputs(spec: DecoderSpec, capacity: int, dtype: Dtype) -> list[TensorSpec]:
    """The second part."""
    return [
        TensorSpec(
            name="logits",
            dtype="float32",
            shape=(FREE_LOGITS, spec.vocabulary),
            meaning="of the wanted rows",
        ),
        *(
            TensorSpec(
                name=f"next_{cache.name}",
                dtype=cache.dtype,
                shape=cache.shape,
                meaning="the same memory, with the rows written",
            )
            for cache in _caches(spec, capacity, dtype)
        ),
    ]


def _caches(spec: DecoderSpec, capacity: int, dtype: Dtype) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=name,
            dtype=dtype,
            shape=(1, spec.cache_heads, capacity, spec.head_dim),
            meaning=f"{name.split('_')[1]}s so far, layer {int(name.rpartition('_')[2])}",
        )
        for name in cache_names(spec.layers)
    ]


def cache_names(layers: int) -> list[str]:
    """Names of the cache inputs, in the order of the graph."""
    digits = max(2, len(str(layers - 1)))
    return [f"cache_{part}_{k:0{digits}d}" for k in range(layers) for part in ("key", "value")]
