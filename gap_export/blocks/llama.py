"""The Llama decoder as a graph: RMS norms, rotary embedding, grouped heads, gated MLP.

Mistral's is the same but for its window, which a prompt must not outgrow.

Parameter names are those of a Hugging Face checkpoint below `language_model` and `lm_head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gap_export.checkpoint.sources import build_without_memory, linear_weights, shapes_of
from gap_export.errors import CheckpointError
from gap_export.interfaces.dialect import Dialect, Rows
from gap_export.interfaces.family import SmoothingGroup

# B batch (1), S rows, H query heads, G key/value heads, d head width, L cache slots, D width,
# V vocabulary, P positions, E = H * d, F = G * d.

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_TYPES = ("llama", "mistral")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The sizes of a Llama decoder."""

    layers: int
    width: int
    heads: int
    cache_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    epsilon: float
    attention_bias: bool
    mlp_bias: bool


def read_llama_shape(config: LlamaConfig, where: str) -> LlamaShape:
    """The sizes in a text config.

    Raises:
        CheckpointError: The config asks for something that this decoder does not have.
    """
    if config.model_type not in _TYPES:
        raise CheckpointError(
            f"{where}: the language model is of type '{config.model_type}', expected "
            f"{' or '.join(_TYPES)}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise CheckpointError(f"{where}: sliding_window {window}, expected none")
    if config.hidden_act not in {"silu", "swish"}:
        raise CheckpointError(
            f"{where}: text_config.hidden_act '{config.hidden_act}', expected silu"
        )
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise CheckpointError(
            f"{where}: rope_type '{rope_type}' depends on the running length; "
            f"have {', '.join(_ROPE_TYPES)}"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where}: rope_parameters.partial_rotary_factor, expected 1")
    return LlamaShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        cache_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        epsilon=config.rms_norm_eps,
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
    )


def rotary_tables(config: LlamaConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [P, head_dim / 2], float32, one row per position ID.

    The length must cover the unpruned sequence: position IDs outrun the cache's slots.
    """
    rotary = LlamaRotaryEmbedding(config)
    cosine, sine = rotary(torch.zeros(1, 1), torch.arange(positions)[None])
    half = cosine.shape[-1] // 2
    return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()


def llama_name(key: str) -> str:
    """Name of a tensor in the modules here, from its key in a language model's own checkpoint."""
    return f"language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key


def decoder_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the decoder, its head and the token embedding table."""
    return shapes_of(_declare(shape)) | {
        "language_model.embed_tokens.weight": (shape.vocabulary, shape.width)
    }


def packable_weights(shape: LlamaShape) -> list[str]:
    """Names of the weights that may come quantized: of all linear layers, the head among them."""
    return linear_weights(_declare(shape))


def _declare(shape: LlamaShape) -> LlamaDecoder:
    """The decoder's parameters, without memory and operators."""
    none: Any = None
    tables = (torch.empty(0), torch.empty(0))
    decoder = build_without_memory(lambda: LlamaDecoder(shape, none, *tables))
    assert isinstance(decoder, LlamaDecoder)
    return decoder


def smoothing_groups(shape: LlamaShape) -> list[SmoothingGroup]:
    """Weights whose inputs can be scaled: after both norms, after values and after the gate.

    Grouped values feed several heads each, and biased layers would need their bias scaled; those
    are left.
    """
    groups = []
    for k in range(shape.layers):
        layer = f"language_model.layers.{k}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        makers = {
            f"{layer}.input_layernorm": [f"{attention}.{x}_proj" for x in "qkv"],
            f"{layer}.post_attention_layernorm": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        }
        if shape.heads == shape.cache_heads and not shape.attention_bias:
            makers[f"{attention}.v_proj"] = [f"{attention}.o_proj"]
        if not shape.mlp_bias:
            makers[f"{mlp}.up_proj"] = [f"{mlp}.down_proj"]
        groups += [
            SmoothingGroup(
                maker=f"{maker}.weight", readers=tuple(f"{reader}.weight" for reader in readers)
            )
            for maker, readers in makers.items()
        ]
    return groups


