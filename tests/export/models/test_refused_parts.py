"""Parts, settings, configs and tokenizers that are missing or wrong: one line each."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import pytest
from makers import originals
from makers.damage import change_json
from makers.families import (
    CLIP_FAMILIES,
    FAMILIES,
)
from tools.refusals import needs, refuse

from gap_export.config.load import load_config
from gap_export.errors import CheckpointError
from gap_export.pipeline.model import read_model
from gap_runtime.errors import ConfigError, UnknownNameError


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub

    asked = []

    def refuse_download(hub_id, **_):
        asked.append(hub_id)
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse_download)
    return asked


def without(case, role):
    """The same, without being told where a part is; what it is called elsewhere is moved."""
    place = case.place(role)
    place.rename(place.with_name(f"moved-{place.name}"))
    overrides = {key: v for key, v in case.overrides.items() if key != f"parts.{role}"}
    text = {key: v for key, v in case.text.items() if key != f"parts.{role}"}
    return replace(case, overrides=overrides, text=text)


@pytest.mark.parametrize(
    ("name", "role", "hub_id"),
    [
        ("llava", "clip", "openai/clip-vit-large-patch14-336"),
        ("llava-original", "clip", "openai/clip-tiny-patch14-70"),
        ("llava-next-vicuna", "clip", "openai/clip-vit-large-patch14-336"),
        ("shikra", "clip", "openai/clip-vit-large-patch14"),
        ("shikra", "base", "huggyllama/llama-7b"),
        ("minigpt-v2", "language", "meta-llama/Llama-2-7b-chat-hf"),
    ],
)
def test_a_part_is_nowhere(find, tmp_path, offline, name, role, hub_id):
    """The folder `delta` has a name that says that it cannot do without the base."""
    case = without(find(name).copy(tmp_path / "home"), role)
    message = refuse(case, tmp_path / "b", CheckpointError, **needs(name, role))
    assert offline == [hub_id]
    assert message.startswith(f"{hub_id}: cannot be fetched from the hub (no network here)")
    place = case.place()
    folder = place.parent if place.is_file() else place
    for looked in (hub_id, folder / hub_id, folder / hub_id.rpartition("/")[2], folder.parent):
        assert str(looked) in message
    assert f"give it with --set parts.{role}=DIR" in message


def test_a_part_that_is_a_file_is_nowhere(find, tmp_path, offline):
    case = without(find("minigpt-v2").copy(tmp_path / "home"), "vision")
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith("eva_vit_g.pth: no such part 'vision'; looked for eva_vit_g.pth, ")
    assert message.endswith("--set parts.vision=DIR")
    assert offline == []


@pytest.mark.parametrize(("name", "role"), [("llava-original", "clip"), ("shikra", "base")])
def test_a_part_beside_the_checkpoint_is_found(find, tmp_path, offline, name, role):
    case = find(name).copy(tmp_path / "home")
    hub_name = {"clip": "clip-tiny-patch14-70", "base": "llama-7b"}[role]
    beside = case.place().parent / hub_name
    case.place(role).rename(beside)
    overrides = {key: v for key, v in case.overrides.items() if key != f"parts.{role}"}
    plan = replace(case, overrides=overrides).plan(tmp_path / "b")
    assert plan.checkpoint.parts[role].folder == beside
    assert offline == []


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("llava-original", "clip"),
        ("shikra", "clip"),
        ("minigpt-v2", "language"),
        ("minigpt-v2", "vision"),
    ],
)
def test_a_part_is_left_out_that_is_needed(find, tmp_path, name, role):
    message = refuse(find(name), tmp_path / "b", CheckpointError, **{f"parts__{role}": ""})
    assert message.endswith(f"needs its part '{role}'; give it with --set parts.{role}=DIR")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_that_the_family_has_not(find, tmp_path, name):
    message = refuse(find(name), tmp_path / "b", UnknownNameError, parts__wheel="x")
    assert message.startswith("unknown part 'wheel'; have ")


@pytest.mark.parametrize("pruner", ["cls_attention", "trim"])
@pytest.mark.parametrize("name", CLIP_FAMILIES)
def test_clip_of_another_width(find, tmp_path, name, pruner):
    wide = originals.make_clip(tmp_path / "wide", image_size=70, vision_width=44)
    case = find(name)
    message = refuse(case, tmp_path / "b", CheckpointError, pruner=pruner, parts__clip=str(wide))
    width = {"llava-next-mistral": 40, "llava-original": 40, "shikra": 48}.get(name, 36)
    assert str(wide) in message
    assert "44" in message
    assert str(width) in message
    assert "--set parts.clip=DIR" in message
    # And the way without CLIP, where it is not the model's tower.
    is_tower = name in {"llava-original", "shikra"}
    assert ("--set prune.phrase=embeddings" in message) != is_tower


def test_clip_without_a_tokenizer(find, tmp_path):
    bare = originals.make_clip(
        tmp_path / "bare", image_size=70, vision_width=36, vision_heads=3, with_tokenizer=False
    )
    message = refuse(
        find("llava"), tmp_path / "b", CheckpointError, pruner="trim", parts__clip=str(bare)
    )
    assert message == f"{bare}: no tokenizer in it; CLIP's is needed to read phrases"


def test_parts_that_were_exchanged(find, tmp_path):
    case = find("minigpt-v2")
    eva, llama = str(case.place("vision")), str(case.place("language"))
    message = refuse(case, tmp_path / "b", CheckpointError, parts__vision=llama)
    assert "patch_embed.proj.weight" in message
    message = refuse(case, tmp_path / "b", CheckpointError, parts__language=eva)
    assert "config.json" in message


@pytest.mark.parametrize(
    ("canvas", "reason"),
    [
        ("big", "expected WIDTHxHEIGHT or WIDTHxHEIGHT/ASPECT"),
        ("", "expected WIDTHxHEIGHT"),
        ("126x42,", "expected WIDTHxHEIGHT"),
        ("126x42/9", "expected WIDTHxHEIGHT"),
        ("126 x 42", "expected WIDTHxHEIGHT"),
        ("126x42/9:1/3", "expected WIDTHxHEIGHT"),
        ("126x42/0:3", "aspect of 0"),
        ("126x42/3:0", "aspect of 0"),
        ("126x43", "no such canvas; have 84x42, 42x84, 84x84, 42x126, 126x42"),
        ("0x0", "no such canvas"),
        ("126x42/1:1", "use 84x84/1:1"),
        ("42x126/3:1", "use 126x42/3:1"),
    ],
)
def test_a_canvas_that_cannot_be(find, tmp_path, canvas, reason):
    case = find("llava-next-vicuna")
    message = refuse(case, tmp_path / "b", ConfigError, image__canvas=canvas)
    assert message.startswith(f"image.canvas '{canvas.rpartition(',')[2]}': ")
    assert reason in message


def test_a_ratio_that_would_remove_newlines(find, tmp_path):
    case = find("llava-next-mistral")
    message = refuse(case, tmp_path / "b", ConfigError, prune__ratios=[0.92])
    assert "ratio 0.92 keeps 6 of 70 visual tokens, of which 6 mark the ends of rows" in message
    plan = case.plan(tmp_path / "b", prune__ratios=[float(message.rpartition(" ")[2])])
    assert plan.entries[0].kept == 7


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("vision__heads", 3, "vision.heads is 3, which does not divide EVA's width of 176"),
        ("vision__heads", 0, "vision.heads is 0, expected 1 to"),
        ("vision__side", 50, "vision.side is 50, expected an even number of patches of 7 pixels"),
        ("vision__side", 49, "vision.side is 49, expected an even number"),
        ("vision__side", 0, "vision.side is 0, expected 1 to"),
        ("prune__phrase", "clip", "use --set prune.phrase=embeddings"),
    ],
)
def test_sizes_that_eva_cannot_have(find, tmp_path, setting, value, reason):
    case = find("minigpt-v2")
    pruner = "trim" if setting == "prune__phrase" else "random"
    message = refuse(case, tmp_path / "b", ConfigError, pruner=pruner, **{setting: value})
    assert reason in message


CONFIGS = (
    ("llava", {"quantization_config": {"bits": 4}}, "quantized"),
    ("llava-original", {"quantization_config": {"bits": 4}}, "quantized"),
    ("llava-next-vicuna", {"quantization_config": {"bits": 4}}, "quantized"),
    ("shikra", {"quantization_config": {"bits": 4}}, "quantized"),
    ("llava", {"vision_feature_select_strategy": "full"}, "keeps the CLS token"),
    ("llava-original", {"mm_vision_select_feature": "cls_patch"}, "keeps the CLS token"),
    ("llava-next-vicuna", {"vision_feature_select_strategy": "full"}, "keeps the CLS token"),
    ("llava", {"vision_feature_layer": -9}, "vision_feature_layer -9"),
    ("llava-original", {"mm_vision_select_layer": -9}, "vision_feature_layer -9"),
    ("llava-next-vicuna", {"vision_feature_layer": 7}, "vision_feature_layer 7"),
    ("shikra", {"mm_vision_select_layer": -9}, "vision_feature_layer -9"),
    ("llava", {"vision_feature_layer": [-2, -1]}, "expected one layer"),
    ("llava-original", {"mm_projector_type": "linear"}, "'linear', expected mlp2x_gelu"),
    ("llava-original", {"s2": True}, "s2 is True, a tower that looks at several scales"),
    ("llava-original", {"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer', a res"),
    ("llava-next-vicuna", {"image_grid_pinpoints": [[42, 43]]}, "expected multiples of 42"),
    ("llava-next-vicuna", {"image_grid_pinpoints": []}, "image_grid_pinpoints"),
    ("llava-next-vicuna", {"image_grid_pinpoints": [[42]]}, "expected pairs of multiples of 42"),
    ("llava-next-vicuna", {"image_grid_pinpoints": [[42, "x"]]}, "expected pairs of multiples"),
    ("llava-original", {"mm_hidden_size": None}, "mm_hidden_size None, but"),
    ("llava-original", {"mm_vision_select_feature": []}, "not a LLaVA config (unhashable"),
    ("llava", {"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
)


@pytest.mark.parametrize(("name", "values", "reason"), CONFIGS)
def test_a_config_that_describes_something_else(find, tmp_path, name, values, reason):
    case = find(name).copy(tmp_path / "home")
    change_json(case.place() / "config.json", **values)
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(str(case.place() / "config.json"))
    assert reason in message


def test_patches_that_are_larger_than_a_picture(find, tmp_path):
    case = find("llava").copy(tmp_path / "home")
    path = case.place() / "config.json"
    vision = json.loads(path.read_text("utf-8"))["vision_config"]
    change_json(path, vision_config=vision | {"patch_size": vision["image_size"] + 1})
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{path}: a picture becomes 0 visual tokens, ")


def test_frequencies_that_cannot_be_made(find, tmp_path):
    case = find("llava").copy(tmp_path / "home")
    path = case.place() / "config.json"
    text = json.loads(path.read_text("utf-8"))["text_config"]
    rope = text["rope_parameters"] | {"rope_theta": None}
    change_json(path, text_config=text | {"rope_parameters": rope})
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith("rope_parameters {")
    assert "cannot be used (unsupported operand" in message


def test_a_table_of_added_tokens_that_is_none(find, tmp_path):
    case = find("shikra").copy(tmp_path / "home")
    change_json(case.place() / "added_tokens.json", **{"<im_start>": [1, 2]})
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{case.place()}: its tokenizer's files cannot be read (TypeError(")


@pytest.mark.parametrize(
    ("name", "role"),
    [(n, "") for n in CLIP_FAMILIES]
    + [("llava-original", "clip"), ("shikra", "base"), ("minigpt-v2", "language")],
)
@pytest.mark.parametrize("text", ["{", "[]", '{"text_config": 3, "hidden_size": "wide"}', None])
def test_a_config_that_cannot_be_read(find, tmp_path, name, role, text):
    case = find(name).copy(tmp_path / "home")
    config = case.place(role) / "config.json"
    kinds = (CheckpointError, ConfigError, UnknownNameError)
    config.unlink()
    if text is not None:
        config.write_text(text, encoding="utf-8")
    with pytest.raises(kinds) as caught:
        case.plan(tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert str(config.parent) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "role"), [("llava", ""), ("shikra", "clip"), ("llava-next-vicuna", "")]
)
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"do_normalize": False}, "do_normalize is off"),
        ({"resample": 2}, "resample 2, expected 3"),
        ({"rescale_factor": 1 / 127}, "expected 1/255"),
        ({"size": {"shortest_edge": 77}}, "but the vision tower takes"),
        ({"size": {"shortest_edge": [70]}}, "but the vision tower takes"),
        ({"resample": [3]}, "expected 3"),
        ({"image_mean": [0.5]}, "1 and 3 values, expected 3 values each"),
    ],
)
def test_a_processor_that_does_something_else(find, tmp_path, name, role, values, reason):
    case = find(name).copy(tmp_path / "home")
    change_json(case.place(role) / "preprocessor_config.json", **values)
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{case.place(role)}: image processor: ")
    assert reason in message
    assert re.search("; (if|give) .* mend ", message)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_without_a_tokenizer(find, tmp_path, name):
    case = find(name).copy(tmp_path / "home")
    folder = case.place("language") if name == "minigpt-v2" else case.place()
    for file in ("tokenizer.json", "tokenizer.model"):
        (folder / file).unlink(missing_ok=True)
    message = refuse(case, tmp_path / "b", CheckpointError, reference=True)
    assert message.startswith(f"{folder}: no tokenizer.json in it")
    plan = case.plan(tmp_path / "b")
    assert plan.prompt.tokenizer is None
    assert plan.layout.prefix == plan.spec.prefix


@pytest.mark.parametrize("name", ["llava-original", "shikra", "minigpt-v2"])
def test_a_tokenizer_that_is_broken(find, tmp_path, name):
    case = find(name).copy(tmp_path / "home")
    folder = case.place("language") if name == "minigpt-v2" else case.place()
    (folder / "tokenizer.model").write_bytes(b"no tokenizer")
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message.startswith(f"{folder / 'tokenizer.model'}: its tokenizer cannot be read")


def test_every_family_is_refused_by_every_other(find):
    """A configuration's name with a folder of another family."""
    models = {
        "llava-1.5-7b": {"llava", "llava-original"},
        "llava-next-vicuna-7b": {"llava-next-vicuna", "llava-next-mistral"},
        "shikra-7b": {"shikra"},
        "minigpt-v2": {"minigpt-v2"},
        "internvl3-1b": {"internvl3", "internvl3.5"},
    }
    parts = {
        "shikra-7b": {f"parts.{r}": str(find("shikra").place(r)) for r in ("base", "clip")},
        "minigpt-v2": {
            f"parts.{r}": str(find("minigpt-v2").place(r)) for r in ("vision", "language")
        },
    }
    for model, name in itertools.product(models, FAMILIES):
        if name in models[model]:
            continue
        named = load_config(model, parts.get(model, {}), checkpoint=str(find(name).place()))
        with pytest.raises(CheckpointError) as caught:
            find_weights(named)
        assert "\n" not in str(caught.value)


def find_weights(named):
    model = read_model(named)
    return model.family.find_weights(model.checkpoint, model.spec)


def test_copies_are_whole(find, tmp_path):
    """The tests above change copies; one that is not changed can be planned."""
    for name in FAMILIES:
        case = find(name).copy(tmp_path / name)
        assert case.plan(tmp_path / "b", pruner="trim").entries
        shutil.rmtree(case.home)
