"""The stages of a bundle: their inputs and outputs, and the road from module to proved file."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Final

import onnx_ir as ir

from gap_export.graph.decoder import DecoderStage, decoder_inputs, decoder_outputs
from gap_export.graph.text import TextStage, text_inputs, text_outputs
from gap_export.graph.vision import (
    PruneStage,
    TowerStage,
    prune_outputs,
    sort_features,
    tower_inputs,
    tower_outputs,
)
from gap_export.interfaces.dialect import FUSED
from gap_export.interfaces.family import (
    build_fixed_tokens,
    build_text_tower,
    fill_constants,
    geometry_of,
)
from gap_export.interfaces.features import Feature
from gap_export.pipeline.plan import ExportPlan
from gap_export.quantization.graph import quantize_graph
from gap_export.quantization.heads import pack_heads
from gap_export.tracing.graph import Traced
from gap_export.tracing.keep_batch import keep_batch
from gap_export.tracing.proof import prove_graph
from gap_export.tracing.repeat_layers import trace_stack
from gap_export.tracing.trace import trace
from gap_export.weights.bind import bind_weights
from gap_export.weights.plan import WeightPlan
from gap_export.weights.write import write_placeholders
from gap_runtime.bundle.manifest import DECODER, TEXT, VISION, RatioEntry, Role, Stage
from gap_runtime.bundle.tensors import FREE_LOGITS, FREE_ROWS
from gap_runtime.pictures.preprocess import Bucket

_NOT_IN_GRAPHS: Final = frozenset(
    {
        "box",
        "buckets",
        "image_text",
        "image_token_id",
        "notes",
        "prefix",
        "stop_ids",
        "template",
        "tokenizer",
    }
)
"""Facts of a model that no graph is made from; each graph is of one bucket, which is told."""


def model_key(plan: ExportPlan) -> tuple[object, ...]:
    """What every graph depends on: equal keys of two plans mean that their graphs can be equal.

    Each `*_key` holds all that the `trace_*` beside it reads; places of files are no part of it.
    """
    facts = {
        each.name: getattr(plan.spec, each.name)
        for each in fields(plan.spec)
        if each.name not in _NOT_IN_GRAPHS
    }
    if plan.spec.text is not None:
        facts["text"] = replace(plan.spec.text, tokenizer=Path())
    return plan.family, plan.dialect, plan.target.opset, plan.dtype, repr(facts)


def tower_key(plan: ExportPlan, bucket: Bucket) -> tuple[object, ...]:
    """What `trace_tower` reads."""
    return "tower", *model_key(plan), repr(bucket), plan.tower_needs


def trace_tower(plan: ExportPlan, bucket: Bucket) -> Traced:
    """The tower's graph, the same for all ratios."""
    spec, needs = plan.spec, plan.tower_needs
    return trace_stack(
        lambda: TowerStage(plan.family.build_tower(spec, bucket, needs), needs),
        f"tower.{plan.family.TOWER_LAYERS}",
        dtype=plan.dtype,
        dialect=plan.dialect,
        opset=plan.target.opset,
        inputs=tower_inputs(spec, bucket),
        outputs=tower_outputs(spec, bucket, needs, plan.dtype),
        finish=lambda stage: fill_constants(stage.tower),  # type: ignore[arg-type]
    )


def pruning_key(plan: ExportPlan, entry: RatioEntry) -> tuple[object, ...]:
    """What `trace_pruning` reads."""
    return (
        "pruning",
        *model_key(plan),
        repr(plan.bucket(entry)),
        plan.tower_needs,
        plan.reads_clip,
        plan.reads_phrase(entry),
        # The module: a file of the user's may have been changed and loaded anew.
        plan.pruner,
        # Which ratio it is follows from the layout.
        replace(plan.prune, ratios=(), keep=()),
        plan.layout.at(entry),
        entry.kept,
        plan.coordinates.get(entry.bucket, ()),
    )


def trace_pruning(plan: ExportPlan, entry: RatioEntry) -> Traced:
    """The graph from patches to visual tokens, kept index and position IDs at one ratio."""
    layout, spec = plan.layout.at(entry), plan.spec
    bucket = plan.bucket(entry)
    between = tower_outputs(spec, bucket, plan.tower_needs, plan.dtype)
    phrase = text_outputs(_phrase_width(plan)) if plan.reads_phrase(entry) else []
    return trace(
        lambda: PruneStage(
            plan.pruner,
            plan.family.build_projector(spec),
            build_fixed_tokens(plan.family, spec, bucket),
            config=plan.prune,
            layout=layout,
            geometry=geometry_of(bucket),
            fixed=bucket.fixed,
            given=[*sort_features(plan.tower_needs), *([Feature.TEXT] if phrase else [])],
            text_sign=-1 if plan.reads_clip else 1,
            grid=spec.position_grid(bucket),
            planes=spec.decoder.planes,
            coordinates=plan.coordinates.get(bucket.name, ()),
        ),
        dtype=plan.dtype,
        dialect=plan.dialect,
        opset=plan.target.opset,
        inputs=[*between, *phrase],
        outputs=prune_outputs(spec.decoder, layout),
        nested=len(between) - 1 + len(phrase),
    )


