"""Memory and disk of a bundle, from the checkpoint's index alone: no value is read.

    bundle       the weight files that the export would write, and the decoder's rotary tables
    weights      of the vision graph, CLIP's text tower where phrases go through it, the decoder
    cache        slots x layers x 2 x heads x head width x bytes; twice where a target's engines
                 cannot write it in place (`caches_in_place`); what one of int8 takes less than one
                 of the model's dtype is told beside it
    activations  the larger of the vision graph's peak and the prefill's of the longest prompt:
                 the most bytes of tensors that are alive at once when the modules run without
                 values, in the order that they are written in, with attention scores written out
                 where the dialect writes them out
    embedding    the token embedding table, which stays on the host, mapped from its file
    reserve      a constant for firmware, operating system, Python, CUDA and TensorRT

Their sum is held against the memory of the target's smallest machine. An engine may need less,
because it joins operators, or more, for its workspace; building one needs more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypedDict

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gap_export.checkpoint.sources import Shapes
from gap_export.config.records import ExportConfig
from gap_export.graph.decoder import DecoderStage, cache_names
from gap_export.interfaces.family import fill_constants
from gap_export.pipeline.plan import ExportPlan
from gap_export.quantization.scheme import Scheme
from gap_runtime.bundle.manifest import BundleLayout, RatioEntry
from gap_runtime.bundle.tensors import ITEM_BYTES, count_bytes
from gap_runtime.pictures.preprocess import Bucket

RESERVE_MIB: Final = 2048
_MIB: Final = 2**20
_TIGHT_SHARE: Final = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes that a bundle takes, on disk and where it runs.

    `memory_bytes` is that of the target's smallest machine and `fits` whether `total_bytes` are
    within it, `is_tight` whether they are within it and more than nine tenths of it; null where
    the target has no limit. `cache_saved_bytes` is what the KV cache would take more in the
    model's dtype.
    """

    bundle_bytes: int
    vision_weights_bytes: int
    text_weights_bytes: int
    decoder_weights_bytes: int
    cache_bytes: int
    cache_saved_bytes: int
    vision_activations_bytes: int
    prefill_activations_bytes: int
    embedding_bytes: int
    reserve_bytes: int
    total_bytes: int
    memory_bytes: int | None
    fits: bool | None
    is_tight: bool | None


class DryRun(TypedDict):
    """What an export would make: the bundle's folder, its ratios, prompt, and sizes in bytes.

    `layout` counts slots. `memory` is an estimate for the target. `config` is the model file
    with all options over it.
    """

    bundle: str
    ratios: list[RatioEntry]
    layout: BundleLayout
    dtype: str
    checkpoint: str
    weights_bytes: int
    cache_dtype: str
    cache_bytes: int
    prompt: str
    notes: list[str]
    config: ExportConfig
    memory: Estimate


def estimate(plan: ExportPlan) -> Estimate:
    """What the export of a plan takes; some seconds, as all layers are run without values."""
    family, spec = plan.family, plan.spec
    positions = max(plan.layout.at(entry).positions for entry in plan.entries)
    tables = family.DECODER.rotary_tables(spec.decoder, positions)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    towers = {
        bucket.name: _build(plan, mode, partial(_build_tower, plan, bucket))
        for bucket in spec.buckets
    }
    decoder = _build(
        plan,
        mode,
        lambda: DecoderStage(family.DECODER.build(spec.decoder, plan.dialect, tables)),
    )
    projector = _build(plan, mode, lambda: family.build_projector(spec))
    parameters = plan.parameters
    vision_bytes, text_bytes, decoder_bytes = (
        _count(plan, shapes) for shapes in (parameters.vision, parameters.text, parameters.decoder)
    )
    table_bytes = sum(table.nbytes for table in tables)
    if plan.config.kv_cache is not None:
        table_bytes += plan.cache_values_per_slot * ITEM_BYTES["float32"]  # scales, by channel
    decoder_bytes += table_bytes
    embedding = count_bytes((spec.decoder.vocabulary, spec.decoder.width), plan.dtype)
    sides = 1 if plan.target.caches_in_place else 2
    cache = plan.layout.capacity * plan.cache_bytes_per_slot * sides
    vision_peak = max(
        _run_vision(plan, mode, towers[bucket.name], projector, bucket) for bucket in spec.buckets
    )
    prefill_peak = _run_prefill(plan, mode, decoder)
    reserve = RESERVE_MIB * _MIB
    total = (
        vision_bytes
        + text_bytes
        + decoder_bytes
        + cache
        + max(vision_peak, prefill_peak)
        + embedding
        + reserve
    )
    memory = None if plan.target.memory_mib is None else plan.target.memory_mib * _MIB
    return Estimate(
        bundle_bytes=plan.weights.size + table_bytes,
        vision_weights_bytes=vision_bytes,
        text_weights_bytes=text_bytes,
        decoder_weights_bytes=decoder_bytes,
        cache_bytes=cache,
        cache_saved_bytes=plan.layout.capacity * plan.cache_saved_per_slot * sides,
        vision_activations_bytes=vision_peak,
        prefill_activations_bytes=prefill_peak,
        embedding_bytes=embedding,
        reserve_bytes=reserve,
        total_bytes=total,
        memory_bytes=memory,
        fits=None if memory is None else total <= memory,
        is_tight=None if memory is None else is_tight(total, memory),
    )


