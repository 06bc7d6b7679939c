"""What an export gave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from gap_runtime.bundle.manifest import RatioEntry
from gap_runtime.grounding.boxless import BoxCount, count_boxes, describe_boxless
from gap_runtime.records import dump_record

if TYPE_CHECKING:
    from gap_export.pipeline.plan import ExportPlan
    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.bundle.manifest import Manifest
    from gap_runtime.grounding.check import CheckReport


class ExportSummary(TypedDict):
    """A bundle that was made, or was there already: its folder and what it holds.

    `checked`: its graphs gave PyTorch's answers on all `rows` (samples by ratios) that were
    compared; null in `not_checked_because` where they were. `pytorch_boxes` says in how many of
    PyTorch's own answers is a usable box, `ratio` null without pruning.
    """

    bundle: str
    ratios: list[RatioEntry]
    checked: bool
    not_checked_because: str | None
    rows: int
    pytorch_boxes: list[BoxCount]
    dtype: str
    positions: str
    pruner: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExportResult:
    """A finished export: its bundle is in `folder`.

    `report` compares its graphs with PyTorch; it is null where that was not done, and `note` says
    why. `plan` is null where the same export had been made before and nothing was done.
    """

    folder: Path
    manifest: Manifest
    report: CheckReport | None
    note: str
    plan: ExportPlan | None

    @property
    def bundle(self) -> Bundle:
        """The bundle, opened: its files are compared with what the manifest says of them."""
        from gap_runtime.bundle.bundle import Bundle  # noqa: PLC0415 - numpy at first need

        return Bundle.open(self.folder)

    def __repr__(self) -> str:
        """The folder and how the check went, on one line."""
        return f"ExportResult({str(self.folder)!r}, {self.describe_check()})"

    def describe_check(self) -> str:
        """How the comparison with PyTorch went, for people."""
        if self.report is None:
            return f"parity with PyTorch not checked: {self.note}"
        rows = self.report.rows
        equal = sum(row.same_tokens for row in rows)
        said = f"{equal} of {len(rows)} answers equal PyTorch's"
        if self.manifest.quantization is None:
            return said
        return f"{said}, {sum(not row.missed for row in rows)} keep its box"

    def describe_boxless(self) -> str:
        """Where PyTorch's own answers hold no usable box, for people; empty where all do."""
        return describe_boxless(count_boxes(self.manifest.reference))

    def summarize(self) -> ExportSummary:
        """The result as plain data, for `--json`."""
        report = self.report
        return {
            "bundle": str(self.folder),
            "ratios": dump_record(self.manifest.ratios),
            "checked": report is not None and report.passed,
            "not_checked_because": self.note or None,
            "rows": 0 if report is None else len(report.rows),
            "pytorch_boxes": [dump_record(each) for each in count_boxes(self.manifest.reference)],
            "dtype": self.manifest.dtype,
            "positions": self.manifest.pruning.positions,
            "pruner": self.manifest.pruning.strategy,
        }
