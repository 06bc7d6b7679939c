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

import copy
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from gap_runtime.cli.options import ArgumentParser, run_command
from gap_runtime.evaluation.refshapes import COLOURS, Question
from gap_runtime.evaluation.refshapes256 import CELL, SHAPES, SIDE, Scene, describe, draw_scene
from recipe.base import (
    HEAD_DIM,
    IGNORED,
    MOST_THREADS,
    PROMPT_AFTER,
    WIDTH,
    make_model,
    place_loss,
    train_tokenizer,
    write_checkpoint,
)
from recipe.batches import Batch, BatchMaker
from recipe.curriculum import CURRICULUM, GAZE, GAZE_STAGE, RATES, SETTLING, STEPS, Stage
from recipe.forward import Hidden, norm, see, think
from recipe.muon import Muon
from recipe.sizes import CLASSES, EDGES, GRID, LAYERS

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
    return train_tokenizer(corpus, ["[0-9.,?:\n\\]]"])


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


class Trainer:
    """The training loop and its saved state."""

    def __init__(self, *, seed: int, out: Path, state_file: Path) -> None:
        torch.manual_seed(seed)
        self.seed, self.out, self.state_file = seed, out, state_file
        self.tokenizer = build_tokenizer()
        self.batches = BatchMaker(self.tokenizer)
        self.model = make_model(self.tokenizer, side=SIDE, patch=CELL, layers=LAYERS)
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
        stage = next((stage for until, stage in CURRICULUM if step < until), GAZE_STAGE)
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
            write_checkpoint(self.model, self.tokenizer, SIDE, self.out)

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


def main(arguments: Sequence[str]) -> int:
    """Command line."""
    home = Path(__file__).parent
    parser = ArgumentParser(description="train the embedded model with 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=home / "checkpoint-256")
    parser.add_argument("--state", type=Path, default=home.parent / "build/refshapes-256.state.pt")
    options = parser.parse_args(arguments)
    if not 1 <= options.threads <= MOST_THREADS:
        parser.error(f"--threads {options.threads}: expected 1 to {MOST_THREADS}")
    torch.set_num_threads(options.threads)
    Trainer(seed=options.seed, out=options.out, state_file=options.state).run()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None))
