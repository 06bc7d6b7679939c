"""What GAP means, in float64: pruning under GAP is masking, and nothing else is.

A plain rotary transformer is run on the whole sequence with the pruned keys masked out, and on
the pruned sequence with the position IDs of each mode. Only GAP gives the same numbers.
"""

import pytest
import torch

from gap_export.reference.choice import place_tokens

WIDTH, HEADS, LAYERS = 32, 2, 3
BEFORE, PATCHES, AFTER, STEPS = 4, 20, 6, 4
EQUAL, APART = 1e-12, 0.01


class Transformer:
    """Pre-norm attention and MLP blocks with rotary positions, float64, random weights."""

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)

        def matrix(rows, columns):
            values = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
            return values * 1.5 / rows**0.5

        self.blocks = [
            {
                "qkv": matrix(WIDTH, 3 * WIDTH),
                "out": matrix(WIDTH, WIDTH),
                "up": matrix(WIDTH, 2 * WIDTH),
                "down": matrix(2 * WIDTH, WIDTH),
            }
            for _ in range(LAYERS)
        ]

    def run(self, rows, ids, allowed, cache=None):
        """Outputs of rows [S, W] at position IDs; `allowed` [S, past + S]; and the new cache."""
        cache = cache or [None] * LAYERS
        written = []
        for block, past in zip(self.blocks, cache, strict=True):
            split = (norm(rows) @ block["qkv"]).view(len(rows), 3, HEADS, -1).permute(1, 2, 0, 3)
            query, key, value = rotate(split[0], ids), rotate(split[1], ids), split[2]
            if past is not None:
                key, value = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
            written.append((key, value))
            scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            rows = rows + (weights @ value).transpose(0, 1).flatten(1) @ block["out"]
            rows = rows + torch.tanh(norm(rows) @ block["up"]) @ block["down"]
        return rows, written


def norm(rows):
    return rows / rows.pow(2).mean(-1, keepdim=True).sqrt()


def rotate(x, ids):
    half = x.shape[-1] // 2
    frequencies = 50.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.tensor(ids, dtype=torch.float64)[:, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Case:
    """One random sequence, one choice of patches and the truth by masking."""

    def __init__(self, seed, kept):
        draw = torch.Generator().manual_seed(1000 + seed)
        self.model = Transformer(seed)
        self.order = tuple(torch.randperm(PATCHES, generator=draw)[:kept].tolist())
        assert list(self.order) != sorted(self.order)
        length = BEFORE + PATCHES + AFTER + STEPS
        self.whole = torch.randn(length, WIDTH, generator=draw, dtype=torch.float64)
        self.left = [*range(BEFORE), *(BEFORE + k for k in sorted(self.order))]
        self.left += range(BEFORE + PATCHES, BEFORE + PATCHES + AFTER)
        visible = torch.tensor(
            [not BEFORE <= k < BEFORE + PATCHES or k - BEFORE in self.order for k in range(length)]
        )
        # A pruned row must see something, so it sees itself; its output is not looked at.
        allowed = (visible & torch.ones(length, length).tril().bool()) | torch.eye(length).bool()
        self.truth, _ = self.model.run(self.whole, list(range(length)), allowed)

    def pruned(self, slots, ids, *, first_new=None):
        """Outputs of the pruned prompt, then of the steps on its cache."""
        rows = [*range(BEFORE), *(BEFORE + k for k in slots)]
        rows += range(BEFORE + PATCHES, BEFORE + PATCHES + AFTER)
        prompt, cache = self.model.run(
            self.whole[rows], ids, torch.ones(len(rows), len(rows)).tril().bool()
        )
        position = ids[-1] + 1 if first_new is None else first_new
        steps = []
        for step in range(STEPS):
            row = self.whole[BEFORE + PATCHES + AFTER + step][None]
            seen = torch.ones(1, len(rows) + step + 1).bool()
            output, cache = self.model.run(row, [position + step], seen, cache)
            steps.append(output[0])
        return prompt, torch.stack(steps)

    def errors(self, prompt, steps):
        """Largest differences from the truth: all prompt rows, text rows, decoded rows."""
        difference = (prompt - self.truth[self.left]).abs()
        decoded = (steps - self.truth[-STEPS:]).abs().max().item()
        return difference.max().item(), difference[-AFTER:].max().item(), decoded


@pytest.fixture(scope="module", params=[(0, 10), (1, 3), (2, 17), (3, 5)], ids=str)
def case(request):
    return Case(*request.param)


def place(case, mode):
    slots, (ids,) = place_tokens(BEFORE, PATCHES, AFTER, case.order, mode)
    return slots, ids


def test_gap_prefill_and_decode_are_masking(case):
    assert max(case.errors(*case.pruned(*place(case, "gap")))) < EQUAL


@pytest.mark.parametrize("mode", ["compact", "permuted", "permuted-compact"])
def test_other_modes_are_not_masking(case, mode):
    _, text, decoded = case.errors(*case.pruned(*place(case, mode)))
    assert text > APART
    assert decoded > APART


def test_decoding_on_with_the_compact_id_is_not_masking(case):
    slots, ids = place(case, "gap")
    prompt, text, decoded = case.errors(*case.pruned(slots, ids, first_new=len(ids)))
    assert max(prompt, text) < EQUAL
    assert decoded > APART


def test_compact_visual_ids_before_original_text_ids_are_not_masking(case):
    slots, gap = place(case, "gap")
    _, compact = place(case, "compact")
    ids = compact[:-AFTER] + gap[-AFTER:]
    assert case.errors(*case.pruned(slots, ids))[1] > APART


def test_a_shift_of_all_ids_changes_nothing(case):
    slots, ids = place(case, "gap")
    assert max(case.errors(*case.pruned(slots, [number + 100 for number in ids]))) < 1e-11


def test_no_pruning_is_the_same_under_gap_and_compact():
    case = Case(4, PATCHES)
    for mode in ("gap", "compact"):
        assert max(case.errors(*case.pruned(*place(case, mode)))) < EQUAL
