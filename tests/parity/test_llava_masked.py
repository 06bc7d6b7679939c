"""Exported graphs of random checkpoints against transformers with the pruned keys masked."""

import numpy as np
import onnxruntime
import pytest
from makers.checkpoints import make_llava_checkpoint
from PIL import Image
from truths.masked import MaskedLlava

from gap_runtime import Bundle, Grounder
from gap_runtime.grounding.decode import splice_prompt

STEPS = 5
SHAPES = {
    # 25 patches, 13 kept (no square); three query heads to a key head; width != heads * head_dim
    "grouped": {
        "image_size": 70,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
        "width": 72,
        "layers": 3,
        "vision_width": 48,
    },
    # 49 patches, tied head, features of the last block, another rotary base, shards
    "tied": {
        "image_size": 56,
        "patch_size": 8,
        "tied": True,
        "vision_feature_layer": -1,
        "rope_theta": 500.0,
        "names": "modern",
        "max_shard_size": "60KB",
    },
}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle") / request.param
    return make_llava_checkpoint(folder, seed=3, **SHAPES[request.param])


def by_turns(name, values):
    """Every shape with every value; one of both for each value by default."""
    return pytest.mark.parametrize(
        ("checkpoint", name),
        [
            pytest.param(shape, value, marks=() if (i + j) % 2 == 0 else pytest.mark.matrix)
            for i, shape in enumerate(SHAPES)
            for j, value in enumerate(values)
        ],
        indirect=["checkpoint"],
    )


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return MaskedLlava(checkpoint)


def picture(side=90):
    noise = np.random.default_rng(7).integers(0, 256, (side, side - 20, 3), dtype=np.uint8)
    return Image.fromarray(noise)


class Truth:
    """Drafts two tokens at a time of an answer that is known."""

    def __init__(self, answer):
        self.answer, self.accepted = answer, 0

    def about(self, phrase):
        assert phrase == " ".join(phrase.split())
        return self

    def propose(self, token_ids, most):
        return self.answer[len(token_ids) :][: min(most, 2)]

    def learn(self, token_ids, accepted):
        assert self.answer[: len(token_ids)] == list(token_ids)
        self.accepted += accepted

    def keep(self, token_ids):
        assert list(token_ids) == self.answer[: len(token_ids)]


def exported_answer(bundle_folder, phrase, drafter=None):
    """Logits [STEPS, V] of the graphs, the inputs that led to them, and the kept patches."""
    bundle = Bundle.open(bundle_folder)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    entry = bundle.manifest.ratios[0]
    recorded = []
    decoder = grounder._open_cache().session

    class Recorder:
        fit = staticmethod(decoder.fit)

        def run(self, *arguments):
            recorded.append(decoder.run(*arguments).copy())
            return recorded[-1]

    grounder._open_cache().session = Recorder()
    grounder._drafter = drafter
    values = grounder.run_stages(picture(), phrase, entry, most=STEPS)
    return np.concatenate(recorded), values, grounder.encoder.encode(phrase)


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@by_turns("pruner", ["cls_attention", "spatial", "random", "divprune"])
def test_gap_equals_the_full_sequence_with_pruned_keys_masked(
    checkpoint, oracle, export, tmp_path, pruner
):
    bundle = export(
        checkpoint, tmp_path / "b", reference=False, prune__strategy=pruner, prune__ratios=[0.47]
    )
    found, values, prompt = exported_answer(bundle, "the small café mug")
    kept = values.kept_index[0].tolist()
    expected = oracle.answer(values.pixels, prompt.prefix, prompt.suffix, kept, STEPS).numpy()
    assert kept == sorted(set(kept))
    assert int(np.sqrt(len(kept))) ** 2 != len(kept)
    assert relative(found, expected) < 1e-4
    assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()
    # The same with rows of an answer that are drafted, in the prefill and behind it.
    truth = Truth(values.decoded.token_ids)
    found, drafted, _ = exported_answer(bundle, "the small café mug", truth)
    assert relative(found, expected) < 1e-4
    assert drafted.decoded.token_ids == values.decoded.token_ids
    assert truth.accepted == drafted.decoded.accepted > 0
    assert drafted.decoded.calls < values.decoded.calls


