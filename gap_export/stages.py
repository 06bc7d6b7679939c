"""The stages of a bundle: their inputs and outputs, and the road from module to proved file."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Final

import onnx_ir as ir

from gap_export.config import OPSET
from gap_export.features import Feature
from gap_export.graph.decoder import DecoderStage, cache_names
from gap_export.graph.vision import PruneStage, TowerStage
from gap_export.onnx_rules import prove_graph
from gap_export.plan import ExportPlan
from gap_export.tracing import FREE_ROWS, Traced, trace
from gap_export.weights import WeightPlan, bind_weights, write_placeholders
from gap_runtime.manifest import DECODER, VISION, Stage
from gap_runtime.tensors import TensorSpec

_DECODER_FILE: Final = "decoder.onnx"


def trace_tower(plan: ExportPlan) -> Traced:
    """The tower's graph, the same for all ratios."""
    spec, needs = plan.spec, plan.pruner.NEEDS
    return trace(
        lambda: TowerStage(plan.family.build_tower(spec, needs), needs),
        dtype=plan.dtype,
        inputs=[
            TensorSpec(
                name="pixels",
                dtype="float32",
                shape=(1, 3, spec.image_side, spec.image_side),
                meaning="normalized picture",
            )
        ],
        outputs=_between(plan),
        finish=lambda stage: plan.family.fill_constants(stage.tower),  # type: ignore[arg-type]
    )


def trace_pruning(plan: ExportPlan, kept: int) -> Traced:
    """The graph from patches to visual tokens, kept index and position IDs at one kept count."""
    layout, spec = plan.layout.at(kept), plan.spec
    return trace(
        lambda: PruneStage(
            plan.pruner,
            plan.family.build_projector(spec),
            config=plan.request.named.config.prune,
            layout=layout,
            grid=spec.grid,
        ),
        dtype=plan.dtype,
        inputs=_between(plan),
        outputs=[
            TensorSpec(
                name="visual_tokens",
                dtype="float32",
                shape=(1, layout.visual, spec.width),
                meaning="tokens of the kept patches, in slot order",
            ),
            TensorSpec(
                name="kept_index",
                dtype="int64",
                shape=(1, kept),
                meaning="patch that each visual slot holds",
            ),
            TensorSpec(
                name="position_ids",
                dtype="int64",
                shape=(1, layout.prompt),
                meaning="position of every slot of the longest prompt",
            ),
        ],
        nested=len(plan.pruner.NEEDS),
    )


def trace_decoder(plan: ExportPlan) -> Traced:
    """The decoder's graph, the same for all ratios and position modes."""
    spec = plan.spec
    cache_shape = (1, spec.cache_heads, plan.layout.capacity, spec.head_dim)
    names = cache_names(spec.layers)
    caches = [
        TensorSpec(
            name=name,
            dtype=plan.dtype,
            shape=cache_shape,
            meaning=f"{name.split('_')[1]}s so far, layer {int(name.rpartition('_')[2])}",
        )
        for name in names
    ]
    widest = max(kept for _, kept in plan.pairs)
    tables = plan.family.rotary_tables(spec, plan.layout.at(widest).positions)
    return trace(
        lambda: DecoderStage(plan.family.build_decoder(spec, tables)),
        dtype=plan.dtype,
        inputs=[
            TensorSpec(
                name="embeddings",
                dtype="float32",
                shape=(1, FREE_ROWS, spec.width),
                meaning="prompt rows, or one token",
            ),
            TensorSpec(
                name="position_ids",
                dtype="int64",
                shape=(1, FREE_ROWS),
                meaning="rotary position of each row",
            ),
            TensorSpec(
                name="write_slot", dtype="int64", shape=(1,), meaning="cache slot of row 0"
            ),
            TensorSpec(
                name="logits_row", dtype="int64", shape=(1,), meaning="row whose logits are wanted"
            ),
            *caches,
        ],
        outputs=[
            TensorSpec(
                name="logits",
                dtype="float32",
                shape=(1, spec.vocabulary),
                meaning="of the wanted row",
            ),
            *(
                TensorSpec(
                    name=f"next_{cache.name}",
                    dtype=cache.dtype,
                    shape=cache.shape,
                    meaning="the same memory, with the rows written",
                )
                for cache in caches
            ),
        ],
        nested=len(caches),
    )


def write_graphs(
    plan: ExportPlan,
    weights: WeightPlan,
    folder: Path,
    visions: dict[int, Traced],
    decoder: Traced,
) -> list[Stage]:
    """Write and prove every graph beside placeholders of the weights.

    Placeholders, because the ONNX checker refuses hard links, and because a graph that fails
    should do so before gigabytes are copied.
    """
    write_placeholders(weights, folder)
    stages = []
    for ratio, kept in plan.pairs:
        name = f"vision-{kept}of{plan.spec.patches}"
        stage = _describe_stage(name, VISION, f"{name}.onnx", visions[kept], ratio, kept)
        _write_graph(visions[kept], weights, folder / stage.file, stage, free=frozenset())
        stages.append(stage)
    stage = _describe_stage(DECODER, DECODER, _DECODER_FILE, decoder, None, None)
    _write_graph(decoder, weights, folder / stage.file, stage, free=frozenset({FREE_ROWS}))
    return [*stages, stage]


def _between(plan: ExportPlan) -> list[TensorSpec]:
    """What the tower hands to the pruning stage."""
    spec = plan.spec
    patches = TensorSpec(
        name="patches",
        dtype=plan.dtype,
        shape=(1, spec.patches, spec.vision_width),
        meaning="patch features before the projector",
    )
    needs: list[Feature] = sorted(plan.pruner.NEEDS, key=lambda feature: feature.value)
    extras = [
        TensorSpec(
            name=need.value, dtype="float32", shape=(1, spec.patches), meaning="score by patch"
        )
        for need in needs
    ]
    return [patches, *extras]


def _describe_stage(
    name: str, role: str, file: str, traced: Traced, ratio: float | None, kept: int | None
) -> Stage:
    return Stage(
        name=name,
        role=role,
        file=file,
        ratio=ratio,
        kept=kept,
        inputs=traced.inputs,
        outputs=traced.outputs,
    )


def _write_graph(
    traced: Traced, weights: WeightPlan, path: Path, stage: Stage, *, free: frozenset[str]
) -> None:
    bind_weights(traced, weights, path.parent)
    traced.model.graph.name = stage.name
    traced.model.producer_name = "gap-export"
    traced.model.producer_version = metadata.version("gap-export")
    ir.save(traced.model, path)
    prove_graph(path, inputs=stage.inputs, outputs=stage.outputs, opset=OPSET, free=free)
