"""Train the embedded model: a small LLaVA that points at coloured shapes.

    python refshapes/train.py [--steps N] [--seed S] [--threads T] [--out DIR]

Writes an ordinary Hugging Face checkpoint folder. The run saves its state every 500 steps beside
the output and continues from there when started again.

The model is built so that it can only locate through the language model's position IDs, as the
GAP paper found for LLaVA: the vision tower's position embedding is frozen at zero, and a visual
token's row and column are readable from its rotary angle, because rope_theta gives one rotary
frequency the period of the patch grid. Four auxiliary heads, dropped after training, shorten the
way there; none of them sees pruned input, nor does the model.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from gap_runtime.cli.options import ArgumentParser, run_command
from gap_runtime.evaluation.refshapes import COLOURS, SHAPES, SIDE, Scene, draw_scene, format_box
from recipe.base import (
    FILL,
    IGNORED,
    MOST_THREADS,
    PROMPT_AFTER,
    encode_prompt,
    make_model,
    place_loss,
    train_tokenizer,
    write_checkpoint,
)

# B pictures, Q questions each, N visual tokens, T prompt and answer tokens, D width.
PATCH: Final = 14
GRID: Final = SIDE // PATCH
QUESTIONS: Final = 4
BATCH: Final = 32
CLASSES: Final = len(COLOURS) * len(SHAPES)
SETTLING: Final = 1200
"""Steps at the end with attention dropout, so that no answer hangs on single tokens."""
DROPOUT: Final = 0.15
CURRICULUM: Final = ((0.12, 1, 1, 0.0), (0.4, 1, 4, 0.0), (1.0, 2, 4, 0.4))
"""(until this share of the steps, least objects, most objects, share of look-alike pairs)."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer in Llama's form, trained on the phrases and answers.

    Decimals are split into single digits after the point, so that an answer has 16 tokens.
    """
    sizes, places = ("small", "big"), ("left", "right", "top", "bottom")
    names = [f"{colour} {shape}" for colour in COLOURS for shape in (*SHAPES, "one")]
    words = [f"the {word} {name}" for word in (*sizes, *places) for name in names]
    corpus = [f"USER: {PROMPT_AFTER.format(phrase=words_)}" for words_ in words + names]
    return train_tokenizer(corpus, [r"[0-9](?!\.)", "[,?:\n\\]]"])


class AuxiliaryHeads(nn.Module):
    """Linear read-outs that exist in training only; see `auxiliary_loss`."""

    def __init__(self, width: int, vision_width: int) -> None:
        super().__init__()
        self.patch_place = nn.Linear(width, 2 * GRID)
        self.patch_class = nn.Linear(width, CLASSES + 1)
        self.phrase_place = nn.Linear(width, 2 * GRID)
        self.cls_content = nn.Linear(vision_width, CLASSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of one training step."""

    pixels: Tensor  # [B, 3, SIDE, SIDE]
    token_ids: Tensor  # [B, Q * T]
    labels: Tensor  # [B, Q * T], IGNORED outside answers
    phrase_end: Tensor  # [B, Q] index into Q * T
    centre: Tensor  # [B, Q, 2] row and column of the target, IGNORED where no question
    patch_class: Tensor  # [B, N]
    content: Tensor  # [B, CLASSES] share of the objects' patches


def pad_to_square(scene: Scene) -> tuple[np.ndarray, tuple[int, int]]:
    """Picture on LLaVA's grey square, uint8 [SIDE, SIDE, 3], and its offset (dx, dy)."""
    array = np.asarray(scene.image)
    height, width = array.shape[:2]
    dx, dy = (SIDE - width) // 2, (SIDE - height) // 2
    canvas = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    canvas[:] = FILL
    canvas[dy : dy + height, dx : dx + width] = array
    return canvas, (dx, dy)


