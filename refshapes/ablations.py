"""What a pruned model needs of its position IDs: ablations on the embedded model, by PyTorch.

    python refshapes/ablations.py [--phrases 200] [--keep 64] [--out build/ablations]
                                  [--write docs/why-positions.md]

Pruners choose as the reference does; which token lies in which slot and which ID it has is then
set by hand, variant by variant, and Hugging Face's own language model answers. Every answer is a
line of `answers.jsonl` as soon as it is known: run again after a stop, it goes on, and variants
that are new are asked alone. `summary.json` has the figures; the tables between the two marks of
a page are replaced.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from arrangements import (
    APART,
    EXACT,
    GRID,
    KEPT,
    MAIN,
    TOKENS,
    WHOLE,
    Laid,
    Variant,
    list_variants,
)
from gap_export.config.pruners import IVC
from gap_export.interfaces.pruner import load_pruner
from gap_export.pipeline.asking import open_reference
from gap_export.pipeline.plan import ExportPlan, plan_export
from gap_export.pipeline.request import make_request
from gap_export.reference.answers import Reference
from gap_export.reference.choice import Chosen
from gap_runtime.bundle.hashes import hash_file
from gap_runtime.cli.options import ArgumentParser, run_command
from gap_runtime.display import Display, Pace
from gap_runtime.errors import InputError
from gap_runtime.evaluation.data import open_data
from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.protocol import DEFAULT_PROTOCOL, load_protocol
from gap_runtime.evaluation.refshapes256 import CELL
from gap_runtime.evaluation.statistics import mcnemar_p, mean_interval, wilson_interval
from gap_runtime.pictures.boxes import Box, parse_boxes
from gap_runtime.pictures.load import frame_picture
from gap_runtime.records.files import exists, read_text
from tables import require_marks, write_between

# V variants, S rows, D decoder width.

MODEL: Final = "refshapes-256"
BEGIN: Final = "<!-- tables: made by refshapes/ablations.py -->"
END: Final = "<!-- end of tables -->"
TOP: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One answer.

    `said` is where the IDs put the object: the mean column and row, in cells, of its kept tokens'
    IDs; None where none of them was kept.
    """

    key: str
    variant: str
    seed: int
    answer: str
    said: tuple[float, float] | None


