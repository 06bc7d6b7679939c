"""PyTorch's own answers, recorded for the check: plain, eager, and without any graph code.

Hugging Face's model, processor, tokenizer and cache do the work; the pruning and the position
IDs are written out here a second time, as lists, straight from the definitions.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gap_export.config import PruneConfig
from gap_export.interfaces.family import EagerModel, ModelSpec
from gap_export.interfaces.features import EagerVision, Pruner
from gap_export.reference.samples import Sample
from gap_runtime.bundle.manifest import PhraseInput, Prompt, RatioEntry, ReferenceSample
from gap_runtime.errors import InputError
from gap_runtime.grounding.prompt import PHRASE_FIELD
from gap_runtime.pictures.boxes import parse_boxes
from gap_runtime.pictures.load import find_bucket, fitting_size, load_picture
from gap_runtime.pictures.preprocess import Bucket

UNPRUNED: Final = "unpruned"
EXTRA: Final = -1
"""Stands for the extra token where visual tokens are given by index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerAnswer:
    """PyTorch's answer to one question.

    `prompt_ids` are the tokens before and after the picture, `order` the patches by visual slot.
    `token_margins` are the leads of the answer's tokens and of the stop token, see `_margin`.
    `scores` are the pruner's, by patch (None where it has none).
    """

    prompt_ids: list[int]
    pixels: Tensor
    visual_tokens: Tensor
    order: list[int]
    position_ids: list[int]
    logits: Tensor
    token_ids: list[int]
    token_margins: list[float]
    text: str
    scores: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A picture and a phrase as PyTorch sees them, whatever is pruned then."""

    pixels: Tensor
    vision: EagerVision
    bucket: Bucket
    prefix: list[int]
    suffix: list[int]


def ask(
    model: EagerModel,
    picture: Image.Image,
    phrase: str,
    *,
    bucket: Bucket,
    template: str,
    reads: PhraseInput | None,
    before: Asked | None = None,
) -> Asked:
    """Run the vision tower and the tokenizer.

    Args:
        model: The loaded checkpoint.
        picture: RGB.
        phrase: To fill into the template.
        bucket: Of the picture.
        template: Prompt with `{phrase}`.
        reads: How the pruner is told the phrase, None where it is not.
        before: Another question about this picture; the tower does not run again.
    """
    phrase = " ".join(phrase.split())  # as everywhere
    prefix, suffix = model.encode(template.replace(PHRASE_FIELD, phrase))
    pixels = model.make_pixels(picture) if before is None else before.pixels
    vision = model.look(pixels, bucket) if before is None else before.vision
    if reads is not None and reads.source == "clip":
        vision = replace(
            vision,
            text=model.read_phrase(phrase),
            text_patches=model.text_patches(vision),
            text_sign=-1,
        )
    elif reads is not None:
        rows = model.embed(model.encode_phrase(phrase))
        vision = replace(
            vision,
            text=torch.stack([row / row.norm() for row in rows]).mean(dim=0),
            text_patches=torch.stack([token / token.norm() for token in vision.tokens]),
            text_sign=1,
        )
    return Asked(pixels=pixels, vision=vision, bucket=bucket, prefix=prefix, suffix=suffix)


def answer_eagerly(
    model: EagerModel,
    asked: Asked,
    *,
    entry: RatioEntry | None,
    pruner: Pruner,
    config: PruneConfig,
    most: int,
    stop_ids: tuple[int, ...],
    show: Callable[[int], None] = lambda _: None,
) -> EagerAnswer:
    """Ask PyTorch.

    Args:
        model: The loaded checkpoint.
        asked: The question.
        entry: How much is pruned; None leaves all visual tokens in place.
        pruner: Its eager form is used.
        config: Position mode and the pruner's settings.
        most: Most tokens to decode.
        stop_ids: Tokens that end an answer.
        show: Told the number of tokens so far.
    """
    chosen = choose(model, asked, entry, pruner, config)
    order, position_ids = place_tokens(
        len(asked.prefix),
        asked.bucket.patches,
        len(asked.suffix),
        chosen.order,
        config.positions if entry else "gap",
        extra_index=chosen.extra_index,
    )
    visual = torch.stack([chosen.tokens[token] for token in order])
    embeddings = torch.cat([model.embed(asked.prefix), visual, model.embed(asked.suffix)])
    cache = model.start_cache()
    logits = model.run_decoder(embeddings, torch.tensor(position_ids), cache)
    answer: list[int] = []
    margins: list[float] = []
    last, position = logits, position_ids[-1] + 1
    while len(answer) < most:
        token = int(last.argmax())
        margins.append(_margin(last))
        if token in stop_ids:
            break
        answer.append(token)
        show(len(answer))
        last = model.run_decoder(model.embed([token]), torch.tensor([position]), cache)
        position += 1
    return EagerAnswer(
        prompt_ids=asked.prefix + asked.suffix,
        pixels=asked.pixels,
        visual_tokens=visual,
        order=[token for token in order if token != EXTRA],
        position_ids=position_ids,
        logits=logits,
        token_ids=answer,
        token_margins=margins,
        text=model.decode(answer),
        scores=chosen.scores,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Visual tokens by index (the extra one under EXTRA), the order, and the extra one's place.

    `scores` are by visual token; those that are never removed have the best.
    """

    order: list[int]
    tokens: dict[int, Tensor]
    extra_index: float | None
    scores: tuple[float, ...] | None


