"""Which weights are quantized, and that all others are looked at as they lie."""

from pathlib import Path

import pytest
import torch
from makers.checkpoints import edit_tensors
from makers.families import export, find_family

from gap_export.errors import ExportError

BROKEN = {
    # Of towers that are read from files of their own, which are brought whole.
    "minigpt-v2": ("vision", "blocks.1.attn.qkv.weight", "float16"),
    "shikra": ("clip", "vision_model.encoder.layers.1.mlp.fc1.weight", "float32"),
    # CLIP's text tower is never quantized.
    "llava-next-vicuna": ("clip", "text_model.encoder.layers.1.mlp.fc1.weight", "float32"),
}


def spoil(place, key):
    """Put one NaN into a tensor of a file or folder."""

    def change(tensors):
        if key in tensors:
            tensors[key].view(-1)[3] = float("nan")
        return tensors

    if place.is_file():
        whole = torch.load(place, weights_only=True)
        change(whole.get("model", whole))
        torch.save(whole, place)
    else:
        edit_tensors(place, change)


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("family", BROKEN)
def test_what_stays_as_it_lies_is_looked_through(family, vision, tmp_path, tmp_path_factory):
    """Also where other weights are quantized, and without a reference that would show it."""
    role, key, dtype = BROKEN[family]
    case = find_family(family, tmp_path_factory, head_dim=16).copy(tmp_path / "home")
    spoil(case.place(role), key)
    (tmp_path / "out").mkdir()
    plan = case.plan(
        tmp_path / "out" / "b",
        pruner="trim" if key.startswith("text") else "cls_attention",
        dtype=dtype,
        quantize__weights="int4",
        quantize__vision=vision,
    )
    with pytest.raises(ExportError) as caught:
        export(plan)
    said = str(caught.value)
    # What is quantized goes by its name in the model, which ends as that in the file.
    assert said.startswith(tuple(path.name for path in files(case.place(role))))
    assert key.rpartition("encoder.")[2] in said
    assert "holds values that are no finite numbers" in said
    assert "\n" not in said
    assert not list((tmp_path / "out").iterdir())


def files(place: Path) -> list[Path]:
    """A file itself, or those of a folder."""
    return [place] if place.is_file() else list(place.iterdir())
