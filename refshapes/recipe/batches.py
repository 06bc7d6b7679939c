"""Scenes as tensors: pictures, and the questions behind each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from gap_runtime.evaluation.refshapes import COLOURS, Question, format_box
from gap_runtime.evaluation.refshapes256 import CELL, SHAPES, SIDE, Scene
from recipe.base import FILL, IGNORED, encode_prompt
from recipe.sizes import CLASSES, GRID

TOUCHED: Final = 0.03
"""Share of a patch that an object must cover to count as touching it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of one training step."""

    patches: Tensor  # [B, N, 3 * CELL * CELL]
    rows: int  # of the grid
    token_ids: Tensor  # [B, Q, T]
    labels: Tensor  # [B, Q, T], IGNORED outside answers
    phrase_end: Tensor  # [B, Q] index into T
    target: Tensor  # [B, Q, N], 1 where a patch belongs to the target
    centre: Tensor  # [B, Q, 2] row and column of the target
    colour: Tensor  # [B, N], 0 is background
    shape: Tensor  # [B, N], 0 is background
    edges: Tensor  # [B, N, 4] where the box's left, top, right, bottom side is; 0 is not here
    content: Tensor  # [B, CLASSES] share of the objects' patches
    touched: Tensor  # [B, N] share of the attention that a patch should have from CLS
    outlines: Tensor  # [B, N] the same, most of all where a corner of an object's box is


def cover(box: tuple[int, int, int, int], rows: int) -> np.ndarray:
    """Share of every patch that a box covers, [rows, GRID]; the box in the grid's frame."""
    x0, y0, x1, y1 = box
    left, top = np.arange(GRID) * CELL, np.arange(rows) * CELL
    across = np.clip(np.minimum(x1, left + CELL) - np.maximum(x0, left), 0, None)
    down = np.clip(np.minimum(y1, top + CELL) - np.maximum(y0, top), 0, None)
    return down[:, None] * across[None, :] / CELL**2


