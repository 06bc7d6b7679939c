"""A tower without a CLS token: what it serves is exported, what it cannot serve is refused.

The model is made up: SigLIP's tower before LLaVA's projector and decoder, all of Hugging Face's.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from makers.checkpoints import make_llava_checkpoint
from makers.families import make_picture, make_samples
from torch import nn
from transformers import LlavaForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel
from truths import pruners as truth
from truths.masked import MaskedLlava

from gap_export.blocks.scores import column_attention
from gap_export.checkpoint.sources import expected_shapes
from gap_export.interfaces.features import CLS_FEATURES, Feature
from gap_export.models import llava
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.reference import model as reference_model
from gap_runtime import Bundle, Grounder
from gap_runtime.errors import ConfigError
from gap_runtime.registry import list_plugins, load_plugin

HEADS, WIDTH, LAYERS = 3, 36, 4
PRUNERS = {
    name: load_plugin("gap_export.pruners", name, "pruner").NEEDS
    for name in list_plugins("gap_export.pruners")
}


class Siglip(SiglipVisionModel):
    """The library's tower, whose parameters may have no values when it is made."""

    def _init_weights(self, module):
        pass


class SiglipTower(nn.Module):
    """The blocks up to the hidden state that is wanted; every token is a patch."""

    def __init__(self, config, layer, needs, *, text_width=None):
        super().__init__()
        assert text_width is None
        assert not needs & CLS_FEATURES
        used = copy.deepcopy(config)
        used.num_hidden_layers, used._attn_implementation = layer, "sdpa"
        self.vision_tower = Siglip(used)
        del self.vision_tower.post_layernorm
        self.needs = needs

    def fill_constants(self):
        embeddings = self.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]

    def forward(self, pixels):
        states, before = self.vision_tower.embeddings(pixels), None
        for block in self.vision_tower.encoder.layers:
            before, states = states, block(states, None)
        values = {}
        if Feature.COLUMN_ATTENTION in self.needs:
            last = self.vision_tower.encoder.layers[-1]
            normed = last.layer_norm1(before)
            query, key = last.self_attn.q_proj(normed), last.self_attn.k_proj(normed)
            score = column_attention(query, key, HEADS, leading=0)
            values[Feature.COLUMN_ATTENTION] = score
        return states, values


class Holder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vision_tower = SiglipVisionModel(config)


@pytest.fixture(autouse=True)
def siglip_family(monkeypatch):
    """LLaVA as a family whose tower is SigLIP's."""
    replaced = {
        "require_clip_tower": lambda *_: None,
        "require_patches_alone": lambda *_: None,
        "clip_features": lambda *_: {Feature.COLUMN_ATTENTION: ()},
        "tower_shapes": lambda config: expected_shapes(lambda: Holder(config)),
        "ClipTower": SiglipTower,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(llava, name, value)
    monkeypatch.setattr(
        reference_model, "EagerClip", partial(reference_model.EagerClip, leading=0)
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    home = tmp_path_factory.mktemp("siglip")
    make_samples(home / "samples", make_picture(90, 61))
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=50,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=70,
        patch_size=14,
        vision_use_head=False,
    )
    return make_llava_checkpoint(
        home / "model", image_size=70, vision=vision, names="library", seed=8
    )


@pytest.mark.parametrize(
    "pruner",
    ["column_attention", pytest.param("divprune", marks=pytest.mark.matrix), "text_similarity"],
)
def test_what_needs_no_cls_is_exported(checkpoint, export, tmp_path, pruner):
    """The export compares its graphs with PyTorch; GAP is held against the masked oracle."""
    folder = export(
        checkpoint,
        tmp_path / "b",
        prune__strategy=pruner,
        prune__ratios=[0.47],
        prompt__answer=3,
        check__samples=str(checkpoint.parent / "samples"),
        **({"prune__phrase": "embeddings"} if pruner == "text_similarity" else {}),
    )
    bundle = Bundle.open(folder)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    values = grounder.run_stages(
        make_picture(90, 61, seed=2), "the café mug", bundle.manifest.ratios[0], most=1
    )
    prompt = grounder.encoder.encode("the café mug")
    expected = MaskedLlava(checkpoint).answer(
        values.pixels, prompt.prefix, prompt.suffix, values.kept_index[0].tolist(), 1
    )
    found = values.decoded.prefill_logits
    assert np.abs(found - expected[0].numpy()).max() < 1e-4 * expected.abs().max()


def test_nuwa_goes_by_the_attention_that_patches_receive(checkpoint, export, tmp_path):
    folder = export(
        checkpoint,
        tmp_path / "b",
        reference=False,
        prune__strategy="nuwa",
        prune__keep=[9],
        prompt__answer=1,
    )
    bundle = Bundle.open(folder)
    values = Grounder(bundle, "onnxruntime:cpu").run_stages(
        make_picture(90, 61, seed=2), "the café mug", bundle.manifest.ratios[0], most=1
    )
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.no_grad():
        seen = model.model.vision_tower(
            torch.tensor(values.pixels).double(), output_hidden_states=True, output_attentions=True
        )
    layer = model.config.vision_feature_layer
    column = seen.attentions[layer][0].mean((0, 1)).numpy()
    expected = truth.nuwa(column, seen.hidden_states[layer][0].numpy(), 9, [(5, 5)])
    assert values.kept_index[0].tolist() == expected.order
    rows = model.model.multi_modal_projector(torch.tensor(expected.rows)).detach().numpy()
    np.testing.assert_allclose(values.visual_tokens[0], rows, atol=1e-4 * np.abs(rows).max())


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if PRUNERS[name] & CLS_FEATURES])
def test_what_needs_cls_is_refused(checkpoint, tmp_path, pruner):
    with pytest.raises(ConfigError) as error:
        plan_export(
            make_request(
                str(checkpoint),
                settings={"prune.strategy": pruner},
                target="cpu",
                out=tmp_path / "b",
                reference=False,
            )
        )
    message = str(error.value)
    assert "as its vision tower has no CLS token; choose another --pruner: " in message
    served = message.rpartition(": ")[2].split(", ")
    assert set(served) == {name for name in PRUNERS if not PRUNERS[name] & CLS_FEATURES}
