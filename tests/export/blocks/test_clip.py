"""The tower's scores against the library's, and which layer the features come from."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from gap_export.blocks.clip import ClipTower, resolve_layer
from gap_export.errors import CheckpointError
from gap_export.interfaces.features import Feature


def test_the_towers_score_is_the_librarys_attention():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=28,
        patch_size=7,
        attn_implementation="eager",
    )
    library = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in library.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    pixels = torch.randn(1, 3, 28, 28)
    layer = resolve_layer(config, -2, "config.json")
    needs = frozenset({Feature.CLS_ATTENTION, Feature.COLUMN_ATTENTION})
    tower = ClipTower(config, layer, needs).eval()
    missing, unexpected = tower.vision_tower.load_state_dict(library.state_dict(), strict=False)
    with torch.no_grad():
        patches, values = tower(pixels)
        whole = library(pixels, output_hidden_states=True, output_attentions=True)
    expected = torch.stack([whole.attentions[2][0, head, 0, 1:] for head in range(3)]).mean(0)
    assert layer == 3
    assert not missing
    assert all(".3." in name or "post_layernorm" in name for name in unexpected)
    assert torch.allclose(patches, whole.hidden_states[-2][:, 1:], atol=1e-5)
    assert torch.allclose(values[Feature.CLS_ATTENTION][0], expected, atol=1e-6)
    assert expected.std() > 1e-3
    received = whole.attentions[2][0].mean(dim=(0, 1))[1:]
    assert torch.allclose(values[Feature.COLUMN_ATTENTION][0], received, atol=1e-6)
    assert received.std() > 1e-4


@pytest.mark.parametrize(("layer", "index"), [(-2, 4), (-1, 5), (5, 5), (1, 1), (-5, 1)])
def test_feature_layers_count_hidden_states(layer, index):
    assert resolve_layer(CLIPVisionConfig(num_hidden_layers=5), layer, "x") == index


@pytest.mark.parametrize("layer", [0, 6, -6, -7])
def test_feature_layers_without_a_block_are_refused(layer):
    with pytest.raises(CheckpointError, match="vision_feature_layer"):
        resolve_layer(CLIPVisionConfig(num_hidden_layers=5), layer, "x")
