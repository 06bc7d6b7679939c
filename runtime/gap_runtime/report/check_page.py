"""The parity report of `gap-runtime check` as a page: stages, first divergence, kept patches."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from PIL import Image

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.grounding.boxless import describe_boxless
from gap_runtime.grounding.check import CheckReport, Compared
from gap_runtime.grounding.compare import CheckRow, Tolerance, find_tolerance
from gap_runtime.pictures.drawing import draw_heat, draw_pair, shade_patches
from gap_runtime.report.occasion import Occasion
from gap_runtime.report.page import encode_picture, make_page, make_table

_LEGEND: Final = (
    '<ul class="legend">'
    '<li><span class="swatch reference"></span>PyTorch, recorded at export</li>'
    '<li><span class="swatch found"></span>this backend, drawn inside it</li>'
    '<li><span class="swatch shade"></span>patch that was removed</li></ul>'
)


def make_check_page(
    bundle: Bundle, report: CheckReport, compared: Sequence[Compared], occasion: Occasion
) -> str:
    """The page of a check.

    Args:
        bundle: What was checked.
        report: All rows.
        compared: What each of them was made of.
        occasion: When, where and with what.
    """
    manifest = bundle.manifest
    tolerance = find_tolerance(manifest)
    passed = sum(row.passed for row in report.rows)
    verdict = (
        '<strong class="good">passed</strong>'
        if report.passed
        else '<strong class="bad">failed</strong>'
    )
    failures = "".join(
        f"<li><code>{escape(row.sample)}</code> at ratio {row.ratio:g}: "
        f"{escape('; '.join(row.reasons))}</li>"
        for row in report.rows
        if not row.passed
    )
    summary = (
        f"<p>{verdict}: {passed} of {len(report.rows)} rows agree with the answers that PyTorch "
        f"gave at export. Backend <code>{escape(report.backend)}</code>, "
        f"{escape(report.precision)}; pruner <code>{escape(manifest.pruning.strategy)}</code>, "
        f"positions <code>{escape(manifest.pruning.positions)}</code>.</p>"
    )
    if boxless := describe_boxless(report.pytorch_boxes):
        summary += f'<p class="boxless">{escape(boxless)}.</p>'
    shown = "".join(_show(bundle, each) for each in compared)
    body = [
        f"<header><h1>{escape(manifest.name)} against PyTorch</h1>",
        summary,
        f"<ul>{failures}</ul>" if failures else "",
        "</header><main>",
        *_make_section("stages", "Stage by stage", _make_stages(report.rows, tolerance)),
        _explain(tolerance),
        *_make_section("answers", "Answers", _make_answers(report.rows)),
        *_make_section("pictures", "Kept patches and boxes", _LEGEND),
        f'<div class="gallery">{shown}</div>',
        *_show_heat(bundle, compared),
        *_make_section("occasion", "When and where", _tell(occasion)),
        "</main>",
    ]
    return make_page(f"{manifest.name} against PyTorch", "\n".join(body))


def _make_section(name: str, title: str, content: str) -> list[str]:
    """A heading that can be linked to, and what stands under it."""
    return [f'<h2 id="{name}">{escape(title)}</h2>', content]


def _make_stages(rows: Sequence[CheckRow], tolerance: Tolerance) -> str:
    allowed = [
        *("most that passes", "", f"{tolerance.pixels:.0e}", "equal or a near tie", "equal"),
        *(f"{tolerance.visual:.0e}", f"{tolerance.logits:.0e}", "", ""),
    ]
    return make_table(
        "Errors of every stage, in the order in which they run",
        [
            *("sample", "ratio", "pixels", "kept patches", "position IDs", "visual tokens"),
            *("prefill logits", "first divergence", "result"),
        ],
        [
            allowed,
            *(
                [
                    row.sample,
                    f"{row.ratio:g}",
                    f"{row.pixels_error:.1e}",
                    _describe_kept(row),
                    "equal" if row.positions_equal else "differ",
                    _number(row.visual_error),
                    _number(row.relative_logit_error),
                    "none" if row.first_divergence is None else f"token {row.first_divergence}",
                    "passed" if row.passed else "; ".join(row.reasons),
                ]
                for row in rows
            ),
        ],
        wrapped=8,
    )


def _make_answers(rows: Sequence[CheckRow]) -> str:
    return make_table(
        "Answers; IoU is that of the two boxes",
        ["sample", "ratio", "PyTorch", "this backend", "tokens", "IoU"],
        [
            [
                row.sample,
                f"{row.ratio:g}",
                row.reference_answer,
                row.answer,
                "same" if row.same_tokens else f"part at {row.first_divergence}",
                "no box" if row.iou is None else f"{row.iou:.3f}",
            ]
            for row in rows
        ],
    )


def _tell(occasion: Occasion) -> str:
    return make_table("This check", ["what", "which"], occasion, wrapped=1)


def _explain(tolerance: Tolerance) -> str:
    excuse = (
        "another token counts as an error unless PyTorch's own choice was a near tie"
        if tolerance.iou is None
        else f"other tokens pass where the box keeps an IoU of {tolerance.iou:g}"
    )
    return (
        "<p class=quiet>Pixels: largest difference. Visual tokens: largest difference of a "
        "token, relative to its length. Logits: relative to the largest. They are compared where "
        f"the same patches were kept. In answers, {excuse}.</p>"
    )


def _describe_kept(row: CheckRow) -> str:
    if row.kept_equal:
        return "equal"
    return f"Jaccard {row.kept_jaccard:.3f}{', near tie' if row.near_tie else ''}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _show(bundle: Bundle, each: Compared) -> str:
    """The picture of a row."""
    row = each.row
    canvas, scale = shade_patches(
        each.picture, bundle.manifest.preprocess, bundle.manifest.buckets, each.kept_index
    )
    draw_pair(canvas, scale, reference=each.reference_boxes, found=each.boxes)
    differ = sorted(set(each.kept_index) ^ set(each.reference_kept_index))
    said = f"{len(each.kept_index)} patches kept"
    if differ:
        said += f", {len(differ)} in one of the two only"
    if not each.boxes:
        said += ", no box"
    result = "passed" if row.passed else "; ".join(row.reasons)
    alt = (
        f"{row.sample} at ratio {row.ratio:g}: the picture with removed patches shaded and the "
        f"boxes of PyTorch and of this backend for '{each.phrase}'"
    )
    return _figure(
        canvas,
        alt,
        f"<strong>{escape(each.phrase)}</strong><br>{escape(row.sample)}, ratio {row.ratio:g}: "
        f"{said}; <span class={'good' if row.passed else 'bad'}>{escape(result)}</span>",
    )


def _show_heat(bundle: Bundle, compared: Sequence[Compared]) -> list[str]:
    """For every sample, how many ratios keep each patch; nothing where there is but one ratio."""
    by_sample: dict[str, list[Compared]] = {}
    for each in compared:
        by_sample.setdefault(each.row.sample, []).append(each)
    figures = []
    for sample, group in by_sample.items():
        if len(group) < 2:
            continue
        counts: dict[int, int] = {}
        for each in group:
            for patch in each.kept_index:
                counts[patch] = counts.get(patch, 0) + 1
        shares = {patch: count / len(group) for patch, count in counts.items()}
        ratios = ", ".join(f"{each.row.ratio:g}" for each in group)
        figures.append(
            _figure(
                draw_heat(
                    group[0].picture, bundle.manifest.preprocess, bundle.manifest.buckets, shares
                ),
                f"{sample}: the picture, the darker a patch the fewer of the ratios keep it",
                f"<strong>{escape(sample)}</strong>: ratios {ratios}",
            )
        )
    if not figures:
        return []
    note = "<p>The brighter a patch, the more of the ratios keep it.</p>"
    return [
        *_make_section("heat", "Which patches stay", note),
        f'<div class="gallery">{"".join(figures)}</div>',
    ]


def _figure(picture: Image.Image, alt: str, caption: str) -> str:
    """A picture with its caption, which is HTML."""
    return (
        f'<figure><img alt="{escape(alt)}" width="{picture.width}" height="{picture.height}" '
        f'src="{encode_picture(picture)}"><figcaption>{caption}</figcaption></figure>'
    )
