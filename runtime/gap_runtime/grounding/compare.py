"""What one sample's stages gave, beside PyTorch's: tolerances, errors, near ties.

A row passes when every stage agrees within the tolerances of the bundle's dtype. What cannot be
compared fails. A patch choice may differ from PyTorch's only where two scores nearly tie.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from gap_runtime.bundle.manifest import Manifest, ReferenceSample
from gap_runtime.grounding.grounder import StageValues
from gap_runtime.pictures.boxes import Box, iou


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Largest errors that pass.

    `pixels` is absolute. `visual` is relative to each token's length, `logits` to the
    reference's largest magnitude, and so is the margin of a token that excuses another one in
    its place. `near_tie` is how far the scores of exchanged patches may lie
    apart, relative to the score at the cut. `iou` is the least IoU that excuses an answer with
    other tokens; None excuses nothing. `misses` is the share of answers that may miss it, one in
    any case where it is not 0: quantized weights are judged by how many boxes they lose.
    `jaccard` is how alike the kept patches must be where they may differ without a near tie.
    `score` is absolute, of how sure the model is of an answer of the same tokens.
    """

    pixels: float
    visual: float
    logits: float
    near_tie: float
    iou: float | None
    misses: float = 0.0
    jaccard: float | None = None
    score: float = 2e-3


TOLERANCES: Final = {
    "float32": Tolerance(pixels=1e-5, visual=1e-4, logits=1e-4, near_tie=1e-4, iou=None),
    "float16": Tolerance(
        pixels=1e-5, visual=2e-2, logits=2e-2, near_tie=3e-2, iou=0.9, score=5e-2
    ),
    "bfloat16": Tolerance(
        pixels=1e-5, visual=1e-1, logits=1e-1, near_tie=2e-1, iou=0.9, score=0.15
    ),
    "int8": Tolerance(
        pixels=1e-5,
        visual=5e-2,
        logits=1e-1,
        near_tie=5e-2,
        iou=0.5,
        misses=0.02,
        jaccard=0.9,
        score=0.15,
    ),
    "int4": Tolerance(
        pixels=1e-5,
        visual=5e-2,
        logits=3e-1,
        near_tie=3e-1,
        iou=0.5,
        misses=0.05,
        jaccard=0.9,
        score=0.4,
    ),
}
"""By dtype, or by that of the weights where they are quantized."""

LEAST_IOU: Final = 0.9
"""Least IoU with the reference's box where the tokens are its own or `iou` excuses none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One sample at one ratio. `reasons` is empty when it passed; `missed`: all but its answer.

    `first_divergence` is the first token that is not PyTorch's, `draft_divergence` the first one
    that is another with drafts than without, and `draft_margin` by how much the one without led
    the other there, relative to the largest logit. `score` is how sure the model was of the
    answer, `reference_score` how sure PyTorch was (None where the bundle does not say).
    """

    ratio: float
    sample: str
    pixels_error: float
    kept_equal: bool
    kept_jaccard: float
    near_tie: bool
    same_prompt: bool
    positions_equal: bool
    visual_error: float | None
    max_logit_error: float | None
    relative_logit_error: float | None
    same_tokens: bool
    token_near_tie: bool
    first_divergence: int | None
    draft_divergence: int | None
    draft_margin: float | None
    answer: str
    reference_answer: str
    iou: float | None
    missed: bool
    passed: bool
    reasons: tuple[str, ...]
    score: float = 0.0
    reference_score: float | None = None


def find_tolerance(manifest: Manifest) -> Tolerance:
    """What a bundle is judged by: its precision's row, widened behind a KV cache of 8 bits.

    What the vision graph gives has nothing to do with the cache; what the decoder gives of it may
    differ as with weights of 8 bits.
    """
    own, rounded = TOLERANCES[manifest.precision], TOLERANCES["int8"]
    if not manifest.has_int8_cache:
        return own
    excused = [each.iou for each in (own, rounded) if each.iou is not None]
    return replace(
        own,
        logits=max(own.logits, rounded.logits),
        iou=min(excused),
        misses=max(own.misses, rounded.misses),
        score=max(own.score, rounded.score),
    )


