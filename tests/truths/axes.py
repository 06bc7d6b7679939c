"""Position IDs by time, row and column as Hugging Face's Qwen2.5-VL counts them."""

from functools import partial
from types import SimpleNamespace

import torch
from transformers import Qwen2_5_VLModel


def count_positions(before, grid, after):
    """IDs [3, S] of a whole prompt: text, a picture of (rows, columns) visual tokens, text."""
    rows, columns = grid
    kinds = [0] * before + [1] * rows * columns + [0] * after
    sizes = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=sizes))
    model.get_vision_position_ids = partial(Qwen2_5_VLModel.get_vision_position_ids, model)
    ids, delta = Qwen2_5_VLModel.get_rope_index(
        model,
        torch.zeros(1, len(kinds), dtype=torch.int64),
        torch.tensor([kinds]),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]]),
    )
    # The library's own decoding goes on here.
    assert len(kinds) + delta.item() == ids.max() + 1
    return ids[:, 0]
