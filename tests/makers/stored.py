"""Tensors of every dtype, stored, and compared with what is read."""

import torch

from gap_export.checkpoint.tensor import read_tensor

INDEX = "model.safetensors.index.json"


def some_tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(7, dtype=torch.float16),
        "c.weight": torch.randn(2, 3, 4).to(torch.bfloat16),
        "d.index": torch.arange(9) - 2**40,
        "d.small": torch.arange(5, dtype=torch.int32) - 2,
        "d.mask": torch.tensor([True, False, True]),
        "e.scalar": torch.tensor(2.5),
    }


def assert_values(checkpoint, expected):
    """Read values are the expected ones, and lie in the file as the index says."""
    assert set(checkpoint.tensors) == set(expected)
    for key, tensor in expected.items():
        location, found = checkpoint.tensors[key], read_tensor(checkpoint.tensors[key])
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert location.shape == tuple(tensor.shape)
        assert torch.equal(found, tensor), key
        assert found.is_contiguous()
        assert location.length == tensor.numel() * tensor.element_size()
        assert (location.strides is None) == tensor.is_contiguous()
        if location.strides is None:
            raw = location.file.read_bytes()[location.offset :][: location.length]
            values = tensor.detach().contiguous().flatten().view(torch.uint8)
            assert raw == values.numpy().tobytes(), key


def save_state(folder, state, name="pytorch_model.bin", **options):
    torch.save(state, folder / name, **options)
    return folder / name