def is_tight(total: int, memory: int) -> bool:
    """Whether bytes fit in a memory that is sold as so large, but leave little of it.

    A machine keeps some of it for itself: of 8 GiB a Jetson shows about 7.4.
    """
    return _TIGHT_SHARE * memory < total <= memory


def stored_bytes(shape: tuple[int, ...], dtype: str, scheme: Scheme | None) -> int:
    """Bytes of one tensor as it is stored; `dtype` is the model's, which scales have as well."""
    return count_bytes(shape, dtype) if scheme is None else scheme.count_bytes(shape, dtype)


def _count(plan: ExportPlan, parameters: Shapes) -> int:
    """Bytes of a graph's parameters."""
    return sum(
        stored_bytes(shape, plan.dtype, plan.schemes.get(name))
        for name, shape in parameters.items()
    )


def _build_tower(plan: ExportPlan, bucket: Bucket) -> nn.Module:
    return plan.family.build_tower(plan.spec, bucket, plan.tower_needs)


def _build(plan: ExportPlan, mode: FakeTensorMode, build: Callable[[], nn.Module]) -> nn.Module:
    """A module in the plan's dtype, whose parameters take no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, plan.dtype))
    try:
        with mode:
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def _run_vision(
    plan: ExportPlan, mode: FakeTensorMode, tower: nn.Module, projector: nn.Module, bucket: Bucket
) -> int:
    """Most bytes alive at once in a bucket's vision graph, the pruner's own left out."""
    shape = plan.spec.preprocess.pixel_shape(bucket)
    kept = max(entry.kept for entry in plan.entries if entry.bucket == bucket.name)
    fill_constants(tower)
    live = _LiveBytes(tower, projector)
    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), live:
        pixels = torch.empty(shape, dtype=getattr(torch, plan.dtype))
        patches, _ = tower(pixels)
        projector(patches[:, :kept])
    return live.most


def _run_prefill(plan: ExportPlan, mode: FakeTensorMode, decoder: nn.Module) -> int:
    """Most bytes alive at once in a prefill of the longest prompt, caches left out."""
    spec = plan.spec.decoder
    rows = max(plan.layout.at(entry).prompt for entry in plan.entries)
    shape = (1, spec.cache_heads, plan.layout.capacity, spec.head_dim)
    with mode:
        caches = [
            torch.empty(shape, dtype=getattr(torch, plan.dtype)) for _ in cache_names(spec.layers)
        ]
        inputs = (
            torch.empty(1, rows, spec.row_width),
            torch.zeros(spec.axes, rows, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
        )
    # The written caches are the engine's own memory, which is counted as cache.
    live = _LiveBytes(decoder, ignored=shape)
    with mode, torch.no_grad(), live:
        decoder(*inputs, caches)
    return live.most


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators give and somebody still holds."""

    def __init__(self, *modules: nn.Module, ignored: tuple[int, ...] | None = None) -> None:
        """Leave out the modules' own tensors, whatever view of them is taken, and a shape."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.ignored = ignored
        self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(
            tensor.untyped_storage()
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it gives."""
        del types
        given = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) != self.ignored:
                self._count(tensor)
        return given

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = int(storage.nbytes())
        self._known.add(storage)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
