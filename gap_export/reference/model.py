"""A grounding model put together of its eager parts; fits interfaces.family.EagerModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from gap_export.interfaces.family import ModelSpec, geometry_of
from gap_export.interfaces.features import EagerVision, Geometry
from gap_export.reference.clip import EagerClip, EagerClipText
from gap_export.reference.llama import EagerLlama
from gap_export.reference.loader import Loader
from gap_runtime.pictures.preprocess import Bucket

# V views, P patches of a view, N visual tokens, F fixed ones, C patch width, D decoder width,
# S rows, W text width.

Arrange = Callable[[Tensor], Tensor]


class EagerTower(Protocol):
    """A vision tower in PyTorch."""

    def look(
        self, views: Tensor, project: Arrange, *, geometry: Geometry, arrange: Arrange
    ) -> EagerVision:
        """All that pruners may ask for of the views [V, 3, H, W] of a picture."""

    def normalize(self, patches: Tensor) -> Tensor:
        """The tower's last norm on patches [N, C]."""


def one_view(bucket: Bucket) -> Arrange:
    """Patches as the one view of the picture has them."""
    del bucket
    return lambda values: values[0]


class EagerGrounder:
    """Tower, projector and language model, each the library's own or written plainly."""

    def __init__(
        self,
        *,
        tower: EagerTower,
        project: Arrange,
        language: EagerLlama,
        process: Callable[[Image.Image], Tensor],
        clip: EagerClipText | None = None,
        arrange: Callable[[Bucket], Arrange] = one_view,
        fixed_token: Tensor | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            tower: Pixels to patches.
            project: Patches [K, C] to visual tokens [K, D].
            language: Embeddings to logits.
            process: A picture to pixels.
            clip: For phrases.
            arrange: How patches of several views become one row, by bucket.
            fixed_token: The one [D] that stands at every fixed index.
        """
        self._tower, self._project, self._language = tower, project, language
        self._process, self._clip = process, clip
        self._arrange, self._fixed_token = arrange, fixed_token
        self.encode, self.encode_phrase = language.encode, language.encode_phrase
        self.decode, self.embed = language.decode, language.embed
        self.rotary_frequencies = language.rotary_frequencies
        self.start_cache, self.run_decoder = language.start_cache, language.run_decoder
        self.read_cache = language.read_cache
        self.observe = language.observe

    def make_pixels(self, picture: Image.Image) -> Tensor:
        """Pixels of an RGB picture."""
        return self._process(picture)

    def look(self, pixels: Tensor, bucket: Bucket) -> EagerVision:
        """All that pruners may ask for of a picture."""
        return self._tower.look(
            pixels.flatten(0, -4),
            self.project,
            geometry=geometry_of(bucket),
            arrange=self._arrange(bucket),
        )

    def read_phrase(self, phrase: str) -> Tensor:
        """Text features [W] of a phrase."""
        assert self._clip is not None
        return self._clip.read_phrase(phrase)

    def text_patches(self, vision: EagerVision) -> Tensor:
        """Patches [N, W] in the space of text features."""
        assert self._clip is not None
        return self._clip.project_patches(self._tower.normalize(vision.patches))

    @torch.no_grad()
    def project(self, patches: Tensor) -> Tensor:
        """Visual tokens [K, D] of patches [K, C]."""
        return self._project(patches)

    def fixed_tokens(self, bucket: Bucket) -> Tensor:
        """The tokens that are never removed, [F, D]."""
        assert self._fixed_token is not None
        return self._fixed_token.detach().expand(len(bucket.fixed), -1)


def join_parts(
    model: Any,
    loader: Loader,
    spec: ModelSpec,
    *,
    layer: int,
    process: Callable[[Image.Image], Tensor],
    arrange: Callable[[Bucket], Arrange] = one_view,
) -> EagerGrounder:
    """A library's grounding model, taken apart by the names that the library uses.

    Args:
        model: With a vision tower, a projector, a language model and a head.
        loader: Which made it, for CLIP's text tower.
        spec: Facts about the model.
        layer: Index of the hidden state that patches are taken from.
        process: A picture to pixels.
        arrange: How patches of several views become one row, by bucket.
    """
    parts = model.model
    return EagerGrounder(
        tower=EagerClip(parts.vision_tower, layer),
        project=parts.multi_modal_projector,
        language=EagerLlama(
            parts.language_model,
            model.lm_head,
            spec.tokenizer,
            image_token_id=spec.image_token_id,
        ),
        process=process,
        clip=None if spec.text is None else loader.load_clip_text(),
        arrange=arrange,
        fixed_token=getattr(parts, "image_newline", None),
    )


def linear_layer(tensors: Mapping[str, Tensor], name: str) -> Arrange:
    """A linear layer on the tensors of its name."""
    return lambda rows: rows @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def load_processor(
    kind: Any,
    folder: Path | None,
    side: int,
    *,
    always: Mapping[str, Any] | None = None,
    usual: Mapping[str, Any] | None = None,
) -> Callable[[Image.Image], Tensor]:
    """A library's image processor as pixels of a picture.

    Args:
        kind: The processor's class.
        folder: Of the checkpoint that configures it; None where none does.
        side: Of the square that the tower takes, in pixels.
        always: Settings whatever a checkpoint says.
        usual: Further settings where none does.
    """
    if folder is not None:
        processor = kind.from_pretrained(folder, local_files_only=True, **(always or {}))
    else:
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        processor = kind(**sizes, **(always or {}), **(usual or {}))

    def process(picture: Image.Image) -> Tensor:
        pixels: Tensor = processor(picture, return_tensors="pt")["pixel_values"]
        return pixels

    return process
