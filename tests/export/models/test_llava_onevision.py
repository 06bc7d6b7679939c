"""LLaVA-OneVision: its tower in every form of a config, its prompt, pruners and refusals."""

from types import SimpleNamespace

import pytest
import torch
from makers import originals
from makers.families import PHRASE, WITHOUT_CLS, find_family, make_picture, serves
from makers.originals.internvl import edit_config
from tools.distances import furthest
from tools.refusals import refuse
from transformers import (
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
)

from gap_export.blocks import llama
from gap_export.config.load import load_config
from gap_export.errors import CheckpointError
from gap_export.interfaces.features import Feature
from gap_export.models import llava_onevision
from gap_runtime.errors import ConfigError
from gap_runtime.grounding.prompt import PromptEncoder, load_tokenizer
from gap_runtime.pictures.load import find_bucket
from gap_runtime.registry import list_plugins

NAME = "llava-onevision"
PRUNERS = list_plugins("gap_export.pruners")


@pytest.fixture
def case(tmp_path_factory):
    return find_family(NAME, tmp_path_factory)


@pytest.fixture
def copy(case, tmp_path):
    return case.copy(tmp_path / "home")


FORMS = (
    {},
    {"feature_layer": -2},
    {"feature_layer": 1, "vision_head": True, "names": "modern"},
)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_the_tower_equals_the_librarys(tmp_path, case, form):
    folder = originals.make_llava_onevision(tmp_path / "m", layers=1, views=2, **form)
    plan = case.plan(tmp_path / "b", checkpoint=str(folder))
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    own = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    for bucket, size in zip(plan.spec.buckets, case.sizes, strict=True):
        tower = llava_onevision.build_tower(plan.spec, bucket, frozenset(plan.spec.features))
        tower.load_state_dict({name: own[name] for name in tower.state_dict()}, strict=True)
        shape = plan.spec.preprocess.pixel_shape(bucket)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            tokens, values = tower.eval()(pixels)
            features = model.model.get_image_features(
                pixels, torch.tensor([size[::-1]]), return_dict=True
            )
        expected = features.pooler_output[0]
        assert len(expected) == bucket.patches
        assert furthest(tokens[0], expected[bucket.removable]) < 1e-4
        assert torch.equal(
            expected[list(bucket.fixed)], own["image_newline"].expand(len(bucket.fixed), -1)
        )
        look = eager.look(pixels, bucket)
        assert furthest(look.tokens, tokens[0]) < 1e-4
        column = look.by_token(look.attentions[look.layer - 1].mean((1, 2)))
        assert furthest(values[Feature.COLUMN_ATTENTION][0], column) < 1e-5
        keys = look.keys[look.layer - 1].unflatten(-1, (3, -1)).mean(2)
        assert furthest(values[Feature.KEYS][0], look.by_token(keys)) < 1e-4


def test_prompt_is_the_librarys(case, tmp_path):
    """Its processor needs torchvision; what it puts in a picture's place needs its rule alone."""
    plan = case.plan(tmp_path / "b")
    folder = case.place()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    rule = SimpleNamespace(
        image_processor=processor,
        num_image_tokens=16,
        vision_aspect_ratio="anyres_max_3",
        vision_feature_select_strategy="full",
        image_token="<image>",
    )
    for name in ("_get_number_of_features", "_get_unpadded_features"):
        method = getattr(LlavaOnevisionProcessor, name)
        setattr(rule, name, lambda *sizes, method=method: method(rule, *sizes))
    encoder = PromptEncoder(load_tokenizer(folder / "tokenizer.json"), plan.prompt, rows=9999)
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    text = plan.spec.template.replace("{phrase}", PHRASE)
    assert text.startswith("<|im_start|>user <image>\nPlease provide")
    assert text.endswith(f"{PHRASE}<|im_end|><|im_start|>assistant\n")
    for bucket, size in zip(plan.spec.buckets, case.sizes, strict=True):
        seen = processor(make_picture(*size), return_tensors="pt")
        pictured = LlavaOnevisionProcessor.replace_image_token(rule, seen, 0)
        ids = tokenizer(text.replace("<image>", pictured)).input_ids
        encoded = encoder.encode(PHRASE)
        visual = [plan.spec.image_token_id] * bucket.patches
        assert ids == encoded.prefix + visual + encoded.suffix
        assert len(encoded.prefix) == plan.layout.prefix
        assert torch.equal(eager.make_pixels(make_picture(*size)), seen["pixel_values"])


