"""The finished bundle, and exports without their slow parts."""

import pytest

from gap_export.pipeline import run as pipeline
from gap_export.pipeline.stages import Graphs


@pytest.fixture(scope="module")
def bundle(exported):
    """The finished bundle's folder."""
    return exported.folder


@pytest.fixture
def quick(monkeypatch):
    """Skip the slow part of an export: tracing, graphs, weights, manifest."""

    class Nothing:
        size = 0
        shards, placed = {}, {}

    for name in ("write_graphs", "_start_record", "_require_readable"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "_trace", lambda *_: Graphs(visions=(), decoder=None, text=None))
    monkeypatch.setattr(pipeline, "bring_weights", lambda *_, **__: {})
    monkeypatch.setattr(pipeline, "_lay_out", lambda *_: Nothing())
    monkeypatch.setattr(pipeline, "_make_manifest", lambda *_: QuickManifest())


class QuickManifest:
    """Stands for a manifest where only the moving of folders is of interest."""

    reference = None

    def write(self, folder):
        (folder / "manifest.json").write_text("new", encoding="utf-8")
