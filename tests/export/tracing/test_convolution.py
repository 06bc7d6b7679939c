"""A patch embedding without a convolution, beside torch's convolution in float64."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from gap_export.dialects import cuda
from gap_export.errors import ExportError
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec


class Patches(nn.Module):
    def __init__(self, side, width):
        super().__init__()
        self.embed = nn.Conv2d(3, width, side, stride=side, padding="valid")

    def forward(self, pixels):
        return self.embed(pixels).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("height", "length"),
    # Pixels behind the last whole patch are not seen: below it, beside it, and both.
    [(16, 24), (18, 24), (16, 31), (19, 29)],
)
def test_a_patch_embedding_is_the_product_of_flattened_patches(height, length):
    views, side, width = 3, 8, 5
    torch.manual_seed(3)
    module = Patches(side, width).double()
    count = (height // side) * (length // side)
    pixels = TensorSpec(
        name="pixels", meaning="pixels", dtype="float64", shape=(views, 3, height, length)
    )
    patches = TensorSpec(
        name="patches", meaning="patches", dtype="float64", shape=(views, count, width)
    )
    model = trace(
        lambda: Patches(side, width),
        dtype="float64",
        dialect=cuda,
        opset=24,
        inputs=[pixels],
        outputs=[patches],
    ).model
    kinds = [node.op_type for node in model.graph]
    assert "Conv" not in kinds
    assert kinds.count("Gemm") == 1
    for name, parameter in module.named_parameters():
        model.graph.initializers[name].const_value = ir.tensor(parameter.detach().numpy())
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = torch.randn(views, 3, height, length, dtype=torch.float64)
    (found,) = session.run(None, {"pixels": given.numpy()})
    with torch.no_grad():
        expected = module(given).numpy()
    assert np.abs(found - expected).max() <= 1e-14 * np.abs(expected).max() * 3 * side**2


def test_only_patches_that_do_not_overlap_are_taken():
    """Any other convolution would come out wrong."""
    pixels = TensorSpec(name="pixels", meaning="pixels", dtype="float32", shape=(1, 3, 8, 8))
    grid = TensorSpec(name="grid", meaning="grid", dtype="float32", shape=(1, 4, 7, 7))
    with pytest.raises((ExportError, AssertionError)):
        trace(
            lambda: nn.Conv2d(3, 4, 2),
            dtype="float32",
            dialect=cuda,
            opset=24,
            inputs=[pixels],
            outputs=[grid],
        )