class LlamaDecoder(nn.Module):
    """All layers and the head. Created without values; weights are bound after tracing."""

    def __init__(
        self, shape: LlamaShape, dialect: Dialect, cosine_Pd: Tensor, sine_Pd: Tensor
    ) -> None:
        """Declare the parameters; the rotary tables are constants of the graph."""
        super().__init__()
        self.dialect = dialect
        self.language_model = _Stack(shape, dialect)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.register_buffer("cosine", cosine_Pd, persistent=False)
        self.register_buffer("sine", sine_Pd, persistent=False)

    cosine: Tensor
    sine: Tensor

    def forward(
        self,
        embeddings_BSD: Tensor,
        position_ids_BS: Tensor,
        write_slot_B: Tensor,
        logits_rows_R: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Logits [R, V] float32 of the wanted rows, then the caches, key and value by layer."""
        # The batch is one, and linear layers of two dimensions need no reshaping.
        hidden_SD = embeddings_BSD.squeeze(0).to(self.lm_head.weight.dtype)
        rows = Rows(
            position_ids_BS=position_ids_BS,
            write_slot_B=write_slot_B,
            cosine_Pd=self.cosine,
            sine_Pd=self.sine,
        )
        planned = self.dialect.plan_rows(rows, caches[0])
        written: list[Tensor] = []
        for k, layer in enumerate(self.language_model.layers):
            cache = (caches[2 * k], caches[2 * k + 1])
            hidden_SD, key, value = layer(hidden_SD, cache, rows, planned)
            written += [key, value]
        # One Gather; index_select would be written with a Reshape that loses the free dimension.
        wanted_RD = functional.embedding(logits_rows_R, hidden_SD)
        logits_RV = self.lm_head(self.language_model.norm(wanted_RD))
        return logits_RV.float(), *written


class LlamaLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: LlamaShape, dialect: Dialect) -> None:
        """Declare the parameters."""
        super().__init__()
        self.input_layernorm = _Norm(shape, dialect)
        self.self_attn = LlamaAttention(shape, dialect)
        self.post_attention_layernorm = _Norm(shape, dialect)
        self.mlp = LlamaMlp(shape)

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

    def __init__(self, shape: LlamaShape, dialect: Dialect) -> None:
        """Declare the parameters."""
        super().__init__()
        self.dialect = dialect
        query, cached = shape.heads * shape.head_dim, shape.cache_heads * shape.head_dim
        bias = shape.attention_bias
        self.q_proj = nn.Linear(shape.width, query, bias=bias)
        self.k_proj = nn.Linear(shape.width, cached, bias=bias)
        self.v_proj = nn.Linear(shape.width, cached, bias=bias)
        self.o_proj = nn.Linear(query, shape.width, bias=bias)

    def forward(
        self,
        hidden_SD: Tensor,
        cache: tuple[Tensor, Tensor],
        rows: Rows,
        planned: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention output and the caches with this call's rows written."""
        mixed_SE, key, value = self.dialect.attend(
            self.q_proj(hidden_SD),
            self.k_proj(hidden_SD),
            self.v_proj(hidden_SD),
            cache,
            rows,
            planned,
        )
        return self.o_proj(mixed_SE), key, value


class LlamaMlp(nn.Module):
    """Gated MLP (SwiGLU)."""

    def __init__(self, shape: LlamaShape) -> None:
        """Declare the parameters."""
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.width, shape.mlp, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.mlp, shape.width, bias=shape.mlp_bias)

    def forward(self, hidden_SD: Tensor) -> Tensor:
        """down(silu(gate) * up)."""
        gate = functional.silu(self.gate_proj(hidden_SD))
        output: Tensor = self.down_proj(gate * self.up_proj(hidden_SD))
        return output


class _Stack(nn.Module):
    def __init__(self, shape: LlamaShape, dialect: Dialect) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaLayer(shape, dialect) for _ in range(shape.layers))
        self.norm = _Norm(shape, dialect)


class _Norm(nn.Module):
    def __init__(self, shape: LlamaShape, dialect: Dialect) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.width))
        self.epsilon, self.dialect = shape.epsilon, dialect

    def forward(self, x_SD: Tensor) -> Tensor:
        return self.dialect.rms_norm(x_SD, self.weight, self.epsilon)
