"""GAP is masking for models of tiles, in float64 with the library's own decoders.

The packed sequence runs over all views, with newlines where there are any. The same in exported
graphs, against other formulas: test_families_masked.py.
"""

import pytest
import torch
from makers.families import find_family
from transformers import AutoModelForImageTextToText

EQUAL, APART = 1e-12, 1e-2


@pytest.fixture(params=["internvl3", "internvl3.5", "llava-onevision"])
def model(request, tmp_path_factory, monkeypatch):
    case = find_family(request.param, tmp_path_factory)
    model = AutoModelForImageTextToText.from_pretrained(
        # So does its plain attention.
        case.files,
        dtype=torch.float64,
        attn_implementation="sdpa",
    ).eval()

    def norm(self, x):
        """The library's norms go through float32, which rounds."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale

    monkeypatch.setattr(type(model.model.language_model.norm), "forward", norm)
    return model


def see(model, draw):
    """All visual tokens [N, D] of a random picture."""
    side = model.config.vision_config.image_size
    if isinstance(side, int):
        # A mosaic of 9 tiles, which is shrunk, before newlines.
        views = torch.randn(1, 10, 3, side, side, generator=draw, dtype=torch.float64)
        sizes = torch.tensor([[3 * side, 3 * side]])
        return model.model.get_image_features(views, sizes, return_dict=True).pooler_output[0]
    views = torch.randn(4, 3, *side, generator=draw, dtype=torch.float64)
    return model.model.get_image_features(views, return_dict=True).pooler_output.flatten(0, 1)


@torch.no_grad()
def ask(model, rows, positions, mask):
    hidden = model.model.language_model(
        inputs_embeds=rows[None],
        position_ids=torch.tensor([positions]),
        attention_mask=mask[None, None],
        use_cache=False,
    ).last_hidden_state[0]
    return model.lm_head(hidden)


def causal(length):
    return torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_pruned_tiles_answer_as_masked_ones(model, share):
    draw = torch.Generator().manual_seed(int(share * 10))
    with torch.no_grad():
        visual = see(model, draw)
        embed = model.get_input_embeddings()
        ids = torch.randint(0, embed.num_embeddings, (15,), generator=draw)
        before, after = embed(ids[:4]), embed(ids[4:])
    patches, answer = len(visual), 4
    kept = torch.randperm(patches, generator=draw)[: max(1, round(share * patches))].sort().values
    whole = torch.cat([before, visual, after])
    hidden = torch.zeros(len(whole), dtype=torch.bool)
    hidden[4 : 4 + patches] = True
    hidden[4 + kept] = False
    mask = causal(len(whole))
    mask[:, hidden] = -torch.inf
    # A hidden row may see itself, or its softmax would have nothing to weigh.
    mask.fill_diagonal_(0.0)
    truth = ask(model, whole, list(range(len(whole))), mask)[-answer - 1 :]

    rows = torch.cat([before, visual[kept], after])
    gap = [*range(4), *(4 + kept).tolist(), *range(4 + patches, len(whole))]
    # Prompt and answer in one run: each row sees the rows before it, as steps on a cache do.
    found = ask(model, rows, gap, causal(len(rows)))[-answer - 1 :]
    size = truth.abs().max()
    assert ((found - truth).abs().max() / size).item() < EQUAL
    compact = ask(model, rows, list(range(len(rows))), causal(len(rows)))[-answer - 1 :]
    assert ((compact - truth).abs().max() / size).item() > APART
