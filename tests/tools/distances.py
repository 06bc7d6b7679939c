"""How far two arrays are from each other."""

import torch


def furthest(found, expected):
    """Largest difference of a row, relative to the row's own length."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
