"""Train the embedded model with 256 visual tokens: a small LLaVA that points at coloured shapes.

    python refshapes/train256.py [--seed S] [--threads T] [--out DIR] [--state FILE]

Writes an ordinary Hugging Face checkpoint folder. The run saves its state every few minutes and
continues from there when started again.

As in `train.py` the model can only locate through the language model's position IDs: the vision
tower's position embedding is frozen at zero, and one rotary frequency has the period of the patch
grid. Neither the model nor the auxiliary heads, which are dropped afterwards, see pruned input.
At last the tower alone learns where CLS looks, its features kept: what the pruners go by.

What makes it train on one core: pictures of few rows first (16 x 4 patches, then 16 x 8, then
16 x 16; the width and with it the rotary base stay), many questions packed behind a picture, a
forward pass of its own that computes nothing twice (`forward`), and Muon for the matrices.
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from gap_runtime.evaluation.refshapes import COLOURS, Question
from gap_runtime.evaluation.refshapes256 import CELL, SHAPES, SIDE, Scene, describe, draw_scene

# B pictures, Q questions each, N patches, P tokens before them, T tokens of a question, D width,
# H heads, d width of a head, S = P + N.
GRID: Final = SIDE // CELL
WIDTH: Final = 128
HEAD_DIM: Final = 32
HEADS: Final = WIDTH // HEAD_DIM
LAYERS: Final = 6
FILL: Final = (122, 116, 104)
PROMPT_BEFORE: Final = "USER: "
PROMPT_AFTER: Final = "\nWhere is {phrase}? ASSISTANT:"
IGNORED: Final = -100
CLASSES: Final = len(COLOURS) * len(SHAPES)
EPSILON: Final = 1e-6
EDGES: Final = 1 + CELL // 2
"""A side of a box is not in a patch, or within two of its pixels."""
TOUCHED: Final = 0.03
"""Share of a patch that an object must cover to count as touching it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the curriculum, by default as it ends.

    `plain` is the share of plain phrases where there are others, `rate` the learning rate of the
    matrices. The weights of losses: `kind` for the colour and shape of patches,
    `centre` for where the phrase's object is, `edge` for where
    in a patch its object's sides are, `bind` for the attention from a question to its object,
    `look` for that from CLS to all objects. With `lower`, every third step has pictures of 4, 8
    or 12 rows. `hidden` is the largest share of a picture's patches that an attention head of the
    language model does not see; which ones is another draw for every picture, head and layer.
    """

    rows: int = GRID
    pictures: int = 5
    questions: int = 7
    least: int = 2
    most: int = 6
    repeats: float = 0.4
    plain: float = 0.6
    rate: float = 4e-3
    kind: float = 0.5
    centre: float = 0.2
    edge: float = 0.2
    bind: float = 0.3
    look: float = 0.2
    hidden: float = 0.0
    lower: bool = False


STEPS: Final = 4325
GAZE: Final = 400
"""Steps behind them that train the tower alone."""
_FULL: Final = Stage()
_HALF: Final = Stage(rows=8, pictures=6, questions=6, most=5, look=0.05)
_LOW: Final = Stage(rows=4, pictures=8, questions=4, most=3, repeats=0.2, plain=0.8, look=0.05)
_UNBOUND: Final = replace(_LOW, kind=0.15, centre=0.1, edge=0.0, bind=0.0)
_FEW: Final = replace(_UNBOUND, pictures=12, least=1, repeats=0.0, plain=1.0, rate=2e-3)
_GAZE: Final = Stage(pictures=8, questions=1)
CURRICULUM: Final = (
    (400, replace(_FEW, pictures=16, questions=3, most=1)),
    (750, _FEW),
    (1109, _UNBOUND),
    (1556, replace(_LOW, edge=0.0)),
    (1700, _LOW),
    (1972, _HALF),
    (2320, replace(_FULL, look=0.05)),
    (2767, _FULL),
    (3502, replace(_FULL, lower=True)),
    (3625, replace(_FULL, lower=True, look=0.6)),
    (STEPS, replace(_FULL, hidden=0.8)),
)
"""(until this step, how)."""
RATES: Final = (
    (0, 0.01),
    (99, 1),
    (2434, 1),
    (2435, 0.977),
    (3501, 0.154),
    (3502, 0.097),
    (3625, 0),
    (3675, 0.3),
    (STEPS, 0),
)
"""(step, share of the full learning rates), straight lines between."""
SETTLING: Final = 3256
"""From this step on attention is dropped: no answer hangs on single tokens."""
DROPOUT: Final = 0.15
GAZE_RATE: Final = 1.5e-3
KEPT: Final = 6.0
"""Weight of what the tower's features change, as a share of their variance."""
ADAM_RATE: Final = 2e-3
SAVE_EVERY: Final = 180
"""Seconds between two saved states."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer in Llama's form, trained on the phrases and answers.

    Every digit is a token, and so is the point before it: an answer has 24 tokens.
    """
    words = ["small", "big", "left", "right", "top", "bottom", *COLOURS, *SHAPES, "one"]
    corpus = [f"USER: {PROMPT_AFTER.format(phrase=f'the {word}')}" for word in words]
    corpus += [f"the {word} left of the right of the above the below the" for word in words]
    corpus += [f"[0.{k:02d}, 1.{k:02d}, 0.00, 1.00]" for k in range(100)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9.,?:\n\\]]"), "isolated"),
            pre_tokenizers.Split(Regex("\u2581"), "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    trainer = BpeTrainer(
        vocab_size=512,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 4, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained LLaVA, its vision position embedding frozen at zero."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=CELL,
        projection_dim=96,
        initializer_range=0.02,
    )
    text = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        rms_norm_eps=EPSILON,
        rope_parameters={
            "rope_type": "default",
            # Rotary pair 1 turns once per row of the grid.
            "rope_theta": (2 * math.pi / GRID) ** (-HEAD_DIM / 2),
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )
    config.image_token_id = config.image_token_index
    model = LlavaForConditionalGeneration(config)
    table = model.model.vision_tower.embeddings.position_embedding.weight
    nn.init.zeros_(table)
    table.requires_grad = False
    return model


