"""The Llama decoder and those that differ from it in little; fits gap_export.interfaces.decoder.

    type               biases                   norm of heads    axes of positions
    llama              as configured            no               1
    mistral            none                     no               1
    qwen2              queries, keys, values    no               1
    qwen3              as configured            yes              1
    qwen2_5_vl_text    queries, keys, values    no               3, frequencies in sections
    qwen3_vl_text      as configured            yes              3, frequencies by turns

None may have a window that a prompt outgrows, or rotary frequencies that change as it grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gap_export.blocks.llama_layers import LlamaDecoder, LlamaSizes
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.packed import match_sources, read_packing
from gap_export.checkpoint.sources import (
    TensorSource,
    build_without_memory,
    linear_weights,
    shapes_of,
)
from gap_export.config.families import NO_WAY
from gap_export.errors import CheckpointError
from gap_export.interfaces.decoder import DecoderSpec, SmoothingGroup
from gap_export.interfaces.dialect import Dialect

# P positions, d head width.

EMBEDDING: Final = "language_model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
LAYERS: Final = "language_model.layers"
_TYPES: Final = {
    1: ("llama", "mistral", "qwen2", "qwen3"),
    3: ("qwen2_5_vl_text", "qwen3_vl_text"),
}
"""Of language models, by the axes of their positions."""
_QUERY_BIASED: Final = frozenset({"qwen2", "qwen2_5_vl_text"})
_HEAD_NORMED: Final = frozenset({"qwen3", "qwen3_vl_text"})
_BY_TURNS: Final = frozenset({"qwen3_vl_text"})
_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn", "dynamic")
_GROWING: Final = "dynamic"
"""Its frequencies are the default ones up to the trained number of positions."""


def read_decoder(
    config: Any, where: str, *, is_tied: bool = False, axes: int = 1, planes: int = 0
) -> DecoderSpec:
    """The facts in a text config.

    Args:
        config: The library's.
        where: The file that it is from.
        is_tied: Whether something else says that the head is the embedding table.
        axes: How many position IDs the family gives to a token.
        planes: How many vectors it adds to the hidden states behind the first layers.

    Raises:
        CheckpointError: The config asks for something that this decoder does not have.
    """
    kind, types = config.model_type, _TYPES[axes]
    if kind not in types:
        raise CheckpointError(
            f"{where}: the language model is of type '{kind}', expected "
            f"{', '.join(types[:-1])} or {types[-1]}; {NO_WAY}"
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
    has_bias = getattr(config, "attention_bias", False)
    head_dim = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return DecoderSpec(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        cache_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        max_positions=config.max_position_embeddings,
        axes=axes,
        planes=planes,
        sizes=LlamaSizes(
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            query_bias=has_bias or kind in _QUERY_BIASED,
            output_bias=has_bias,
            mlp_bias=getattr(config, "mlp_bias", False),
            has_head_norms=kind in _HEAD_NORMED,
            frequency_axes=() if axes == 1 else _read_axes(config, where, head_dim // 2),
            is_tied=is_tied or bool(getattr(config, "tie_word_embeddings", False)),
            library_config=config,
        ),
    )


def _read_axes(config: Any, where: str, frequencies: int) -> tuple[int, ...]:
    """On which axis (time, row, column) a token's position turns each rotary frequency.

    Sections lie one behind the other, or rows and columns take every third frequency in turn
    until their sections are used up, and time has all others.
    """
    sections: list[int] = config.rope_parameters.get("mrope_section") or []
    if len(sections) != 3 or sum(sections) != frequencies:
        raise CheckpointError(
            f"{where}: rope_parameters.mrope_section {sections}, expected three numbers that add "
            f"up to {frequencies}"
        )
    if config.model_type not in _BY_TURNS:
        return tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    return tuple(k % 3 if k < 3 * sections[k % 3] else 0 for k in range(frequencies))


def rotary_tables(spec: DecoderSpec, positions: int) -> tuple[Tensor, ...]:
    """Cosine and sine tables [P, d / 2], float32, one row per position ID.

    The length must cover the unpruned sequence: position IDs outrun the cache's slots.

    Raises:
        CheckpointError: The library can make none, or none of that length.
    """
    config = spec.sizes.library_config
    if config.rope_parameters.get("rope_type") == _GROWING and positions > spec.max_positions:
        raise CheckpointError(
            f"rope_type '{_GROWING}' is the same for every length up to {spec.max_positions} "
            f"positions, this prompt and its answer take {positions}; export smaller pictures"
        )
    try:
        rotary = LlamaRotaryEmbedding(config)
        cosine, sine = rotary(torch.zeros(1, 1), torch.arange(positions)[None])
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"rope_parameters {config.rope_parameters!r:.160} cannot be used "
            f"({' '.join(str(error).split()):.160}); download the checkpoint again"
        ) from error
    half = cosine.shape[-1] // 2
    return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()


def build(spec: DecoderSpec, dialect: Dialect, tables: tuple[Tensor, ...]) -> nn.Module:
    """The decoder with its head."""
    return LlamaDecoder(spec, dialect, *tables)


def llama_name(key: str) -> str:
    """Name of a tensor in the modules here, from its key in a language model's own checkpoint."""
    return f"language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key


