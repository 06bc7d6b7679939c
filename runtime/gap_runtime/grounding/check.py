"""Compare a bundle on a backend with PyTorch's recorded answers: every sample at every ratio."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from PIL import Image

from gap_runtime.backends import DEFAULT_BACKEND
from gap_runtime.bundle.arrays import ReferenceArrays
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import RatioEntry, Reference, ReferenceSample
from gap_runtime.errors import CheckError
from gap_runtime.grounding.boxless import BoxCount, count_boxes
from gap_runtime.grounding.compare import (
    CheckRow,
    Tolerance,
    compare_drafted,
    compare_scores,
    compare_stages,
    find_margin,
    find_tolerance,
    first_divergence,
)
from gap_runtime.grounding.fastest import choose_backend
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.pictures.boxes import Box, parse_boxes
from gap_runtime.pictures.load import frame_picture, load_picture


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CheckReport:
    """All rows of a check. `precision` is the dtype, or that of quantized weights.

    `misses_allowed` rows may fail in nothing but their answer. `draft_differences` counts rows
    whose answer is another one with drafts. `pytorch_boxes` says where PyTorch's own answers hold
    boxes, which a check that passes does not.
    """

    bundle: str
    backend: str
    precision: str
    misses_allowed: int
    draft_differences: int
    passed: bool
    pytorch_boxes: tuple[BoxCount, ...]
    rows: tuple[CheckRow, ...]

    def __repr__(self) -> str:
        """How it went, on one line."""
        equal = sum(row.passed for row in self.rows)
        return (
            f"CheckReport({'passed' if self.passed else 'failed'}, {equal} of {len(self.rows)} "
            f"rows, {self.precision} on {self.backend})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What a row was made of, for people to look at. Kept patches are by slot."""

    row: CheckRow
    picture: Image.Image
    phrase: str
    kept_index: tuple[int, ...]
    reference_kept_index: tuple[int, ...]
    boxes: tuple[Box, ...]
    reference_boxes: tuple[Box, ...]


def count_rows(bundle: Bundle, ratios: Collection[float] | None = None) -> int:
    """How many rows a check has, to say how far it is."""
    reference = bundle.manifest.reference
    wanted = {entry.ratio for entry in bundle.manifest.ratios} if ratios is None else set(ratios)
    return sum(sample.ratio in wanted for sample in reference.samples) if reference else 0


def check_bundle(
    bundle: Bundle,
    backend: str = DEFAULT_BACKEND,
    *,
    ratios: Collection[float] | None = None,
    on_row: Callable[[CheckRow], None] | None = None,
    on_compared: Callable[[Compared], None] | None = None,
) -> CheckReport:
    """Run every reference sample at every ratio and compare.

    Args:
        bundle: With a reference.
        backend: By name.
        ratios: Those of the bundle's that are compared; all by default.
        on_row: Called with every row as it is there.
        on_compared: Called with what it was made of.

    Raises:
        CheckError: The bundle holds no reference.
        EngineError: The backend failed.
    """
    manifest = bundle.manifest
    if manifest.reference is None:
        raise CheckError(
            f"{bundle.folder}: no reference answers in it; export without --no-reference"
        )
    backend = choose_backend(bundle, backend)
    grounder = Grounder(bundle, backend, keep_pictures=0)
    arrays = ReferenceArrays(bundle, manifest.reference)
    rows: list[CheckRow] = []
    for entry in manifest.ratios:
        if ratios is not None and entry.ratio not in ratios:
            continue
        for sample in _samples_at(manifest.reference, entry, bundle):
            found = _check_sample(grounder, arrays, sample, entry)
            rows.append(found.row)
            if on_row is not None:
                on_row(found.row)
            if on_compared is not None:
                on_compared(found)
    return CheckReport(
        bundle=str(bundle.folder),
        backend=backend,
        precision=manifest.described_precision,
        misses_allowed=(allowed := _allowed_misses(find_tolerance(manifest), len(rows))),
        draft_differences=sum(row.draft_divergence is not None for row in rows),
        passed=all(row.passed or row.missed for row in rows)
        and sum(row.missed for row in rows) <= allowed,
        pytorch_boxes=count_boxes(manifest.reference),
        rows=tuple(rows),
    )


def _allowed_misses(tolerance: Tolerance, rows: int) -> int:
    return max(1, int(tolerance.misses * rows)) if tolerance.misses else 0


def _samples_at(reference: Reference, entry: RatioEntry, bundle: Bundle) -> list[ReferenceSample]:
    samples = [
        sample
        for sample in reference.samples
        if (sample.ratio, sample.bucket) == (entry.ratio, entry.bucket)
    ]
    if not samples:
        where = f" for pictures of {entry.bucket}" if entry.bucket else ""
        raise CheckError(
            f"{bundle.folder}: no reference answers at ratio {entry.ratio:g}{where}; export again"
        )
    return samples


def _check_sample(
    grounder: Grounder, arrays: ReferenceArrays, sample: ReferenceSample, entry: RatioEntry
) -> Compared:
    manifest = grounder.bundle.manifest
    expected = arrays.read(sample)
    picture = load_picture(grounder.bundle.folder / sample.image)
    view = grounder.look(picture)
    values = grounder.run_stages(view, sample.phrase, entry, draft=False)
    recorded = expected.get("probabilities")
    reference_score = (
        None if recorded is None else grounder.score(sample.token_ids, recorded.tolist())
    )
    drafted = grounder.run_stages(view, sample.phrase, entry)
    place = first_divergence(drafted.decoded.token_ids, values.decoded.token_ids)
    margin = None
    if place is not None:
        again = grounder.run_stages(view, sample.phrase, entry, draft=False, most=place + 1)
        logits = again.decoded.last_logits
        ended = [stop for stop in manifest.prompt.stop_ids if stop < len(logits)]
        chosen = drafted.decoded.token_ids[place : place + 1] or ended
        margin = find_margin(logits, chosen)
    answer = grounder.encoder.decode(values.decoded.token_ids)
    bucket = manifest.bucket(entry.bucket)
    frame = frame_picture(picture.size, manifest.preprocess, bucket)
    boxes = parse_boxes(answer, manifest.box, frame).boxes
    tolerance = find_tolerance(manifest)
    row = compare_stages(
        values,
        expected,
        sample,
        ratio=entry.ratio,
        answer=answer,
        boxes=boxes,
        tolerance=tolerance,
    )
    row = compare_scores(
        row,
        grounder.score(values.decoded.token_ids, values.decoded.probabilities),
        reference_score,
        tolerance,
    )
    return Compared(
        # Another order of sums may round a cached value of 8 bits to its neighbour.
        row=compare_drafted(
            row,
            place,
            margin,
            exact=manifest.precision == "float32" and not manifest.has_int8_cache,
        ),
        picture=picture,
        phrase=sample.phrase,
        kept_index=tuple(int(k) for k in values.kept_index[0]),
        reference_kept_index=tuple(int(k) for k in expected["kept_index"][0]),
        boxes=boxes,
        reference_boxes=sample.boxes,
    )
