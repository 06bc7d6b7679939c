"""Qwen3 with its tower, Hugging Face's own, and what DeepStack adds behind its first layers.

Rows of the decoder are an embedding and, behind it, the planes that are added; those of text are
zeros. The library is given both apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.interfaces.features import EagerVision, Geometry
from gap_export.reference.hooks import record_outputs
from gap_export.reference.llama import EagerLlama
from gap_export.reference.qwen_vision import describe_view, map_attention, run_tower

# N patches, M visual tokens, C width, D decoder width, S rows, p planes.


class EagerQwen3Vision:
    """The library's tower, with the states that its mergers take."""

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
        del project  # the library's own outputs are taken
        blocks: Any = self._tower.blocks
        stacked = sorted(self._config.deepstack_visual_indexes)
        with (
            record_outputs(blocks[k] for k in stacked) as states,
            map_attention(blocks[-1].attn) as maps,
        ):
            output, _ = run_tower(self._tower, self._config, views)
        count = len(output.pooler_output)
        taken = [each.reshape(count, -1) for each in (output.last_hidden_state, *states)]
        features = output.deepstack_features
        return describe_view(
            arrange(torch.cat(taken, dim=1)[None]),
            output.pooler_output,
            maps[0],
            geometry=geometry,
            arrange=arrange,
            planes=torch.cat(features, dim=1) if features else None,
        )

    def normalize(self, patches: Tensor) -> Tensor:
        """Nothing compares patches with CLIP's text here."""
        return patches

    @torch.no_grad()
    def project(self, rows: Tensor) -> Tensor:
        """Visual tokens [K, (1 + p) D] of rows [K, (1 + p) 4 C], by the library's mergers."""
        tower: Any = self._tower
        stacked = list(self._config.deepstack_visual_indexes)
        mergers = [tower.merger]
        mergers += [tower.deepstack_merger_list[stacked.index(k)] for k in sorted(stacked)]
        width = self._config.hidden_size
        parts = rows.chunk(len(mergers), dim=1)
        merged = [
            merge(part.reshape(-1, width)) for merge, part in zip(mergers, parts, strict=True)
        ]
        return torch.cat(merged, dim=1)


class EagerQwen3Text(EagerLlama):
    """A decoder whose rows bring planes."""

    def __init__(
        self,
        decoder: nn.Module,
        head: nn.Module,
        tokenizer: TokenizerFiles,
        *,
        image_token_id: int | None,
        planes: int,
    ) -> None:
        """Wrap a loaded model; as EagerLlama, with the number of planes."""
        super().__init__(decoder, head, tokenizer, image_token_id=image_token_id)
        self._planes = planes

    def embed(self, token_ids: list[int]) -> Tensor:
        """Token embeddings with planes of zeros behind them [S, (1 + p) D]."""
        rows = super().embed(token_ids)
        return torch.cat([rows, rows.new_zeros(len(rows), self._planes * rows.shape[1])], dim=1)

    def split_planes(self, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The rows alone [S, D], and what the library takes besides."""
        own, *planes = rows.chunk(1 + self._planes, dim=1)
        if not planes:
            return own, {}
        everywhere = torch.ones(1, len(own), dtype=torch.bool)
        return own, {"visual_pos_masks": everywhere, "deepstack_visual_embeds": planes}