def tensor_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the decoder, its head and the token embedding table."""
    return shapes_of(_declare(spec)) | {EMBEDDING: (spec.vocabulary, spec.width)}


def optional_tensors(spec: DecoderSpec) -> frozenset[str]:
    """Those that a checkpoint may leave out: a head that is the embedding table."""
    return frozenset({HEAD} if spec.sizes.is_tied else ())


def match_weights(
    checkpoint: Checkpoint,
    decoder: DecoderSpec,
    expected: dict[str, tuple[int, ...]],
    *,
    rename: Callable[[str], str],
    ignored: Sequence[str],
) -> dict[str, TensorSource]:
    """Where the tensors of a model with this decoder lie in one checkpoint; a tied head is found.

    Args:
        checkpoint: The files.
        decoder: What it is made of; its linear layers may be packed.
        expected: Shapes by name, the decoder's among them.
        rename: From a key of the files to a name in the modules here.
        ignored: Patterns of keys that no module takes.

    Raises:
        CheckpointError: One is missing, has another shape or is not known.
    """
    sources = match_sources(
        checkpoint,
        expected,
        packing=read_packing(checkpoint.require_json("config.json"), "config.json"),
        packable=linear_layers(decoder),
        rename=rename,
        ignored=ignored,
        optional=optional_tensors(decoder),
    )
    tie_head(sources)
    return sources


def tie_head(sources: dict[str, TensorSource]) -> None:
    """Take the embedding table for the head where the checkpoint has none of its own."""
    sources.setdefault(HEAD, sources[EMBEDDING])


def linear_layers(spec: DecoderSpec) -> list[str]:
    """Names of the weights of all linear layers, the head among them."""
    return linear_weights(_declare(spec))


def _declare(spec: DecoderSpec) -> nn.Module:
    """The decoder's parameters, without memory and operators."""
    none: Any = None
    tables = (torch.empty(0), torch.empty(0))
    return build_without_memory(lambda: LlamaDecoder(spec, none, *tables))


def smoothing_groups(spec: DecoderSpec) -> list[SmoothingGroup]:
    """Weights whose inputs can be scaled: after both norms, after values and after the gate.

    Grouped values feed several heads each, and biased layers would need their bias scaled; those
    are left.
    """
    sizes: LlamaSizes = spec.sizes
    groups = []
    for k in range(spec.layers):
        layer = f"{LAYERS}.{k}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        makers = {
            f"{layer}.input_layernorm": [f"{attention}.{x}_proj" for x in "qkv"],
            f"{layer}.post_attention_layernorm": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        }
        if sizes.heads == spec.cache_heads and not sizes.query_bias:
            makers[f"{attention}.v_proj"] = [f"{attention}.o_proj"]
        if not sizes.mlp_bias:
            makers[f"{mlp}.up_proj"] = [f"{mlp}.down_proj"]
        groups += [
            SmoothingGroup(
                maker=f"{maker}.weight", readers=tuple(f"{reader}.weight" for reader in readers)
            )
            for maker, readers in makers.items()
        ]
    return groups
