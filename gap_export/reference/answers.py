"""PyTorch's own answers: plain, eager, and without any graph code.

Hugging Face's model, processor, tokenizer and cache do the work; the pruning and the position
IDs are written out a second time in `choice`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from gap_export.config.records import PruneConfig
from gap_export.interfaces.family import EagerModel, ModelSpec
from gap_export.interfaces.features import EagerVision, Pruner
from gap_export.reference.choice import EXTRA_INDEX, Chosen, find_extra_place, place_tokens
from gap_export.reference.coordinates import choose_eagerly, find_coordinates
from gap_runtime.bundle.manifest import PhraseInput, Prompt, RatioEntry
from gap_runtime.grounding.prompt import PHRASE_FIELD
from gap_runtime.pictures.load import find_bucket
from gap_runtime.pictures.preprocess import Bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A picture and a phrase as PyTorch sees them, whatever is pruned then.

    `prefix` and `suffix` are the tokens before and after the picture.
    """

    pixels: Tensor
    vision: EagerVision
    bucket: Bucket
    prefix: list[int]
    suffix: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerAnswer:
    """PyTorch's answer to one question.

    `prompt_ids` are the tokens before and after the picture, `order` the patches by visual slot,
    `position_ids` one list for each axis.
    `token_margins` are the leads of the answer's tokens and of the stop token, see `_margin`;
    `probabilities` those of the answer's tokens, without the stop token.
    `scores` are the pruner's, by patch (None where it has none).
    """

    prompt_ids: list[int]
    visual_tokens: Tensor
    order: list[int]
    position_ids: list[list[int]]
    logits: Tensor
    token_ids: list[int]
    token_margins: list[float]
    probabilities: list[float]
    text: str
    scores: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A checkpoint in PyTorch with all that an export settles about a question.

    `pruner`'s eager form is used, with the settings `prune`. `phrase` says how the pruner is told
    the phrase, None where it is not. `answer_tokens` is the most that is decoded. `see_cache` is
    shown the keys and values [G, T, d] of every layer behind each answer.
    """

    model: EagerModel
    spec: ModelSpec
    pruner: Pruner
    prune: PruneConfig
    prompt: Prompt
    phrase: PhraseInput | None
    answer_tokens: int
    see_cache: Callable[[list[tuple[Tensor, Tensor]]], None] | None = None

    def find_bucket(self, picture: Image.Image) -> Bucket:
        """The bucket of a picture.

        Raises:
            InputError: The model takes no picture of its shape.
        """
        return find_bucket(picture.size, self.spec.preprocess, self.spec.buckets)

    def ask(
        self, picture: Image.Image, phrase: str, bucket: Bucket, *, before: Question | None = None
    ) -> Question:
        """Run the vision tower and the tokenizer.

        Args:
            picture: RGB.
            phrase: To fill into the prompt.
            bucket: Of the picture.
            before: Another question about this picture; the tower does not run again.
        """
        phrase = " ".join(phrase.split())  # as everywhere
        prompt = self.prompt.template.replace(PHRASE_FIELD, phrase)
        prefix, suffix = self.model.encode(prompt)
        pixels = self.model.make_pixels(picture) if before is None else before.pixels
        vision = self.model.look(pixels, bucket) if before is None else before.vision
        return Question(
            pixels=pixels,
            vision=self._tell(vision, phrase),
            bucket=bucket,
            prefix=prefix,
            suffix=suffix,
        )

    def choose(self, question: Question, entry: RatioEntry | None) -> Chosen:
        """What is kept of the picture at a ratio, as visual tokens; None keeps all."""
        vision, bucket = question.vision, question.bucket
        removable = bucket.removable
        rows = vision.tokens
        if vision.planes is not None:
            rows = torch.cat([rows, vision.planes], dim=1)
        tokens = dict(zip(removable, rows, strict=True))
        if bucket.fixed:
            tokens |= dict(zip(bucket.fixed, self.model.fixed_tokens(bucket), strict=True))
        if entry is None:
            order = list(range(bucket.patches))
            return Chosen(order=order, tokens=tokens, extra_place=None, scores=None)
        kept = entry.kept - len(bucket.fixed)
        stay = self._find_coordinates(question, removable)
        choice = choose_eagerly(self.pruner, vision, kept, self.prune, stay)
        order = [removable[index] for index in choice.order] + list(bucket.fixed)
        if choice.rows is not None and entry.kept < entry.patches:
            merged = self.model.project(choice.rows)
            tokens |= {removable[k]: token for k, token in zip(choice.order, merged, strict=True)}
        extra_place = None
        if entry.extra:
            assert choice.extra is not None
            assert choice.extra_weights is not None
            tokens[EXTRA_INDEX] = self.model.project(choice.extra[None])[0]
            extra_place = find_extra_place(
                self.prune, bucket.patches, removable, choice.extra_weights
            )
        scores = None
        if choice.scores is not None:
            by_token = dict(zip(removable, choice.scores, strict=True))
            scores = tuple(by_token.get(k, math.inf) for k in range(bucket.patches))
        return Chosen(order=order, tokens=tokens, extra_place=extra_place, scores=scores)

    def _find_coordinates(self, question: Question, removable: list[int]) -> list[int]:
        """Removable tokens, counted among themselves, that stay whatever the pruner chooses."""
        if not self.prune.keeps_coordinates:
            return []
        before, bucket = len(question.prefix), question.bucket
        _, ids = place_tokens(
            before,
            bucket.patches,
            0,
            list(range(bucket.patches)),
            "gap",
            grid=self.spec.position_grid(bucket),
        )
        places = [[axis[before + token] for axis in ids] for token in removable]
        return find_coordinates(self.model.rotary_frequencies(), places, self.prune.ivc)

    def answer(
        self,
        question: Question,
        entry: RatioEntry | None,
        show: Callable[[int], None] = lambda _: None,
    ) -> EagerAnswer:
        """Decode an answer.

        Args:
            question: Was asked.
            entry: How much is pruned; None leaves all visual tokens in place.
            show: Told the number of tokens so far.
        """
        model, chosen = self.model, self.choose(question, entry)
        order, position_ids = place_tokens(
            len(question.prefix),
            question.bucket.patches,
            len(question.suffix),
            chosen.order,
            self.prune.positions if entry else "gap",
            extra_place=chosen.extra_place,
            grid=self.spec.position_grid(question.bucket),
        )
        visual = torch.stack([chosen.tokens[token] for token in order])
        before, after = model.embed(question.prefix), model.embed(question.suffix)
        cache = model.start_cache()
        logits = model.run_decoder(
            torch.cat([before, visual, after]), torch.tensor(position_ids), cache
        )
        token_ids: list[int] = []
        margins: list[float] = []
        probabilities: list[float] = []
        # Text has the same number on every axis.
        last, position = logits, position_ids[0][-1] + 1
        while len(token_ids) < self.answer_tokens:
            token = int(last.argmax())
            margins.append(_margin(last))
            if token in self.prompt.stop_ids:
                break
            token_ids.append(token)
            probabilities.append(float(last.softmax(dim=-1)[token]))
            show(len(token_ids))
            now = torch.full((len(position_ids), 1), position)
            last = model.run_decoder(model.embed([token]), now, cache)
            position += 1
        if self.see_cache is not None:
            self.see_cache(model.read_cache(cache))
        return EagerAnswer(
            prompt_ids=question.prefix + question.suffix,
            visual_tokens=visual,
            order=[token for token in order if token != EXTRA_INDEX],
            position_ids=position_ids,
            logits=logits,
            token_ids=token_ids,
            token_margins=margins,
            probabilities=probabilities,
            text=model.decode(token_ids),
            scores=chosen.scores,
        )

    def _tell(self, vision: EagerVision, phrase: str) -> EagerVision:
        """What was seen, with the phrase beside it where the pruner reads it."""
        model = self.model
        if self.phrase is None:
            return vision
        if self.phrase.source == "clip":
            return replace(
                vision,
                text=model.read_phrase(phrase),
                text_patches=model.text_patches(vision),
                text_sign=-1,
            )
        # Without the planes that rows of some decoders bring.
        rows = model.embed(model.encode_phrase(phrase))[:, : vision.tokens.shape[1]]
        return replace(
            vision,
            text=torch.stack([row / row.norm() for row in rows]).mean(dim=0),
            text_patches=torch.stack([token / token.norm() for token in vision.tokens]),
            text_sign=1,
        )


def _margin(logits: Tensor) -> float:
    """Lead of the best token over the next, relative to the largest magnitude."""
    best, second = torch.topk(logits, 2).values.tolist()
    return float((best - second) / max(float(logits.abs().max()), 1e-30))
