"""GAP is masking for Qwen-VL, in float64 with the library's own decoders, DeepStack included.

A pruned sequence, prompt and answer in one run, gives what the full one gives when no row may look
at a pruned token. The same in exported graphs: test_qwen2_5_vl.py, test_qwen3_vl.py.
"""

import pytest
import torch
from makers.qwen import make_qwen3_checkpoint, make_qwen_checkpoint
from truths.axes import count_positions
from truths.qwen import MaskedQwen, hide, mask_keys

from gap_export.reference.choice import place_tokens

EQUAL, APART = 1e-12, 1e-2
MAKERS = {"qwen2_5_vl": make_qwen_checkpoint, "qwen3_vl": make_qwen3_checkpoint}
TOKEN = {"qwen2_5_vl": 28, "qwen3_vl": 16}
BEFORE, ANSWER = 4, 4


@pytest.fixture(scope="module", params=sorted(MAKERS))
def oracle(request, tmp_path_factory):
    folder = MAKERS[request.param](tmp_path_factory.mktemp("axes") / "model", seed=7)
    model = MaskedQwen(folder, request.param)
    model.kind = request.param
    return model


def choose(grid, how):
    """Kept tokens, ascending."""
    rows, columns = grid
    if how == "first row":
        return list(range(columns))
    if how == "last token":
        return [rows * columns - 1]
    draw = torch.Generator().manual_seed(columns)
    return sorted(torch.randperm(rows * columns, generator=draw)[: rows * columns // 2].tolist())


class Case:
    """A picture of noise, with text before it and an answer behind it."""

    def __init__(self, oracle, grid, how):
        draw = torch.Generator().manual_seed(grid[0])
        side = TOKEN[oracle.kind]
        pixels = torch.randn(1, 3, grid[0] * side, grid[1] * side, generator=draw)
        self.oracle, self.kept = oracle, choose(grid, how)
        self.tokens, self.planes, self.grid = oracle.look(pixels)
        assert self.grid == grid
        text = torch.randint(0, 60, (11,), generator=draw)
        with torch.no_grad():
            self.before, self.after = oracle.embed(text[:BEFORE]), oracle.embed(text[BEFORE:])

    def whole(self):
        rows = torch.cat([self.before, self.tokens, self.after])
        hidden = hide(len(rows), BEFORE, len(self.tokens), self.kept)
        ids = count_positions(BEFORE, self.grid, len(self.after))
        places = torch.arange(BEFORE, BEFORE + len(self.tokens))
        mask = mask_keys(len(rows), 0, hidden)
        return self.oracle.run(rows, ids, mask, planes=self.planes, places=places)[-ANSWER:]

    def pruned(self, mode, *, planes=True):
        slots, ids = place_tokens(
            BEFORE, len(self.tokens), len(self.after), self.kept[::-1], mode, grid=self.grid
        )
        rows = torch.cat([self.before, self.tokens[slots], self.after])
        places = torch.arange(BEFORE, BEFORE + len(slots))
        taken = [plane[slots] for plane in self.planes] if planes else ()
        mask = mask_keys(len(rows), 0, torch.zeros(0, dtype=torch.bool))
        return self.oracle.run(rows, ids, mask, planes=taken, places=places)[-ANSWER:]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Both sides of Qwen2.5-VL's are whole windows.
@pytest.mark.parametrize("grid", [(4, 6), (2, 14), (14, 2)])
@pytest.mark.parametrize("how", ["half", "first row", "last token"])
def test_gap_is_masking(oracle, grid, how):
    case = Case(oracle, grid, how)
    expected = case.whole()
    assert relative(case.pruned("gap"), expected) < EQUAL
    assert relative(case.pruned("compact"), expected) > APART


@pytest.mark.parametrize("mode", ["compact-grid", "permuted", "permuted-compact"])
def test_other_modes_are_not_masking(oracle, mode):
    case = Case(oracle, (6, 4), "first row" if mode == "compact-grid" else "half")
    assert relative(case.pruned(mode), case.whole()) > APART


@pytest.mark.parametrize("grid", [(1, 19), (19, 1)])
def test_a_picture_of_one_row_or_column(oracle, grid):
    if oracle.kind == "qwen2_5_vl":
        pytest.skip("its windows are two tokens wide here")
    case = Case(oracle, grid, "half")
    assert relative(case.pruned("gap"), case.whole()) < EQUAL


def test_planes_are_part_of_the_answer(oracle):
    case = Case(oracle, (4, 6), "half")
    assert bool(case.planes) == (oracle.kind == "qwen3_vl")
    difference = relative(case.pruned("gap", planes=False), case.whole())
    assert (difference > APART) == bool(case.planes)


def test_the_grid_mode_is_gap_where_the_last_cell_stays(oracle):
    case = Case(oracle, (4, 6), "half")
    case.kept = sorted({*case.kept, 23})
    assert torch.equal(case.pruned("compact-grid"), case.pruned("gap"))
