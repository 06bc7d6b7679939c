"""The answers that go into a bundle: every sample at every ratio, with the arrays to compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from torch import Tensor

from gap_export.interfaces.family import ModelSpec
from gap_export.reference.answers import EagerAnswer, Reference
from gap_export.reference.samples import Sample
from gap_runtime.bundle.manifest import RatioEntry, ReferenceSample
from gap_runtime.errors import InputError
from gap_runtime.pictures.boxes import parse_boxes
from gap_runtime.pictures.load import find_bucket, fitting_size, frame_picture, load_picture
from gap_runtime.pictures.preprocess import Bucket

UNPRUNED: Final = "unpruned"
_SAMPLES: Final = "samples"
"""Folder of a bundle that the pictures are put in."""


def record_answers(
    reference: Reference,
    samples: Sequence[Sample],
    entries: Sequence[RatioEntry],
    folder: Path,
    show: Callable[[float, str], None] = lambda _share, _now: None,
) -> tuple[list[ReferenceSample], dict[str, np.ndarray]]:
    """Answers to every sample without pruning and at every ratio, with the arrays to compare.

    Args:
        reference: Is asked.
        samples: Pictures and phrases.
        entries: Ratios with their kept counts, for each bucket.
        folder: The bundle being made, which gets the pictures.
        show: Told the share of the answers that is done, and which is given now.
    """
    spec = reference.spec
    records: list[ReferenceSample] = []
    arrays: dict[str, np.ndarray] = {}
    (folder / _SAMPLES).mkdir()
    total = len(samples) * (len(spec.buckets) + len(entries))
    for sample in samples:
        for bucket in spec.buckets:
            name = f"{sample.name}-{bucket.name}" if bucket.name else sample.name
            image = f"{_SAMPLES}/{_bring_picture(sample, spec, bucket, folder / _SAMPLES)}"
            picture = load_picture(folder / image)
            frame = frame_picture(picture.size, spec.preprocess, bucket)
            question = reference.ask(picture, sample.phrase, bucket)
            arrays[f"{name}/pixels"] = _to_numpy(question.pixels)
            for entry in [None, *(each for each in entries if each.bucket == bucket.name)]:
                share = len(records) / total
                now = f"{name}, {UNPRUNED if entry is None else f'ratio {entry.ratio:g}'}"
                show(share, now)
                answer = reference.answer(question, entry, partial(_show_token, show, share, now))
                key = f"{name}/{UNPRUNED if entry is None else f'kept-{entry.kept}'}"
                arrays |= _arrays(key, answer)
                boxes = parse_boxes(answer.text, spec.box, frame).boxes
                records.append(
                    ReferenceSample(
                        key=key,
                        sample=name,
                        image=image,
                        phrase=sample.phrase,
                        bucket=bucket.name,
                        ratio=entry.ratio if entry else None,
                        kept=entry.kept if entry else bucket.patches,
                        answer=answer.text,
                        token_ids=tuple(answer.token_ids),
                        boxes=boxes,
                        prompt_ids=tuple(answer.prompt_ids),
                        token_margins=tuple(answer.token_margins),
                    )
                )
    return records, arrays


def _show_token(show: Callable[[float, str], None], share: float, now: str, tokens: int) -> None:
    show(share, f"{now}, token {tokens}")


def _bring_picture(sample: Sample, spec: ModelSpec, bucket: Bucket, folder: Path) -> str:
    """Put a sample's picture into the bundle, in a shape that fits the bucket; its file name."""
    picture = load_picture(sample.path)
    try:
        fits = find_bucket(picture.size, spec.preprocess, (bucket,)) == bucket
    except InputError:
        fits = False
    if fits:
        shutil.copyfile(sample.path, folder / sample.path.name)
        return sample.path.name
    # What it shows does not matter: the same stretched picture goes both ways.
    name = f"{sample.path.stem}-{bucket.name}.png"
    picture.resize(fitting_size(bucket, spec.preprocess)).save(folder / name)
    return name


def _arrays(key: str, answer: EagerAnswer) -> dict[str, np.ndarray]:
    """What the check compares of an answer, by name."""
    arrays = {
        f"{key}/visual_tokens": _to_numpy(answer.visual_tokens)[None],
        f"{key}/kept_index": np.array([answer.order]),
        f"{key}/position_ids": np.array(answer.position_ids),
        f"{key}/logits": _to_numpy(answer.logits),
        f"{key}/probabilities": np.array(answer.probabilities, dtype=np.float32),
    }
    if answer.scores is not None:
        arrays[f"{key}/scores"] = np.array(answer.scores, dtype=np.float32)
    return arrays


def _to_numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().numpy()
    return array