class AuxiliaryHeads(nn.Module):
    """Linear read-outs that exist in training only; see `Trainer.loss`."""

    def __init__(self, width: int, vision_width: int) -> None:
        super().__init__()
        kinds = len(COLOURS) + len(SHAPES) + 2
        self.vision_kind = nn.Linear(vision_width, kinds)
        self.patch_kind = nn.Linear(width, kinds)
        self.patch_place = nn.Linear(width, 2 * GRID)
        self.phrase_place = nn.ModuleList(nn.Linear(width, 2 * GRID) for _ in range(2))
        self.cls_content = nn.Linear(vision_width, CLASSES)
        self.vision_edge = nn.Linear(vision_width, 4 * EDGES)
        self.patch_edge = nn.Linear(width, 4 * EDGES)


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


def format_box(box: tuple[int, int, int, int], width: int, height: int) -> str:
    """LLaVA's answer text: corners in the frame of the padded square, two decimals."""
    dx, dy = (SIDE - width) // 2, (SIDE - height) // 2
    x0, y0, x1, y1 = ((v + (dx, dy)[k % 2]) / SIDE for k, v in enumerate(box))
    return f"[{x0:.2f}, {y0:.2f}, {x1:.2f}, {y1:.2f}]"


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
        before, _ = self.encode(PROMPT_BEFORE + "<image>" + PROMPT_AFTER.format(phrase="it"))
        self.prefix = torch.tensor(before)
        self.eos = tokenizer.eos_token_id
        self.prompts: dict[str, list[int]] = {}

    def encode(self, prompt: str) -> tuple[list[int], list[int]]:
        """Token IDs before and after the image."""
        ids = self.tokenizer(prompt)["input_ids"]
        at = ids.index(self.tokenizer.convert_tokens_to_ids("<image>"))
        return ids[:at], ids[at + 1 :]

    def ask(self, phrase: str) -> list[int]:
        """Token IDs of a question, each phrase encoded once."""
        if phrase not in self.prompts:
            text = PROMPT_BEFORE + "<image>" + PROMPT_AFTER.format(phrase=phrase)
            self.prompts[phrase] = self.encode(text)[1]
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
                    format_box(question.box, width, height if rows == GRID else SIDE),
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