def choose(
    model: EagerModel,
    asked: Asked,
    entry: RatioEntry | None,
    pruner: Pruner,
    config: PruneConfig,
) -> Chosen:
    """What a pruner keeps of a picture, as visual tokens; `entry` None keeps all."""
    vision, bucket = asked.vision, asked.bucket
    removable = [token for token in range(bucket.patches) if token not in bucket.fixed]
    tokens = dict(zip(removable, vision.tokens, strict=True))
    if bucket.fixed:
        tokens |= dict(zip(bucket.fixed, model.fixed_tokens(bucket), strict=True))
    if entry is None:
        order = list(range(bucket.patches))
        return Chosen(order=order, tokens=tokens, extra_index=None, scores=None)
    choice = pruner.prune_eagerly(vision, entry.kept - len(bucket.fixed), config)
    order = [removable[index] for index in choice.order] + list(bucket.fixed)
    if choice.rows is not None and entry.kept < entry.patches:
        merged = model.project(choice.rows)
        tokens |= {removable[k]: token for k, token in zip(choice.order, merged, strict=True)}
    extra_index = None
    if entry.extra:
        assert choice.extra is not None
        assert choice.extra_weights is not None
        tokens[EXTRA] = model.project(choice.extra[None])[0]
        extra_index = _extra_index(config, bucket.patches, removable, choice.extra_weights)
    scores = None
    if choice.scores is not None:
        by_token = dict(zip(removable, choice.scores, strict=True))
        scores = tuple(by_token.get(k, math.inf) for k in range(bucket.patches))
    return Chosen(order=order, tokens=tokens, extra_index=extra_index, scores=scores)


def _extra_index(
    config: PruneConfig, patches: int, removable: list[int], weights: Tensor
) -> float:
    """Where the extra token lies among the visual ones; a half is behind the one before it."""
    if config.extra_token == "append":
        return patches
    if config.extra_token == "last-visual":
        return patches - 0.5
    heavy: list[float] = weights.double().tolist()
    mean = sum(w * k for w, k in zip(heavy, removable, strict=True)) / sum(heavy)
    return float(math.floor(mean + 0.5)) + 0.5


def place_tokens(
    before: int,
    patches: int,
    after: int,
    order: list[int],
    mode: str,
    *,
    extra_index: float | None = None,
) -> tuple[list[int], list[int]]:
    """Visual tokens by slot and position IDs of all slots, as plain lists.

    Args:
        before: Tokens before the picture.
        patches: Visual tokens before pruning.
        after: Tokens after the picture.
        order: Kept tokens in the pruner's own order.
        mode: Position mode.
        extra_index: Where the extra token (EXTRA) lies among the visual ones, None without one.

    References:
        Grounding-Aware Token Pruning, arXiv:2506.21873.
    """
    marks = sorted(order) if extra_index is None else sorted([*order, extra_index])
    raster = [EXTRA if mark == extra_index else int(mark) for mark in marks]
    own = list(order) if extra_index is None else [*order, EXTRA]
    text_start = patches + (extra_index == patches)
    if mode in {"gap", "permuted"}:
        visual_ids = [before + math.floor(mark) for mark in marks]
    else:
        visual_ids = [before + rank for rank in range(len(marks))]
        text_start = len(marks)
    slots = raster if mode in {"gap", "compact"} else own
    text_ids = [before + text_start + j for j in range(after)]
    return slots, list(range(before)) + visual_ids + text_ids


