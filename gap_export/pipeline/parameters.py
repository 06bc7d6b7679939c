"""Which parameters the graphs of an export use, from the modules that they are traced from.

Nothing is run and nothing is read: modules are built without memory. They hold what their graphs
use and no more, so this is known before any graph is traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from torch import nn

from gap_export.checkpoint.sources import Shapes, build_without_memory, linear_weights, shapes_of
from gap_export.interfaces.dialect import Dialect
from gap_export.interfaces.family import Family, ModelSpec, build_fixed_tokens, build_text_tower
from gap_export.interfaces.features import Feature
from gap_runtime.pictures.preprocess import Bucket

HEAD: Final = "lm_head.weight"
"""Canonical name of the decoder's last linear layer, in every family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Shapes of what the graphs use, by canonical name; no graph uses the embedding table.

    `linear` are the weights of the linear layers that may be quantized, each with the part of the
    model that it is of: `decoder`, `head` or `vision`. CLIP's text tower is no such part.
    """

    vision: Shapes
    text: Shapes
    decoder: Shapes
    linear: dict[str, str]

    @property
    def all(self) -> Shapes:
        """Those of every graph."""
        return self.vision | self.text | self.decoder


def list_parameters(
    family: Family,
    spec: ModelSpec,
    dialect: Dialect,
    needs: Mapping[str, frozenset[Feature]],
    *,
    reads_clip: bool,
) -> Parameters:
    """The parameters of all graphs of a bundle.

    Args:
        family: Builds the modules.
        spec: The checkpoint.
        dialect: What the decoder is written in.
        needs: By-products of the tower that the graphs of each bucket use.
        reads_clip: Whether phrases go through CLIP's text tower.
    """
    builders = [partial(family.build_projector, spec)]
    for bucket in spec.buckets:
        builders += [
            partial(family.build_tower, spec, bucket, needs[bucket.name]),
            partial(_build_fixed_tokens, family, spec, bucket),
        ]
    seeing = [build_without_memory(build) for build in builders]
    tables = family.DECODER.rotary_tables(spec.decoder, 1)
    decoder = build_without_memory(lambda: family.DECODER.build(spec.decoder, dialect, tables))
    text: Shapes = {}
    if reads_clip:
        text = shapes_of(build_without_memory(lambda: build_text_tower(family, spec)))
    linear = {name: "vision" for module in seeing for name in linear_weights(module)}
    linear |= {name: "head" if name == HEAD else "decoder" for name in linear_weights(decoder)}
    return Parameters(
        vision={name: shape for module in seeing for name, shape in shapes_of(module).items()},
        text=text,
        decoder=shapes_of(decoder),
        linear=linear,
    )


def _build_fixed_tokens(family: Family, spec: ModelSpec, bucket: Bucket) -> nn.Module:
    return build_fixed_tokens(family, spec, bucket) or nn.Module()