def text_key(plan: ExportPlan) -> tuple[object, ...]:
    """What `trace_text` reads."""
    return "text", *model_key(plan), plan.reads_clip


def trace_text(plan: ExportPlan) -> Traced:
    """CLIP's text tower, where graphs read the phrase through it."""
    text = plan.spec.text
    assert text is not None
    return trace(
        lambda: TextStage(build_text_tower(plan.family, plan.spec)),
        dtype=plan.dtype,
        dialect=plan.dialect,
        opset=plan.target.opset,
        inputs=text_inputs(text),
        outputs=text_outputs(text.width),
        finish=lambda stage: fill_constants(stage.tower),  # type: ignore[arg-type]
    )


def decoder_key(plan: ExportPlan) -> tuple[object, ...]:
    """What `trace_decoder` reads."""
    return "decoder", *model_key(plan), plan.layout.capacity, _positions(plan)


def trace_decoder(plan: ExportPlan) -> Traced:
    """The decoder's graph, the same for all ratios and position modes."""
    decoder, spec = plan.family.DECODER, plan.spec.decoder
    tables = decoder.rotary_tables(spec, _positions(plan))
    capacity = plan.layout.capacity
    return trace_stack(
        lambda: DecoderStage(decoder.build(spec, plan.dialect, tables)),
        f"decoder.{decoder.LAYERS}",
        dtype=plan.dtype,
        dialect=plan.dialect,
        opset=plan.target.opset,
        inputs=decoder_inputs(spec, capacity, plan.dtype),
        outputs=decoder_outputs(spec, capacity, plan.dtype),
        nested=2 * spec.layers,
    )


def _positions(plan: ExportPlan) -> int:
    """How many position IDs a bundle can use."""
    return max(plan.layout.at(entry).positions for entry in plan.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """All graphs of a bundle; vision graphs in the order of the plan's entries."""

    visions: tuple[Traced, ...]
    decoder: Traced
    text: Traced | None

    @property
    def all(self) -> list[Traced]:
        """Every graph."""
        return [*self.visions, self.decoder, *([self.text] if self.text else [])]


def quantize_graphs(plan: ExportPlan, graphs: Graphs) -> Graphs:
    """The graphs with quantized weights in the linear layers that the plan says."""
    decoder = quantize_graph(graphs.decoder, plan.schemes)
    if decoder.parameters != graphs.decoder.parameters and FUSED in plan.dialect.OPERATORS:
        # What came quantized from a checkpoint is made, not encoded.
        joins = plan.quantization is not None and plan.quantization.method != "checkpoint"
        decoder = pack_heads(keep_batch(decoder), joins=joins)
    visions = tuple(quantize_graph(each, plan.schemes) for each in graphs.visions)
    return replace(graphs, visions=visions, decoder=decoder)


def write_graphs(
    plan: ExportPlan, weights: WeightPlan, folder: Path, graphs: Graphs
) -> list[Stage]:
    """Write and prove every graph beside placeholders of the weights.

    Placeholders, because the ONNX checker refuses hard links, and because a graph that fails
    should do so before gigabytes are copied.
    """
    write_placeholders(weights, folder)
    stages = []
    for entry, vision in zip(plan.entries, graphs.visions, strict=True):
        bucket = f"-{entry.bucket}" if entry.bucket else ""
        name = f"vision{bucket}-{entry.kept}of{entry.patches}"
        stages.append(_describe_stage(name, VISION, vision, entry))
        _write_graph(plan, vision, weights, folder, stages[-1])
    if graphs.text is not None:
        stages.append(_describe_stage(TEXT, TEXT, graphs.text, None))
        _write_graph(plan, graphs.text, weights, folder, stages[-1])
    stages.append(_describe_stage(DECODER, DECODER, graphs.decoder, None))
    _write_graph(plan, graphs.decoder, weights, folder, stages[-1])
    return stages


def _phrase_width(plan: ExportPlan) -> int:
    """Width of what stands for the phrase: CLIP's features, or the decoder's embeddings."""
    text = plan.spec.text
    return text.width if plan.reads_clip and text else plan.spec.decoder.width


def _describe_stage(name: str, role: Role, traced: Traced, entry: RatioEntry | None) -> Stage:
    return Stage(
        name=name,
        role=role,
        file=f"{name}.onnx",
        bucket=entry.bucket if entry else None,
        ratio=entry.ratio if entry else None,
        kept=entry.kept if entry else None,
        inputs=traced.inputs,
        outputs=traced.outputs,
    )


def _write_graph(
    plan: ExportPlan, traced: Traced, weights: WeightPlan, folder: Path, stage: Stage
) -> None:
    path = folder / stage.file
    traced = bind_weights(traced, weights, folder)
    traced.model.graph.name = stage.name
    traced.model.producer_name = "gap-export"
    traced.model.producer_version = metadata.version("gap-export")
    ir.save(traced.model, path)
    prove_graph(
        path,
        inputs=stage.inputs,
        outputs=stage.outputs,
        opset=plan.target.opset,
        operators=plan.dialect.OPERATORS,
        free=frozenset({FREE_ROWS, FREE_LOGITS} if stage.role == DECODER else ()),
    )