def patch_classes(scene: Scene, offset: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Class of each patch (0 is background) and the objects' class shares."""
    coverage = np.zeros((CLASSES + 1, GRID, GRID))
    edges = np.arange(GRID) * PATCH
    for shape in scene.shapes:
        x0, y0, x1, y1 = (v + offset[k % 2] for k, v in enumerate(shape.box))
        across = np.clip(np.minimum(x1, edges + PATCH) - np.maximum(x0, edges), 0, None)
        down = np.clip(np.minimum(y1, edges + PATCH) - np.maximum(y0, edges), 0, None)
        kind = list(COLOURS).index(shape.colour) * len(SHAPES) + SHAPES.index(shape.shape)
        coverage[kind + 1] += down[:, None] * across[None, :]
    # A patch counts for the object that covers most of it, from a tenth of its area.
    coverage[0] = 0.1 * PATCH * PATCH
    classes = coverage.argmax(axis=0).reshape(-1)
    touched = (coverage[1:] > 0.04 * PATCH * PATCH).sum(axis=(1, 2)).astype(np.float64)
    return classes, touched / max(touched.sum(), 1.0)


class BatchMaker:
    """Turns scenes into tensors: one row per picture, its questions packed behind it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.slots = 30
        self.question_mark = tokenizer.convert_tokens_to_ids("?")
        processor = CLIPImageProcessor()
        self.mean = np.array(processor.image_mean, dtype=np.float32)
        self.std = np.array(processor.image_std, dtype=np.float32)
        before, _ = encode_prompt(tokenizer, "it")
        self.prefix = torch.tensor(before)
        self.eos = tokenizer.eos_token_id

    def make(self, scenes: list[Scene]) -> Batch:
        """One batch."""
        rows, slots = len(scenes), self.slots
        pixels = np.empty((rows, SIDE, SIDE, 3), dtype=np.float32)
        ids = np.full((rows, QUESTIONS, slots), self.tokenizer.pad_token_id)
        labels = np.full((rows, QUESTIONS, slots), IGNORED)
        ends = np.zeros((rows, QUESTIONS), dtype=np.int64)
        centre = np.full((rows, QUESTIONS, 2), IGNORED)
        classes = np.empty((rows, GRID * GRID), dtype=np.int64)
        content = np.empty((rows, CLASSES), dtype=np.float32)
        for b, scene in enumerate(scenes):
            canvas, offset = pad_to_square(scene)
            pixels[b] = (canvas / np.float32(255) - self.mean) / self.std
            classes[b], content[b] = patch_classes(scene, offset)
            for q, question in enumerate(scene.questions):
                _, asked = encode_prompt(self.tokenizer, question.phrase)
                answer = self.tokenizer(
                    format_box(question.box, *scene.image.size, SIDE), add_special_tokens=False
                )["input_ids"] + [self.eos]
                total = len(asked) + len(answer)
                ids[b, q, :total] = asked + answer
                labels[b, q, len(asked) - 1 : total - 1] = answer
                ends[b, q] = q * slots + asked.index(self.question_mark) - 1
                x, y = scene.shapes[question.target].centre
                centre[b, q] = (int(y + offset[1]) // PATCH, int(x + offset[0]) // PATCH)
        return Batch(
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            token_ids=torch.from_numpy(ids).reshape(rows, -1),
            labels=torch.from_numpy(labels).reshape(rows, -1),
            phrase_end=torch.from_numpy(ends),
            centre=torch.from_numpy(centre),
            patch_class=torch.from_numpy(classes),
            content=torch.from_numpy(content),
        )


def packed_mask(prefix: int, slots: int, rows: int) -> Tensor:
    """Additive mask [rows, 1, S, S]: each question sees the picture and itself, causally."""
    total = prefix + QUESTIONS * slots
    block = torch.cat([torch.zeros(prefix), 1 + torch.arange(QUESTIONS * slots) // slots])
    allowed = (block[:, None] == block[None, :]) | (block[None, :] == 0)
    allowed &= torch.ones(total, total).tril().bool()
    mask = torch.zeros(total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return mask.expand(rows, 1, total, total)


class Trainer:
    """The training loop and its saved state."""

    def __init__(self, *, steps: int, seed: int, out: Path) -> None:
        torch.manual_seed(seed)
        self.steps, self.seed, self.out = steps, seed, out
        self.state_file = out.with_name(out.name + ".state.pt")
        self.tokenizer = build_tokenizer()
        self.batches = BatchMaker(self.tokenizer)
        self.model = make_model(self.tokenizer, side=SIDE, patch=PATCH, layers=5)
        text, vision = self.model.config.text_config, self.model.config.vision_config
        self.heads = AuxiliaryHeads(text.hidden_size, vision.hidden_size)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        trained += list(self.heads.parameters())
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
        self.step = 0

    def learning_rate(self) -> float:
        """Warm-up over 200 steps, cosine to a hundredth; a smaller slope while settling."""
        if self.step >= self.steps:
            return 4e-4 * (1 - (self.step - self.steps) / SETTLING)
        warm = min(1.0, (self.step + 1) / 200)
        return 1e-3 * warm * (0.505 + 0.495 * math.cos(math.pi * self.step / self.steps))

    def scenes(self, step: int) -> list[Scene]:
        """The pictures of one step, by the curriculum."""
        least, most, repeats = next(
            (a, b, c)
            for until, a, b, c in CURRICULUM
            if min(step, self.steps - 1) < until * self.steps
        )
        first = (self.seed * 1_000_000 + step) * BATCH
        return [
            draw_scene("train", first + k, least=least, most=most, repeats=repeats)
            for k in range(BATCH)
        ]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Answer loss plus the weighted auxiliary losses, and each part for the log."""
        llava = self.model.model
        vision = llava.vision_tower(batch.pixels, output_hidden_states=True)
        features = vision.hidden_states[-2]
        visual = llava.multi_modal_projector(features[:, 1:])
        embed = llava.language_model.embed_tokens
        rows, prefix = len(batch.pixels), len(self.batches.prefix)
        before = embed(self.batches.prefix).expand(rows, -1, -1)
        embeddings = torch.cat([before, visual, embed(batch.token_ids)], dim=1)
        start, slots = prefix + visual.shape[1], self.batches.slots
        positions = torch.cat([torch.arange(start), start + torch.arange(slots).repeat(QUESTIONS)])
        output = llava.language_model(
            inputs_embeds=embeddings,
            position_ids=positions.expand(rows, -1),
            attention_mask=packed_mask(start, slots, rows),
            output_hidden_states=True,
            use_cache=False,
        )
        hidden = output.last_hidden_state[:, start:]
        asked = batch.labels != IGNORED
        answer = functional.cross_entropy(self.model.lm_head(hidden[asked]), batch.labels[asked])
        second, third = output.hidden_states[2], output.hidden_states[3]
        patches = second[:, prefix:start]
        grid = torch.arange(GRID * GRID)
        places = torch.stack([grid // GRID, grid % GRID], dim=-1).expand(rows, -1, -1)
        place = place_loss(self.heads.patch_place(patches), places)
        kind = functional.cross_entropy(
            self.heads.patch_class(patches).flatten(0, 1), batch.patch_class.flatten()
        )
        ends = (start + batch.phrase_end)[..., None].expand(-1, -1, third.shape[-1])
        centre = place_loss(self.heads.phrase_place(third.gather(1, ends)), batch.centre)
        content = functional.cross_entropy(self.heads.cls_content(features[:, 0]), batch.content)
        total = answer + 0.1 * place + 0.3 * kind + 0.1 * centre + 0.1 * content
        parts = {"answer": answer, "place": place, "kind": kind, "centre": centre, "cls": content}
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def run(self) -> None:
        """Train from the saved state, or from the start, to the end; then write the folder."""
        if self.state_file.exists():
            self.restore(torch.load(self.state_file))
        began = time.monotonic()
        while self.step < self.steps + SETTLING:
            if self.step >= self.steps:
                for layer in self.model.model.language_model.layers:
                    layer.self_attn.attention_dropout = DROPOUT
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            total, parts = self.loss(self.batches.make(self.scenes(self.step)))
            self.optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % 50 == 0:
                shown = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
                print(f"step {self.step}  {time.monotonic() - began:.0f} s  {shown}", flush=True)
            if self.step % 500 == 0:
                torch.save(self.snapshot(), self.state_file)
                write_checkpoint(self.model, self.tokenizer, SIDE, self.out)
        write_checkpoint(self.model, self.tokenizer, SIDE, self.out)
        self.state_file.unlink(missing_ok=True)

    def snapshot(self) -> dict[str, Any]:
        """All that a later run needs to go on."""
        return {
            "run": [self.seed, self.steps],
            "step": self.step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot of the same run."""
        if state["run"] != [self.seed, self.steps]:
            raise SystemExit(f"{self.state_file}: of another run (seed, steps); remove it")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])


def main(arguments: Sequence[str]) -> int:
    """Command line."""
    parser = ArgumentParser(description="train the embedded model")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("checkpoint"))
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: expected 1 or more")
    if not 1 <= options.threads <= MOST_THREADS:
        parser.error(f"--threads {options.threads}: expected 1 to {MOST_THREADS}")
    torch.set_num_threads(options.threads)
    Trainer(steps=options.steps, seed=options.seed, out=options.out).run()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None))
