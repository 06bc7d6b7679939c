"""InternVL: its tower in every form that a config can ask for, its tiles, prompt and refusals."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from makers import originals
from makers.families import PHRASE, find_family, make_picture
from makers.originals.internvl import edit_config
from tools.distances import furthest
from tools.refusals import refuse
from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from gap_export.blocks import llama
from gap_export.errors import CheckpointError
from gap_export.interfaces.features import Feature
from gap_export.models import internvl
from gap_runtime.errors import ConfigError
from gap_runtime.grounding.prompt import PromptEncoder, load_tokenizer
from gap_runtime.pictures.boxes import PictureFrame, parse_boxes
from gap_runtime.pictures.load import find_bucket


@pytest.fixture
def case(tmp_path_factory):
    return find_family("internvl3", tmp_path_factory)


@pytest.fixture
def copy(case, tmp_path):
    return case.copy(tmp_path / "home")


FORMS = (
    {},
    {"head_norms": True, "norm_type": "rms_norm", "attention_bias": False},
    {"mean_pooling": False},
    {"feature_layer": -2, "mean_pooling": False},
    {"feature_layer": 2},
    {"cell": 1},
)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_the_tower_equals_the_librarys(tmp_path, case, form):
    folder = originals.make_internvl(tmp_path / "m", layers=1, **form)
    plan = case.copy(tmp_path / "c").plan(
        tmp_path / "b", image__tiles=2, image__canvas="48x24", checkpoint=str(folder)
    )
    (bucket,) = plan.spec.buckets
    needs = frozenset(plan.spec.features)
    tower = internvl.build_tower(plan.spec, bucket, needs).eval()
    model = InternVLForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    own = model.model.vision_tower.state_dict()
    tower.load_state_dict(
        {f"vision_tower.{k}": own[k] for k in tower.vision_tower.state_dict()}, strict=True
    )
    pixels = torch.randn(1, 3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches, values = tower(pixels)
        found = model.model.multi_modal_projector(patches)[0]
        features = model.model.get_image_features(
            pixels[0],
            vision_feature_layer=plan.spec.library_config.vision_feature_layer,
            return_dict=True,
        )
    assert furthest(found, features.pooler_output.flatten(0, 1)) < 1e-4
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    look = eager.look(pixels, bucket)
    assert furthest(look.tokens, found) < 1e-4
    layer, cell = look.layer, round(bucket.strip**0.5)
    side = 6 // cell
    # Patch by patch, in the order in which cells hold them.
    order = [
        (view, (y * cell + j) * 6 + x * cell + i)
        for view, y, x, j, i in itertools.product(
            range(3), range(side), range(side), range(cell), range(cell)
        )
    ]
    attention = look.attentions[layer - 1].mean(1)
    expected = torch.stack([attention[view, 0, 1 + patch] for view, patch in order])
    assert furthest(values[Feature.CLS_ATTENTION][0], expected) < 1e-5
    column = look.attentions[layer - 1].mean((1, 2))
    expected = torch.stack([column[view, 1 + patch] for view, patch in order])
    assert furthest(values[Feature.COLUMN_ATTENTION][0], expected) < 1e-5
    merge = look.keys[look.merge_block]
    expected = torch.stack([merge[view, 1 + patch] for view, patch in order])
    assert furthest(values[Feature.MERGE_KEYS][0], expected) < 1e-4


def test_prompt_is_the_librarys(case, tmp_path):
    """Its processor needs torchvision; what it puts in a picture's place needs its rule alone."""
    plan = case.plan(tmp_path / "b")
    folder = case.place()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rule = SimpleNamespace(
        start_image_token=tokenizer.start_image_token,
        image_token=tokenizer.context_image_token,
        end_image_token=tokenizer.end_image_token,
        image_seq_length=9,
    )
    processor = GotOcr2ImageProcessorPil.from_pretrained(folder, crop_to_patches=True)
    encoder = PromptEncoder(load_tokenizer(folder / "tokenizer.json"), plan.prompt, rows=9999)
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    text = plan.spec.template.replace("{phrase}", PHRASE)
    for bucket, size in zip(plan.spec.buckets, case.sizes, strict=True):
        seen = processor(make_picture(*size), return_tensors="pt")
        counts = {"num_patches": seen["num_patches"].tolist()}
        pictured = InternVLProcessor.replace_image_token(rule, counts, 0)
        ids = tokenizer(text.replace("<image>", pictured)).input_ids
        encoded = encoder.encode(PHRASE)
        visual = [plan.spec.image_token_id] * bucket.patches
        assert ids == encoded.prefix + visual + encoded.suffix
        assert len(encoded.prefix) == plan.layout.prefix
        pixels = eager.make_pixels(make_picture(*size))
        assert torch.equal(pixels[0], seen["pixel_values"])
        assert tuple(pixels.shape) == plan.spec.preprocess.pixel_shape(bucket)


