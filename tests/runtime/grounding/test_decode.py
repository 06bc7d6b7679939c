"""The decode loop against decoders that record what they are asked, and that remember slots."""

import numpy as np
import pytest

from gap_runtime.grounding.decode import decode_greedily, splice_prompt

STOP = 9
TABLE = np.arange(20, dtype=np.float32).reshape(10, 2)


class FakeDecoder:
    """Answers with the given tokens in turn, in one buffer, as a real session does."""

    def __init__(self, tokens):
        self.tokens = iter(tokens)
        self.calls = []
        self.logits = np.zeros((1, 10), np.float32)

    def fit(self, rows):
        return rows

    def run(self, embeddings, position_ids, write_slot, logits_rows):
        self.calls.append(
            {
                "embeddings": embeddings.copy(),
                "positions": position_ids.tolist(),
                "slot": write_slot,
                "rows": logits_rows.tolist(),
                "dtypes": (embeddings.dtype, position_ids.dtype),
            }
        )
        assert len(logits_rows) == 1
        self.logits[:] = 0
        self.logits[0, next(self.tokens)] = 1
        return self.logits


def decode(tokens, positions, *, length, most=8, stop_ids=(STOP,)):
    decoder = FakeDecoder(tokens)
    position_ids = np.array([positions], dtype=np.int64)
    decoded = decode_greedily(
        decoder,
        TABLE,
        np.ones((1, length, 2), np.float32),
        position_ids,
        most=most,
        capacity=length + most,
        stop_ids=stop_ids,
    )
    return decoded, decoder.calls


def test_prefill_writes_the_real_prompt_from_slot_0():
    _, calls = decode([STOP], [0, 1, 5, 9, 10, 11], length=4)
    assert len(calls) == 1
    assert calls[0]["embeddings"].shape == (1, 4, 2)
    assert calls[0]["positions"] == [[0, 1, 5, 9]]
    assert calls[0]["slot"] == 0


def test_prefill_reads_the_last_row():
    _, calls = decode([STOP], [0, 1, 5, 9, 10, 11], length=4)
    assert calls[0]["rows"] == [3]


def test_positions_follow_the_last_one_and_slots_the_length():
    # Gap: four tokens in the cache, the last at position 66.
    _, calls = decode([3, 4, 5, STOP], [0, 1, 30, 66, 67, 68], length=4)
    assert [call["positions"] for call in calls[1:]] == [[[67]], [[68]], [[69]]]
    assert [call["slot"] for call in calls[1:]] == [4, 5, 6]
    assert [call["rows"] for call in calls[1:]] == [[0], [0], [0]]


def test_position_may_lie_behind_the_slot():
    # Permuted: the last prompt token has a lower position than others.
    _, calls = decode([3, 4, STOP], [0, 7, 8, 2, 3], length=4)
    assert [call["positions"] for call in calls[1:]] == [[[3]], [[4]]]
    assert [call["slot"] for call in calls[1:]] == [4, 5]


def test_each_token_is_fed_back_by_its_embedding():
    _, calls = decode([3, 7, STOP], [0, 1], length=2)
    assert calls[1]["embeddings"].tolist() == [[[6, 7]]]
    assert calls[2]["embeddings"].tolist() == [[[14, 15]]]


def test_steps_have_the_types_of_the_graph():
    _, calls = decode([3, STOP], [0, 1], length=2)
    assert calls[1]["dtypes"] == (np.float32, np.int64)


def test_answer_ends_before_the_stop_token():
    decoded, calls = decode([3, 4, STOP, 5], [0, 1], length=2)
    assert decoded.token_ids == [3, 4]
    assert len(calls) == 3


def test_any_stop_token_ends_the_answer():
    decoded, _ = decode([3, 6, 4], [0, 1], length=2, stop_ids=(STOP, 6))
    assert decoded.token_ids == [3]


def test_stop_token_at_once_gives_no_answer():
    decoded, calls = decode([STOP], [0, 1], length=2)
    assert decoded.token_ids == []
    assert len(calls) == 1


@pytest.mark.parametrize(("most", "runs"), [(0, 1), (1, 1), (3, 3)])
def test_at_most_so_many_tokens_and_no_run_in_vain(most, runs):
    decoded, calls = decode([1, 2, 3, 4, 5], [0, 1], length=2, most=most)
    assert decoded.token_ids == [1, 2, 3][:most]
    assert len(calls) == runs


def test_without_stop_tokens_all_are_decoded():
    decoded, _ = decode([1, STOP, 2, STOP], [0, 1], length=2, most=4, stop_ids=())
    assert decoded.token_ids == [1, STOP, 2, STOP]


def test_prefill_logits_outlive_the_buffer_they_came_in():
    decoded, _ = decode([3, 4, STOP], [0, 1], length=2)
    assert decoded.prefill_logits.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_splice_puts_text_and_visual_tokens_in_order():
    visual = np.array([[[-1, -2], [-3, -4], [-5, -6]]], dtype=np.float32)
    rows = splice_prompt(TABLE, [1, 2], visual, [4])
    assert rows.tolist() == [[[2, 3], [4, 5], [-1, -2], [-3, -4], [-5, -6], [8, 9]]]


def test_splice_gives_float32_whatever_the_table_has():
    visual = np.full((1, 1, 2), 7, np.float32)
    rows = splice_prompt(TABLE.astype(np.float16), [1], visual, [3])
    assert rows.shape == (1, 3, 2)
    assert rows.dtype == np.float32


