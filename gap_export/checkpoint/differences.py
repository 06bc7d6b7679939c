"""Whether a checkpoint holds a model, or the differences to one, by its values."""

from __future__ import annotations

from typing import Final

from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.tensor import read_tensor
from gap_export.errors import CheckpointError

_LEAST_NORM: Final = 0.25


def holds_differences(checkpoint: Checkpoint) -> bool:
    """Whether the weights are differences to another model's.

    Rotary buffers of equal models differ by nothing at all. Where a saver left them out, the last
    norm tells: its weights lie far from zero in a model and around it in a difference.
    """
    found = _differ_by_buffers(checkpoint)
    if found is not None:
        return found
    norm = checkpoint.tensors.get("model.norm.weight")
    return norm is not None and abs(float(read_tensor(norm).float().mean())) < _LEAST_NORM


def refuse_differences(checkpoint: Checkpoint) -> None:
    """Refuse what is certain to be differences, where a whole model is wanted.

    Raises:
        CheckpointError: All rotary buffers are zero.
    """
    if _differ_by_buffers(checkpoint):
        raise CheckpointError(
            f"{checkpoint.folder}: holds differences to another model's weights (its rotary "
            "buffers are zero), not a model; add them with their authors' script and give what "
            "it makes"
        )


def _differ_by_buffers(checkpoint: Checkpoint) -> bool | None:
    """What the rotary buffers say; None where there are none."""
    buffers = [
        tensor for key, tensor in checkpoint.tensors.items() if key.endswith("rotary_emb.inv_freq")
    ]
    return not any(bool(read_tensor(tensor).any()) for tensor in buffers) if buffers else None
