"""What an export will make: every number settled from indices alone, before any work."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from gap_export.checkpoint.index import Checkpoint, open_checkpoint, open_part
from gap_export.checkpoint.sources import PackedValues, TensorSource
from gap_export.checkpoint.tokenizer import read_tokenizer
from gap_export.config import (
    DTYPES,
    ExportConfig,
    Method,
    NamedConfig,
    PruneConfig,
    count_ratios,
    resolve_family,
)
from gap_export.errors import CheckpointError
from gap_export.graph.positions import keeps_raster_order
from gap_export.interfaces.dialect import FUSED, Dialect
from gap_export.interfaces.family import Family, ModelSpec
from gap_export.interfaces.features import Feature, Pruner
from gap_export.interfaces.pruner import load_pruner
from gap_export.pipeline.parameters import HEAD, Parameters, list_parameters
from gap_export.pipeline.prompt import plan_phrase, plan_prompt
from gap_export.pipeline.request import ExportRequest
from gap_export.quantization.awq import find_scaled
from gap_export.quantization.scheme import (
    Scheme,
    choose_schemes,
    packed_scheme,
)
from gap_export.quantization.values import quantize_sources
from gap_export.reference.samples import Sample, read_samples
from gap_export.weights.plan import WeightPlan, plan_weights
from gap_runtime.bundle.manifest import (
    BundleLayout,
    Part,
    PhraseInput,
    Prompt,
    Quantization,
    RatioEntry,
)
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.errors import ConfigError, UnknownNameError, describe_unknown
from gap_runtime.grounding.prompt import PromptEncoder
from gap_runtime.machines.target import ModelDtype, Target, load_target
from gap_runtime.pictures.preprocess import Bucket
from gap_runtime.registry import load_plugin

_INT4_OPSET: Final = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Everything that follows from the request and the checkpoint's index, before any work.

    `entries` are the ratios, for each bucket. `sources` are the model's tensors by name,
    `parameters` those that graphs use, `schemes` how those are stored that are quantized, and
    `weights` the files that all will lie in; what is not known before graphs are traced is the
    order of those that are written anew.
    """

    request: ExportRequest
    target: Target
    dialect: Dialect
    checkpoint: Checkpoint
    family_name: str
    family: Family
    pruner: Pruner
    spec: ModelSpec
    sources: dict[str, TensorSource]
    dtype: ModelDtype
    quantization: Quantization | None
    parameters: Parameters
    schemes: dict[str, Scheme]
    weights: WeightPlan
    layout: BundleLayout
    entries: tuple[RatioEntry, ...]
    phrase: PhraseInput | None
    prompt: Prompt
    tokenizer: Tokenizer | None
    samples: list[Sample]
    out: Path

    @property
    def name(self) -> str:
        """Of the model, as it was asked for."""
        return self.request.named.name

    @property
    def config(self) -> ExportConfig:
        """All settings."""
        return self.request.named.config

    @property
    def prune(self) -> PruneConfig:
        """Those of the pruning."""
        return self.config.prune

    @property
    def cache_bytes_per_slot(self) -> int:
        """Bytes of the KV cache per slot, all layers."""
        spec = self.spec.decoder
        return 2 * spec.layers * spec.cache_heads * spec.head_dim * ITEM_BYTES[self.dtype]

    @property
    def ratios(self) -> tuple[float, ...]:
        """What its entries are called by, each once."""
        return tuple(dict.fromkeys(entry.ratio for entry in self.entries))

    @property
    def weights_bytes(self) -> int:
        """Bytes of the checkpoint's tensors."""
        files = {each for source in self.sources.values() for each in source.inputs}
        return sum(tensor.length for tensor in files)

    @property
    def encoder(self) -> PromptEncoder:
        """What makes tokens of phrases, as the bundle will; there must be a tokenizer."""
        assert self.tokenizer is not None
        return PromptEncoder(self.tokenizer, self.prompt, rows=self.spec.decoder.vocabulary)

    @property
    def reads_clip(self) -> bool:
        """Whether phrases go through CLIP's text tower."""
        return _reads_clip(self.phrase)

    def reads_phrase(self, entry: RatioEntry) -> bool:
        """Whether the vision graph of a ratio takes the phrase."""
        return self.phrase is not None and _is_chosen(entry, self.prune)

    @property
    def tower_needs(self) -> frozenset[Feature]:
        """Needs of the pruner that the tower serves; others come later or with the phrase."""
        return _tower_needs(self.pruner, self.phrase)

    def bucket(self, entry: RatioEntry) -> Bucket:
        """The bucket of a ratio."""
        return next(bucket for bucket in self.spec.buckets if bucket.name == entry.bucket)


