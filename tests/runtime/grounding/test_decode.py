"""The decode loop against a decoder that records what it is asked."""

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
        self.logits = np.zeros(10, np.float32)

    def run(self, embeddings, position_ids, write_slot, logits_row):
        self.calls.append(
            {
                "embeddings": embeddings.copy(),
                "positions": position_ids.tolist(),
                "slot": write_slot,
                "row": logits_row,
                "dtypes": (embeddings.dtype, position_ids.dtype),
            }
        )
        self.logits[:] = 0
        self.logits[next(self.tokens)] = 1
        return self.logits


def decode(tokens, positions, *, length, most=8, stop_ids=(STOP,)):
    decoder = FakeDecoder(tokens)
    position_ids = np.array([positions], dtype=np.int64)
    embeddings = np.ones((1, len(positions), 2), np.float32)
    decoded = decode_greedily(
        decoder, TABLE, embeddings, position_ids, length=length, most=most, stop_ids=stop_ids
    )
    return decoded, decoder.calls


def test_prefill_writes_the_whole_padded_prompt_from_slot_0():
    _, calls = decode([STOP], [0, 1, 5, 9, 10, 11], length=4)
    assert len(calls) == 1
    assert calls[0]["embeddings"].shape == (1, 6, 2)
    assert calls[0]["positions"] == [[0, 1, 5, 9, 10, 11]]
    assert calls[0]["slot"] == 0


def test_prefill_reads_the_last_real_row_not_the_padding():
    _, calls = decode([STOP], [0, 1, 5, 9, 10, 11], length=4)
    assert calls[0]["row"] == 3


def test_positions_follow_the_last_one_and_slots_the_length():
    # Gap: four tokens in the cache, the last at position 66.
    _, calls = decode([3, 4, 5, STOP], [0, 1, 30, 66, 67, 68], length=4)
    assert [call["positions"] for call in calls[1:]] == [[[67]], [[68]], [[69]]]
    assert [call["slot"] for call in calls[1:]] == [4, 5, 6]
    assert [call["row"] for call in calls[1:]] == [0, 0, 0]


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
    rows = splice_prompt(TABLE, [1, 2], visual, [4], 6)
    assert rows.tolist() == [[[2, 3], [4, 5], [-1, -2], [-3, -4], [-5, -6], [8, 9]]]


def test_splice_pads_with_zero_rows():
    visual = np.full((1, 1, 2), 7, np.float32)
    rows = splice_prompt(TABLE, [1], visual, [3], 5)
    assert rows.shape == (1, 5, 2)
    assert rows.dtype == np.float32
    assert rows[0, 3:].tolist() == [[0, 0], [0, 0]]


def test_splice_without_text_around():
    visual = np.full((1, 2, 2), 7, np.float32)
    assert splice_prompt(TABLE, [], visual, [], 2).tolist() == visual.tolist()
