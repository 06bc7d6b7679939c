"""Checkpoints, prompts and settings that a plan refuses or fills in."""

import dataclasses
import json
import shutil

import pytest
import torch
from makers import checkpoints
from tokenizers import Tokenizer
from tools.commands import dry_run

from gap_export.errors import CheckpointError
from gap_export.pipeline import run as pipeline
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_runtime.errors import ConfigError

IMAGE_ID = 3


@pytest.fixture
def copy(tiny_llava, tmp_path):
    """A copy of the tiny checkpoint to be broken."""
    return shutil.copytree(tiny_llava, tmp_path / "copy")


def edit_config(folder, edit):
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_without_a_tokenizer_only_graphs_can_be_made(copy, tmp_path, make_plan):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        make_plan(copy, tmp_path / "out", reference=True)
    assert "--no-reference" in str(caught.value)
    plan = make_plan(copy, tmp_path / "out", reference=False, prompt__prefix=7)
    assert (plan.prompt.tokenizer, plan.layout.prefix) == (None, 7)


@pytest.mark.usefixtures("quick")
def test_a_bundle_of_graphs_alone_has_no_tokenizer(copy, tmp_path, make_plan, run_export):
    (copy / "tokenizer.json").unlink()
    run_export(make_plan(copy, tmp_path / "out"))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_broken_tokenizer_is_named(copy, tmp_path, make_plan):
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises((CheckpointError, ConfigError), match=r"tokenizer\.json"):
        make_plan(copy, tmp_path / "out")


def test_an_image_token_that_the_tokenizer_lacks(copy, tmp_path, make_plan):
    edit_config(copy, lambda data: data.update(image_token_index=9999, image_token_id=9999))
    with pytest.raises(CheckpointError, match="no token 9999"):
        make_plan(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("language_model.model.layers.1.mlp.up_proj.weight", None, ("missing", "layers.1.mlp.up")),
        (
            "language_model.model.layers.0.mlp.up_proj.weight",
            torch.t,
            ("model.safetensors", "up_proj.weight", "[64, 96]", "[96, 64]", "it lies transposed"),
        ),
    ],
)
def test_a_tensor_that_is_missing_or_transposed(
    copy, tmp_path, make_plan, capsys, name, change, parts
):
    """Said before any work; the other damages and layouts are in models/test_llava_files.py."""

    def edit(tensors):
        value = tensors.pop(name)
        return tensors if change is None else tensors | {name: change(value)}

    checkpoints.edit_tensors(copy, edit)
    with pytest.raises(CheckpointError) as caught:
        make_plan(copy, tmp_path / "out")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert dry_run(copy) == 3
    assert str(caught.value) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda data: data.update(vision_feature_layer=-9), "vision_feature_layer"),
        (lambda data: data.update(vision_feature_layer=[-2, -3]), "vision_feature_layer"),
        (lambda data: data.update(vision_feature_select_strategy="full"), "strategy"),
        (lambda data: data["text_config"].update(model_type="gemma"), "gemma"),
        (
            lambda data: data["text_config"].update(model_type="mistral", sliding_window=64),
            "sliding_window",
        ),
        (lambda data: data["text_config"].update(hidden_act="gelu"), "hidden_act"),
        (lambda data: data["vision_config"].update(model_type="siglip_vision_model"), "siglip"),
        (
            lambda data: data["text_config"].update(
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 256,
                }
            ),
            "longrope",
        ),
    ],
)
def test_configs_that_the_family_does_not_have(copy, tmp_path, make_plan, edit, part):
    edit_config(copy, edit)
    with pytest.raises(CheckpointError) as caught:
        make_plan(copy, tmp_path / "out")
    assert "config.json" in str(caught.value)
    assert part in str(caught.value)


@pytest.mark.parametrize("window", [None, 512])
def test_mistral_is_llama_where_its_window_holds_every_position(copy, tmp_path, make_plan, window):
    edit_config(
        copy,
        lambda data: data["text_config"].update(model_type="mistral", sliding_window=window),
    )
    assert make_plan(copy, tmp_path / "out").spec.decoder.max_positions == 512


def test_a_checkpoint_of_another_family_under_a_model_file(copy, tmp_path):
    edit_config(copy, lambda data: (data.clear(), data.update(model_type="gpt2", n_embd=64)))
    request = make_request("refshapes", checkpoint=copy, out=tmp_path / "out", reference=False)
    with pytest.raises((CheckpointError, ConfigError), match="gpt2"):
        plan_export(request)


def test_a_prompt_that_is_too_long_for_its_slots(tiny_llava, tmp_path, make_plan):
    with pytest.raises(
        ConfigError, match=r"prompt.suffix is 3; raise it with --set prompt.suffix"
    ):
        make_plan(tiny_llava, tmp_path / "out", prompt__suffix=3)


def test_room_after_the_image_fits_the_template_where_it_is_not_given(tiny_llava, tmp_path):
    """64 tokens, or the template's own and 32 more where that is more."""
    tokenizer = Tokenizer.from_file(str(tiny_llava / "tokenizer.json"))
    for template in ("<image> {phrase}", "<image>" + "0123456789" * 6 + " {phrase}"):
        request = make_request(
            tiny_llava, settings={"prompt.template": template}, out=tmp_path, reference=False
        )
        ids = tokenizer.encode(template.replace("{phrase}", "x")).ids
        after = len(ids) - ids.index(IMAGE_ID) - 1
        assert plan_export(request).layout.suffix == max(64, after + 32)
    assert after > 32


@pytest.mark.parametrize("frame", ["padded-square", "original"])
def test_the_frame_of_boxes_can_be_said(tiny_llava, tmp_path, make_plan, frame):
    usual = make_plan(tiny_llava, tmp_path / "out").spec.box
    assert usual.frame == "padded-square"
    said = make_plan(tiny_llava, tmp_path / "out", box__frame=frame).spec.box
    assert said == dataclasses.replace(usual, frame=frame)


def test_the_default_folder_name(tiny_llava, make_plan):
    plan = make_plan(tiny_llava, None, ratios=(0.75, 0.5))
    assert plan.out == pipeline.Path("tiny-llava-6-13of25")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stored_dtype_is_the_default(tmp_path, make_plan, dtype):
    folder = checkpoints.make_llava_checkpoint(tmp_path / "small", dtype=dtype)
    assert make_plan(folder, tmp_path / "out").dtype == dtype