def test_without_a_chat_template_the_prompt_is_the_same(case, tmp_path):
    folder = originals.make_llava_onevision(
        tmp_path / "m", layers=1, vision_layers=1, chat=False, processor=False
    )
    plan = case.plan(tmp_path / "b", checkpoint=str(folder))
    assert plan.spec.template == case.plan(tmp_path / "c").spec.template
    # As the class of the library's processor has it.
    assert plan.spec.preprocess.mean == tuple(LlavaOnevisionImageProcessorPil.image_mean)
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    (bucket, _), picture = plan.spec.buckets, make_picture(*case.sizes[0])
    found = eager.make_pixels(picture)
    assert tuple(found.shape) == plan.spec.preprocess.pixel_shape(bucket)


def test_usual_photographs_have_graphs_where_no_canvas_is_asked_for(case, tmp_path):
    plan = case.plan(tmp_path / "b", image__canvas=None)
    spec = plan.spec
    names = [bucket.name for bucket in spec.buckets]
    assert names == ["62x62-6x8", "62x62-8x6"]
    assert find_bucket((52, 39), spec.preprocess, spec.buckets) == spec.buckets[0]
    assert find_bucket((39, 52), spec.preprocess, spec.buckets) == spec.buckets[1]


def test_the_usual_pruner_is_the_best_without_cls(case):
    folder = str(case.place())
    assert load_config(folder, {}).config.prune.strategy == "column_attention"
    assert load_config(folder, {"prune.strategy": "dart"}).config.prune.strategy == "dart"
    assert load_config("llava-onevision-qwen2-7b", {}).config.prune.strategy == "column_attention"
    assert load_config("llava-1.5-7b", {}).config.prune.strategy == "cls_attention"


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if not serves(NAME, name)])
def test_pruners_that_need_cls_are_refused(case, tmp_path, pruner):
    message = refuse(case, tmp_path / "b", ConfigError, prune__strategy=pruner)
    assert f"'{pruner}' needs " in message
    assert "as its vision tower has no CLS token; choose another --pruner: " in message
    served = message.rpartition(": ")[2].split(", ")
    assert served == [name for name in PRUNERS if serves(NAME, name)]
    assert NAME in WITHOUT_CLS


def test_a_head_in_the_files_wins_over_a_config_that_ties_it(case, tmp_path):
    folder = originals.make_llava_onevision(tmp_path / "m", layers=1, vision_layers=1, tied=False)
    edit_config(folder, lambda data: data["text_config"].update(tie_word_embeddings=True))
    plan = case.plan(tmp_path / "b", checkpoint=str(folder))
    assert plan.sources[llama.HEAD].inputs[0].key == "language_model.lm_head.weight"
    rows = torch.randn(3, 84, generator=torch.Generator().manual_seed(1))
    head = originals.read_folder(folder)["language_model.lm_head.weight"]
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    assert torch.equal(eager._language._head.weight, head)
    eager.run_decoder(rows, torch.arange(3)[None], eager.start_cache())


def test_a_head_that_is_the_embedding_table(case, tmp_path):
    plan = case.plan(tmp_path / "b")
    assert plan.sources[llama.HEAD].inputs[0].key == llama.EMBEDDING.replace(
        "language_model.", "language_model.model."
    )


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda data: data["vision_config"].update(num_channels=1), "num_channels 1, expected 3"),
        (lambda data: data["vision_config"].update(model_type="clip_vision_model"), "expected si"),
        (lambda data: data.update(vision_feature_select_strategy="default"), "the first patch"),
        (lambda data: data.update(vision_feature_layer=[-1, -2]), "expected one layer"),
        (lambda data: data.update(vision_feature_layer=9), "expected one of the 3 blocks"),
        (lambda data: data.update(vision_aspect_ratio="anyres"), "vision_aspect_ratio 'anyres'"),
        (lambda data: data.update(image_grid_pinpoints=[[30, 31]]), "expected multiples of 31"),
        (lambda data: data["text_config"].update(model_type="gemma"), "of type 'gemma'"),
    ],
)
def test_configs_that_are_refused(copy, tmp_path, edit, reason):
    edit_config(copy.place(), edit)
    message = refuse(copy, tmp_path / "b", CheckpointError)
    assert message.startswith(str(copy.place() / "config.json"))
    assert reason in message


@pytest.mark.parametrize(
    ("canvas", "reason"),
    [
        ("93", "expected WIDTHxHEIGHT"),
        ("124x31", "the model has no such canvas; have 31x31, 62x31"),
        ("62x31/0:1", "an aspect of 0"),
        ("93x93/40:1", "so thin a picture"),
        ("62x62/3:1", "go on other canvases"),
    ],
)
def test_canvases_that_are_refused(case, tmp_path, canvas, reason):
    message = refuse(case, tmp_path / "b", ConfigError, image__canvas=canvas)
    assert message.startswith(f"image.canvas '{canvas}': ")
    assert reason in message
