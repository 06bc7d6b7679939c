"""Checkpoints in every layout: what is found, and what is refused before any work is done."""

import contextlib
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from makers import checkpoints, originals

from gap_export.checkpoint.sources import make_tensor
from gap_export.cli import main as cli
from gap_export.config.load import load_config
from gap_export.errors import CheckpointError
from gap_export.pipeline.model import read_model

TEMPLATE = "prompt.template=USER: <image>\nWhere is {phrase}? ASSISTANT:"

# The same four tensors under the keys of each layout, none of them square.
KEYS = {
    "legacy": {
        "mlp": "language_model.model.layers.1.mlp.up_proj.weight",
        "head": "language_model.lm_head.weight",
        "projector": "multi_modal_projector.linear_1.weight",
        "vision": "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    },
    "modern": {
        "mlp": "model.language_model.layers.1.mlp.up_proj.weight",
        "head": "lm_head.weight",
        "projector": "model.multi_modal_projector.linear_1.weight",
        "vision": "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    },
    "original": {
        "mlp": "model.layers.1.mlp.up_proj.weight",
        "head": "lm_head.weight",
        "projector": "model.mm_projector.0.weight",
        # In the CLIP checkpoint beside it.
        "vision": "vision_model.encoder.layers.0.mlp.fc1.weight",
    },
    "original with tower": {
        "mlp": "model.layers.1.mlp.up_proj.weight",
        "head": "lm_head.weight",
        "projector": "model.mm_projector.0.weight",
        "vision": "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    },
}
NAMES = {
    "mlp": "language_model.layers.1.mlp.up_proj.weight",
    "head": "lm_head.weight",
    "projector": "multi_modal_projector.linear_1.weight",
    "vision": "vision_tower.encoder.layers.0.mlp.fc1.weight",
}
PLACES = [
    # Every layout and every tensor once; `make matrix` has all pairs.
    pytest.param(layout, tensor, marks=() if i == j else pytest.mark.matrix)
    for i, (layout, keys) in enumerate(KEYS.items())
    for j, tensor in enumerate(keys)
]
# Read by no graph, and no mistake.
IGNORED = ("rotary_emb.inv_freq", "position_ids", "logit_scale")


def make_checkpoint(folder, layout):
    """A folder that holds a checkpoint of a layout, and its CLIP where it needs one."""
    if layout in {"legacy", "modern"}:
        return checkpoints.make_llava_checkpoint(folder / "model", names=layout)
    clip = originals.make_clip(folder / "clip-vit")
    tower = layout == "original with tower"
    return originals.make_llava_original(folder / "model", clip, with_vision_tower=tower)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of every layout. Read only."""
    return {
        layout: make_checkpoint(tmp_path_factory.mktemp("layouts") / "home", layout)
        for layout in KEYS
    }


def read(folder):
    return read_model(load_config(str(folder), {}))


@pytest.fixture(scope="module")
def models(folders):
    """The indexed checkpoint of every layout."""
    return {layout: read(folder) for layout, folder in folders.items()}


def edit_files(home, edit):
    """Rewrite every weight file below a folder, and the index beside it, through `edit`."""
    for folder in {path.parent for path in home.rglob("*") if path.is_file()}:
        if list(folder.glob("*.safetensors")):
            checkpoints.edit_tensors(folder, edit)
        index = folder / "pytorch_model.bin.index.json"
        if index.is_file():
            data = json.loads(index.read_text(encoding="utf-8"))
            places = {}
            for name in sorted(set(data["weight_map"].values())):
                tensors = edit(torch.load(folder / name, weights_only=True))
                torch.save(tensors, folder / name)
                places |= dict.fromkeys(tensors, name)
            index.write_text(json.dumps(data | {"weight_map": places}), encoding="utf-8")


def change(key, make):
    """An edit that replaces the tensors beside `key` by what `make` makes of it."""

    def edit(tensors):
        if key not in tensors:
            return tensors
        value = tensors.pop(key)
        return tensors | make(value)

    return edit


@pytest.fixture
def dry_run(capsys, monkeypatch, tmp_path):
    """A function that dry-runs a folder; gives the one line of its refusal."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def run(folder, *arguments):
        code = cli.main([str(folder), "--dry-run", "--json", "--set", TEMPLATE, *arguments])
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert not list((tmp_path / "empty").iterdir())
        assert "Traceback" not in captured.err
        if code == 0:
            return None
        assert (code, found["error"]["kind"]) == (3, "checkpoint")
        assert "\n" not in found["error"]["message"]
        return found["error"]["message"]

    return run


@pytest.mark.parametrize("layout", KEYS)
def test_a_whole_checkpoint_is_no_error(dry_run, folders, layout):
    assert dry_run(folders[layout]) is None


@pytest.mark.parametrize(("layout", "tensor"), PLACES)
def test_what_does_not_fit_is_refused_before_any_work(dry_run, tmp_path, layout, tensor):
    """Missing, misshapen, transposed, of no use, doubled: one home, one damage after another."""
    folder = make_checkpoint(tmp_path, layout)
    key = KEYS[layout][tensor]
    kept = []
    edit_files(tmp_path, change(key, lambda value: kept.append(value) or {key: value}))
    assert len(kept) == 1
    whole = kept[0]
    rows, columns = whole.shape

    def damage(make):
        edit_files(tmp_path, change(key, make))
        return dry_run(folder)

    def restore(*extra):
        def edit(tensors):
            tensors = {k: v for k, v in tensors.items() if k not in extra}
            return tensors | ({key: whole} if key in tensors else {})

        edit_files(tmp_path, edit)

    found = damage(lambda value: {key: value[:-1].clone()})
    for part in (f"'{key}'", f"[{rows - 1}, {columns}]", f"[{rows}, {columns}]"):
        assert part in found
    assert found.partition(":")[0].endswith((".safetensors", ".bin"))
    assert "transposed" not in found
    restore()

    found = damage(lambda value: {key: value.t().contiguous()})
    for part in (f"'{key}'", f"[{columns}, {rows}]", f"[{rows}, {columns}]", "it lies transposed"):
        assert part in found
    restore()

    for dtype, names in ((torch.float64, ("F64", "float64")), (torch.int32, ("int32",))):
        found = damage(lambda value, dtype=dtype: {key: value.to(dtype)})
        for part in (f"'{key}'", "float32, float16 or bfloat16"):
            assert part in found
        assert any(name in found for name in names)
        restore()

    found = damage(lambda value: {key: value, f"{key}.lora_A": torch.zeros(2, 2)})
    assert f"'{key}.lora_A'" in found
    assert found.partition(":")[0].endswith((".safetensors", ".bin"))
    assert "family" in found
    restore(f"{key}.lora_A")

    other = KEYS["modern" if layout == "legacy" else "legacy"][tensor]
    if not (layout.startswith("original") and tensor == "vision"):
        found = damage(lambda value: {key: value, other: value.clone()})
        for part in (f"'{key}'", f"'{other}'"):
            assert part in found
        restore(other)

    assert dry_run(folder) is None
    found = damage(lambda _: {})
    assert f"'{NAMES[tensor]}' is missing" in found


def without(checkpoint, key):
    """A checkpoint, or the part of it, without one tensor."""
    tensors = {k: v for k, v in checkpoint.tensors.items() if k != key}
    return dataclasses.replace(checkpoint, tensors=tensors)


def reshaped(checkpoint, key):
    """A checkpoint with one tensor of one more dimension."""
    tensor = checkpoint.tensors[key]
    other = dataclasses.replace(tensor, shape=(*tensor.shape, 1))
    return dataclasses.replace(checkpoint, tensors=checkpoint.tensors | {key: other})


@pytest.mark.parametrize(
    ("damage", "layout"),
    [
        pytest.param(damage, layout, marks=() if (i + j) % 2 == 0 else pytest.mark.matrix)
        for i, damage in enumerate([without, reshaped])
        for j, layout in enumerate(KEYS)
    ],
)
def test_no_tensor_is_one_that_nobody_looks_at(models, layout, damage):
    model = models[layout]
    whole = model.checkpoint
    with_clip = layout == "original"
    cases = [(key, damage(whole, key)) for key in whole.tensors]
    for role, part in whole.parts.items():
        for key in part.tensors if with_clip else ():
            parts = whole.parts | {role: damage(part, key)}
            cases.append((key, dataclasses.replace(whole, parts=parts)))
    refused = 0
    for key, checkpoint in cases:
        if any(name in key for name in IGNORED):
            model.family.find_weights(checkpoint, model.spec)
            continue
        with pytest.raises(CheckpointError):
            model.family.find_weights(checkpoint, model.spec)
        refused += 1
    assert refused > 40


@pytest.mark.parametrize("layout", ["legacy", "modern"])
def test_both_names_lead_to_the_same_tensors(models, folders, layout):
    model = models[layout]
    found = model.family.find_weights(model.checkpoint, model.spec)
    stored = {
        checkpoints.stored_name(key, "legacy"): value
        for key, value in checkpoints.read_tensors(folders[layout]).items()
    }
    assert len(found) == len(stored)
    for name, source in found.items():
        assert torch.equal(make_tensor(source), stored[checkpoints.stored_name(name, "legacy")])


@pytest.mark.parametrize("layout", ["original", "original with tower"])
def test_the_authors_names_lead_to_their_tensors(models, folders, layout):
    """A tower in the checkpoint wins over CLIP's."""
    model = models[layout]
    found = model.family.find_weights(model.checkpoint, model.spec)
    stored, clip = {}, checkpoints.read_tensors(folders[layout].parent / "clip-vit")
    for path in sorted(folders[layout].glob("pytorch_model-*.bin")):
        stored |= torch.load(path, weights_only=True)
    towers = 0
    for name, source in found.items():
        if name.startswith("vision_tower."):
            key = name.replace("vision_tower.", "vision_model.", 1)
            own = f"model.vision_tower.vision_tower.{key}"
            expected = stored[own] if layout == "original with tower" else clip[key]
            assert (own in stored) == (layout == "original with tower")
            towers += 1
        elif name.startswith(("text.", "visual_projection.")):
            expected = clip[name.removeprefix("text.")]
        elif name.startswith("multi_modal_projector."):
            _, layer, part = name.split(".")
            expected = stored[f"model.mm_projector.{'02'[int(layer[-1]) - 1]}.{part}"]
        else:
            expected = stored[name.replace("language_model.", "model.", 1)]
        assert torch.equal(make_tensor(source), expected), name
    assert towers > 40


def test_a_head_that_is_left_out_must_be_tied(tmp_path):
    """A checkpoint that says nothing of ties and has no head lacks one."""
    folder = checkpoints.make_llava_checkpoint(tmp_path / "model")
    checkpoints.edit_tensors(
        folder, lambda tensors: {k: v for k, v in tensors.items() if "lm_head" not in k}
    )
    model = read(folder)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        model.family.find_weights(model.checkpoint, model.spec)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_the_table_unless_it_is_stored(tmp_path, stored):
    folder = checkpoints.make_llava_checkpoint(tmp_path / "model", tied=True)
    key = "language_model.model.embed_tokens.weight"
    if stored:
        add = change(key, lambda v: {key: v, "language_model.lm_head.weight": v + 1})
        checkpoints.edit_tensors(folder, add)
    model = read(folder)
    found = model.family.find_weights(model.checkpoint, model.spec)
    table, head = (
        make_tensor(found[model.family.DECODER.EMBEDDING]),
        make_tensor(found["lm_head.weight"]),
    )
    assert torch.equal(head, table + 1 if stored else table)


def test_a_part_that_is_missing_is_named_with_its_role(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path, "original")
    (tmp_path / "clip-vit").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = folder / "config.json"
    data = json.loads(config.read_text(encoding="utf-8")) | {"mm_vision_tower": "./clip-vit"}
    config.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no such part 'clip'.*--set parts\.clip=DIR"):
        read(folder)
    named = load_config(str(folder), {"parts.clip": str(tmp_path / "elsewhere")})
    assert read_model(named).checkpoint.parts["clip"].folder == tmp_path / "elsewhere"


def test_a_published_config_is_read_without_the_librarys_advice(folders, tmp_path):
    """`rope_scaling` is deprecated for who writes configs; whoever exports can change nothing."""
    script = "import sys; from gap_export.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, folders["original"], "--dry-run", "--set", TEMPLATE],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "rope_scaling" not in done.stderr
    assert "Warning" not in done.stderr


def test_clip_without_a_tokenizer_is_refused_where_phrases_are_read(dry_run, tmp_path):
    clip = originals.make_clip(tmp_path / "clip-vit", with_tokenizer=False)
    folder = originals.make_llava_original(tmp_path / "model", clip)
    found = dry_run(folder, "--pruner", "trim")
    for part in (str(clip), "no tokenizer in it", "CLIP's"):
        assert part in found
    assert dry_run(folder, "--pruner", "cls_attention") is None
    assert dry_run(folder, "--pruner", "trim", "--set", "prune.phrase=embeddings") is None


@contextlib.contextmanager
def refused(part):
    with pytest.raises(CheckpointError) as caught:
        yield
    assert part in str(caught.value)


def test_the_wrong_clip_is_refused_by_its_width(tmp_path):
    folder = make_checkpoint(tmp_path, "original")
    other = originals.make_clip(tmp_path / "other", vision_width=40)
    with refused("mm_hidden_size 32"):
        read_model(load_config(str(folder), {"parts.clip": str(other)}))


def test_a_projector_of_another_kind(tmp_path):
    clip = originals.make_clip(tmp_path / "clip-vit")
    folder = originals.make_llava_original(tmp_path / "model", clip, projector="linear")
    with refused("mm_projector_type 'linear'"):
        read(folder)
