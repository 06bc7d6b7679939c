"""Attention that turns queries and keys itself: by position IDs in every call, never by slots.

Calls are cut as phrases, drafts and known pictures cut them, positions have gaps as pruning leaves
them, and the library's own language model in float64 says what is right.
"""

import dataclasses
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from makers.checkpoints import make_llava_checkpoint
from truths.masked import MaskedLlava

from gap_export.dialects import onnxruntime
from gap_export.interfaces.dialect import RotaryTables, Rows
from gap_runtime import Bundle
from gap_runtime.backends import open_backend
from gap_runtime.bundle.manifest import DECODER

PROMPT, LAST = 30, 38
GAPS = np.cumsum([0, *np.random.default_rng(5).integers(1, 3, LAST)])
"""A position for each slot, some of them left out."""
CUTS = {
    "the whole prompt at once, then tokens": [
        (0, PROMPT),
        *((k, k + 1) for k in range(PROMPT, LAST)),
    ],
    "one row first": [(0, 1), (1, 4), (4, LAST)],
    "the text, the picture, the phrase, drafts": [(0, 6), (6, 22), (22, PROMPT), (PROMPT, LAST)],
    "refused drafts, whose slots are written again": [
        (0, 20),
        (20, 25),
        (22, 27),
        (23, 24),
        (24, LAST),
    ],
    "another prompt in a cache that was used": [(0, LAST), (0, 9), (9, LAST)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("rotary")
    return make_llava_checkpoint(
        home / "llava", image_size=70, heads=6, kv_heads=2, head_dim=16, width=72, layers=3, seed=8
    )


@pytest.fixture(scope="module")
def bundle(folder, export, tmp_path_factory):
    out = tmp_path_factory.mktemp("rotary") / "b"
    return Bundle.open(export(folder, out, reference=False, prune__ratios=[0.47]))


@pytest.fixture(scope="module")
def rows(bundle):
    """Embeddings [LAST, D] of no token in particular."""
    width = bundle.manifest.embedding.shape[1]
    return np.random.default_rng(6).standard_normal((LAST, width)).astype(np.float32)


@pytest.fixture(scope="module")
def truth(folder, rows):
    """Logits [LAST, V] in float64 for the rows at some positions, each seeing those before it."""
    model = MaskedLlava(folder).model

    @torch.no_grad()
    def compute(positions):
        mask = torch.full((LAST, LAST), -1e30, dtype=torch.float64).triu(1)
        output = model.model.language_model(
            inputs_embeds=torch.as_tensor(rows, dtype=torch.float64)[None],
            position_ids=torch.as_tensor(positions)[None],
            attention_mask=mask[None, None],
        )
        return model.lm_head(output.last_hidden_state[0]).numpy()

    return compute


def run(bundle, rows, cuts):
    """Logits [LAST, V] of the graph, every row's by the last call that it was in."""
    backend, device = open_backend("onnxruntime:cpu")
    decoder = backend.open_decoder(bundle, bundle.manifest.stage(DECODER), device)
    found = {}
    for start, end in cuts:
        given = rows[None, start:end], GAPS[None, start:end]
        logits = decoder.run(*given, start, np.arange(end - start))
        found |= dict(zip(range(start, end), logits.copy(), strict=True))
    return np.stack([found[row] for row in range(LAST)])


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_every_call_turns_by_position_ids(bundle, rows, truth, cuts):
    found = run(bundle, rows, cuts)
    assert relative(found, truth(GAPS[:LAST])) < 1e-4
    # What slots in their place would give, in any one of the calls, is far from it.
    for start, end in cuts:
        if end > 1:
            counted = GAPS[:LAST].copy()
            counted[start:end] = np.arange(start, end) + counted[start] * (start == 0)
            assert relative(found, truth(counted)) > 1e-2


def test_no_node_turns_them_besides(bundle):
    graph = onnx.load(bundle.folder / "decoder.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert (kinds["GroupQueryAttention"], kinds["RotaryEmbedding"]) == (3, 0)


TABLES = RotaryTables(
    cosine_Pd=torch.ones(9, 8), sine_Pd=torch.zeros(9, 8), position_BS=torch.zeros(1, 2)
)
ROWS = Rows(
    cosine_BSd=torch.ones(1, 2, 8),
    sine_BSd=torch.zeros(1, 2, 8),
    write_slot_B=torch.zeros(1),
    tables=TABLES,
)


@pytest.mark.parametrize(
    ("rows", "head_dim", "dtype", "expected"),
    [
        (ROWS, 16, torch.float32, TABLES),
        (ROWS, 128, torch.float32, TABLES),
        # Its kernel wants cosines in eights.
        (ROWS, 24, torch.float32, None),
        # CUDA's kernel of a step counts slots.
        (ROWS, 16, torch.float16, None),
        (ROWS, 16, torch.bfloat16, None),
        # Several positions a token.
        (dataclasses.replace(ROWS, tables=None), 16, torch.float32, None),
    ],
)
def test_when_attention_turns(rows, head_dim, dtype, expected):
    assert onnxruntime.find_tables(rows, head_dim, dtype) is expected