def see(tower: nn.Module, patches: Tensor) -> tuple[Tensor, Tensor]:
    """The tower's hidden state -2 [B, 1 + N, C], and the attention of CLS there [B, N].

    The last block, which nothing reads, is left out.
    """
    kernel = tower.embeddings.patch_embedding.weight
    hidden = functional.linear(patches, kernel.flatten(1))
    begin = tower.embeddings.class_embedding.expand(len(patches), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([begin, hidden], dim=1))
    blocks = tower.encoder.layers[:-1]
    attention = hidden
    for block in blocks:
        inner = block.self_attn
        normed = block.layer_norm1(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (inner.num_heads, -1)).transpose(1, 2)
            for project in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + inner.out_proj(mixed.transpose(1, 2).flatten(2))
        wide = block.mlp.fc1(block.layer_norm2(hidden))
        hidden = hidden + block.mlp.fc2(wide * torch.sigmoid(1.702 * wide))
        attention = (key @ query[:, :, 0, :, None])[..., 0] * query.shape[-1] ** -0.5
    return hidden, attention.softmax(dim=-1).mean(dim=1)[:, 1:]


class Hidden:
    """Which patches a head of one layer does not see: a draw for every picture and head."""

    def __init__(self, pictures: int, patches: int, most: float) -> None:
        self.share = torch.rand(pictures, HEADS, 1, 1) * most
        self.patches = patches

    def __call__(self, total: int) -> Tensor:
        """True where hidden, [B, H, 1, S]; the text before the picture never is."""
        drawn = torch.rand(*self.share.shape[:2], 1, self.patches) < self.share
        return functional.pad(drawn, (total - self.patches, 0))


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., L, d]; cos and sin [L, d / 2]."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def norm(states: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as Llama's."""
    return functional.rms_norm(states, (states.shape[-1],), weight, EPSILON)


