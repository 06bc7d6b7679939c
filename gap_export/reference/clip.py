"""CLIP's towers of Hugging Face's, with everything on the way that pruners may ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel

from gap_export.interfaces.features import EagerVision, Geometry
from gap_export.reference.hooks import record_outputs

# V views, T tokens of a view (CLS first where there is one), N visual tokens, C width, D decoder
# width, W text width.


def _as_they_are(states: Tensor) -> Tensor:
    return states


class EagerClip:
    """A vision tower of CLIP's kind."""

    def __init__(
        self,
        tower: CLIPVisionModel,
        layer: int,
        *,
        leading: int = 1,
        behind: Callable[[Tensor], Tensor] = _as_they_are,
    ) -> None:
        """Wrap a loaded tower.

        Args:
            tower: The library's, whose blocks are named as CLIP's.
            layer: The hidden state that patches are taken from.
            leading: Tokens before the patches: 1 for CLIP's CLS.
            behind: What becomes of the patches of each view before they are arranged.
        """
        self._tower, self._layer, self._leading = tower.eval(), layer, leading
        self._behind = behind

    @torch.no_grad()
    def look(
        self,
        views: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        geometry: Geometry,
        arrange: Callable[[Tensor], Tensor],
    ) -> EagerVision:
        """All that pruners may ask for.

        Args:
            views: Pixels [V, 3, H, W].
            project: Patches [N, C] to visual tokens [N, D].
            geometry: Of the tokens that may be removed.
            arrange: [V, T - leading, ...] to the patches [N, ...] in their order.
        """
        dtype = next(self._tower.parameters()).dtype
        attentions = [block.self_attn for block in self._tower.encoder.layers]
        with (
            record_outputs(each.q_proj for each in attentions) as queries,
            record_outputs(each.k_proj for each in attentions) as keys,
        ):
            output = self._tower(
                views.to(dtype), output_hidden_states=True, output_attentions=True
            )
        patches = arrange(self._behind(output.hidden_states[self._layer][:, self._leading :]))
        return EagerVision(
            patches=patches,
            tokens=project(patches),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            queries=tuple(queries),
            keys=tuple(keys),
            leading=self._leading,
            layer=self._layer,
            geometry=geometry,
            arrange=arrange,
        )

    @torch.no_grad()
    def normalize(self, patches: Tensor) -> Tensor:
        """The tower's last norm, which is meant for the last layer's states, on patches."""
        normed: Tensor = self._tower.post_layernorm(patches)
        return normed


class EagerClipText:
    """CLIP as a whole, for its text tower and the space that it shares with patches."""

    def __init__(self, model: CLIPModel, tokenizer: Path) -> None:
        """Wrap a loaded model; `tokenizer` is the folder of its tokenizer."""
        self._model = model.eval()
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)

    @torch.no_grad()
    def read_phrase(self, phrase: str) -> Tensor:
        """Text features [W], not normalized."""
        length = self._model.config.text_config.max_position_embeddings
        encoded = self._tokenizer(phrase, truncation=True, max_length=length, return_tensors="pt")
        pooled = self._model.text_model(**encoded).pooler_output
        features: Tensor = self._model.text_projection(pooled)[0]
        return features

    @torch.no_grad()
    def project_patches(self, patches: Tensor) -> Tensor:
        """Normed patches [N, C] in the space of text features [N, W]."""
        projected: Tensor = self._model.visual_projection(patches)
        return projected
