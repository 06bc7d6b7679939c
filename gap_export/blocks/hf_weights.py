"""Weights of checkpoints in Hugging Face's layout, with an adapter merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gap_export.blocks import llama
from gap_export.blocks.hf_config import IGNORED, library_name
from gap_export.checkpoint.adapter import add_adapters, read_adapters, replace_values
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource
from gap_export.interfaces.decoder import DecoderSpec


def match_merged(
    checkpoint: Checkpoint,
    decoder: DecoderSpec,
    expected: dict[str, tuple[int, ...]],
    ignored: Sequence[str] = (),
    *,
    rename: Callable[[str], str] = library_name,
) -> dict[str, TensorSource]:
    """Where the tensors of a model lie, in the key names of any version of the library.

    Args:
        checkpoint: The files, and an adapter among the parts or none.
        decoder: What the language model is made of.
        expected: Shapes by name, without the decoder's.
        ignored: Patterns of keys that no module takes, besides those of all models.
        rename: From a key of the files to a name in the modules here.

    Raises:
        CheckpointError: One is missing, has another shape or is not known, or the adapter does
            not fit.
    """
    adapters = read_adapters(checkpoint, rename)
    sources = llama.match_weights(
        replace_values(checkpoint, adapters, rename),
        decoder,
        expected | llama.tensor_shapes(decoder),
        rename=rename,
        ignored=(*IGNORED, *ignored),
    )
    add_adapters(sources, adapters)
    return sources
