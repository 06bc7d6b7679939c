"""The sample questions that PyTorch answers at export: a list of {image, phrase} in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gap_export.config.shipped import package_data
from gap_export.errors import ExportError
from gap_runtime.records.files import expand
from gap_runtime.records.plain import read_json

SAMPLES_FILE: Final = "samples.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A picture file and a phrase to ask about it."""

    name: str
    path: Path
    phrase: str


def find_samples(folder: str | None) -> Path:
    """The folder of the samples: that one, or the packaged one."""
    return expand(folder) if folder else package_data("refshapes") / "samples"


def read_samples(folder: str | None) -> list[Sample]:
    """The samples of a folder, or the packaged ones.

    Raises:
        ExportError: `samples.json` is missing or not a list of {image, phrase}.
    """
    home = find_samples(folder)
    path = home / SAMPLES_FILE
    try:
        entries = read_json(path, ExportError, advice="it lists {image, phrase}")
        samples = [
            Sample(
                name=f"{k:02d}-{Path(entry['image']).stem}",
                path=home / entry["image"],
                phrase=" ".join(str(entry["phrase"]).split()),
            )
            for k, entry in enumerate(entries)
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise ExportError(f"{path}: expected a list of {{image, phrase}}") from error
    names = [sample.path.name for sample in samples]
    doubled = {sample.path for sample in samples if names.count(sample.path.name) > 1}
    if len(doubled) > len({path.name for path in doubled}):
        raise ExportError(f"{path}: different pictures share a file name; rename one")
    if not samples:
        raise ExportError(f"{path}: no samples in it; list at least one or use --no-reference")
    return samples
