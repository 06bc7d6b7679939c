"""In which dtype and how many bits weights are stored, and what a target cannot run."""

from __future__ import annotations

from typing import Final

from gap_export.checkpoint.sources import PackedValues, TensorSource
from gap_export.config.records import DTYPES, CacheBits, Method
from gap_export.interfaces.dialect import ATTENTION, Dialect
from gap_export.pipeline.parameters import HEAD
from gap_export.pipeline.request import ExportRequest
from gap_export.quantization.scheme import packed_scheme
from gap_runtime.bundle.manifest import Part, Quantization
from gap_runtime.errors import ConfigError
from gap_runtime.machines.target import ModelDtype, Target

_INT4_OPSET: Final = 21


def stored_dtype(sources: dict[str, TensorSource]) -> ModelDtype:
    """The dtype that most of the model's bytes have: no conversion is the default."""
    sizes: dict[str, int] = {}
    for source in sources.values():
        for tensor in source.inputs:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.length
    floats = [dtype for dtype in DTYPES if dtype in sizes]
    return max(floats, key=lambda dtype: sizes[dtype]) if floats else "float32"


def settle_quantization(
    request: ExportRequest, sources: dict[str, TensorSource]
) -> Quantization | None:
    """What is quantized, and how; None for nothing.

    Args:
        request: What was asked for.
        sources: The model's tensors, which may have come quantized.
    """
    packed = _packed_values(sources)
    if packed:
        bits = max(each.bits for each in packed.values())
        found: set[Part] = {"head" if name == HEAD else "decoder" for name in packed}
        return Quantization(
            weights="int8" if bits == 8 else "int4",
            method="checkpoint",
            parts=tuple(sorted(found)),
        )
    wanted = request.named.config.quantize
    if wanted.weights is None:
        return None
    usual: Method = "awq" if wanted.weights == "int4" and request.reference else "nearest"
    switches: dict[Part, bool] = {
        "decoder": wanted.decoder,
        "head": wanted.head,
        "vision": wanted.vision,
    }
    return Quantization(
        weights=wanted.weights,
        method=wanted.method or usual,
        parts=tuple(part for part, quantized in switches.items() if quantized),
    )


def require_quantizable(request: ExportRequest, target: Target) -> None:
    """Refuse a quantization that the target's operators cannot say, or that lacks samples.

    Raises:
        ConfigError: It asks for one.
    """
    wanted = request.named.config.quantize
    if wanted.weights is None:
        return
    if not (wanted.decoder or wanted.head or wanted.vision):
        raise ConfigError(
            f"quantize.weights is {wanted.weights}, but quantize.decoder, quantize.head and "
            "quantize.vision are all off; turn one on"
        )
    if wanted.weights == "int4" and target.opset < _INT4_OPSET:
        raise ConfigError(
            f"target '{target.name}': int4 weights need opset {_INT4_OPSET}, its dialect "
            f"'{target.dialect}' is written in {target.opset}; use --quantize int8"
        )
    if wanted.method == "awq" and not request.reference:
        raise ConfigError(
            "quantize.method awq watches PyTorch answer the sample pictures, which "
            "--no-reference leaves out; use --set quantize.method=nearest"
        )


def require_cacheable(
    kv_cache: CacheBits | None, target: Target, dialect: Dialect, head_dim: int
) -> None:
    """Refuse a KV cache in fewer bits where the target's attention cannot read it.

    Args:
        kv_cache: What was asked for; None for the model's dtype.
        target: Kind of machine.
        dialect: Of the target.
        head_dim: Width of the decoder's heads.

    Raises:
        ConfigError: It cannot.
    """
    if kv_cache is None or dialect.takes_int8_cache(head_dim):
        return
    if ATTENTION in dialect.OPERATORS:
        raise ConfigError(
            f"target '{target.name}': its attention on a KV cache of {kv_cache} takes heads of "
            f"multiples of 8 values, the decoder's have {head_dim}; leave --kv-cache out"
        )
    raise ConfigError(
        f"target '{target.name}': its dialect '{target.dialect}' has no attention on a KV cache "
        f"of {kv_cache}; leave --kv-cache out, or use --target cpu or --target cuda"
    )


def require_answers(request: ExportRequest) -> None:
    """Refuse a KV cache in fewer bits whose scales nothing would tell.

    Raises:
        ConfigError: No sample is answered.
    """
    kv_cache = request.named.config.kv_cache
    if kv_cache is not None and not request.reference:
        raise ConfigError(
            f"--kv-cache {kv_cache} takes its scales from PyTorch's answers to the sample "
            "pictures, which are not asked for with --no-reference, or in a sweep; leave one out"
        )


def require_dtype(target: Target, dtype: ModelDtype) -> None:
    """Refuse a dtype that the target has no kernels for.

    Raises:
        ConfigError: It is one.
    """
    if target.dtypes and dtype not in target.dtypes:
        raise ConfigError(
            f"target '{target.name}' has no kernels for {dtype}; use --dtype "
            f"{' or '.join(target.dtypes)}, or --target standard"
        )


def require_packable(
    request: ExportRequest, target: Target, sources: dict[str, TensorSource]
) -> None:
    """Refuse a checkpoint that came quantized in a way that the target cannot run.

    Raises:
        ConfigError: It did.
    """
    named, wanted = request.named.name, request.named.config.quantize
    for name, packed in _packed_values(sources).items():
        if wanted.weights is not None:
            raise ConfigError(
                f"{named}: quantize.weights is {wanted.weights}, but the checkpoint came "
                f"quantized to {packed.bits} bits, which are kept as they are; leave it out, or "
                "give the checkpoint that it was made from"
            )
        scheme = packed_scheme(packed, sources[name].shape[1])
        if scheme.needs_blocks and target.opset < _INT4_OPSET:
            raise ConfigError(
                f"{named}: the checkpoint came quantized in blocks, which need opset "
                f"{_INT4_OPSET}; target '{target.name}' is written in {target.opset}; give the "
                "checkpoint that it was made from, with --quantize int8"
            )
        if scheme.has_zeros and not target.takes_zero_points:
            raise ConfigError(
                f"{named}: '{name}' came quantized with zero points, which engines of target "
                f"'{target.name}' cannot take; give a GPTQ checkpoint made with sym=True, or the "
                "one that it was made from, with --quantize int4"
            )


def _packed_values(sources: dict[str, TensorSource]) -> dict[str, PackedValues]:
    return {name: each.packed for name, each in sources.items() if each.packed is not None}