def test_usual_photographs_have_graphs_where_no_canvas_is_asked_for(case, tmp_path):
    folder = originals.make_internvl(tmp_path / "m", layers=1, vision_layers=1)
    plan = case.plan(tmp_path / "b", checkpoint=str(folder), image__canvas=None)
    assert [bucket.canvas for bucket in plan.spec.buckets] == [(96, 72), (72, 96)]
    assert [bucket.patches for bucket in plan.spec.buckets] == [13 * 9, 13 * 9]
    spec = plan.spec
    assert find_bucket((640, 480), spec.preprocess, spec.buckets) == spec.buckets[0]
    assert find_bucket((480, 640), spec.preprocess, spec.buckets) == spec.buckets[1]


def test_one_tile_serves_every_picture(case, tmp_path):
    plan = case.plan(tmp_path / "b", image__canvas=None, image__tiles=1)
    (bucket,) = plan.spec.buckets
    assert bucket.patches == 9
    for size in ((640, 480), (1, 300), (7, 7)):
        assert find_bucket(size, plan.spec.preprocess, plan.spec.buckets) is bucket


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ("[[100, 200, 300, 400]]", [(20, 20, 60, 40)]),
        ("<ref>a cup</ref><box>[[100, 200, 300, 400]]</box>", [(20, 20, 60, 40)]),
        ("the box is [100, 200, 300, 400].", [(20, 20, 60, 40)]),
        ("[[0, 0, 1000, 1000], [500, 500, 1000, 1000]]", [(0, 0, 200, 100), (100, 50, 200, 100)]),
        ("[[100, 200, 300", []),
        ("no", []),
    ],
)
def test_boxes_are_thousandths_of_the_picture(case, tmp_path, answer, boxes):
    plan = case.plan(tmp_path / "b")
    found = parse_boxes(answer, plan.spec.box, PictureFrame.whole((200, 100)))
    assert [tuple(box) for box in found.boxes] == boxes
    assert bool(found.problems) == (not boxes)


def test_a_head_in_the_files_wins_over_a_config_that_ties_it(case, tmp_path):
    """The library's default says tied, and configs of some versions leave the key out."""
    folder = originals.make_internvl(tmp_path / "m", layers=1, vision_layers=1)
    edit_config(folder, lambda data: data.pop("tie_word_embeddings"))
    plan = case.plan(tmp_path / "b", checkpoint=str(folder))
    stored = originals.read_folder(folder)
    table, head = (
        stored[f"language_model.{name}.weight"] for name in ("model.embed_tokens", "lm_head")
    )
    assert not torch.equal(table, head)
    rows = torch.randn(3, 84, generator=torch.Generator().manual_seed(1))
    answers = []
    for memory in (None, 0):
        eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32", memory=memory)
        answers.append(eager.run_decoder(rows, torch.arange(3)[None], eager.start_cache()))
    torch.testing.assert_close(*answers)
    assert plan.sources[llama.HEAD].inputs[0].key == "language_model.lm_head.weight"


def test_growing_frequencies_are_the_usual_ones_up_to_the_trained_length(case, tmp_path):
    plan = case.plan(tmp_path / "b")
    config = plan.spec.library_config.text_config
    assert config.rope_parameters["rope_type"] == "dynamic"
    cosine, sine = llama.rotary_tables(plan.spec.decoder, config.max_position_embeddings)
    head = plan.spec.decoder.head_dim
    frequencies = 1e6 ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    angles = torch.arange(len(cosine), dtype=torch.float64)[:, None] * frequencies
    assert (cosine - angles.cos()).abs().max() < 1e-3
    assert (sine - angles.sin()).abs().max() < 1e-3
    with pytest.raises(CheckpointError, match=r"up to 1024 positions.*take 1025"):
        llama.rotary_tables(plan.spec.decoder, 1025)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda data: data["vision_config"].update(image_size=[24, 32]), "expected a square"),
        (lambda data: data["vision_config"].update(num_channels=1), "num_channels is not 3"),
        (lambda data: data["vision_config"].update(norm_type="batch"), "norm_type 'batch'"),
        (lambda data: data.update(downsample_ratio=0.3), "downsample_ratio 0.3"),
        (lambda data: data.update(downsample_ratio=1 / 3), "downsample_ratio 0.333"),
        (lambda data: data.update(downsample_ratio=0.25), "downsample_ratio 0.25"),
        (lambda data: data.update(vision_feature_select_strategy="full"), "'full' keeps the CLS"),
        (lambda data: data.update(vision_feature_layer=[-1, -2]), "expected one layer"),
        (lambda data: data.update(vision_feature_layer=9), "expected one of the 4 blocks"),
        (lambda data: data["text_config"].update(model_type="gemma"), "of type 'gemma'"),
    ],
)
def test_configs_that_are_refused(copy, tmp_path, edit, reason):
    edit_config(copy.place(), edit)
    message = refuse(copy, tmp_path / "b", CheckpointError)
    assert message.startswith(str(copy.place() / "config.json"))
    assert reason in message


@pytest.mark.parametrize("canvas", ["72", "70x24", "96x24", "24x24/4:3", ""])
def test_canvases_that_are_refused(case, tmp_path, canvas):
    message = refuse(case, tmp_path / "b", ConfigError, image__canvas=canvas)
    assert message.startswith(f"image.canvas '{canvas}': expected WIDTHxHEIGHT in multiples of 24")
    assert "one of 5 from 24x24 to 72x24" in message