def record_reference(
    model: EagerModel,
    samples: list[Sample],
    spec: ModelSpec,
    entries: Sequence[RatioEntry],
    *,
    pruner: Pruner,
    config: PruneConfig,
    prompt: Prompt,
    phrase: PhraseInput | None,
    most: int,
    folder: Path,
    images: str,
    show: Callable[[float, str], None] = lambda _share, _now: None,
) -> tuple[list[ReferenceSample], dict[str, np.ndarray]]:
    """Answers to every sample without pruning and at every ratio, with the arrays to compare.

    Args:
        model: The loaded checkpoint.
        samples: Questions.
        spec: Facts about the model.
        entries: Ratios with their kept counts, for each bucket.
        pruner: Its eager form is used.
        config: Position mode and the pruner's settings.
        prompt: Of the bundle.
        phrase: How the pruner is told the phrase, None where it is not.
        most: Most tokens to decode.
        folder: The bundle being made.
        images: Folder within the bundle that the pictures are put in.
        show: Told the share of the answers that is done, and which is given now.
    """
    records: list[ReferenceSample] = []
    arrays: dict[str, np.ndarray] = {}
    (folder / images).mkdir()
    answers = len(samples) * (len(spec.buckets) + len(entries))
    for sample in samples:
        for bucket in spec.buckets:
            name = f"{sample.name}-{bucket.name}" if bucket.name else sample.name
            image = f"{images}/{_place_picture(sample, spec, bucket, folder / images)}"
            picture = load_picture(folder / image)
            asked = ask(
                model,
                picture,
                sample.phrase,
                bucket=bucket,
                template=prompt.template,
                reads=phrase,
            )
            arrays[f"{name}/pixels"] = _to_numpy(asked.pixels)
            for entry in [None, *(each for each in entries if each.bucket == bucket.name)]:
                now = f"{name}, {'unpruned' if entry is None else f'ratio {entry.ratio:g}'}"
                show(len(records) / answers, now)
                answer = answer_eagerly(
                    model,
                    asked,
                    entry=entry,
                    pruner=pruner,
                    config=config,
                    most=most,
                    stop_ids=prompt.stop_ids,
                    show=partial(_show_token, show, len(records) / answers, now),
                )
                key = f"{name}/{UNPRUNED if entry is None else f'kept-{entry.kept}'}"
                arrays |= _arrays(key, answer)
                boxes = parse_boxes(answer.text, spec.box, *picture.size).boxes
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
                        boxes=tuple((b.x0, b.y0, b.x1, b.y1) for b in boxes),
                        prompt_ids=tuple(answer.prompt_ids),
                        token_margins=tuple(answer.token_margins),
                    )
                )
    return records, arrays


def _show_token(show: Callable[[float, str], None], share: float, now: str, tokens: int) -> None:
    show(share, f"{now}, token {tokens}")


def _place_picture(sample: Sample, spec: ModelSpec, bucket: Bucket, folder: Path) -> str:
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
        f"{key}/position_ids": np.array([answer.position_ids]),
        f"{key}/logits": _to_numpy(answer.logits),
    }
    if answer.scores is not None:
        arrays[f"{key}/scores"] = np.array(answer.scores, dtype=np.float32)
    return arrays


def _margin(logits: Tensor) -> float:
    """Lead of the best token over the next, relative to the largest magnitude."""
    best, second = torch.topk(logits, 2).values.tolist()
    return float((best - second) / max(float(logits.abs().max()), 1e-30))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().numpy()
    return array