def find_edges(box: tuple[int, int, int, int], rows: int) -> np.ndarray:
    """Where in each patch the sides of a box are, [rows * GRID, 4]: 0 not in it, else 1 to 7."""
    places = np.indices((rows, GRID)).reshape(2, -1)[[1, 0, 1, 0]].T * CELL
    # The last pixel inside the box stands for its right and its bottom side.
    within = np.array(box) - (0, 0, 1, 1) - places
    return np.where((within >= 0) & (within < CELL), 1 + within // 2, 0)


class BatchMaker:
    """Turns scenes into tensors: pictures, and the questions behind each."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.question_mark = tokenizer.convert_tokens_to_ids("?")
        processor = CLIPImageProcessor()
        self.mean = np.array(processor.image_mean, dtype=np.float32) * 255
        self.std = np.array(processor.image_std, dtype=np.float32) * 255
        before, _ = encode_prompt(tokenizer, "it")
        self.prefix = torch.tensor(before)
        self.eos = tokenizer.eos_token_id
        self.prompts: dict[str, list[int]] = {}

    def ask(self, phrase: str) -> list[int]:
        """Token IDs of a question, each phrase encoded once."""
        if phrase not in self.prompts:
            self.prompts[phrase] = encode_prompt(self.tokenizer, phrase)[1]
        return self.prompts[phrase]

    def make(self, scenes: list[Scene], asked: list[list[Question]], rows: int) -> Batch:
        """One batch; each scene with equally many questions, on a grid of so many rows."""
        pictures, questions = len(scenes), len(asked[0])
        patches = np.empty((pictures, rows * GRID, 3 * CELL * CELL), dtype=np.float32)
        colour = np.zeros((pictures, rows * GRID), dtype=np.int64)
        shape = np.zeros_like(colour)
        edges = np.full((pictures, rows * GRID, 4), IGNORED, dtype=np.int64)
        content = np.zeros((pictures, CLASSES), dtype=np.float32)
        touched = np.zeros((pictures, rows * GRID), dtype=np.float32)
        target = np.zeros((pictures, questions, rows * GRID), dtype=np.float32)
        texts, centre = [], np.empty((pictures, questions, 2), dtype=np.int64)
        for b, scene in enumerate(scenes):
            width, height = scene.image.size
            dx, dy = (GRID * CELL - width) // 2, (rows * CELL - height) // 2
            canvas = np.empty((rows * CELL, GRID * CELL, 3), dtype=np.float32)
            canvas[:] = FILL
            canvas[dy : dy + height, dx : dx + width] = np.asarray(scene.image)
            canvas -= self.mean
            canvas /= self.std
            split = canvas.reshape(rows, CELL, GRID, CELL, 3).transpose(0, 2, 4, 1, 3)
            patches[b] = split.reshape(rows * GRID, -1)
            # A patch counts for the object that covers most of it, from a tenth of its area.
            most = np.full((rows, GRID), 0.1)
            for item in scene.shapes:
                box = tuple(v + (dx, dy)[k % 2] for k, v in enumerate(item.box))
                share = cover(box, rows)
                kinds = list(COLOURS).index(item.colour), SHAPES.index(item.shape)
                here = (share > most).reshape(-1)
                colour[b, here], shape[b, here] = kinds[0] + 1, kinds[1] + 1
                most = np.maximum(most, share)
                some = (share > TOUCHED).reshape(-1)
                touched[b] += some
                edges[b, some] = find_edges(box, rows)[some]
                content[b, kinds[0] * len(SHAPES) + kinds[1]] += some.sum()
            for q, question in enumerate(asked[b]):
                answer = self.tokenizer(
                    # A picture of few rows is the upper part of a square.
                    format_box(question.box, width, height if rows == GRID else SIDE, SIDE),
                    add_special_tokens=False,
                )["input_ids"]
                texts.append((self.ask(question.phrase), [*answer, self.eos]))
                box = tuple(v + (dx, dy)[k % 2] for k, v in enumerate(question.box))
                target[b, q] = cover(box, rows).reshape(-1) > TOUCHED
                x, y = scene.shapes[question.target].centre
                centre[b, q] = (int(y + dy) // CELL, int(x + dx) // CELL)
        slots = max(len(prompt) + len(answer) for prompt, answer in texts) - 1
        ids = np.full((len(texts), slots), self.tokenizer.pad_token_id)
        labels = np.full_like(ids, IGNORED)
        ends = np.empty(len(texts), dtype=np.int64)
        for k, (prompt, answer) in enumerate(texts):
            total = len(prompt) + len(answer)
            ids[k, : total - 1] = prompt + answer[:-1]
            labels[k, len(prompt) - 1 : total - 1] = answer
            ends[k] = prompt.index(self.question_mark) - 1
        touched = np.minimum(touched, 1)
        # A patch with a corner of a box says most of where the box is: two sides of four.
        sides = np.minimum((edges > 0).sum(axis=-1), 2)
        outlines = touched * (0.1 + sides**2.5).astype(np.float32)
        return Batch(
            patches=torch.from_numpy(patches),
            rows=rows,
            token_ids=torch.from_numpy(ids).view(pictures, questions, -1),
            labels=torch.from_numpy(labels).view(pictures, questions, -1),
            phrase_end=torch.from_numpy(ends).view(pictures, questions),
            target=torch.from_numpy(target),
            centre=torch.from_numpy(centre),
            colour=torch.from_numpy(colour),
            shape=torch.from_numpy(shape),
            edges=torch.from_numpy(edges),
            content=torch.from_numpy(content / content.sum(axis=1, keepdims=True)),
            touched=torch.from_numpy(touched / touched.sum(axis=1, keepdims=True)),
            outlines=torch.from_numpy(outlines / outlines.sum(axis=1, keepdims=True)),
        )
