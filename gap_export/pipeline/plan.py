"""What an export will make: every number settled from indices alone, before any work."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from gap_export.checkpoint.index import Checkpoint, Fetch
from gap_export.checkpoint.sources import TensorSource
from gap_export.checkpoint.tokenizer import read_tokenizer
from gap_export.config.counts import count_ratios
from gap_export.config.pruners import IVC
from gap_export.config.records import ExportConfig, PruneConfig
from gap_export.graph.coordinates import find_coordinates, find_ids
from gap_export.graph.positions import keeps_raster_order
from gap_export.interfaces.dialect import FUSED, Dialect
from gap_export.interfaces.family import Family, ModelSpec
from gap_export.interfaces.features import Feature, Pruner, settle_needs
from gap_export.pipeline.model import Model, read_model
from gap_export.pipeline.parameters import Parameters, list_parameters
from gap_export.pipeline.precision import (
    require_cacheable,
    require_dtype,
    require_packable,
    require_quantizable,
    settle_quantization,
    stored_dtype,
)
from gap_export.pipeline.prompt import plan_phrase, plan_prompt
from gap_export.pipeline.request import ExportRequest
from gap_export.quantization.awq import find_scaled
from gap_export.quantization.scheme import (
    Scheme,
    choose_schemes,
)
from gap_export.quantization.values import quantize_sources
from gap_export.reference.samples import Sample, read_samples
from gap_export.weights.plan import WeightPlan, plan_weights
from gap_runtime.bundle.manifest import (
    BundleLayout,
    CacheDtype,
    PhraseInput,
    Prompt,
    Quantization,
    RatioEntry,
)
from gap_runtime.bundle.ranges import is_plain_name
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.errors import ConfigError
from gap_runtime.grounding.prompt import PromptEncoder
from gap_runtime.machines.target import ModelDtype, Target, load_target
from gap_runtime.pictures.preprocess import Bucket
from gap_runtime.records.files import expand, resolve
from gap_runtime.registry import load_plugin


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Everything that follows from the request and the checkpoint's index, before any work.

    `entries` are the ratios, for each bucket. `sources` are the model's tensors by name,
    `parameters` those that graphs use, `schemes` how those are stored that are quantized, and
    `weights` the files that all will lie in; what is not known before graphs are traced is the
    order of those that are written anew. `coordinates` are the tokens, by bucket, that stay
    whatever the pruner chooses.
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
    coordinates: dict[str, tuple[int, ...]]
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
    def cache_dtype(self) -> CacheDtype:
        """Of the KV cache."""
        return self.config.kv_cache or self.dtype

    @property
    def cache_values_per_slot(self) -> int:
        """Values of the KV cache per slot, all layers."""
        spec = self.spec.decoder
        return 2 * spec.layers * spec.cache_heads * spec.head_dim

    @property
    def cache_bytes_per_slot(self) -> int:
        """Bytes of the KV cache per slot, all layers."""
        return self.cache_values_per_slot * ITEM_BYTES[self.cache_dtype]

    @property
    def cache_saved_per_slot(self) -> int:
        """Bytes per slot that the KV cache takes less than in the model's dtype."""
        return self.cache_values_per_slot * ITEM_BYTES[self.dtype] - self.cache_bytes_per_slot

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
        return _tower_needs(self.pruner, self.phrase, self.spec)

    def bucket(self, entry: RatioEntry) -> Bucket:
        """The bucket of a ratio."""
        return next(bucket for bucket in self.spec.buckets if bucket.name == entry.bucket)


def plan_export(request: ExportRequest, fetch: Fetch | None = None) -> ExportPlan:
    """Read configs and indices and settle every number, without tracing or writing.

    Args:
        request: What to export.
        fetch: How to come by what is not on this machine, other than by downloading all of it.

    Raises:
        GapError: Anything about the request or the checkpoint that cannot work.
    """
    target = load_target(request.target)
    dialect = _load_dialect(target)
    model = read_model(request.named, fetch)
    request = replace(request, named=model.named)
    config, spec = model.named.config, model.spec
    require_quantizable(request, target)
    entries = _settle_entries(model, config.prune)
    sources = model.family.find_weights(model.checkpoint, spec)
    require_packable(request, target, sources)
    require_cacheable(config.kv_cache, target, dialect, spec.decoder.head_dim)
    tokenizer = read_tokenizer(spec.tokenizer)
    prompt, prefix, suffix = plan_prompt(
        request.named, tokenizer, spec, reference=request.reference
    )
    layout = BundleLayout(prefix=prefix, suffix=suffix, answer=config.prompt.answer, capacity=0)
    capacity = max(layout.at(entry).capacity for entry in entries)
    dtype = config.dtype or target.dtype or stored_dtype(sources)
    require_dtype(target, dtype)
    phrase = plan_phrase(model.pruner, spec.text, config.prune)
    needs = _tower_needs(model.pruner, phrase, spec)
    pruned = {entry.bucket for entry in entries if _is_chosen(entry, config.prune)}
    parameters = list_parameters(
        model.family,
        spec,
        dialect,
        {each.name: needs if each.name in pruned else frozenset() for each in spec.buckets},
        reads_clip=_reads_clip(phrase),
    )
    quantization = settle_quantization(request, sources)
    schemes = choose_schemes(
        parameters.linear,
        sources,
        quantization,
        fuses=FUSED in dialect.OPERATORS,
        # In 16 bits the product itself would round to them what is kept in float32 otherwise.
        fuses_whole=dialect.FUSES_WHOLE and dtype == "float32",
        block=target.block,
    )
    samples = read_samples(config.check.samples) if request.reference else []
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
        coordinates=_plan_coordinates(model, config.prune, prefix, entries),
        phrase=phrase,
        prompt=prompt,
        tokenizer=tokenizer,
        samples=samples,
        out=_settle_out(request, spec, entries),
    )
    for sample in samples:
        plan.encoder.encode_within(sample.phrase, plan.layout)
    return plan


