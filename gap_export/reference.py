"""PyTorch's own answers, recorded for the check: plain, eager, and without any graph code.

Hugging Face's model, processor, tokenizer and cache do the work; the pruning and the position
IDs are written out here a second time, as lists, straight from the definitions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gap_export.config import PruneConfig, package_data
from gap_export.errors import ExportError
from gap_export.family import EagerModel, ModelSpec
from gap_export.features import EagerChoice, Pruner
from gap_runtime.boxes import parse_boxes
from gap_runtime.image import load_picture
from gap_runtime.manifest import BoxFormat, ReferenceSample
from gap_runtime.prompt import PHRASE_FIELD

UNPRUNED: Final = "unpruned"
SAMPLES_FILE: Final = "samples.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A picture file and a phrase to ask about it."""

    name: str
    path: Path
    phrase: str


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


def read_samples(folder: str | None) -> list[Sample]:
    """The samples of a folder, or the packaged ones.

    Raises:
        ExportError: `samples.json` is missing or not a list of {image, phrase}.
    """
    home = Path(folder).expanduser() if folder else package_data("refshapes") / "samples"
    path = home / SAMPLES_FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        samples = [
            Sample(
                name=f"{k:02d}-{Path(entry['image']).stem}",
                path=home / entry["image"],
                phrase=" ".join(str(entry["phrase"]).split()),
            )
            for k, entry in enumerate(entries)
        ]
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such file; it lists {{image, phrase}}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ExportError(f"{path}: expected a list of {{image, phrase}}") from error
    names = [sample.path.name for sample in samples]
    doubled = {sample.path for sample in samples if names.count(sample.path.name) > 1}
    if len(doubled) > len({path.name for path in doubled}):
        raise ExportError(f"{path}: different pictures share a file name; rename one")
    if not samples:
        raise ExportError(f"{path}: no samples in it; list at least one or use --no-reference")
    return samples


def answer_eagerly(
    model: EagerModel,
    spec: ModelSpec,
    picture: Image.Image,
    prompt: str,
    *,
    choose: Callable[..., EagerChoice] | None,
    kept: int,
    config: PruneConfig,
    most: int,
) -> EagerAnswer:
    """Ask PyTorch.

    Args:
        model: The loaded checkpoint.
        spec: Its facts.
        picture: RGB.
        prompt: The filled template, with one image token.
        choose: A pruner's eager form; None leaves all patches in place.
        kept: Patches to keep.
        config: Position mode and seed.
        most: Most tokens to decode.
    """
    token_ids = model.encode(prompt)
    at = token_ids.index(spec.image_token_id)
    prefix, suffix = token_ids[:at], token_ids[at + 1 :]
    pixels = model.make_pixels(picture)
    vision = model.look(pixels)
    tokens = model.project(vision)
    if choose is None:
        choice = EagerChoice(order=tuple(range(spec.patches)), scores=None)
    else:
        choice = choose(vision, kept, config)
    mode = config.positions if choose is not None else "gap"
    order, position_ids = place_tokens(len(prefix), spec.patches, len(suffix), choice.order, mode)
    visual = tokens[order]
    embeddings = torch.cat([model.embed(prefix), visual, model.embed(suffix)])
    cache = model.start_cache()
    logits = model.run_decoder(embeddings, torch.tensor(position_ids), cache)
    answer: list[int] = []
    margins: list[float] = []
    last, position = logits, position_ids[-1] + 1
    while len(answer) < most:
        token = int(last.argmax())
        margins.append(_margin(last))
        if token in spec.stop_ids:
            break
        answer.append(token)
        last = model.run_decoder(model.embed([token]), torch.tensor([position]), cache)
        position += 1
    return EagerAnswer(
        prompt_ids=prefix + suffix,
        pixels=pixels,
        visual_tokens=visual,
        order=order,
        position_ids=position_ids,
        logits=logits,
        token_ids=answer,
        token_margins=margins,
        text=model.decode(answer),
        scores=choice.scores,
    )


