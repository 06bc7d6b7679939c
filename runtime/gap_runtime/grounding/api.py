"""What `import gap_runtime` gives beside Grounder: check a bundle, draw what was found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from PIL import Image

from gap_runtime.backends import DEFAULT_BACKEND
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.errors import InputError
from gap_runtime.grounding.check import CheckReport, check_bundle
from gap_runtime.grounding.compare import CheckRow
from gap_runtime.grounding.view import Grounding
from gap_runtime.pictures.drawing import draw_groundings
from gap_runtime.pictures.load import ChannelOrder, ImageInput, open_picture


def check(
    bundle: Bundle | str | Path,
    backend: str = DEFAULT_BACKEND,
    *,
    ratios: Collection[float] | None = None,
    on_row: Callable[[CheckRow], None] | None = None,
) -> CheckReport:
    """Compare a bundle with PyTorch's recorded answers, as the command `gap-runtime check` does.

    Args:
        bundle: Opened, or its folder.
        backend: As in Grounder.
        ratios: Those of the bundle's that are compared; all by default.
        on_row: Called with every row as it is there.

    Returns:
        The report; `.passed` says how it went, `.rows` why.

    Raises:
        CheckError: The bundle holds no reference.
        BundleError: The folder holds no bundle, or a damaged one.
        EngineError: The backend failed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify_all=True)
    chosen = None if ratios is None else opened.choose_ratios(ratios)
    return check_bundle(opened, backend, ratios=chosen, on_row=on_row)


def draw(
    bundle: Bundle,
    image: ImageInput,
    found: Grounding | Sequence[Grounding],
    *,
    order: ChannelOrder = "RGB",
) -> Image.Image:
    """Paint boxes, phrases and kept patches on a copy of a picture.

    Args:
        bundle: That the groundings are of.
        image: The picture, as for `Grounder.ground`.
        found: One grounding or several, all with the same kept patches.
        order: As for `Grounder.ground`.

    Raises:
        InputError: The picture cannot be used, or the phrases kept different patches.
    """
    groundings = [found] if isinstance(found, Grounding) else list(found)
    for each in groundings:
        if not isinstance(each, Grounding):
            raise InputError(f"a grounding of type {type(each).__name__}; expected a Grounding")
    kept = {each.kept_index for each in groundings}
    if len(kept) != 1:
        raise InputError(
            "each phrase kept other patches, which one drawing cannot show; ask for one phrase at "
            "a time"
            if kept
            else "no grounding to draw"
        )
    return draw_groundings(
        open_picture(image, order=order),
        bundle.manifest.preprocess,
        bundle.manifest.buckets,
        [(each.phrase, each.boxes) for each in groundings],
        kept_index=kept.pop(),
    )
