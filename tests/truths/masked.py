"""The oracle of the whole project: transformers on the FULL sequence, pruned keys masked out.

Pruning with GAP position IDs must give exactly what the unpruned model gives when no row may
look at a pruned token. Nothing here knows position modes, kept orders or graphs. Float64.
"""

import torch
from transformers import DynamicCache, LlavaForConditionalGeneration


class MaskedLlava:
    """A checkpoint in float64, asked with some visual tokens hidden."""

    def __init__(self, folder, number=None):
        """Load it; `number(before, after)` gives the position IDs [A, S] of a whole prompt."""
        self.number = number
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def visual_tokens(self, pixels):
        """All visual tokens [N, D] by the library's own method."""
        output = self.model.model.get_image_features(
            torch.as_tensor(pixels, dtype=torch.float64), return_dict=True
        )
        return output.pooler_output[0]

    @torch.no_grad()
    def answer(self, pixels, prefix, suffix, kept, steps):
        """Logits [steps, V]: of the prompt's last row, then of each greedy token."""
        visual = self.visual_tokens(pixels)
        embed = self.model.get_input_embeddings()
        rows = torch.cat([embed(torch.tensor(prefix)), visual, embed(torch.tensor(suffix))])
        hidden = torch.zeros(len(rows), dtype=torch.bool)
        hidden[len(prefix) : len(prefix) + len(visual)] = True
        hidden[len(prefix) + torch.as_tensor(kept)] = False
        cache, logits = DynamicCache(), []
        ids = torch.arange(len(rows))[None]
        if self.number is not None:
            ids = self.number(len(prefix), len(suffix))
        while True:
            seen = cache.get_seq_length()
            mask = torch.zeros(len(rows), seen + len(rows), dtype=torch.float64)
            mask += torch.full_like(mask, -1e30).triu(seen + 1)
            mask[:, : len(hidden)] += hidden * -1e30
            # A hidden row may see itself, or its softmax would have nothing to weigh.
            if not seen:
                mask.fill_diagonal_(0.0)
            output = self.model.model.language_model(
                inputs_embeds=rows[None],
                position_ids=ids if len(ids) == 1 else ids[:, None],
                attention_mask=mask[None, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(self.model.lm_head(output.last_hidden_state[0, -1]))
            if len(logits) == steps:
                return torch.stack(logits)
            rows, ids = embed(logits[-1].argmax()[None]), ids[:, -1:] + 1
