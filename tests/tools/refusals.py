"""What a refusal has to be: one line, and nothing written."""

import pytest

from gap_export.checkpoint.index import open_checkpoint
from gap_export.errors import CheckpointError
from gap_runtime.errors import GapError


def refuse(case, out, kind, **overrides):
    """The one line of a plan's refusal; nothing is written."""
    before = snapshot(case.home)
    with pytest.raises(GapError) as caught:
        case.plan(out, **overrides)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    assert snapshot(case.home) == before
    return message


def snapshot(home):
    return {path: path.stat().st_mtime_ns for path in home.rglob("*")}


def needs(name, role):
    """Overrides with which a part is read."""
    return {"pruner": "trim"} if (role, name[:5]) == ("clip", "llava") else {}


def refuse_checkpoint(folder):
    """The one line with which a checkpoint is not opened."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 3
    return message