def _settle_entries(model: Model, prune: PruneConfig) -> tuple[RatioEntry, ...]:
    """Every ratio of every bucket as counts of tokens."""
    return tuple(
        RatioEntry(
            ratio=ratio,
            bucket=bucket.name,
            patches=bucket.patches,
            kept=kept,
            extra=_count_extra(model.pruner, prune, kept, bucket),
        )
        for bucket in model.spec.buckets
        for ratio, kept in count_ratios(
            prune,
            bucket.patches,
            len(bucket.fixed),
            named_by=max(each.patches for each in model.spec.buckets),
        )
    )


def _plan_coordinates(
    model: Model, prune: PruneConfig, prefix: int, entries: tuple[RatioEntry, ...]
) -> dict[str, tuple[int, ...]]:
    """Tokens that stay whatever the pruner chooses, counted among the removable ones, by bucket.

    Raises:
        ConfigError: A count leaves nothing for the pruner to choose.
    """
    if not prune.keeps_coordinates:
        return {}
    spec, found = model.spec, {}
    for bucket in spec.buckets:
        ids = find_ids(bucket.removable, prefix, spec.position_grid(bucket))
        tables = model.family.DECODER.rotary_tables(spec.decoder, 1 + max(map(max, ids)))
        found[bucket.name] = find_coordinates(tables, ids, prune.ivc)
    for entry in entries:
        fixed = next(len(b.fixed) for b in spec.buckets if b.name == entry.bucket)
        least = fixed + len(found[entry.bucket]) + 1
        if entry.kept < min(least, entry.patches):
            raise ConfigError(
                f"keep {entry.kept} of {entry.patches} with {IVC}: {least - 1} visual tokens "
                f"stay anyway; keep at least {least}, or lower prune.ivc, which is {prune.ivc:g}"
            )
    return found


def _settle_out(request: ExportRequest, spec: ModelSpec, entries: tuple[RatioEntry, ...]) -> Path:
    """The bundle's folder: the one that was asked for, or one that is named by the counts."""
    counts = "-".join(
        f"{'-'.join(str(e.kept) for e in entries if e.bucket == b.name)}of{b.patches}"
        for b in spec.buckets
    )
    out = expand(request.out or Path(f"{request.named.name}-{counts}"))
    if out.is_symlink() or out.name in {"", ".."}:
        out = resolve(out)
    if str(out).startswith("~") or not is_plain_name(out.name):
        raise ConfigError(
            f"{out!s:.200}: no place for a bundle; give --out a folder whose name is printable, "
            "without \\, and at most 200 characters long"
        )
    return out


def _count_extra(pruner: Pruner, config: PruneConfig, kept: int, bucket: Bucket) -> int:
    """Extra tokens of a ratio: none where nothing is removed that they could be made of."""
    made = kept < bucket.patches and config.extra_token != "drop"
    return pruner.EXTRA if made else 0


def _is_chosen(entry: RatioEntry, config: PruneConfig) -> bool:
    """Whether a pruner chooses at a ratio: not where all tokens stay in their order."""
    return entry.kept < entry.patches or not keeps_raster_order(config.positions)


def _reads_clip(phrase: PhraseInput | None) -> bool:
    return phrase is not None and phrase.source == "clip"


def _tower_needs(
    pruner: Pruner, phrase: PhraseInput | None, spec: ModelSpec
) -> frozenset[Feature]:
    later = {Feature.TOKENS, Feature.TEXT}
    if not _reads_clip(phrase):
        later.add(Feature.TEXT_PATCHES)
    return settle_needs(pruner.NEEDS, spec.features) - later


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
