"""The demo's picture: PyTorch's and ONNX's boxes, unpruned, with GAP and with compact IDs.

    python refshapes/demo.py GAP_BUNDLE COMPACT_BUNDLE --samples FOLDER --out demo.png

PyTorch's boxes are the answers that were recorded into the bundles at export.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gap_runtime import Box, Bundle, Grounder
from gap_runtime.bundle.files import require_apart
from gap_runtime.bundle.manifest import ReferenceSample
from gap_runtime.cli.options import ArgumentParser, run_command
from gap_runtime.display import Display
from gap_runtime.errors import InputError
from gap_runtime.pictures.boxes import iou
from gap_runtime.pictures.drawing import draw_grounding
from gap_runtime.pictures.load import load_picture
from gap_runtime.records.plain import read_json
from gap_runtime.report.page import require_writable


def recorded(bundle: Bundle, sample: str, ratio: float | None) -> ReferenceSample:
    """PyTorch's answer to a sample at a ratio, or without pruning."""
    reference = bundle.manifest.reference
    assert reference is not None
    return next(s for s in reference.samples if s.sample == sample and s.ratio == ratio)


def measure(boxes: tuple[Box, ...], truth: Box) -> float:
    """IoU of an answer's box with the true one; 0 without a box."""
    return iou(boxes[0], truth) if boxes else 0.0


def draw_panels(panels: list[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Titled pictures of one size side by side, row by row."""
    font = ImageFont.load_default(size=22)
    margin, header = 14, 38
    width, height = panels[0][1].size
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + margin) + margin, rows * (height + header + margin) + margin),
        (250, 250, 252),
    )
    draw = ImageDraw.Draw(sheet)
    for k, (title, panel) in enumerate(panels):
        x = margin + (k % columns) * (width + margin)
        y = margin + (k // columns) * (height + header + margin)
        draw.text((x, y + 4), title, fill=(28, 30, 40), font=font)
        sheet.paste(panel, (x, y + header))
    return sheet


def read_truths(path: Path) -> list[Box]:
    """The true box of every sample."""
    try:
        return [Box(*map(float, entry["box"])) for entry in read_json(path, InputError)]
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected a list of {{image, phrase, box}}") from error


def main(arguments: Sequence[str]) -> int:
    """Draw the sheet and print the table."""
    parser = ArgumentParser(description="draw what pruning does to grounding")
    parser.add_argument("gap", type=Path, help="bundle without pruning and with a ratio")
    parser.add_argument("compact", type=Path, help="the same ratio with compact position IDs")
    parser.add_argument("--samples", type=Path, required=True, help="folder with samples.json")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.out.suffix.lower() != ".png":
        parser.error(f"--out {options.out}: expected the name of a PNG file")
    gap, compact = Bundle.open(options.gap), Bundle.open(options.compact)
    require_apart(options.out, [gap.folder, compact.folder, options.samples], "--out")
    require_writable(options.out)
    for bundle in (gap, compact):
        if bundle.manifest.reference is None:
            raise InputError(f"{bundle.folder}: holds no answers of PyTorch; export it with them")
    ratio = max(entry.ratio for entry in gap.manifest.ratios)
    cells = [("unpruned", gap, 0.0), ("GAP", gap, ratio), ("compact IDs", compact, ratio)]
    grounders = {id(bundle): Grounder(bundle, "onnxruntime:cpu") for bundle in (gap, compact)}
    truths = read_truths(options.samples / "samples.json")
    rows, panels = [], []
    assert gap.manifest.reference is not None
    names = list(dict.fromkeys(s.sample for s in gap.manifest.reference.samples))
    if len(names) != len(truths):
        raise InputError(f"{options.samples}: {len(truths)} samples, the bundle has {len(names)}")
    for name, truth in zip(names, truths, strict=True):
        for title, bundle, removed in cells:
            eager = recorded(bundle, name, removed or None)
            picture = load_picture(bundle.folder / eager.image)
            exported = grounders[id(bundle)].ground(picture, eager.phrase, ratio=removed)
            share = f"{exported.kept} of {exported.patches}"
            rows.append(
                [
                    eager.phrase,
                    title,
                    share,
                    f"{measure(eager.boxes, truth):.2f}",
                    f"{measure(exported.boxes, truth):.2f}",
                    "same" if eager.answer == exported.answer else "differ",
                ]
            )
            if name == names[0]:
                for side, found in (("PyTorch", eager.boxes), ("ONNX", exported.boxes)):
                    panel = draw_grounding(
                        picture,
                        bundle.manifest.preprocess,
                        bundle.manifest.buckets,
                        phrase=eager.phrase,
                        boxes=found,
                        kept_index=exported.kept_index,
                    )
                    panels.append((side, f"{side}: {title}, {share} tokens", panel))
    ordered: list[tuple[str, Image.Image]] = [
        (title, panel)
        for wanted in ("PyTorch", "ONNX")
        for side, title, panel in panels
        if side == wanted
    ]
    draw_panels(ordered, columns=len(cells)).save(options.out)
    Display().table(
        "IoU with the true box",
        ["phrase", "positions", "tokens kept", "PyTorch", "ONNX", "answers"],
        rows,
    )
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None))