@by_turns("mode", ["compact", "permuted", "permuted-compact"])
def test_other_position_ids_do_not(checkpoint, oracle, export, tmp_path, mode):
    bundle = export(
        checkpoint, tmp_path / "b", reference=False, prune__positions=mode, prune__ratios=[0.47]
    )
    found, values, prompt = exported_answer(bundle, "the small café mug")
    kept = values.kept_index[0].tolist()
    expected = oracle.answer(values.pixels, prompt.prefix, prompt.suffix, kept, STEPS).numpy()
    assert relative(found[0], expected[0]) > 1e-2


def test_decoding_on_with_the_slot_as_position_does_not_either(
    checkpoint, oracle, export, tmp_path
):
    bundle_folder = export(checkpoint, tmp_path / "b", reference=False, prune__ratios=[0.47])
    bundle = Bundle.open(bundle_folder)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    entry = bundle.manifest.ratios[0]
    _, values, prompt = exported_answer(bundle_folder, "the mug")
    layout = bundle.manifest.layout.at(entry)
    length = layout.prefix + layout.kept + len(prompt.suffix)
    kept = values.kept_index[0].tolist()
    expected = oracle.answer(values.pixels, prompt.prefix, prompt.suffix, kept, 2).numpy()
    table = bundle.map_embedding()
    rows = splice_prompt(table, prompt.prefix, values.visual_tokens, prompt.suffix)
    decoder = grounder._open_cache().session

    def step(position):
        decoder.run(rows, values.position_ids[:, :length], 0, np.array([length - 1]))
        token = np.asarray(table[int(expected[0].argmax())], dtype=np.float32)[None, None]
        return decoder.run(token, np.array([[position]]), length, np.array([0]))[0].copy()

    right = values.position_ids[0, length - 1] + 1
    assert right - length == layout.patches - layout.kept
    assert relative(step(right), expected[1]) < 1e-4
    assert relative(step(length), expected[1]) > 1e-2


def test_one_export_serves_several_ratios_and_the_padding_is_never_seen(
    checkpoint, oracle, export, tmp_path
):
    bundle_folder = export(
        checkpoint, tmp_path / "b", reference=False, prune__ratios=[0.8, 0.0, 0.47]
    )
    bundle = Bundle.open(bundle_folder)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    prompt = grounder.encoder.encode("it")
    for entry in bundle.manifest.ratios:
        # The longest prompt goes first, so that its keys lie in the slots behind the short one.
        grounder.run_stages(picture(), "the very very long one", entry, most=1)
        values = grounder.run_stages(picture(), "it", entry, most=1)
        kept = values.kept_index[0].tolist()
        expected = oracle.answer(values.pixels, prompt.prefix, prompt.suffix, kept, 1).numpy()
        assert len(kept) == entry.kept
        assert relative(values.decoded.prefill_logits, expected[0]) < 1e-4


def test_visual_tokens_and_positions_by_a_plain_onnxruntime_script(
    checkpoint, oracle, export, tmp_path
):
    folder = export(checkpoint, tmp_path / "b", reference=False, prune__ratios=[0.47])
    bundle = Bundle.open(folder)
    stage = bundle.manifest.stages[0]
    session = onnxruntime.InferenceSession(folder / stage.file)
    side = bundle.manifest.preprocess.side
    pixels = np.random.default_rng(1).standard_normal((1, 3, side, side)).astype(np.float32)
    tokens, kept, positions = session.run(None, {"pixels": pixels})
    layout = bundle.manifest.layout.at(bundle.manifest.ratios[0])
    everything = oracle.visual_tokens(pixels).numpy()
    assert relative(tokens[0], everything[kept[0]]) < 1e-4
    expected = [
        *range(layout.prefix),
        *(layout.prefix + int(patch) for patch in kept[0]),
        *range(layout.prefix + layout.patches, layout.prefix + layout.patches + layout.suffix),
    ]
    assert positions[0].tolist() == expected