def test_splice_without_text_around():
    visual = np.full((1, 2, 2), 7, np.float32)
    assert splice_prompt(TABLE, [], visual, []).tolist() == visual.tolist()


def test_planes_behind_a_row_of_text_are_zeros():
    visual = np.array([[[-1, -2, -3, -4, -5, -6]]], dtype=np.float32)
    rows = splice_prompt(TABLE, [1], visual, [4])
    assert rows.tolist() == [[[2, 3, 0, 0, 0, 0], [-1, -2, -3, -4, -5, -6], [8, 9, 0, 0, 0, 0]]]
    decoder = FakeDecoder([3, STOP])
    decode_greedily(decoder, TABLE, rows, np.arange(3)[None], most=4, capacity=7, stop_ids=(STOP,))
    prefill, step = (call["embeddings"].tolist() for call in decoder.calls)
    assert prefill == rows.tolist()
    assert step == [[[6, 7, 0, 0, 0, 0]]]


class ScriptedDrafter:
    """Drafts by chance from the true answer: some right, some wrong from some token on."""

    def __init__(self, rng, truth):
        self.rng, self.truth, self.learnt = rng, truth, []

    def propose(self, token_ids, most):
        count = int(self.rng.integers(0, 8))
        draft = list(self.truth[len(token_ids) : len(token_ids) + count])
        if draft and self.rng.random() < 0.5:
            draft[int(self.rng.integers(len(draft)))] = int(self.rng.integers(10))
        return draft[: max(most, 0)]

    def learn(self, token_ids, accepted):
        self.learnt.append((len(token_ids), accepted))


class SlotDecoder:
    """What a row gives depends on the rows and positions of its slot and all before it.

    `sizes` are the row counts that it takes, None for any.
    """

    def __init__(self, capacity, sizes=None, axes=1):
        self.slots = np.full((capacity, 2 + axes), np.nan)
        self.sizes, self.calls = sizes, []

    def fit(self, rows):
        if self.sizes is None:
            return rows
        return min((size for size in self.sizes if size >= rows), default=None)

    def run(self, embeddings, position_ids, write_slot, logits_rows):
        rows = embeddings.shape[1]
        assert self.sizes is None or rows in self.sizes
        assert write_slot + rows <= len(self.slots)
        assert len(logits_rows) <= 8
        self.slots[write_slot : write_slot + rows] = np.concatenate(
            [embeddings[0], position_ids.T], axis=1
        )
        self.calls.append((write_slot, rows, logits_rows.tolist()))
        logits = np.zeros((len(logits_rows), 10), np.float32)
        for k, row in enumerate(logits_rows):
            seen = self.slots[: write_slot + row + 1]
            assert np.isfinite(seen).all()
            weights = np.arange(1, seen.size + 1).reshape(seen.shape)
            logits[k, int((seen * weights).sum()) % 10] = 1
        return logits


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("sizes", [None, (1, 8, 12)])
@pytest.mark.parametrize("seed", range(25))
def test_drafts_change_the_calls_and_never_the_answer(seed, sizes, axes):
    rng = np.random.default_rng(seed)
    length, most = int(rng.integers(3, 12)), int(rng.integers(0, 20))
    prompt = rng.integers(0, 9, (1, length, 2)).astype(np.float32)
    positions = np.cumsum(rng.integers(0, 4, (axes, length)), axis=1)
    stop_ids = (int(rng.integers(10)),) if seed % 2 else ()

    def answer(drafter, sizes=sizes):
        decoder = SlotDecoder(12 + most, sizes, axes)
        found = decode_greedily(
            decoder,
            TABLE,
            prompt,
            positions,
            most=most,
            capacity=12 + most,
            stop_ids=stop_ids,
            drafter=drafter,
        )
        return found, decoder.calls

    plain, calls = answer(None, sizes=None)
    assert [rows for _, rows, _ in calls] == [length] + [1] * (len(calls) - 1)
    truth = [*plain.token_ids, *stop_ids, 3]
    drafter = ScriptedDrafter(rng, truth)
    found, drafted_calls = answer(drafter)
    assert found.token_ids == plain.token_ids
    assert found.prefill_logits.tolist() == plain.prefill_logits.tolist()
    # The last row may lie behind an end that was drafted: it is the row that was read last.
    assert found.last_logits.tolist() == plain.last_logits.tolist()
    assert found.calls == len(drafted_calls) <= plain.calls
    assert found.drafted == sum(len(wanted) - 1 for _, _, wanted in drafted_calls)
    assert sum(accepted for _, accepted in drafter.learnt) == found.accepted
    assert len(found.token_ids) <= found.calls + found.accepted


def test_good_drafts_save_calls():
    """The decoder of the property above, told the truth."""
    rng = np.random.default_rng(0)
    prompt, positions = np.ones((1, 4, 2), np.float32), np.arange(4)[None]

    class Truth(ScriptedDrafter):
        def propose(self, token_ids, most):
            return list(self.truth[len(token_ids) :][: min(most, 7)])

    def answer(drafter):
        return decode_greedily(
            SlotDecoder(24),
            TABLE,
            prompt,
            positions,
            most=20,
            capacity=24,
            stop_ids=(),
            drafter=drafter,
        )

    plain = answer(None)
    found = answer(Truth(rng, plain.token_ids))
    assert found.token_ids == plain.token_ids
    assert (plain.calls, found.calls) == (20, 3)
