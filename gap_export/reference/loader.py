"""A library's models with the weights of a checkpoint: in memory, or read when they are needed.

What is merged or renamed is said over lazy tensors, so that both ways are one road. Where nothing
is, and memory has room, the library reads its own files: the independent reader of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from gap_export.checkpoint.adapter import Adapter
from gap_export.checkpoint.index import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.reference.clip import EagerClipText
from gap_export.reference.files import is_wrapped, open_tensors, read_quantization
from gap_export.reference.lazy import LazyTensor, add_product, rename_tensors
from gap_export.reference.streamed import Stream, StreamedTensors, read_parameter

_OLDER_NAMES: Final = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "model.vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}
"""Beginnings of keys that older versions of the library wrote, and today's."""


class Loader:
    """Makes the parts of an eager model.

    Attributes:
        dtype: Of the parameters.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, memory: int | None) -> None:
        """Begin with nothing read.

        Args:
            checkpoint: With its parts.
            dtype: Of the parameters.
            memory: Bytes of weights that may stay in memory while they are read when they are
                needed; None to have all of them there.
        """
        self._checkpoint = checkpoint
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._stream = None if memory is None else Stream(memory)

    def open(self, part: str | None = None) -> dict[str, LazyTensor]:
        """Tensors of the checkpoint's own files, or of a part's, by their keys there."""
        return open_tensors(self._find(part), self.dtype, whole=self._stream is None)

    def load(
        self,
        kind: Any,
        config: Any,
        *,
        part: str | None = None,
        names: Mapping[str, str] = _OLDER_NAMES,
        adapters: Sequence[Adapter] = (),
    ) -> Any:
        """A model of a checkpoint in the library's own layout.

        The library runs quantized layers on a GPU only, so it gets those as plain ones.

        Args:
            kind: The model's class.
            config: The library's, that of the model before it was quantized.
            part: Of the checkpoint; None for its own files.
            names: Beginnings of keys, and of the parameters' names in the class.
            adapters: What is merged into it.
        """
        checkpoint = self._find(part)
        is_plain = not (adapters or read_quantization(checkpoint) or is_wrapped(checkpoint))
        if self._stream is None and is_plain:
            return kind.from_pretrained(
                checkpoint.folder,
                dtype=self.dtype,
                attn_implementation="eager",
                local_files_only=True,
            )
        tensors = rename_tensors(self.open(part), names)
        return self.build(kind, config, merge_adapters(self, tensors, adapters))

    def build(self, kind: Any, config: Any, tensors: Mapping[str, LazyTensor]) -> Any:
        """A model made of tensors.

        Args:
            kind: The model's class.
            config: The library's.
            tensors: By the names of the model's parameters; others are ignored.

        Raises:
            ValueError: A parameter has no tensor.
        """
        with _without_values():
            # The library's own way to a model without weights; it changes the config.
            model = kind._from_config(  # noqa: SLF001
                copy.deepcopy(config), attn_implementation="eager", dtype=self.dtype
            )
        model.requires_grad_(requires_grad=False)
        sources = _match(model, tensors)
        # By tensor: parameters that are tied are one.
        made: dict[int, nn.Parameter] = {}
        for name, module in list(model.named_modules()):
            own = {
                key: sources[f"{name}.{key}" if name else key]
                for key, parameter in module._parameters.items()  # noqa: SLF001
                if parameter is not None
            }
            if self._stream is not None and own:
                self._stream.attach(module, own)
            elif self._stream is None:
                for key, tensor in own.items():
                    if id(tensor) not in made:
                        made[id(tensor)] = read_parameter(tensor, getattr(module, key))
                    setattr(module, key, made[id(tensor)])
        return model.eval()

    def read(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, Tensor]:
        """Values of tensors that are no module's, each read whenever it is looked up."""
        if self._stream is not None:
            return StreamedTensors(self._stream, tensors)
        return {key: tensor.read() for key, tensor in tensors.items()}

    def load_clip_text(self) -> EagerClipText:
        """CLIP's text tower, from the part of that name."""
        folder = self._find("clip").folder
        config = CLIPModel.config_class.from_pretrained(folder, local_files_only=True)
        return EagerClipText(self.load(CLIPModel, config, part="clip", names={}), folder)

    def _find(self, part: str | None) -> Checkpoint:
        return self._checkpoint if part is None else self._checkpoint.parts[part]


@contextmanager
def open_loader(checkpoint: Checkpoint, dtype: str, memory: int | None) -> Iterator[Loader]:
    """A loader whose many libraries' errors become one line.

    Args:
        checkpoint: With its parts.
        dtype: Of the parameters.
        memory: As a loader's.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
    """
    try:
        yield Loader(checkpoint, dtype, memory)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.folder}: PyTorch cannot load it ({reason:.200}); mend it, or export the "
            "graphs alone with --no-reference"
        ) from error


def merge_adapters(
    loader: Loader,
    tensors: Mapping[str, LazyTensor],
    adapters: Sequence[Adapter],
    *,
    key_of: Callable[[str], str] | None = None,
) -> dict[str, LazyTensor]:
    """A model's tensors with adapters' values and products, one after the other.

    Args:
        loader: Opens the adapters' files.
        tensors: Of the model.
        adapters: By the names of the modules here.
        key_of: The tensor's key, by such a name; in the library's names where None.

    Raises:
        ValueError: An adapter changes a tensor that there is not.
    """
    merged, key_of = dict(tensors), key_of or _library_key
    for adapter in adapters:
        files = loader.open(adapter.part)
        for name, value in adapter.values.items():
            merged[key_of(name)] = files[value.key]
        for name, pair in adapter.pairs.items():
            key = key_of(name)
            if key not in merged:
                raise ValueError(f"tensor '{key}' is missing")
            up, down = files[pair.up.key], files[pair.down.key]
            merged[key] = add_product(merged[key], up, down, pair.scale)
    return merged


def language_key(name: str) -> str:
    """A language model's own key of a tensor, from its name in the modules here."""
    name = name.removeprefix("language_model.")
    return name if name.startswith("lm_head.") else f"model.{name}"


def _library_key(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _match(model: nn.Module, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensor of every parameter; those that are tied have that of the first name."""
    first: dict[int, LazyTensor] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = first.get(id(parameter)) or tensors.get(name)
        if tensor is None:
            near = "".join(get_close_matches(name, tensors, n=1, cutoff=0.0))
            raise ValueError(f"tensor '{name}' is missing; the nearest that is there is '{near}'")
        found[name] = first.setdefault(id(parameter), tensor)
    return found


@contextmanager
def _without_values() -> Iterator[None]:
    """Modules that are made here have parameters without memory, but all of their buffers."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
