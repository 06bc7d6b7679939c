"""What an export needs of this machine, looked at before any work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gap_export.checkpoint.sources import TensorSource
from gap_export.errors import CheckpointError, ExportError
from gap_export.interfaces.family import EagerModel
from gap_export.pipeline.plan import REFERENCE_DTYPE, ExportPlan
from gap_export.reference.samples import SAMPLES_FILE, find_samples
from gap_export.weights.write import require_linkable, require_space
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.display import Display, format_bytes
from gap_runtime.machines.memory import free_memory

_MIB: Final = 2**20
_WORK_BYTES: Final = 192 * _MIB
"""What tracing takes at least, besides the libraries, which are loaded by now."""
_MOST_KEPT_BYTES: Final = 512 * _MIB
"""Weights of a reference that is read layer by layer that stay in memory."""
_KEPT_SHARE: Final = 8


def require_readable(plan: ExportPlan) -> None:
    """Open every file that the export will read.

    Raises:
        CheckpointError: One cannot be opened.
    """
    for path in _input_files(plan):
        try:
            path.open("rb").close()
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}), which the export needs; mend its "
                "permissions or the disk"
            ) from error


def _input_files(plan: ExportPlan) -> Iterator[Path]:
    found = {each.file for source in plan.sources.values() for each in source.inputs}
    for each in (plan.checkpoint, *plan.checkpoint.parts.values()):
        found |= {tensor.file for tensor in each.tensors.values()}
    yield from sorted(found)
    if plan.samples:
        yield find_samples(plan.config.check.samples) / SAMPLES_FILE
        yield from (sample.path for sample in plan.samples)


def require_room(plan: ExportPlan, folder: Path) -> None:
    """Compare the weight files that will be written with the free disk, and try the links.

    Args:
        plan: What will be made.
        folder: The bundle being made, empty.

    Raises:
        ExportError: They will not fit, or cannot be linked there.
    """
    if plan.request.bring == "link":
        require_linkable(plan.weights, folder)
    require_space(plan.weights, folder, plan.request.bring)


def settle_memory(plan: ExportPlan) -> int | None:
    """Compare what the export must take with the free memory.

    Returns:
        Bytes of weights that PyTorch's reference may keep when it is read layer by layer; None
        where the model fits in memory whole, or there is no reference.

    Raises:
        ExportError: There is not enough even so.
    """
    free = free_memory()
    needed = _WORK_BYTES + max(map(_made_bytes, plan.sources.values()), default=0)
    if needed > free:
        raise ExportError(
            f"{plan.out}: the export takes at least {format_bytes(needed)} of memory, "
            f"{format_bytes(free)} is free; end other programs, or raise the limit of this one"
        )
    return settle_reference(plan) if plan.request.reference else None


def settle_reference(plan: ExportPlan) -> int | None:
    """Compare PyTorch's reference with the free memory.

    Returns:
        Bytes of weights that it may keep when it is read layer by layer; None where it fits whole.

    Raises:
        ExportError: There is not enough even so.
    """
    free = free_memory()
    wanted = plan.config.check.memory_mib
    if wanted is None and reference_bytes(plan) + _WORK_BYTES <= free:
        return None
    least = _streamed_bytes(plan)
    if least > free:
        way = "export with --no-reference, or on" if plan.request.reference else "use"
        raise ExportError(
            f"{plan.checkpoint.folder}: PyTorch's reference in {REFERENCE_DTYPE} takes "
            f"{format_bytes(reference_bytes(plan))} of memory, layer by layer "
            f"{format_bytes(least)}, and {format_bytes(free)} is free; {way} a larger machine"
        )
    if wanted is not None:
        return wanted * _MIB
    return min(free // _KEPT_SHARE, _MOST_KEPT_BYTES)


def load_reference(plan: ExportPlan, display: Display | None) -> EagerModel:
    """The model in PyTorch, whole or layer by layer as memory allows.

    Args:
        plan: Of an export, which need not be made.
        display: Says so where it is layer by layer.

    Raises:
        GapError: The checkpoint cannot be used, or there is not enough memory.
    """
    memory = settle_reference(plan)
    if memory is not None and display is not None:
        display.say(describe_streaming(plan, memory))
    return plan.family.load_eager(plan.checkpoint, plan.spec, REFERENCE_DTYPE, memory=memory)


def describe_streaming(plan: ExportPlan, memory: int) -> str:
    """Why weights are read layer by layer, for people."""
    is_set = plan.config.check.memory_mib is not None
    why = (
        "check.memory_mib is set" if is_set else f"{format_bytes(free_memory())} of memory is free"
    )
    return (
        f"PyTorch's weights take {format_bytes(reference_bytes(plan))} in {REFERENCE_DTYPE}, "
        f"{why}: they are read layer by layer for every token, and {format_bytes(memory)} of them "
        "kept"
    )


def reference_bytes(plan: ExportPlan) -> int:
    """Bytes of all weights as PyTorch's reference has them."""
    return sum(map(_float_bytes, plan.sources.values()))


def _streamed_bytes(plan: ExportPlan) -> int:
    """What a reference takes at least that is read layer by layer: a weight, and the cache."""
    largest = max(
        _float_bytes(source)
        for name, source in plan.sources.items()
        if name != plan.family.DECODER.EMBEDDING
    )
    longest = max(plan.layout.prefix + entry.patches for entry in plan.entries)
    slots = longest + plan.layout.suffix + plan.layout.answer
    spec = plan.spec.decoder
    rows = 2 * len(spec.layers) * spec.cache_heads * spec.head_dim
    return _WORK_BYTES + largest + slots * rows * ITEM_BYTES[REFERENCE_DTYPE]


def _made_bytes(source: TensorSource) -> int:
    """Bytes of a tensor that can only be made whole."""
    return 0 if source.cut or source.make is None else _float_bytes(source)


def _float_bytes(source: TensorSource) -> int:
    return math.prod(source.shape) * ITEM_BYTES[REFERENCE_DTYPE]
