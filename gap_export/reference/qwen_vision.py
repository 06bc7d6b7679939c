"""Qwen's vision towers, Hugging Face's own, and its image processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from gap_export.interfaces.family import ModelSpec
from gap_export.interfaces.features import EagerVision, Geometry
from gap_runtime.pictures.preprocess import find_mode

OLDER_NAMES: Final = {
    "visual.": "model.visual.",
    "model.visual.": "model.visual.",
    "model.language_model.": "model.language_model.",
    "model.": "model.language_model.",
}
"""Beginnings of keys of checkpoints, those of published Qwen2.5-VL among them, and today's."""

# V views (1), N patches, M visual tokens, C width, D decoder width, p pixels of a patch's side.


class EagerQwenVision:
    """Qwen2.5-VL's tower without its merger."""

    def __init__(self, tower: nn.Module, config: Any) -> None:
        """Wrap a loaded tower; `config` is the library's."""
        self._tower, self._config = tower.eval(), config

    @torch.no_grad()
    def look(
        self,
        views: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        geometry: Geometry,
        arrange: Callable[[Tensor], Tensor],
    ) -> EagerVision:
        """The tokens of the one view [1, 3, H, W], and what its patches attend to."""
        config, tower = self._config, self._tower
        seeing = [k for k in config.fullatt_block_indexes if k < config.depth]
        # Where none sees the whole picture, no pruner asks for what one attends to.
        full = max(seeing, default=config.depth - 1)
        blocks: Any = tower.blocks
        with map_attention(blocks[full].attn) as maps:
            output, grid = run_tower(tower, config, views)
        order, _ = get_vision_window_index(
            grid,
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        back = torch.argsort(order)
        patches = arrange(output.last_hidden_state.reshape(len(order), -1)[back][None])
        # The patches of each token, in the order of the tokens.
        places = torch.arange(len(maps[0])).reshape(len(order), -1)[back].flatten()
        return describe_view(
            patches,
            project(patches),
            maps[0][places][:, places],
            geometry=geometry,
            arrange=arrange,
        )

    def normalize(self, patches: Tensor) -> Tensor:
        """Nothing compares patches with CLIP's text here."""
        return patches


def run_tower(tower: Any, config: Any, views: Tensor) -> tuple[Any, Tensor]:
    """What the library's tower gives for pixels [1, 3, H, W], and the grid that it was told."""
    merge, size = config.spatial_merge_size, config.patch_size
    rows, columns = (int(side) // size for side in views.shape[-2:])
    # As the library's processor lays patches out: token by token, then its own patches.
    cut = views[0].reshape(3, rows // merge, merge, size, columns // merge, merge, size)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]
    flat = cut.expand(*cut.shape[:5], config.temporal_patch_size, size, size)
    grid = torch.tensor([[1, rows, columns]])
    dtype = next(tower.parameters()).dtype
    return tower(flat.reshape(rows * columns, -1).to(dtype), grid_thw=grid), grid


@contextmanager
def map_attention(attention: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets the map [N, N] of a block's attention when it runs, the mean over heads.

    The library gives none of these towers; here it is made of the block's own inputs.
    """
    maps: list[Tensor] = []

    def write(module: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        states = inputs[0] if inputs else named["hidden_states"]
        turned = module.qkv(states).reshape(len(states), 3, module.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(*turned[:2], *named["position_embeddings"])
        total = torch.zeros(len(states), len(states))
        # Head by head, as all at once would take gigabytes.
        for one, other in zip(query.transpose(0, 1), key.transpose(0, 1), strict=True):
            total += torch.softmax((one.float() @ other.float().T) * module.scaling, dim=-1)
        maps.append(total / module.num_heads)

    handle = attention.register_forward_pre_hook(write, with_kwargs=True)
    try:
        yield maps
    finally:
        handle.remove()


def describe_view(
    patches: Tensor,
    tokens: Tensor,
    attention: Tensor,
    *,
    geometry: Geometry,
    arrange: Callable[[Tensor], Tensor],
    planes: Tensor | None = None,
) -> EagerVision:
    """What pruners are told of a picture by a tower that gives one attention map [N, N]."""
    return EagerVision(
        patches=patches,
        tokens=tokens,
        # The only one that is kept counts as the first.
        attentions=(attention[None, None],),
        leading=0,
        layer=1,
        geometry=geometry,
        arrange=arrange,
        planes=planes,
    )


def load_qwen_processor(folder: Path | None, spec: ModelSpec) -> Callable[[Image.Image], Tensor]:
    """The library's processor for pictures that have a bucket's size already.

    Args:
        folder: Of the checkpoint that configures it; None where none does.
        spec: Facts about the model.
    """
    vision = spec.library_config.vision_config
    size, merge = vision.patch_size, vision.spatial_merge_size
    kind = Qwen2VLImageProcessorPil
    shape, mode = spec.preprocess, find_mode(spec.preprocess)
    processor: Any = (
        kind.from_pretrained(folder, local_files_only=True)
        if folder is not None
        else kind(patch_size=size, image_mean=list(shape.mean), image_std=list(shape.std))
    )

    def process(picture: Image.Image) -> Tensor:
        canvas = mode.find_bucket(picture.size, shape, spec.buckets).canvas
        assert canvas is not None
        resized = picture.resize(canvas, Image.Resampling.BICUBIC)
        area = canvas[0] * canvas[1]
        # So many pixels and no others: the library's own rule leaves the size as it is.
        flat = processor(
            resized,
            size={"shortest_edge": area, "longest_edge": area},
            return_tensors="pt",
        )["pixel_values"]
        rows, columns = (side // size // merge for side in reversed(canvas))
        cut: Tensor = flat.reshape(rows, columns, merge, merge, 3, -1, size, size)[..., 0, :, :]
        return cut.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, canvas[1], canvas[0])

    return process
