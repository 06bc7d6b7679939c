"""The checkpoints that benchmarks write."""

import numpy as np
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from benchmarks import checkpoints, tiled
from gap_export.checkpoint.differences import holds_differences
from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.tensor import read_tensor
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request


def test_both_forms_of_the_tokenizer_are_one(tmp_path):
    checkpoints.write_tokenizer(tmp_path)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert pieces.vocab_size() == 32000
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, 1, 2)
    assert [fast.token_to_id(token) for token in ("</s>", "<image>", "<pad>")] == [2, 32000, 32001]
    for text in ("the red mug on the left", "  Was it 12 x \u00e9?\n"):
        ids = fast.encode(text).ids
        assert ids == pieces.encode(text)
        assert fast.decode(ids) == text


def test_values_are_the_same_in_both_layouts_and_norms_are_near_one(tmp_path):
    text = checkpoints.llama_config(16, 1, 2, 24, 40)
    folders = [tmp_path / name for name in ("whole", "alone")]
    prefixes = (
        ("language_model.model.", "model."),
        ("language_model.lm_head.weight", "lm_head.weight"),
    )
    tensors = []
    for folder, prefix, head in zip(folders, *prefixes, strict=True):
        folder.mkdir()
        checkpoints.write_values(folder, checkpoints.llama_shapes(text, prefix, head))
        loaded = load_file(folder / "model.safetensors")
        tensors.append({name.removeprefix("language_model."): v for name, v in loaded.items()})
    whole, alone = tensors
    assert whole.keys() == alone.keys()
    for name, value in whole.items():
        assert value.dtype == np.float16
        assert np.array_equal(value, alone[name])
        assert abs(value.mean() - ("norm" in name)) < 0.03


def test_sizes_are_what_the_names_say():
    counts = {}
    for name, text in checkpoints.RUN.items():
        shapes = checkpoints.library_shapes("llava", text)
        sizes = {key: np.prod(shape) for key, shape in shapes.items()}
        table = sizes["language_model.model.embed_tokens.weight"]
        decoder = sum(size for key, size in sizes.items() if key.startswith("language_model."))
        counts[name] = [round(n / 1e6) for n in (decoder - table, decoder, sum(sizes.values()))]
    assert counts == {"llava-185m": [187, 220, 525], "llava-1.1b": [1035, 1100, 1410]}


def test_tiled_models_have_as_many_parameters_as_published():
    """In billions; heads are no copies of the embedding tables but in OneVision's small one."""
    counts = {
        name: sum(np.prod(shape) for shape in make(text).values())
        for make, texts in (
            (tiled.internvl_shapes, tiled.INTERNVL),
            (tiled.onevision_shapes, tiled.ONEVISION),
        )
        for name, text in texts.items()
    }
    assert {name: round(count / 1e8) / 10 for name, count in counts.items()} == {
        "internvl3-1b": 0.9,
        "internvl3-2b": 2.1,
        "internvl3-8b": 7.9,
        "internvl3.5-1b": 1.1,
        "internvl3.5-2b": 2.3,
        "internvl3.5-4b": 4.7,
        "internvl3.5-8b": 8.5,
        "llava-onevision-qwen2-0.5b": 0.9,
        "llava-onevision-qwen2-7b": 8.0,
    }


def test_written_files_are_what_the_family_reads(tmp_path):
    checkpoints.write_internvl(tmp_path / "m", tiled.INTERNVL["internvl3-1b"], sparse=True)
    plan = plan_export(
        make_request("internvl3-1b", checkpoint=tmp_path / "m", reference=False, target="standard")
    )
    assert [bucket.name for bucket in plan.spec.buckets] == ["1792x1344", "1344x1792"]
    assert {bucket.patches for bucket in plan.spec.buckets} == {13 * 256}
    assert plan.spec.vision_width == 4096


def test_shikras_base_is_a_model_and_its_delta_is_none(tmp_path, monkeypatch):
    """As the family sees it, which would refuse the one in the other's place."""
    small = checkpoints.llama_config(64, 1, 2, 96, 300)
    monkeypatch.setattr(checkpoints, "LLAMA_7B", small)
    monkeypatch.setattr(checkpoints, "write_clip", lambda *_: None)
    checkpoints.write_shikra(tmp_path)
    base = open_checkpoint(str(tmp_path / "llama-7b"))
    assert bool((read_tensor(base.tensors["model.norm.weight"]) == 1).all())
    assert float(read_tensor(base.tensors["lm_head.weight"]).float().std()) > 0.01
    assert not holds_differences(base)
    assert holds_differences(open_checkpoint(str(tmp_path / "shikra-7b-delta-v1")))
