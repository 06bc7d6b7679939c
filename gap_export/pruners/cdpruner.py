"""Keep patches that fit the phrase and differ from each other: a greedy determinantal choice.

Always the token whose squared relevance, times what the chosen ones leave of its direction, is
most. That is greedy MAP of a determinantal point process with the kernel r_i cos_ij r_j, by a
Cholesky factor that grows by one row for each token. Own order: that of the choice.

References:
    CDPruner (arXiv:2506.10967). The phrase is one text feature here, not segments, and the count
    is a constant, so the loop is unrolled. Ours: of a direction there is always a small share
    left, so that float32 never chooses by rounding noise (where more are kept than tokens are
    wide); such tokens go by relevance.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures
from gap_export.tracing.determinantal import choose_determinantal

# B batch (1), N visual tokens, D token width, W text width.

PUBLISHED_AS: Final = "CDPruner"
NEEDS: Final = frozenset({Feature.TOKENS, Feature.TEXT, Feature.TEXT_PATCHES})
EXTRA: Final = 0
_LEAST: Final = 1e-5
"""Least share that is left of a direction; float32 leaves about 1e-6 where nothing should be."""


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Tokens in the order of choice; 15 nodes for each."""
    del config
    unit_ND = functional.normalize(features.values[Feature.TOKENS][0], dim=-1)
    cosine_NN = unit_ND @ unit_ND.T
    left_BN = (unit_ND * unit_ND).sum(dim=-1)[None].clamp(min=_LEAST)
    weight_BN = _rate(features) ** 2
    return Kept(order=choose_determinantal(cosine_NN, left_BN, weight_BN, kept, _LEAST))


def _rate(features: VisionFeatures) -> Tensor:
    """Relevance [B, N]: cosine with the phrase, turned and stretched to 0..1 and a little more."""
    text_BW1 = functional.normalize(features.values[Feature.TEXT], dim=-1)[..., None]
    unit_BNW = functional.normalize(features.values[Feature.TEXT_PATCHES], dim=-1)
    raw_BN = features.text_sign * (unit_BNW @ text_BW1)[..., 0]
    least_B1 = raw_BN.amin(dim=-1, keepdim=True)
    span_B1 = raw_BN.amax(dim=-1, keepdim=True) - least_B1
    stretched_BN = (raw_BN - least_B1 + 1e-6) / torch.where(span_B1 > 0, span_B1, 1.0)
    return torch.where(span_B1 > 0, stretched_BN, 1.0)


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same by the kernel itself, from the towers' own outputs; ties go to the lower index."""
    del config
    assert vision.text is not None
    assert vision.text_patches is not None
    text = vision.text.double()
    cosines = torch.cosine_similarity(vision.text_patches.double(), text[None], eps=1e-12)
    raw = vision.text_sign * cosines
    least, most = float(raw.min()), float(raw.max())
    relevance = torch.ones_like(raw) if least == most else (raw - least + 1e-6) / (most - least)
    directions = torch.stack([t / t.norm().clamp(min=1e-12) for t in vision.tokens.double()])
    kernel = relevance[:, None] * (directions @ directions.T) * relevance
    gains, floor = kernel.diag().clone(), _LEAST * relevance**2
    columns = torch.zeros(kept, len(kernel), dtype=torch.float64)
    order: list[int] = []
    while len(order) < kept:
        offered = torch.maximum(gains, floor)
        offered[order] = -torch.inf
        best, step = int(offered.argmax()), len(order)
        explained = columns[:step, best] @ columns[:step]
        columns[step] = (kernel[best] - explained) / offered[best].sqrt()
        gains -= columns[step] ** 2
        order.append(best)
    return EagerChoice(order=tuple(order), scores=None)
