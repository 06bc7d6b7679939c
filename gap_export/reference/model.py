"""A grounding model put together of its eager parts; fits interfaces.family.EagerModel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from gap_export.checkpoint.index import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.interfaces.features import EagerVision, Geometry
from gap_export.reference.clip import EagerClipText
from gap_export.reference.files import is_quantized, load_tensors
from gap_export.reference.llama import EagerLlama
from gap_export.reference.streamed import LazyTensor, Stream, open_tensors
from gap_runtime.pictures.preprocess import Bucket

# V views, P patches of a view, N visual tokens, F fixed ones, C patch width, D decoder width,
# S rows, W text width.

Arrange = Callable[[Tensor], Tensor]
_LIBRARY_PREFIXES: Final = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
)
"""Beginnings of keys that older versions of the library wrote, and today's."""


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
        self.start_cache, self.run_decoder = language.start_cache, language.run_decoder
        self.observe = language.observe

    def make_pixels(self, picture: Image.Image) -> Tensor:
        """Pixels of an RGB picture."""
        return self._process(picture)

    def look(self, pixels: Tensor, bucket: Bucket) -> EagerVision:
        """All that pruners may ask for of a picture."""
        return self._tower.look(
            pixels.flatten(0, -4),
            self.project,
            geometry=Geometry(grids=bucket.grids, strip=bucket.strip),
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


def rename_library(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors by the names of today's library, from the keys of all of its versions."""
    renamed = {}
    for key, tensor in tensors.items():
        for old, new in _LIBRARY_PREFIXES:
            if key.startswith(old):
                renamed[new + key.removeprefix(old)] = tensor
                break
        else:
            renamed[key] = tensor
    return renamed


@contextmanager
def loading(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the many errors of a library that loads a checkpoint into one line.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.folder}: PyTorch cannot load it ({reason:.200}); mend it, or export the "
            "graphs alone with --no-reference"
        ) from error


def load_library(
    kind: Any,
    checkpoint: Checkpoint,
    config: Any,
    dtype: torch.dtype,
    stream: Stream | None = None,
) -> Any:
    """A library's model of that kind with the weights of its checkpoint.

    The library runs quantized layers on a GPU only, so it gets those as plain ones.

    Args:
        kind: The model's class.
        checkpoint: In the library's own layout.
        config: The library's, that of the model before it was quantized; None for the
            checkpoint's own.
        dtype: Of the parameters.
        stream: Gives the model its parameters when they are needed; None loads them.
    """
    if stream is not None:
        if config is None:
            config = kind.config_class.from_pretrained(checkpoint.folder, local_files_only=True)
        tensors = rename_library(open_tensors(checkpoint, dtype))
        return stream.build(kind, config, tensors, dtype)
    if not is_quantized(checkpoint):
        return kind.from_pretrained(
            checkpoint.folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    return kind.from_pretrained(
        None,
        config=config,
        state_dict=load_tensors(checkpoint, dtype),
        dtype=dtype,
        attn_implementation="eager",
    )


def load_clip_text(
    checkpoint: Checkpoint, dtype: torch.dtype, stream: Stream | None
) -> EagerClipText:
    """CLIP's text tower, from the part of that name."""
    clip = checkpoint.parts["clip"]
    return EagerClipText(load_library(CLIPModel, clip, None, dtype, stream), clip.folder)


def load_state(module: Any, tensors: dict[str, Tensor], *, strict: bool = True) -> None:
    """Put tensors into a library's module; what it does not get must be no parameter."""
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    lacking = sorted(set(missing) & {name for name, _ in module.named_parameters()})
    if lacking or (strict and unexpected):
        raise ValueError(f"tensor '{(lacking or sorted(unexpected))[0]}' has no place")