class Asker:
    """The language model, asked with slots and IDs given by hand, many variants at once."""

    def __init__(self, plan: ExportPlan) -> None:
        """Load the checkpoint by the library alone."""
        model = LlavaForConditionalGeneration.from_pretrained(
            plan.checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._decoder, self._head = model.model.language_model, model.lm_head
        self._stop, self._most = plan.prompt.stop_ids, plan.layout.answer

    @torch.no_grad()
    def answer(self, rows_VSD: Tensor, ids_VS: Tensor) -> list[list[int]]:
        """Greedy answers to prompts of one length, token by token."""
        cache, rows = DynamicCache(), rows_VSD.shape[1]
        mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)[None, None]
        answers: list[list[int]] = [[] for _ in rows_VSD]
        going = list(range(len(answers)))
        position_V1 = ids_VS[:, -1:] + 1
        for _ in range(self._most):
            hidden = self._decoder(
                inputs_embeds=rows_VSD,
                position_ids=ids_VS,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            chosen_V = self._head(hidden).argmax(dim=-1)
            going = [k for k in going if int(chosen_V[k]) not in self._stop]
            if not going:
                break
            for k in going:
                answers[k].append(int(chosen_V[k]))
            rows_VSD = self._decoder.get_input_embeddings()(chosen_V[:, None])
            ids_VS, position_V1 = position_V1, position_V1 + 1
            rows += 1
            mask = torch.zeros(1, 1, 1, rows)
        return answers


def find_object(each: Expression, size: tuple[int, int]) -> set[int]:
    """The tokens whose cells have their middle in the true box."""
    left, top = ((GRID * CELL - side) // 2 for side in size)
    box = each.box
    return {
        row * GRID + column
        for row in range(GRID)
        for column in range(GRID)
        if box.x0 + left <= (column + 0.5) * CELL < box.x1 + left
        and box.y0 + top <= (row + 0.5) * CELL < box.y1 + top
    }


def find_said(laid: Laid, object_tokens: set[int]) -> tuple[float, float] | None:
    """Where the IDs put the object: mean column and row in cells, None where nothing is kept."""
    cells = [
        divmod(place, GRID)
        for token, place in zip(laid.slots, laid.ids, strict=True)
        if token in object_tokens
    ]
    if not cells:
        return None
    return (
        sum(column + 0.5 for _, column in cells) / len(cells),
        sum(row + 0.5 for row, _ in cells) / len(cells),
    )


def ask_phrase(
    asker: Asker,
    reference: Reference,
    each: Expression,
    size: tuple[int, int],
    question: Any,
    chosen: dict[str | None, Chosen],
    wanted: Sequence[tuple[Variant, int]],
) -> Iterator[Asked]:
    """All answers to a phrase that are wanted, prompts of one length together."""
    object_tokens = find_object(each, size)
    before, after = (reference.model.embed(part) for part in (question.prefix, question.suffix))
    prompts: dict[int, list[tuple[Variant, int, Laid, Tensor, Tensor]]] = {}
    for variant, seed in wanted:
        # Other draws for other phrases and variants, the same in every run.
        draw = np.random.default_rng(
            [seed, zlib.crc32(each.key.encode()), zlib.crc32(variant.name.encode())]
        )
        choice = chosen[variant.pruner]
        laid = variant.lay(choice.order, draw)
        tokens: Any = choice.tokens if variant.merges else question.vision.tokens
        visual = torch.stack([tokens[token] for token in laid.slots])
        start = len(question.prefix)
        ids = [
            *range(start),
            *(start + place for place in laid.ids),
            *(start + laid.text + k for k in range(len(question.suffix))),
        ]
        prompts.setdefault(len(ids), []).append(
            (variant, seed, laid, torch.cat([before, visual, after]), torch.tensor(ids))
        )
    for group in prompts.values():
        answers = asker.answer(
            torch.stack([rows for *_, rows, _ in group]), torch.stack([ids for *_, ids in group])
        )
        for (variant, seed, laid, _, _), token_ids in zip(group, answers, strict=True):
            yield Asked(
                key=each.key,
                variant=variant.name,
                seed=seed,
                answer=reference.model.decode(token_ids),
                said=find_said(laid, object_tokens),
            )


def describe_run(plan: ExportPlan, keep: int) -> str:
    """What answers depend on besides phrase and variant; the first line of their file."""
    files = sorted(plan.checkpoint.folder.glob("*.safetensors"))
    weights = {path.name: hash_file(path) for path in files}
    return json.dumps({"model": MODEL, "keep": keep, "weights": weights})


def require_same_run(path: Path, run: str) -> None:
    """Begin a file of answers, or end the command where it holds those of another run."""
    if not exists(path):
        path.write_text(f"{run}\n", encoding="utf-8")
    first = read_text(path, InputError).partition("\n")[0]
    if first != run:
        raise InputError(f"{path}: answers of another run ({first:.80}); give another --out")


def read_asked(path: Path) -> list[Asked]:
    """The answers behind the line of `describe_run`; a torn last line is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n")[1:-1]:
        data = json.loads(line)
        said = data["said"]
        found.append(Asked(**(data | {"said": None if said is None else tuple(said)})))
    return found


def ask_all(plan: ExportPlan, expressions: Sequence[Expression], path: Path) -> list[Asked]:
    """All answers, those that are there already and the others."""
    found = read_asked(path)
    done = {(asked.key, asked.variant, asked.seed) for asked in found}
    pairs = [
        (variant, seed)
        for variant in list_variants(plan.entries[0].kept)
        for seed in variant.seeds
    ]
    left = {
        each.key: [(v, s) for v, s in pairs if (each.key, v.name, s) not in done]
        for each in expressions
    }
    count = sum(1 for wanted in left.values() if wanted)
    reference, asker = open_reference(plan), Asker(plan)
    text = path.read_text(encoding="utf-8")
    # What a stop left of a last line goes.
    path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file, Display().progress("asking") as show:
        pace = Pace(show, count, "phrases")
        for _, group in groupby(expressions, key=lambda each: each.picture.key):
            phrases = [each for each in group if left[each.key]]
            if not phrases:
                continue
            picture = phrases[0].picture.load()
            bucket, question, chosen = reference.find_bucket(picture), None, {}
            for each in phrases:
                question = reference.ask(picture, each.phrase, bucket, before=question)
                for pruner in {variant.pruner for variant, _ in left[each.key]} - chosen.keys():
                    chosen[pruner] = choose(reference, question, plan, pruner)
                for asked in ask_phrase(
                    asker, reference, each, picture.size, question, chosen, left[each.key]
                ):
                    found.append(asked)
                    file.write(json.dumps(dump(asked)) + "\n")
                file.flush()
                pace(1)
    return found


def choose(reference: Reference, question: Any, plan: ExportPlan, pruner: str | None) -> Chosen:
    """What a pruner keeps of a picture; None keeps all. None of them reads the phrase."""
    if pruner is None:
        return reference.choose(question, None)
    using = replace(
        reference,
        pruner=load_pruner(pruner),
        prune=replace(reference.prune, strategy=pruner),
    )
    return using.choose(question, plan.entries[0])


def dump(asked: Asked) -> dict[str, Any]:
    """An answer as plain data."""
    return {name: getattr(asked, name) for name in ("key", "variant", "seed", "answer", "said")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A variant's figures.

    `accuracy` is Acc@0.5, the mean over seeds, `low` and `high` its 95 % interval: Wilson's, or
    with several seeds that of the mean over phrases. `p` is McNemar's, against the model's own
    pruner with GAP, or no pruning where nothing is removed. `boxes` is the share of answers with
    one box. `from_truth` and `from_said` are medians: how many cells an answer's middle lies from
    the object's, and from where the IDs put the object. `at_shifted` of `shiftable` phrases are
    right if the true box is moved as the IDs were. `top` is the share of answers whose middle lies
    in the first four rows of sixteen, the rows that compact IDs speak of; `top_accuracy` is that
    of the phrases whose object lies there, `top_phrases` of them.
    """

    group: str
    label: str
    phrases: int
    seeds: int
    accuracy: float
    low: float
    high: float
    p: float | None
    boxes: float
    from_truth: float
    from_said: float
    shift: int
    shiftable: int
    at_shifted: float | None
    top: float
    top_accuracy: float
    top_phrases: int


def score(
    plan: ExportPlan, expressions: Sequence[Expression], found: Sequence[Asked]
) -> list[Figure]:
    """Figures of all variants."""
    protocol, box = load_protocol(DEFAULT_PROTOCOL), plan.spec.box
    known = {each.key: each for each in expressions}
    frames = {}
    for each in expressions:
        assert each.size is not None
        bucket = plan.spec.buckets[0]
        frames[each.key] = frame_picture(each.size, plan.spec.preprocess, bucket)

    def is_hit(asked: Asked, true: Box) -> bool:
        return protocol.judge(asked.answer, frames[asked.key], true, box).iou >= 0.5

    by_variant: dict[str, list[Asked]] = {}
    for asked in found:
        if asked.key in known:
            by_variant.setdefault(asked.variant, []).append(asked)
    hits = {
        name: {(a.key, a.seed): is_hit(a, known[a.key].box) for a in rows}
        for name, rows in by_variant.items()
    }
    figures = []
    for variant in list_variants(plan.entries[0].kept):
        rows = by_variant[variant.name]
        by_phrase: dict[str, list[bool]] = {}
        for (key, _), hit in hits[variant.name].items():
            by_phrase.setdefault(key, []).append(hit)
        at_top = [
            np.mean(each)
            for key, each in by_phrase.items()
            if find_middle(known[key].box, frames[key].size)[1] < TOP
        ]
        shares = np.array([np.mean(each) for each in by_phrase.values()])
        low, high = find_interval(shares, len(variant.seeds))
        truth, said, boxes, top = [], [], 0, 0
        for asked in rows:
            parsed = parse_boxes(asked.answer, box, frames[asked.key]).boxes
            if len(parsed) != 1:
                continue
            boxes += 1
            middle = find_middle(parsed[0], frames[asked.key].size)
            top += middle[1] < TOP
            truth.append(
                math.dist(middle, find_middle(known[asked.key].box, frames[asked.key].size))
            )
            if asked.said is not None:
                said.append(math.dist(middle, asked.said))
        moved = [(asked, move(known[asked.key], variant.shift)) for asked in rows]
        at_shifted = [is_hit(asked, true) for asked, true in moved if true is not None]
        figures.append(
            Figure(
                group=variant.group,
                label=variant.label,
                phrases=len(by_phrase),
                seeds=len(variant.seeds),
                accuracy=float(shares.mean()),
                low=low,
                high=high,
                p=find_p(variant, hits),
                boxes=boxes / len(rows),
                from_truth=float(np.median(truth)) if truth else math.nan,
                from_said=float(np.median(said)) if said else math.nan,
                shift=variant.shift,
                shiftable=len(at_shifted) if variant.shift else 0,
                at_shifted=float(np.mean(at_shifted)) if variant.shift else None,
                top=top / max(boxes, 1),
                top_accuracy=float(np.mean(at_top)) if at_top else math.nan,
                top_phrases=len(at_top),
            )
        )
    return figures


def find_middle(box: Box, size: tuple[int, int]) -> tuple[float, float]:
    """Column and row of a box's middle in cells of the padded square."""
    left, top = ((GRID * CELL - side) // 2 for side in size)
    return (box.x0 + box.x1 + 2 * left) / 2 / CELL, (box.y0 + box.y1 + 2 * top) / 2 / CELL


def move(each: Expression, columns: int) -> Box | None:
    """The true box so many columns to the right; None where that leaves the picture."""
    assert each.size is not None
    box = each.box
    moved = Box(box.x0 + columns * CELL, box.y0, box.x1 + columns * CELL, box.y1)
    return moved if moved.x1 <= each.size[0] else None


def find_interval(shares: np.ndarray, seeds: int) -> tuple[float, float]:
    """The 95 % interval of a mean over phrases."""
    if seeds == 1:
        return wilson_interval(int(shares.sum()), len(shares))
    return mean_interval(shares.tolist())[1:]


def find_p(variant: Variant, hits: dict[str, dict[tuple[str, int], bool]]) -> float | None:
    """McNemar's p against the model's pruner with GAP, or none, where one seed answers.

    A pruner with coordinate tokens is held against the same one without them.
    """
    pruner = variant.pruner
    base = {
        None: f"{WHOLE}: IDs as they are",
        MAIN: f"{APART}: right IDs, right order (GAP)",
    }.get(pruner, f"{KEPT}: {MAIN}")
    if pruner is not None and pruner.endswith(IVC):
        base = f"{KEPT}: {pruner.removesuffix(IVC)}"
    own, other = hits[variant.name], hits.get(base)
    if len(variant.seeds) > 1 or variant.name == base or other is None:
        return None
    pairs = [(hit, other[key]) for key, hit in own.items()]
    return mcnemar_p(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))


def tabulate(figures: Sequence[Figure], keep: int) -> str:
    """All tables as Markdown."""
    lines = []
    for group in (KEPT, EXACT, APART, WHOLE):
        rows = [each for each in figures if each.group == group]
        shifts = any(each.shift for each in rows)
        kept = f"{TOKENS if group == WHOLE else keep} of {TOKENS} tokens"
        head = (
            "| variant | Acc@0.5 in % (95 %) | p | from the object | from where the IDs say | "
            "in the top rows, % | right of those there, % |"
        )
        lines += [
            f"**{group.capitalize()}** ({kept}, {rows[0].phrases} phrases)",
            "",
            head + (" right where the IDs say, % |" if shifts else ""),
            "|---|---|---|---|---|---|---|" + ("---|" if shifts else ""),
        ]
        for each in rows:
            p = "" if each.p is None else f"{each.p:.2g}"
            moved = (
                f" {100 * each.at_shifted:.1f} of {each.shiftable} |"
                if each.at_shifted is not None
                else " |"
            )
            seeds = f", {each.seeds} draws" if each.seeds > 1 else ""
            lines.append(
                f"| {each.label}{seeds} | {100 * each.accuracy:.1f} "
                f"({100 * each.low:.1f} to {100 * each.high:.1f}) | {p} | "
                f"{each.from_truth:.1f} | {each.from_said:.1f} | {100 * each.top:.0f} | "
                f"{100 * each.top_accuracy:.0f} |"
                f"{moved if shifts else ''}"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def main(arguments: Sequence[str]) -> int:
    """Command line."""
    parser = ArgumentParser(description="what pruned models need of their position IDs")
    parser.add_argument("--phrases", type=int, default=200)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("build/ablations"))
    parser.add_argument("--write", type=Path, metavar="PAGE.md")
    options = parser.parse_args(arguments)
    if options.write is not None:
        require_marks(options.write, BEGIN, END)
    torch.set_num_threads(1)
    expressions = open_data(f"{MODEL}:test", limit=options.phrases).expressions
    request = make_request(MODEL, keep=options.keep, pruner=MAIN, out=options.out, reference=False)
    plan = plan_export(request)
    options.out.mkdir(parents=True, exist_ok=True)
    answers = options.out / "answers.jsonl"
    require_same_run(answers, describe_run(plan, options.keep))
    found = ask_all(plan, expressions, answers)
    figures = score(plan, expressions, found)
    summary = {
        "model": MODEL,
        "keep": options.keep,
        "phrases": len(expressions),
        "figures": [
            {name: getattr(each, name) for name in Figure.__dataclass_fields__} for each in figures
        ],
    }
    text = json.dumps(summary, indent=1)
    (options.out / "summary.json").write_text(text + "\n", encoding="utf-8")
    tables = tabulate(figures, options.keep)
    print(tables)
    if options.write is not None:
        write_between(options.write, BEGIN, END, tables)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None))
