"""A model on the hub, whose family is not known before its config is here."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from makers.qwen import TEMPLATE, make_qwen3_checkpoint, make_qwen_checkpoint

from gap_export.analysis.sweep import SweepRequest, plan_sweep
from gap_export.checkpoint.shapes import ShapeSource
from gap_export.pipeline.fingerprint import identify
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = {"prompt.template": TEMPLATE, "prompt.answer": 2, "image.canvas": "112x112"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub with two checkpoints, and nothing to be reached."""
    home = tmp_path_factory.mktemp("hub")
    for name, make in (("qwen2_5_vl", make_qwen_checkpoint), ("qwen3_vl", make_qwen3_checkpoint)):
        folder = home / f"models--some--{name}"
        make(folder / "snapshots" / COMMIT, layers=3)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")

    def find(name, **_):
        return str(home / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
        patch.setattr(huggingface_hub, "snapshot_download", find)
        yield home


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_hub_id_starts_from_its_familys_pruner(family, tmp_path):
    request = make_request(f"some/{family}", settings=SETTINGS, reference=False)
    assert request.named.config.family == ""
    for fetch in (None, ShapeSource(tmp_path)):  # the second is that of dry runs
        plan = plan_export(request, fetch)
        assert (plan.config.family, plan.prune.strategy) == (family, "divprune")
    # The bundle that the plan makes is found again by what was asked for.
    assert identify(request, {}) == identify(plan.request, {}) is not None
    asked = make_request(f"some/{family}", settings=SETTINGS, reference=False, pruner="random+ivc")
    assert plan_export(asked).prune.strategy == "random+ivc"


@pytest.mark.usefixtures("hub")
def test_a_sweep_of_a_hub_id_takes_its_familys_pruner(tmp_path):
    request = make_request("some/qwen3_vl", settings=SETTINGS, reference=False)
    sweep = SweepRequest(
        named=request.named,
        target="cpu",
        pruners=(),
        positions=("gap",),
        ratios=(0.5,),
        keep=(),
        seeds=(),
        data=None,
        backend="onnxruntime:cpu",
        eager=False,
        out=tmp_path,
        resume=False,
    )
    assert [each.pruner for each in plan_sweep(sweep).variants] == ["divprune"]
    named = replace(sweep, pruners=("spatial",))
    assert [each.pruner for each in plan_sweep(named).variants] == ["spatial"]


def test_an_adapter_beside_qwens_weights_is_told(hub, tmp_path):
    folder = Path(hub) / "models--some--qwen3_vl" / "snapshots" / COMMIT
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    plan = plan_export(make_request(tmp_path, settings=SETTINGS, reference=False))
    (note,) = plan.spec.notes
    assert note.startswith(f"{tmp_path / 'adapter_model.safetensors'}: an adapter beside")
    assert note.endswith(f"--set parts.adapter={tmp_path / 'adapter_model.safetensors'}")