def place_tokens(
    before: int, patches: int, after: int, order: tuple[int, ...], mode: str
) -> tuple[list[int], list[int]]:
    """Patches by visual slot and position IDs of all slots, as plain lists.

    Args:
        before: Tokens before the picture.
        patches: Visual tokens before pruning.
        after: Tokens after the picture.
        order: Kept patches in the pruner's own order.
        mode: Position mode.

    References:
        Grounding-Aware Token Pruning, arXiv:2506.21873.
    """
    raster = sorted(order)
    prefix_ids = list(range(before))
    if mode in {"gap", "permuted"}:
        visual_ids = [before + patch for patch in raster]
        text_start = before + patches
    else:
        visual_ids = [before + rank for rank in range(len(raster))]
        text_start = before + len(raster)
    text_ids = [text_start + j for j in range(after)]
    slots = raster if mode in {"gap", "compact"} else list(order)
    return slots, prefix_ids + visual_ids + text_ids


def record_reference(
    model: EagerModel,
    spec: ModelSpec,
    samples: list[Sample],
    pairs: list[tuple[float, int]],
    *,
    pruner: Pruner,
    config: PruneConfig,
    template: str,
    most: int,
    image_folder: str,
    box: BoxFormat,
) -> tuple[list[ReferenceSample], dict[str, np.ndarray]]:
    """Answers to every sample without pruning and at every ratio, with the arrays to compare.

    Args:
        model: The loaded checkpoint.
        spec: Its facts.
        samples: Questions.
        pairs: Ratios with their kept counts.
        pruner: Its eager form is used.
        config: Position mode and seed.
        template: Prompt with `{phrase}`.
        most: Most tokens to decode.
        image_folder: Folder of the pictures within the bundle.
        box: How answers write boxes.
    """
    records: list[ReferenceSample] = []
    arrays: dict[str, np.ndarray] = {}
    for sample in samples:
        picture = load_picture(sample.path)
        prompt = template.replace(PHRASE_FIELD, sample.phrase)
        for ratio, kept in [(None, spec.patches), *pairs]:
            answer = answer_eagerly(
                model,
                spec,
                picture,
                prompt,
                choose=None if ratio is None else pruner.prune_eagerly,
                kept=kept,
                config=config,
                most=most,
            )
            key = f"{sample.name}/{UNPRUNED if ratio is None else f'kept-{kept}'}"
            arrays[f"{sample.name}/pixels"] = _to_numpy(answer.pixels)
            arrays[f"{key}/visual_tokens"] = _to_numpy(answer.visual_tokens)[None]
            arrays[f"{key}/kept_index"] = np.array([answer.order])
            arrays[f"{key}/position_ids"] = np.array([answer.position_ids])
            arrays[f"{key}/logits"] = _to_numpy(answer.logits)
            if answer.scores is not None:
                arrays[f"{key}/scores"] = np.array(answer.scores, dtype=np.float32)
            parsed = parse_boxes(answer.text, box, *picture.size)
            records.append(
                ReferenceSample(
                    key=key,
                    sample=sample.name,
                    image=f"{image_folder}/{sample.path.name}",
                    phrase=sample.phrase,
                    ratio=ratio,
                    kept=kept,
                    answer=answer.text,
                    token_ids=tuple(answer.token_ids),
                    boxes=tuple((b.x0, b.y0, b.x1, b.y1) for b in parsed.boxes),
                    prompt_ids=tuple(answer.prompt_ids),
                    token_margins=tuple(answer.token_margins),
                )
            )
    return records, arrays


def _margin(logits: Tensor) -> float:
    """Lead of the best token over the next, relative to the largest magnitude."""
    best, second = torch.topk(logits, 2).values.tolist()
    return float((best - second) / max(float(logits.abs().max()), 1e-30))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().numpy()
    return array