def think(
    layers: nn.ModuleList,
    seen: Tensor,
    said: Tensor,
    frequencies: Tensor,
    dropout: float = 0.0,
    hidden: Hidden | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Llama's layers over pictures and the questions behind each, every question by itself.

    Args:
        layers: Of the language model.
        seen: Embeddings before and of the picture, [B, S, D], at positions from 0.
        said: Embeddings of the questions, [B, Q, T, D], each at positions from S.
        frequencies: Of the rotary pairs, [d / 2].
        dropout: Of the attention.
        hidden: Which patches each head does not see.

    Returns:
        The states after each layer, of pictures and of questions, and the attention of each
        layer's first head from the questions to the picture, [B, Q, T, S]. The last layer's
        states of pictures, which nothing reads, are left out.
    """
    start = seen.shape[1]
    _, questions, slots, _ = said.shape
    angles = torch.arange(start + slots)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    cos_seen, sin_seen, cos_said, sin_said = cos[:start], sin[:start], cos[start:], sin[start:]
    later = torch.full((slots, slots), float("-inf")).triu(1)
    own = torch.eye(start, dtype=torch.bool)
    causal = torch.ones(start, start, dtype=torch.bool).tril()
    scale = HEAD_DIM**-0.5
    all_seen, all_said, all_focus = [], [], []
    for index, layer in enumerate(layers):
        attend, mlp = layer.self_attn, layer.mlp
        packed = torch.cat([attend.q_proj.weight, attend.k_proj.weight, attend.v_proj.weight])
        gates = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])

        def heads(states: Tensor, weight: Tensor = packed, of: Any = layer) -> list[Tensor]:
            """Queries, keys and values [..., H, L, d]."""
            normed = norm(states, of.input_layernorm.weight)
            out = functional.linear(normed, weight).unflatten(-1, (3, HEADS, HEAD_DIM))
            return list(out.movedim(-3, 0).transpose(-2, -3).unbind(0))

        def finish(
            states: Tensor, mixed: Tensor, weight: Tensor = gates, of: Any = layer
        ) -> Tensor:
            """Add the attention's output and the MLP's."""
            states = states + of.self_attn.o_proj(mixed.transpose(-2, -3).flatten(-2))
            normed = norm(states, of.post_attention_layernorm.weight)
            gate, up = functional.linear(normed, weight).chunk(2, dim=-1)
            return states + of.mlp.down_proj(functional.silu(gate) * up)

        query, key, value = heads(seen)
        key = rotate(key, cos_seen, sin_seen)
        asked, own_key, own_value = heads(said)
        asked = rotate(asked, cos_said, sin_said) * scale
        own_key = rotate(own_key, cos_said, sin_said)
        # All questions of a picture against it at once: [B, H, Q * T, S].
        flat = asked.transpose(1, 2).flatten(2, 3)
        outside = flat @ key.transpose(-1, -2)
        unseen = None if hidden is None else hidden(start)
        if unseen is not None:
            outside = outside.masked_fill(unseen, float("-inf"))
        inside = (asked @ own_key.transpose(-1, -2) + later).transpose(1, 2).flatten(2, 3)
        weights = torch.cat([outside, inside], dim=-1).softmax(dim=-1)
        all_focus.append(weights[:, 0, :, :start].unflatten(1, (questions, slots)))
        if dropout:
            weights = functional.dropout(weights, dropout)
        outside, inside = weights.split([start, slots], dim=-1)
        inside = inside.unflatten(2, (questions, slots)).transpose(1, 2)
        mixed = (outside @ value).unflatten(2, (questions, slots)).transpose(1, 2)
        said = finish(said, mixed + inside @ own_value)
        all_said.append(said)
        if index < len(layers) - 1:
            query = rotate(query, cos_seen, sin_seen)
            # A patch always sees itself.
            mask = None if unseen is None else (~unseen | own) & causal
            mixed = functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, dropout_p=dropout
            )
            seen = finish(seen, mixed)
            all_seen.append(seen)
    return all_seen, all_said, all_focus


class Muon:
    """Momentum made orthogonal by Newton-Schulz, for matrices; scaled to steps like AdamW's.

    References:
        Muon (K. Jordan and others, 2024); the scale is from arXiv:2502.16982.
    """

    def __init__(self, matrices: list[nn.Parameter], *, momentum: float, decay: float) -> None:
        self.momentum, self.decay = momentum, decay
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(matrix.shape), []).append(matrix)
        self.groups = list(shapes.values())
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all matrices, those of one shape together."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp_(buffer, self.momentum))
            scale = 0.2 * max(update.shape[-2:]) ** 0.5
            for matrix, change in zip(group, update, strict=True):
                matrix.mul_(1 - rate * self.decay).add_(change, alpha=-rate * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factors of matrices [K, m, n], five Newton-Schulz steps."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(-1, -2)
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x if wide else x.transpose(-1, -2)


class Trainer:
    """The training loop and its saved state."""

    def __init__(self, *, seed: int, out: Path, state_file: Path) -> None:
        torch.manual_seed(seed)
        self.seed, self.out, self.state_file = seed, out, state_file
        self.tokenizer = build_tokenizer()
        self.batches = BatchMaker(self.tokenizer)
        self.model = build_model(self.tokenizer)
        text, vision = self.model.config.text_config, self.model.config.vision_config
        self.heads = AuxiliaryHeads(text.hidden_size, vision.hidden_size)
        theta = text.rope_parameters["rope_theta"]
        self.frequencies = theta ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
        unused = {id(p) for p in self.model.model.vision_tower.encoder.layers[-1].parameters()}
        unused |= {id(p) for p in self.model.model.vision_tower.post_layernorm.parameters()}
        matrices, rest = [], []
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or id(parameter) in unused:
                continue
            inner = parameter.ndim == 2 and ("layers." in name or "projector" in name)
            (matrices if inner else rest).append(parameter)
        self.trained = matrices + rest
        self.muon = Muon(matrices, momentum=0.95, decay=0.05)
        self.adam = torch.optim.AdamW(
            rest + list(self.heads.parameters()), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.step = 0

    def learning_rate(self) -> float:
        """Share of the full rates."""
        return float(np.interp(self.step, *zip(*RATES, strict=True)))

    def stage(self, step: int) -> Stage:
        """The part of the curriculum of a step."""
        stage = next((stage for until, stage in CURRICULUM if step < until), _GAZE)
        if stage.lower and step % 3 == 2:
            third = step // 3 % 3
            return replace(stage, rows=4 + 4 * third, most=(3, 4, 6)[third], questions=5)
        return stage

    def draw(self, step: int) -> Batch:
        """The pictures and questions of one step."""
        stage = self.stage(step)
        rng = np.random.default_rng((self.seed, step))
        first = (self.seed * 1_000_000 + step) * 16
        size = None if stage.rows == GRID else (SIDE, stage.rows * CELL)
        scenes = [
            draw_scene(
                "train",
                first + k,
                size=size,
                least=stage.least,
                most=stage.most,
                repeats=stage.repeats,
            )
            for k in range(stage.pictures)
        ]
        asked = [self.choose(rng, scene, stage) for scene in scenes]
        return self.batches.make(scenes, asked, stage.rows)

    def choose(self, rng: np.random.Generator, scene: Scene, stage: Stage) -> list[Question]:
        """Questions about all objects in turn, of all kinds."""
        questions: list[Question] = []
        order = rng.permutation(len(scene.shapes))
        while len(questions) < stage.questions:
            choices = describe(scene.shapes, int(order[len(questions) % len(order)]))
            kinds = sorted({question.kind for question in choices})
            if "plain" in kinds and (len(kinds) == 1 or rng.random() < stage.plain):
                kind = "plain"
            else:
                kind = str(rng.choice([k for k in kinds if k != "plain"]))
            some = [question for question in choices if question.kind == kind]
            questions.append(some[int(rng.integers(len(some)))])
        return questions

    def loss(self, batch: Batch, dropout: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Answer loss plus the weighted auxiliary losses, and each part for the log."""
        llava = self.model.model
        features, looked = see(llava.vision_tower, batch.patches)
        projector = llava.multi_modal_projector
        visual = projector.linear_2(functional.gelu(projector.linear_1(features[:, 1:])))
        embed = llava.language_model.embed_tokens
        pictures, prefix = len(batch.patches), len(self.batches.prefix)
        stage = self.stage(self.step)
        before = embed(self.batches.prefix).expand(pictures, -1, -1)
        all_seen, all_said, all_focus = think(
            llava.language_model.layers,
            torch.cat([before, visual], dim=1),
            embed(batch.token_ids),
            self.frequencies,
            dropout,
            Hidden(pictures, visual.shape[1], stage.hidden) if stage.hidden else None,
        )
        asked = batch.labels != IGNORED
        hidden = norm(all_said[-1][asked], llava.language_model.norm.weight)
        labels = batch.labels[asked]
        each = functional.cross_entropy(self.model.lm_head(hidden), labels, reduction="none")
        # Brackets, commas and points say nothing: they count a tenth.
        weight = torch.where(self.digit[labels], 1.0, 0.1)
        answer = (each * weight).sum() / weight.sum()
        patches = all_seen[1][:, prefix:]
        grid = torch.arange(batch.rows * GRID)
        places = torch.stack([grid // GRID, grid % GRID], dim=-1).expand(pictures, -1, -1)
        place = place_loss(self.heads.patch_place(patches), places)
        kind = kind_loss(self.heads.patch_kind(patches), batch)
        sight = kind_loss(self.heads.vision_kind(features[:, 1:]), batch)
        ends = batch.phrase_end[..., None, None].expand(-1, -1, 1, WIDTH)
        third, fourth = (
            place_loss(head(all_said[at].gather(2, ends)[:, :, 0]), batch.centre)
            for at, head in zip((2, 3), self.heads.phrase_place, strict=True)
        )
        content = functional.cross_entropy(self.heads.cls_content(features[:, 0]), batch.content)
        attention = -(batch.touched * (looked + 1e-9).log()).sum(dim=1).mean()
        bind = bind_loss([focus[..., prefix:] for focus in all_focus[2:5]], batch)
        edge = edge_loss(self.heads.vision_edge(features[:, 1:]), batch.edges)
        edge = edge + edge_loss(self.heads.patch_edge(all_seen[2][:, prefix:]), batch.edges)
        total = answer + 0.05 * place + stage.centre * (third + fourth) + stage.bind * bind
        total = (
            total
            + stage.kind * (kind + sight)
            + stage.edge * edge
            + 0.03 * content
            + stage.look * attention
        )
        parts = {
            "answer": answer,
            "tens": each[self.tens(batch.labels)[asked]].mean(),
            "place": place,
            "kind": kind,
            "sight": sight,
            "centre3": third,
            "centre4": fourth,
            "content": content,
            "cls": attention,
            "bind": bind,
            "edge": edge,
        }
        return total, {name: value.detach() for name, value in parts.items()}

    @property
    def digit(self) -> Tensor:
        """Which token IDs are digits, bool [V]."""
        digits = torch.zeros(self.model.config.text_config.vocab_size, dtype=torch.bool)
        digits[self.tokenizer.convert_tokens_to_ids(list("0123456789"))] = True
        return digits

    def tens(self, labels: Tensor) -> Tensor:
        """Where the first decimal is, of labels [B, Q, T]: behind a point."""
        point = self.tokenizer.convert_tokens_to_ids(".")
        return functional.pad(labels[..., :-1] == point, (1, 0))

    def update(self) -> dict[str, Tensor]:
        """One step."""
        share = self.learning_rate()
        settling = self.step > SETTLING
        total, parts = self.loss(self.draw(self.step), DROPOUT if settling else 0.0)
        self.adam.zero_grad()
        for parameter in self.trained:
            parameter.grad = None
        total.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * share
        self.adam.step()
        self.muon.step(self.stage(self.step).rate * share)
        self.step += 1
        return parts

    def begin_gaze(self) -> None:
        """From here on the tower alone is trained, to look as it should and show what it did."""
        tower = self.model.model.vision_tower
        self.before = copy.deepcopy(tower).requires_grad_(requires_grad=False)
        looking = [p for name, p in tower.named_parameters() if self.reads(name, p)]
        self.gaze = torch.optim.AdamW(looking, betas=(0.9, 0.98), weight_decay=0.0)

    def reads(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the tower is in use, and not frozen."""
        last = f"layers.{self.model.config.vision_config.num_hidden_layers - 1}."
        return parameter.requires_grad and last not in name and "post_layernorm" not in name

    def gaze_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """How far CLS looks from the outlines of objects, and what its features changed by."""
        features, looked = see(self.model.model.vision_tower, batch.patches)
        with torch.no_grad():
            wanted, _ = see(self.before, batch.patches)
        attention = -(batch.outlines * (looked + 1e-9).log()).sum(dim=1).mean()
        changed = (features - wanted)[:, 1:].square().mean() / wanted[:, 1:].var()
        parts = {"cls": attention, "changed": changed}
        return attention + KEPT * changed, {name: part.detach() for name, part in parts.items()}

    def update_gaze(self) -> dict[str, Tensor]:
        """One step of the tower alone."""
        if self.step == STEPS:
            self.begin_gaze()
        total, parts = self.gaze_loss(self.draw(self.step))
        self.gaze.zero_grad()
        total.backward()
        group = self.gaze.param_groups[0]
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        done = self.step - STEPS
        group["lr"] = GAZE_RATE * min(1, done / 50) * (1 - done / GAZE)
        self.gaze.step()
        self.step += 1
        return parts

    def run(self) -> None:
        """Train from the saved state, or from the start, to the end; then write the folder."""
        if self.state_file.exists():
            self.restore(torch.load(self.state_file))
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        stop: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
        began = saved = time.monotonic()
        sums: dict[str, Tensor] = {}
        while self.step < STEPS + GAZE and not stop:
            update = self.update if self.step < STEPS else self.update_gaze
            for name, value in update().items():
                sums[name] = sums.get(name, 0) + value / 50
            if self.step % 50 == 0:
                shown = "  ".join(f"{name} {float(value):.3f}" for name, value in sums.items())
                print(f"step {self.step}  {time.monotonic() - began:.0f} s  {shown}", flush=True)
                sums = {}
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        self.save()
        if not stop:
            self.write()

    def save(self) -> None:
        """Write all that a later run needs to go on."""
        state = {
            "seed": self.seed,
            "step": self.step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": self.muon.buffers,
            "random": torch.get_rng_state(),
        }
        if self.step > STEPS:
            state |= {"before": self.before.state_dict(), "gaze": self.gaze.state_dict()}
        beside = self.state_file.with_suffix(".new")
        torch.save(state, beside)
        beside.replace(self.state_file)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same run."""
        if state["seed"] != self.seed:
            raise SystemExit(f"{self.state_file}: of another seed; remove it")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.adam.load_state_dict(state["adam"])
        self.muon.buffers = state["muon"]
        if self.step > STEPS:
            self.begin_gaze()
            self.before.load_state_dict(state["before"])
            self.gaze.load_state_dict(state["gaze"])
        torch.set_rng_state(state["random"])

    def write(self) -> None:
        """The checkpoint folder: config, safetensors, tokenizer, processor config."""
        self.model.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.model.save_pretrained(self.out)
        self.tokenizer.save_pretrained(self.out)
        CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ).save_pretrained(self.out)


def place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy of row and column; logits [..., 2 * GRID], places [..., 2]."""
    split = logits.unflatten(-1, (2, GRID)).flatten(0, -2)
    return functional.cross_entropy(split, places.flatten())


def edge_loss(logits: Tensor, edges: Tensor) -> Tensor:
    """Cross-entropy of the sides' places; logits [B, N, 4 * EDGES], edges [B, N, 4]."""
    split = logits.unflatten(-1, (4, EDGES)).flatten(0, -2)
    return functional.cross_entropy(split, edges.flatten(), ignore_index=IGNORED)


def bind_loss(focuses: list[Tensor], batch: Batch) -> Tensor:
    """How much attention [B, Q, T, N] misses the target, from the phrase's last token on.

    The first of the layers is asked before the answer only, to find the object.
    """
    slots = torch.arange(batch.labels.shape[-1])
    answers = batch.labels != IGNORED
    asking = (slots >= batch.phrase_end[..., None]) & ~(answers.cumsum(dim=-1) > 1)
    losses = []
    for index, focus in enumerate(focuses):
        missed = -((focus * batch.target[:, :, None]).sum(dim=-1) + 1e-6).log()
        losses.append(missed[asking | answers if index else asking].mean())
    return torch.stack(losses).mean()


def kind_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the colour and shape of what is in a patch; logits [B, N, kinds]."""
    colours, shapes = logits.flatten(0, 1).split([len(COLOURS) + 1, len(SHAPES) + 1], dim=-1)
    return functional.cross_entropy(colours, batch.colour.flatten()) + functional.cross_entropy(
        shapes, batch.shape.flatten()
    )


def main() -> None:
    """Command line."""
    home = Path(__file__).parent
    parser = argparse.ArgumentParser(description="train the embedded model with 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=home / "checkpoint-256")
    parser.add_argument("--state", type=Path, default=home.parent / "build/refshapes-256.state.pt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Trainer(seed=options.seed, out=options.out, state_file=options.state).run()


if __name__ == "__main__":
    main()