def compare_drafted(
    row: CheckRow, place: int | None, margin: float | None, *, exact: bool
) -> CheckRow:
    """Say where the answer is another one with drafts; a failure where they may change nothing.

    A call of several rows may round otherwise than calls of one, which float32 forgives.

    Args:
        row: Without drafts.
        place: The first token that is another one with drafts; None where there is none.
        margin: By how much the token without drafts led the other.
        exact: Whether the two must be the same.
    """
    row = replace(row, draft_divergence=place, draft_margin=margin)
    if place is None or not exact:
        return row
    reasons = (*row.reasons, f"answers with and without drafts part at token {place}")
    return replace(row, reasons=reasons, passed=False, missed=False)


def compare_scores(
    row: CheckRow, score: float, reference_score: float | None, tolerance: Tolerance
) -> CheckRow:
    """Put how sure the model was into a row; a failure where PyTorch was of the same answer not.

    Args:
        row: Without scores.
        score: The backend's.
        reference_score: PyTorch's, None where the bundle does not say.
        tolerance: For the bundle's dtype.
    """
    row = replace(row, score=score, reference_score=reference_score)
    if reference_score is None or not (row.kept_equal and row.same_tokens):
        return row
    error = abs(score - reference_score)
    if error <= tolerance.score:
        return row
    reasons = (*row.reasons, f"scores differ by {error:.2g}")
    return replace(row, reasons=reasons, passed=False, missed=False)


def find_margin(logits: np.ndarray, others: Collection[int]) -> float:
    """By how much the most likely token leads the best of others, relative to the largest logit.

    Args:
        logits: float [V].
        others: Token IDs.
    """
    lead = float(logits.max() - logits[list(others)].max())
    return lead / max(float(np.abs(logits).max()), 1e-30)


def compare_stages(
    values: StageValues,
    expected: dict[str, np.ndarray],
    sample: ReferenceSample,
    *,
    ratio: float,
    answer: str,
    boxes: tuple[Box, ...],
    tolerance: Tolerance,
) -> CheckRow:
    """Compare what the stages gave with the reference's arrays for one sample.

    Args:
        values: From the backend.
        expected: `pixels`, `visual_tokens`, `kept_index`, `position_ids` (of the unpadded
            prompt), prefill `logits` and, where the pruner scores, `scores` [N] by patch.
        sample: The reference's answer.
        ratio: Of the row.
        answer: The backend's answer text.
        boxes: Boxes of that answer.
        tolerance: For the bundle's dtype.
    """
    kept, kept_expected = values.kept_index[0], expected["kept_index"][0]
    kept_equal = np.array_equal(kept, kept_expected)
    jaccard = len(np.intersect1d(kept, kept_expected)) / len(np.union1d(kept, kept_expected))
    near_tie = not kept_equal and (
        is_near_tie(kept, kept_expected, expected.get("scores"), tolerance.near_tie)
        or (tolerance.jaccard is not None and jaccard >= tolerance.jaccard)
    )
    same_prompt = tuple(values.prompt_ids) == sample.prompt_ids
    length = expected["position_ids"].shape[1]
    found, wanted = values.position_ids[:, :length], expected["position_ids"]
    positions_equal = np.array_equal(found, wanted)
    # Other patches have other IDs, but the text at both ends keeps its own.
    ends_equal = np.array_equal(found[:, [0, -1]], wanted[:, [0, -1]])
    pixels_error = _largest_error(values.pixels, expected["pixels"])
    # Where other patches were kept, slots hold other tokens and cannot be compared.
    visual_error = (
        _token_error(values.visual_tokens, expected["visual_tokens"]) if kept_equal else None
    )
    logits, logits_expected = values.decoded.prefill_logits, expected["logits"]
    logit_error = _relative_error(logits, logits_expected) if kept_equal else None
    divergence = first_divergence(values.decoded.token_ids, list(sample.token_ids))
    overlap = match_boxes(boxes, sample.boxes)

    reasons = []
    if not pixels_error <= tolerance.pixels:
        reasons.append(f"pixels differ by {pixels_error:.2g}")
    if not same_prompt:
        reasons.append("the prompt's tokens differ")
    if not kept_equal and not near_tie:
        reasons.append(f"kept patches differ (Jaccard {jaccard:.3f}, no near tie)")
    if not positions_equal and not (near_tie and ends_equal):
        reasons.append("position IDs differ")
    if not np.isfinite(values.visual_tokens).all():
        reasons.append("visual tokens are not finite (gap-export probe names the first tensor)")
    elif visual_error is not None and not visual_error <= tolerance.visual:
        reasons.append(f"visual tokens differ by {visual_error:.2g} (relative)")
    if logit_error is not None and not logit_error <= tolerance.logits:
        reasons.append(f"prefill logits differ by {logit_error:.2g} (relative)")
    margins = sample.token_margins
    token_near_tie = (
        divergence is not None
        and divergence < len(margins)
        and margins[divergence] <= tolerance.logits
    )
    excused = token_near_tie or (
        tolerance.iou is not None and overlap is not None and overlap >= tolerance.iou
    )
    least = LEAST_IOU if tolerance.iou is None else min(LEAST_IOU, tolerance.iou)
    sound = not reasons
    if divergence is not None and not excused:
        reasons.append(f"answers part at token {divergence}")
    elif overlap is not None and overlap < least and not token_near_tie:
        reasons.append(f"boxes differ (IoU {overlap:.3f})")
    return CheckRow(
        ratio=ratio,
        sample=sample.sample,
        pixels_error=pixels_error,
        kept_equal=kept_equal,
        kept_jaccard=jaccard,
        near_tie=near_tie,
        same_prompt=same_prompt,
        positions_equal=positions_equal,
        visual_error=visual_error,
        max_logit_error=float(np.abs(logits - logits_expected).max()),
        relative_logit_error=logit_error,
        same_tokens=divergence is None,
        token_near_tie=token_near_tie,
        first_divergence=divergence,
        draft_divergence=None,
        draft_margin=None,
        answer=answer,
        reference_answer=sample.answer,
        iou=overlap,
        missed=sound and bool(reasons),
        passed=not reasons,
        reasons=tuple(reasons),
    )


