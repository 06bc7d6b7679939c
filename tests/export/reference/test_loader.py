"""The one road of an eager model's weights: what is merged, and that both ways are the same.

Compared with the files read by safetensors and torch, and sums written out here.
"""

import numpy as np
import pytest
import torch
from makers.families import FAMILIES, find_family
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gap_export.checkpoint.index import open_checkpoint
from gap_export.errors import CheckpointError
from gap_export.reference import files
from gap_export.reference.files import open_tensors
from gap_export.reference.lazy import (
    LazyTensor,
    add_product,
    change_tensor,
    rename_tensors,
    sum_tensors,
)
from gap_export.reference.loader import Loader, open_loader

both_ways = pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def lazy(*rows):
    values = torch.tensor(rows, dtype=torch.float32)
    return LazyTensor(
        length=len(values), read=values.clone, rows=lambda index: values[index].clone()
    )


def test_a_longer_tensor_takes_a_shorter_one_into_its_first_rows():
    both = sum_tensors(lazy([1, 2], [3, 4], [5, 6]), lazy([10, 20], [30, 40]))
    assert both.read().tolist() == [[11, 22], [33, 44], [5, 6]]
    assert both.rows(torch.tensor([2, 1, 1])).tolist() == [[5, 6], [33, 44], [33, 44]]
    assert both.length == 3


def test_a_product_is_added_with_its_scale():
    made = add_product(lazy([1, 2], [3, 4], [5, 6]), lazy([1], [0], [2]), lazy([3, -1]), 0.5)
    assert made.read().tolist() == [[2.5, 1.5], [3, 4], [8, 5]]
    assert made.rows(torch.tensor([2])).tolist() == [[8, 5]]
    assert made.length == 3


def test_a_change_is_made_of_the_whole_tensor():
    made = change_tensor(lazy([1, 2], [3, 4]), lambda values: values / values.sum())
    assert made.rows(torch.tensor([1])).tolist() == [[pytest.approx(0.3), pytest.approx(0.4)]]


def test_the_first_beginning_that_fits_is_replaced():
    one = lazy([1])
    renamed = rename_tensors({"a.b.c": one, "a.c": one, "z": one}, {"a.b.": "x.", "a.": "y."})
    assert list(renamed) == ["x.c", "y.c", "z"]


@pytest.fixture(params=["safetensors", "torch"])
def stored(request, tmp_path):
    """A folder with one file, and what is in it."""
    rng = torch.Generator().manual_seed(5)
    values = {
        "matrix": torch.randn(7, 3, generator=rng, dtype=torch.float32),
        "half": torch.randn(5, 2, generator=rng).half(),
        "row": torch.randn(4, generator=rng).bfloat16(),
        "number": torch.tensor(3.5),
    }
    if request.param == "torch":
        torch.save(values, tmp_path / "pytorch_model.bin")
    else:
        save_file(values, tmp_path / "model.safetensors")
    return open_checkpoint(str(tmp_path)), values


@both_ways
def test_tensors_are_those_of_the_file_in_one_dtype(stored, whole):
    checkpoint, values = stored
    tensors = open_tensors(checkpoint, torch.float32, whole=whole)
    assert tensors.keys() == values.keys()
    for key, value in values.items():
        assert torch.equal(tensors[key].read(), value.float()), key
        assert tensors[key].read().dtype == torch.float32
        assert tensors[key].length == (len(value) if value.ndim else 0)
    index = torch.tensor([6, 0, 6])
    assert torch.equal(tensors["matrix"].rows(index), values["matrix"][index])
    assert tensors["half"].rows(torch.tensor([], dtype=torch.int64)).shape == (0, 2)


@both_ways
def test_what_is_read_is_one_s_own(stored, whole):
    """Merging changes it in place, which must not reach the file or the next reading."""
    checkpoint, values = stored
    tensors = open_tensors(checkpoint, torch.float32, whole=whole)
    tensors["matrix"].read().zero_()
    tensors["matrix"].rows(torch.tensor([1])).zero_()
    assert torch.equal(tensors["matrix"].read(), values["matrix"])
    again = open_tensors(checkpoint, torch.float32, whole=True)
    assert torch.equal(again["matrix"].read(), values["matrix"])


def test_a_whole_model_is_read_by_the_libraries_alone(tmp_path_factory, tmp_path, monkeypatch):
    """The export's own reader gives what is compared with it, so the reference has another."""

    def refuse(_):
        raise AssertionError

    monkeypatch.setattr(files, "read_tensor", refuse)
    for name in FAMILIES:
        plan = find_family(name, tmp_path_factory).plan(tmp_path / name)
        plan.family.load_eager(plan.checkpoint, plan.spec, "float32").embed([1])


@pytest.fixture
def llama(tmp_path):
    """A folder of a language model in the library's own files, by the head being tied or not."""

    def make(*, tied):
        folder = tmp_path / str(tied)
        torch.manual_seed(1)
        config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
        LlamaForCausalLM(config).save_pretrained(folder)
        return open_checkpoint(str(folder)), config

    return make


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_tensors_is_the_library_s_own(llama, tied):
    checkpoint, config = llama(tied=tied)
    loader = Loader(checkpoint, "float32", None)
    own = loader.load(LlamaForCausalLM, config)
    built = loader.build(LlamaForCausalLM, config, loader.open())
    streamed = Loader(checkpoint, "float32", 0).load(LlamaForCausalLM, config)
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    ids = torch.tensor([[1, 5, 7, 19]])
    with torch.no_grad():
        truth = own(ids).logits
        assert torch.equal(built(ids).logits, truth)
        assert torch.equal(streamed(ids).logits, truth)
    found = dict(built.named_parameters())
    stored = load_file(checkpoint.folder / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(found[name], value), name


def refusal(checkpoint, config, tensors):
    with (
        pytest.raises(CheckpointError) as caught,
        open_loader(checkpoint, "float32", None) as loader,
    ):
        loader.build(LlamaForCausalLM, config, loader.open() | tensors)
    return str(caught.value)


def test_a_tensor_of_another_shape_is_one_line(llama):
    message = refusal(*llama(tied=False), {"model.norm.weight": lazy(1)})
    assert "PyTorch cannot load it (a tensor of shape [1], expected [16])" in message


def test_a_model_that_lacks_a_tensor_is_one_line(llama):
    """Of one that is tied, the head has none of its own; of one that is not, it is missing."""
    checkpoint, _ = llama(tied=True)
    message = refusal(checkpoint, LlamaConfig(**SIZES, tie_word_embeddings=False), {})
    assert "PyTorch cannot load it (tensor 'lm_head.weight' is missing; the nearest" in message
    assert message.startswith(f"{checkpoint.folder}: ")


@pytest.mark.parametrize("memory", [None, 0])
def test_values_that_are_no_module_s(llama, memory):
    checkpoint, _ = llama(tied=False)
    loader = Loader(checkpoint, "float32", memory)
    values = loader.read(loader.open())
    assert len(values) == len(list(values)) == len(checkpoint.tensors)
    stored = load_file(checkpoint.folder / "model.safetensors")
    np.testing.assert_array_equal(values["lm_head.weight"], stored["lm_head.weight"])
