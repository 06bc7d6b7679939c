"""PyTorch's reference of a plan: what it takes of memory, and how it is opened.

Knows nothing of graphs, so that PyTorch can be asked without what exports.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gap_export.pipeline.plan import ExportPlan
from gap_export.reference.answers import Reference
from gap_export.reference.memory import REFERENCE_DTYPE, MemoryNeed, measure_memory
from gap_runtime.display import Display


def measure_reference(plan: ExportPlan) -> MemoryNeed:
    """What the reference of a plan takes of memory."""
    longest = max(plan.layout.prefix + entry.patches for entry in plan.entries)
    return measure_memory(
        plan.sources,
        plan.spec,
        embedding=plan.family.DECODER.EMBEDDING,
        slots=longest + plan.layout.suffix + plan.layout.answer,
        folder=plan.checkpoint.folder,
        kept_mib=plan.config.check.memory_mib,
    )


def open_reference(plan: ExportPlan, display: Display | None = None) -> Reference:
    """The reference of a plan, in memory or read layer by layer as memory allows.

    Args:
        plan: Of an export, which need not be made.
        display: Says so where it is layer by layer.

    Raises:
        GapError: The checkpoint cannot be used, or there is not enough memory.
    """
    need = measure_reference(plan)
    kept = need.settle("use")
    if kept is not None and display is not None:
        display.say(need.describe(kept))
    return load_reference(plan, kept)


def load_reference(
    plan: ExportPlan,
    kept: int | None,
    see_cache: Callable[[list[tuple[Tensor, Tensor]]], None] | None = None,
) -> Reference:
    """The reference of a plan.

    Args:
        plan: Of an export, which need not be made.
        kept: Bytes of weights that stay in memory where they are read layer by layer; None to
            have all of them there.
        see_cache: Shown the keys and values [G, T, d] of every layer behind each answer.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
    """
    model = plan.family.load_eager(plan.checkpoint, plan.spec, REFERENCE_DTYPE, memory=kept)
    return Reference(
        model=model,
        spec=plan.spec,
        pruner=plan.pruner,
        prune=plan.prune,
        prompt=plan.prompt,
        phrase=plan.phrase,
        answer_tokens=plan.layout.answer,
        see_cache=see_cache,
    )