def plan_export(request: ExportRequest) -> ExportPlan:
    """Read configs and indices and settle every number, without tracing or writing.

    Raises:
        GapError: Anything about the request or the checkpoint that cannot work.
    """
    target = load_target(request.target)
    dialect = _load_dialect(target)
    model = read_model(request.named)
    config, spec = request.named.config, model.spec
    _require_quantizable(request, target)
    entries = tuple(
        RatioEntry(
            ratio=ratio,
            bucket=bucket.name,
            patches=bucket.patches,
            kept=kept,
            extra=_count_extra(model.pruner, config.prune, kept, bucket),
        )
        for bucket in spec.buckets
        for ratio, kept in count_ratios(
            config.prune,
            bucket.patches,
            len(bucket.fixed),
            named_by=max(each.patches for each in spec.buckets),
        )
    )
    sources = model.family.find_weights(model.checkpoint, spec)
    _require_packable(request, target, sources)
    tokenizer = read_tokenizer(spec.tokenizer)
    prompt, prefix, suffix = plan_prompt(
        request.named, tokenizer, spec, reference=request.reference
    )
    layout = BundleLayout(prefix=prefix, suffix=suffix, answer=config.prompt.answer, capacity=0)
    capacity = max(layout.at(entry).capacity for entry in entries)
    counts = "-".join(
        f"{'-'.join(str(e.kept) for e in entries if e.bucket == b.name)}of{b.patches}"
        for b in spec.buckets
    )
    out = (request.out or Path(f"{request.named.name}-{counts}")).expanduser()
    out = out.resolve() if out.is_symlink() else out
    dtype = config.dtype or target.dtype or _stored_dtype(sources)
    phrase = plan_phrase(model.pruner, spec.text, config.prune)
    needs = _tower_needs(model.pruner, phrase)
    pruned = {entry.bucket for entry in entries if _is_chosen(entry, config.prune)}
    parameters = list_parameters(
        model.family,
        spec,
        dialect,
        {each.name: needs if each.name in pruned else frozenset() for each in spec.buckets},
        reads_clip=_reads_clip(phrase),
    )
    quantization = _settle_quantization(request, sources)
    schemes = choose_schemes(
        parameters.linear, sources, quantization, fuses=FUSED in dialect.OPERATORS
    )
    samples: list[Sample] = []
    if request.reference:
        samples = read_samples(config.check.samples)
    plan = ExportPlan(
        request=request,
        target=target,
        dialect=dialect,
        checkpoint=model.checkpoint,
        family_name=model.family_name,
        family=model.family,
        pruner=model.pruner,
        spec=spec,
        sources=sources,
        dtype=dtype,
        quantization=quantization,
        parameters=parameters,
        schemes=schemes,
        weights=_plan_weights(model, parameters, schemes, sources, quantization, dtype),
        layout=replace(layout, capacity=capacity),
        entries=entries,
        phrase=phrase,
        prompt=prompt,
        tokenizer=tokenizer,
        samples=samples,
        out=out,
    )
    for sample in samples:
        plan.encoder.encode_within(sample.phrase, plan.layout)
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint, its family and the pruner that is asked for."""

    checkpoint: Checkpoint
    family_name: str
    family: Family
    pruner: Pruner
    spec: ModelSpec


def read_model(named: NamedConfig) -> Model:
    """Open a configured checkpoint with its parts, and see that the pruner can be served.

    Raises:
        GapError: The checkpoint is broken, or lacks what the pruner needs.
    """
    config = named.config
    family_name = config.family
    parts_beside: frozenset[str] = frozenset()
    if family_name:
        family: Family = load_plugin("gap_export.models", family_name, "family")
        usual = {**family.PARTS, **config.parts}
        parts_beside = frozenset(Path(location).name for location in usual.values())
    checkpoint = open_checkpoint(config.checkpoint, config.revision, ignored=parts_beside)
    if not family_name:
        family_name = resolve_family(checkpoint.folder)
        family = load_plugin("gap_export.models", family_name, "family")
    strategy = config.prune.name
    pruner = load_pruner(config.prune.strategy)
    source = config.prune.phrase or ("clip" if "clip" in family.PARTS else "embeddings")
    reads_clip = Feature.TEXT in pruner.NEEDS and source == "clip"
    unknown = sorted(set(config.parts) - set(family.PARTS))
    if unknown:
        raise UnknownNameError(describe_unknown("part", unknown[0], family.PARTS))
    parts = _open_parts(checkpoint, family, config, reads_clip=reads_clip)
    checkpoint = replace(checkpoint, parts=parts)
    spec = family.read_spec(checkpoint, config)
    if config.box.frame is not None:
        spec = replace(spec, box=replace(spec.box, frame=config.box.frame))
    given = set(spec.features) | {Feature.TOKENS, Feature.TEXT}
    if not reads_clip:
        given.add(Feature.TEXT_PATCHES)
    lacking = sorted(need.value for need in pruner.NEEDS - given)
    if reads_clip and spec.text is None:
        raise ConfigError(
            f"pruner '{strategy}' compares patches with the phrase through CLIP's text tower, "
            f"which family '{family_name}' does not have; use --set prune.phrase=embeddings"
        )
    if lacking:
        raise ConfigError(
            f"pruner '{strategy}' needs {', '.join(lacking)}, which family '{family_name}' does "
            "not give; choose another --pruner"
        )
    return Model(
        checkpoint=checkpoint,
        family_name=family_name,
        family=family,
        pruner=pruner,
        spec=spec,
    )


def _open_parts(
    checkpoint: Checkpoint, family: Family, config: ExportConfig, *, reads_clip: bool
) -> dict[str, Checkpoint]:
    """The further checkpoints that a model is made of, by role."""
    parts = {}
    for role, location in (family.find_parts(checkpoint, text=reads_clip) | config.parts).items():
        if not location:
            continue
        try:
            parts[role] = open_part(location, checkpoint.folder, role)
        except CheckpointError as error:
            if role in config.parts or role in family.find_parts(checkpoint, text=False):
                raise
            # Only the phrase wants it, which can be read in another way.
            raise CheckpointError(
                f"{error}; or compare with the language model's own embeddings: "
                "--set prune.phrase=embeddings"
            ) from error
    return parts


def _count_extra(pruner: Pruner, config: PruneConfig, kept: int, bucket: Bucket) -> int:
    """Extra tokens of a ratio: none where nothing is removed that they could be made of."""
    made = kept < bucket.patches and config.extra_token != "drop"
    return pruner.EXTRA if made else 0


def _is_chosen(entry: RatioEntry, config: PruneConfig) -> bool:
    """Whether a pruner chooses at a ratio: not where all tokens stay in their order."""
    return entry.kept < entry.patches or not keeps_raster_order(config.positions)


def _reads_clip(phrase: PhraseInput | None) -> bool:
    return phrase is not None and phrase.source == "clip"


def _tower_needs(pruner: Pruner, phrase: PhraseInput | None) -> frozenset[Feature]:
    later = {Feature.TOKENS, Feature.TEXT}
    if not _reads_clip(phrase):
        later.add(Feature.TEXT_PATCHES)
    return pruner.NEEDS - later


def _settle_quantization(
    request: ExportRequest, sources: dict[str, TensorSource]
) -> Quantization | None:
    """What is quantized, and how; None for nothing."""
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


def _plan_weights(
    model: Model,
    parameters: Parameters,
    schemes: dict[str, Scheme],
    sources: dict[str, TensorSource],
    quantization: Quantization | None,
    dtype: ModelDtype,
) -> WeightPlan:
    """The files of all that graphs use and of the embedding table."""
    wanted = {
        name: sources[name]
        for name in (*parameters.all, model.family.DECODER.EMBEDDING)
        if name not in schemes
    }
    for name, shape in parameters.all.items():
        assert sources[name].shape == shape, name
    scaled: Collection[str] = ()
    if quantization is not None and quantization.method == "awq":
        scaled = find_scaled(model.family.DECODER.smoothing_groups(model.spec.decoder), schemes)
    return plan_weights(
        model.checkpoint,
        wanted | quantize_sources(sources, schemes, {}, dtype=dtype),
        dtype=dtype,
        changed=scaled,
    )


def _load_dialect(target: Target) -> Dialect:
    """The dialect of a target, which must have the target's opset."""
    dialect: Dialect = load_plugin("gap_export.dialects", target.dialect, "dialect")
    if target.opset not in dialect.OPSETS:
        have = ", ".join(str(opset) for opset in sorted(dialect.OPSETS))
        raise ConfigError(
            f"target '{target.name}': dialect '{target.dialect}' has no opset {target.opset}; "
            f"have {have}"
        )
    return dialect


def _require_quantizable(request: ExportRequest, target: Target) -> None:
    """Refuse a quantization that the target's operators cannot say, or that lacks samples."""
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


def _packed_values(sources: dict[str, TensorSource]) -> dict[str, PackedValues]:
    return {name: each.packed for name, each in sources.items() if each.packed is not None}


def _require_packable(
    request: ExportRequest, target: Target, sources: dict[str, TensorSource]
) -> None:
    """Refuse a checkpoint that came quantized in a way that the target cannot run."""
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


def _stored_dtype(sources: dict[str, TensorSource]) -> ModelDtype:
    """The dtype that most of the model's bytes have: no conversion is the default."""
    sizes: dict[str, int] = {}
    for source in sources.values():
        for tensor in source.inputs:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.length
    floats = [dtype for dtype in DTYPES if dtype in sizes]
    return max(floats, key=lambda dtype: sizes[dtype]) if floats else "float32"
