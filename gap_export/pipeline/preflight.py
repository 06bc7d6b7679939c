"""What an export needs of this machine, looked at before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gap_export.checkpoint.sources import TensorSource
from gap_export.errors import CheckpointError, ExportError
from gap_export.pipeline.plan import ExportPlan
from gap_export.reference.memory import WORK_BYTES, float_bytes
from gap_export.reference.samples import SAMPLES_FILE, find_samples
from gap_export.weights.write import require_linkable, require_space
from gap_runtime.display import format_bytes
from gap_runtime.machines.memory import free_memory
from gap_runtime.records.files import open_file


def require_readable(plan: ExportPlan) -> None:
    """Open every file that the export will read.

    Raises:
        CheckpointError: One cannot be opened.
    """
    for path in _input_files(plan):
        with open_file(path, CheckpointError, advice="mend its permissions or the disk"):
            pass


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


def require_memory(plan: ExportPlan) -> None:
    """Compare what the export must take with the free memory, without PyTorch's reference.

    Raises:
        ExportError: There is not enough.
    """
    free = free_memory()
    needed = WORK_BYTES + max(map(_made_bytes, plan.sources.values()), default=0)
    if needed > free:
        raise ExportError(
            f"{plan.out}: the export takes at least {format_bytes(needed)} of memory, "
            f"{format_bytes(free)} is free; end other programs, or raise the limit of this one"
        )


def _made_bytes(source: TensorSource) -> int:
    """Bytes of a tensor that can only be made whole."""
    return 0 if source.cut or source.make is None else float_bytes(source)
