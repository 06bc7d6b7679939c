"""The layers of a Llama-like decoder as a graph: RMS norms, rotary embedding, heads, gated MLP.

Created without values; weights are bound after tracing. Parameter names are those of a Hugging
Face checkpoint below `language_model` and `lm_head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gap_export.interfaces.decoder import DecoderSpec
from gap_export.interfaces.dialect import Dialect, RotaryTables, Rows

# A axes of positions, B batch (1), S rows, R wanted rows, H query heads, G key/value heads, d head
# width, L cache slots, D width, V vocabulary, P positions, E = H * d, F = G * d.


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSizes:
    """What tells decoders of this kind apart besides the sizes of `DecoderSpec`.

    `query_bias` is that of queries, keys and values, `output_bias` that of the product behind
    them. `has_head_norms`: queries and keys are normed head by head. `frequency_axes` says for
    each rotary frequency on which axis a token's position turns it; empty where there is one.
    `is_tied`: the head is the embedding table. `library_config` is the library's.
    """

    heads: int
    mlp: int
    epsilon: float
    query_bias: bool
    output_bias: bool
    mlp_bias: bool
    has_head_norms: bool
    frequency_axes: tuple[int, ...]
    is_tied: bool
    library_config: Any


class LlamaDecoder(nn.Module):
    """All layers and the head; the rotary tables are constants of the graph."""

    def __init__(
        self, spec: DecoderSpec, dialect: Dialect, cosine_Pd: Tensor, sine_Pd: Tensor
    ) -> None:
        """Declare the parameters."""
        super().__init__()
        self.dialect = dialect
        self.language_model = _Stack(spec, dialect)
        self.width, self.planes = spec.width, spec.planes
        self.frequency_axes: tuple[int, ...] = spec.sizes.frequency_axes
        self.lm_head = nn.Linear(spec.width, spec.vocabulary, bias=False)
        self.register_buffer("cosine", cosine_Pd, persistent=False)
        self.register_buffer("sine", sine_Pd, persistent=False)

    cosine: Tensor
    sine: Tensor

    def forward(
        self,
        embeddings_BSD: Tensor,
        position_ids_AS: Tensor,
        write_slot_B: Tensor,
        logits_rows_R: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Logits [R, V] float32 of the wanted rows, then the caches, key and value by layer.

        Where rows bring planes, D is the width of embedding and planes together.
        """
        # The batch is one, and linear layers of two dimensions need no reshaping.
        rows_SD = embeddings_BSD.squeeze(0).to(self.lm_head.weight.dtype)
        parts: tuple[Tensor, ...] = (rows_SD,)
        if self.planes:
            parts = torch.split(rows_SD, self.width, 1)
        hidden_SD, *planes = parts
        rows = Rows(
            cosine_BSd=self._choose(self.cosine, position_ids_AS),
            sine_BSd=self._choose(self.sine, position_ids_AS),
            write_slot_B=write_slot_B,
            tables=self._give_tables(position_ids_AS),
        )
        planned = self.dialect.plan_rows(rows, caches[0])
        written: list[Tensor] = []
        for k, layer in enumerate(self.language_model.layers):
            cache = (caches[2 * k], caches[2 * k + 1])
            hidden_SD, key, value = layer(hidden_SD, cache, rows, planned)
            written += [key, value]
            if k < len(planes):
                hidden_SD = hidden_SD + planes[k]
        # One Gather; index_select would be written with a Reshape that loses the free dimension.
        wanted_RD = functional.embedding(logits_rows_R, hidden_SD)
        logits_RV = self.lm_head(self.language_model.norm(wanted_RD))
        return logits_RV.float(), *written

    def _give_tables(self, position_ids_AS: Tensor) -> RotaryTables | None:
        """The tables for attention that chooses by itself, of one axis."""
        if self.frequency_axes:
            return None
        return RotaryTables(cosine_Pd=self.cosine, sine_Pd=self.sine, position_BS=position_ids_AS)

    def _choose(self, table_Pd: Tensor, position_ids_AS: Tensor) -> Tensor:
        """The table's rows [B, S, d / 2] by position, each column by that on its own axis."""
        # As an embedding, whose shape stays known.
        rows_ASd = functional.embedding(position_ids_AS, table_Pd)
        if not self.frequency_axes:
            return rows_ASd
        width = len(self.frequency_axes)
        column_d = torch.tensor([a * width + k for k, a in enumerate(self.frequency_axes)])
        return torch.index_select(rows_ASd.transpose(0, 1).flatten(1), 1, column_d)[None]


class LlamaLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, spec: DecoderSpec, dialect: Dialect) -> None:
        """Declare the parameters."""
        super().__init__()
        epsilon = spec.sizes.epsilon
        self.input_layernorm = _Norm(spec.width, epsilon, dialect)
        self.self_attn = LlamaAttention(spec, dialect)
        self.post_attention_layernorm = _Norm(spec.width, epsilon, dialect)
        self.mlp = LlamaMlp(spec)

    def forward(
        self,
        hidden_SD: Tensor,
        cache: tuple[Tensor, Tensor],
        rows: Rows,
        planned: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and the layer's key and value cache."""
        normed_SD = self.input_layernorm(hidden_SD)
        attended_SD, key, value = self.self_attn(normed_SD, cache, rows, planned)
        hidden_SD = hidden_SD + attended_SD
        return hidden_SD + self.mlp(self.post_attention_layernorm(hidden_SD)), key, value


class LlamaAttention(nn.Module):
    """Grouped-query attention on a cache of fixed capacity."""

    def __init__(self, spec: DecoderSpec, dialect: Dialect) -> None:
        """Declare the parameters."""
        super().__init__()
        self.dialect = dialect
        sizes: LlamaSizes = spec.sizes
        query, cached = sizes.heads * spec.head_dim, spec.cache_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.width, query, bias=sizes.query_bias)
        self.k_proj = nn.Linear(spec.width, cached, bias=sizes.query_bias)
        self.v_proj = nn.Linear(spec.width, cached, bias=sizes.query_bias)
        self.o_proj = nn.Linear(query, spec.width, bias=sizes.output_bias)
        self.head_dim, self.has_head_norms = spec.head_dim, sizes.has_head_norms
        if sizes.has_head_norms:
            self.q_norm = _Norm(spec.head_dim, sizes.epsilon, dialect)
            self.k_norm = _Norm(spec.head_dim, sizes.epsilon, dialect)

    def forward(
        self,
        hidden_SD: Tensor,
        cache: tuple[Tensor, Tensor],
        rows: Rows,
        planned: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention output and the caches with this call's rows written."""
        query_SE, key_SF = self.q_proj(hidden_SD), self.k_proj(hidden_SD)
        if self.has_head_norms:
            query_SE = self._norm_heads(query_SE, self.q_norm)
            key_SF = self._norm_heads(key_SF, self.k_norm)
        value_SF = self.v_proj(hidden_SD)
        mixed_SE, key, value = self.dialect.attend(
            query_SE, key_SF, value_SF, cache, rows, planned
        )
        return self.o_proj(mixed_SE), key, value

    def _norm_heads(self, x_SE: Tensor, norm: nn.Module) -> Tensor:
        normed_SHd: Tensor = norm(x_SE.reshape(x_SE.shape[0], -1, self.head_dim))
        return normed_SHd.flatten(1)


class LlamaMlp(nn.Module):
    """Gated MLP (SwiGLU)."""

    def __init__(self, spec: DecoderSpec) -> None:
        """Declare the parameters."""
        super().__init__()
        mlp, bias = spec.sizes.mlp, spec.sizes.mlp_bias
        self.gate_proj = nn.Linear(spec.width, mlp, bias=bias)
        self.up_proj = nn.Linear(spec.width, mlp, bias=bias)
        self.down_proj = nn.Linear(mlp, spec.width, bias=bias)

    def forward(self, hidden_SD: Tensor) -> Tensor:
        """down(silu(gate) * up)."""
        gate = functional.silu(self.gate_proj(hidden_SD))
        output: Tensor = self.down_proj(gate * self.up_proj(hidden_SD))
        return output


class _Stack(nn.Module):
    def __init__(self, spec: DecoderSpec, dialect: Dialect) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaLayer(spec, dialect) for _ in range(spec.layers))
        self.norm = _Norm(spec.width, spec.sizes.epsilon, dialect)


class _Norm(nn.Module):
    def __init__(self, width: int, epsilon: float, dialect: Dialect) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon, self.dialect = epsilon, dialect

    def forward(self, x_SD: Tensor) -> Tensor:
        return self.dialect.rms_norm(x_SD, self.weight, self.epsilon)