def is_near_tie(
    kept: np.ndarray, expected: np.ndarray, scores: np.ndarray | None, tolerance: float
) -> bool:
    """Whether only patches were exchanged or reordered whose scores nearly tie.

    Args:
        kept: Patches by slot.
        expected: The reference's.
        scores: By patch, higher is better, infinite where it is never removed; None where the
            pruner has none.
        tolerance: Largest difference, relative to the lowest score that the reference kept.
    """
    if scores is None or kept.shape != expected.shape:
        return False
    cut = float(scores[expected].min())
    allowed = tolerance * abs(cut)
    exchanged = np.setxor1d(kept, expected)
    if exchanged.size:
        return bool((np.abs(scores[exchanged] - cut) <= allowed).all())
    moved = kept != expected
    return bool((np.abs(scores[kept[moved]] - scores[expected[moved]]) <= allowed).all())


def first_divergence(token_ids: list[int], expected: list[int]) -> int | None:
    """Index of the first token in which two answers differ, or None."""
    for k, (one, other) in enumerate(zip(token_ids, expected, strict=False)):
        if one != other:
            return k
    return None if len(token_ids) == len(expected) else min(len(token_ids), len(expected))


def match_boxes(boxes: tuple[Box, ...], expected: tuple[Box, ...]) -> float | None:
    """Least IoU of boxes with the reference's, in order; 0 where counts differ, None if none."""
    if not boxes and not expected:
        return None
    if len(boxes) != len(expected):
        return 0.0
    return min(iou(box, other) for box, other in zip(boxes, expected, strict=True))


def _largest_error(values: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference; infinite where there is another number of values."""
    if values.shape != expected.shape:
        return float("inf")
    return float(np.abs(values - expected).max())


def _token_error(values: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of a token, relative to the token's own length."""
    if values.shape != expected.shape:
        return float("inf")
    lengths = np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)
    error = float((np.linalg.norm(values - expected, axis=-1) / lengths).max())
    return error if np.isfinite(error) else float("inf")


def _relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest magnitude; not a number counts as infinite."""
    error = float(np.abs(values - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    return error if np.isfinite(error) else float("inf")
