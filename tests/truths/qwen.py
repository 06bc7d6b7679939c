"""Qwen-VL in float64, asked on the full sequence with the pruned keys masked out.

The library's own model; nothing here knows graphs, modes or kept orders. Its norms go through
float32, which rounds, so they are written anew.
"""

import torch
from transformers import (
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from truths.axes import count_positions

KINDS = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


class MaskedQwen:
    """A checkpoint in float64."""

    def __init__(self, folder, kind):
        self.model = (
            KINDS[kind]
            .from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
            .eval()
        )
        for module in self.model.modules():
            if hasattr(module, "variance_epsilon"):
                module.forward = norm_of(module)

    @torch.no_grad()
    def look(self, pixels):
        """All visual tokens [N, D] of pixels [1, 3, H, W], DeepStack's planes, and the grid."""
        vision = self.model.config.vision_config
        size = vision.patch_size
        rows, columns = (side // size // 2 for side in pixels.shape[2:])
        # The library's order of patches: token by token, 2 x 2 patches each, two frames.
        cut = torch.as_tensor(pixels, dtype=torch.float64)[0]
        cut = cut.unfold(1, size, size).unfold(2, size, size)
        cut = cut.reshape(3, rows, 2, columns, 2, size, size).permute(1, 3, 2, 4, 0, 5, 6)
        flat = torch.stack([cut, cut], dim=5).reshape(4 * rows * columns, -1)
        sizes = torch.tensor([[1, 2 * rows, 2 * columns]])
        seen = self.model.model.visual(flat, grid_thw=sizes)
        planes = list(getattr(seen, "deepstack_features", None) or [])
        return seen.pooler_output, planes, (rows, columns)

    @torch.no_grad()
    def run(self, rows, ids, mask, *, planes=(), places=None, cache=None):
        """Logits [S, V] of rows [S, D]; planes [K, D] are added at places of the rows."""
        more = {}
        if planes:
            visual = torch.zeros(1, len(rows), dtype=torch.bool)
            visual[0, places] = True
            more = {"visual_pos_masks": visual, "deepstack_visual_embeds": list(planes)}
        output = self.model.model.language_model(
            inputs_embeds=rows[None],
            position_ids=torch.as_tensor(ids)[:, None],
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=cache is not None,
            **more,
        )
        return self.model.lm_head(output.last_hidden_state[0])

    def embed(self, ids):
        """Token embeddings [S, D]."""
        return self.model.get_input_embeddings()(torch.as_tensor(ids))

    @torch.no_grad()
    def answer(self, pixels, prefix, suffix, kept, steps):
        """Logits [steps, V]: of the prompt's last row, then of each greedy token."""
        tokens, planes, grid = self.look(pixels)
        before, count = len(prefix), len(tokens)
        rows = torch.cat([self.embed(prefix), tokens, self.embed(suffix)])
        hidden = hide(len(rows), before, count, kept)
        ids = count_positions(before, grid, len(suffix))
        places = torch.arange(before, before + count)
        cache, logits = DynamicCache(), []
        while True:
            seen = cache.get_seq_length()
            mask = mask_keys(len(rows), seen, hidden)
            out = self.run(rows, ids, mask, planes=planes, places=places, cache=cache)
            logits.append(out[-1])
            if len(logits) == steps:
                return torch.stack(logits)
            rows, ids = self.embed([int(out[-1].argmax())]), ids[:, -1:] + 1
            planes = ()


def hide(length, before, count, kept):
    """Which rows of a prompt are pruned visual tokens."""
    hidden = torch.zeros(length, dtype=torch.bool)
    hidden[before : before + count] = True
    hidden[before + torch.as_tensor(kept)] = False
    return hidden


def mask_keys(rows, seen, hidden):
    """What is added to attention [rows, seen + rows] of rows behind `seen` ones."""
    mask = torch.full((rows, seen + rows), -1e30, dtype=torch.float64).triu(seen + 1)
    mask[:, : len(hidden)] += hidden * -1e30
    if not seen:
        # A hidden row may see itself, or its softmax would have nothing to weigh.
        mask.fill_diagonal_(0.0)
    return mask


def norm_of(module):
    """A root-mean-square norm in the dtype of what it is given."""
    return lambda x: (
        module.weight
        * x
        * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    )
