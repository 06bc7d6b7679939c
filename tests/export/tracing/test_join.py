"""Two traced graphs joined by the names of what one gives and the other takes."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from gap_export.dialects import native
from gap_export.tracing.join import join
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec


def spec(name, *shape, dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape, meaning="of a test")


PIXELS = spec("pixels", 1, 4)
GIVEN = [spec("patches", 1, 4), spec("keys", 1, 4), spec("scores", 1, 4)]


class Tower(torch.nn.Module):
    """Three outputs that cannot be mistaken for each other."""

    def forward(self, pixels):
        return pixels + 1, pixels * 10, torch.sigmoid(pixels) - 100


class Tail(torch.nn.Module):
    """Takes a list, in which every place has another weight."""

    def forward(self, patches, values):
        total = patches.clone()
        for power, value in enumerate(values, 1):
            total = total + value * 2.0**power
        return total, torch.topk(total, 2).indices


def trace_tower():
    return trace(Tower, dtype="float32", dialect=native, opset=24, inputs=[PIXELS], outputs=GIVEN)


def trace_tail(*inputs):
    return trace(
        Tail,
        dtype="float32",
        dialect=native,
        opset=24,
        inputs=inputs,
        outputs=[spec("total", 1, 4), spec("best", 1, 2, dtype="int64")],
        nested=len(inputs) - 1,
    )


def run(traced, **inputs):
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(traced.model).SerializeToString()
    )
    assert [value.name for value in session.get_inputs()] == [each.name for each in traced.inputs]
    assert [value.name for value in session.get_outputs()] == [
        each.name for each in traced.outputs
    ]
    return session.run(
        None, {name: np.array([value], np.float32) for name, value in inputs.items()}
    )


PICTURE = [0.5, -2.0, 3.0, 1.0]
PHRASE = [7.0, 5.0, -3.0, 0.25]


def expected(names):
    pixels = torch.tensor(PICTURE)
    values = dict(zip(("patches", "keys", "scores"), Tower()(pixels), strict=True))
    values["phrase"] = torch.tensor(PHRASE)
    first, *rest = (values[name] for name in names)
    return Tail()(first, rest)


@pytest.mark.parametrize(
    "names",
    [
        ("patches", "keys", "scores"),
        ("scores", "patches", "keys"),
        ("keys", "scores"),
        ("patches",),
    ],
)
def test_graphs_are_joined_by_name_in_any_order(names):
    by_name = {each.name: each for each in GIVEN}
    whole = join(trace_tower(), trace_tail(*(by_name[name] for name in names)))
    assert whole.inputs == (PIXELS,)
    total, best = run(whole, pixels=PICTURE)
    right = expected(names)
    assert np.allclose(total[0], right[0].numpy(), rtol=1e-6)
    assert best[0].tolist() == right[1].tolist()


@pytest.mark.parametrize("names", [("patches", "phrase", "keys"), ("phrase", "scores")])
def test_what_the_first_does_not_give_is_an_input_of_the_whole(names):
    phrase = spec("phrase", 1, 4)
    by_name = {each.name: each for each in (*GIVEN, phrase)}
    whole = join(trace_tower(), trace_tail(*(by_name[name] for name in names)))
    assert whole.inputs == (PIXELS, phrase)
    total, best = run(whole, pixels=PICTURE, phrase=PHRASE)
    right = expected(names)
    assert np.allclose(total[0], right[0].numpy(), rtol=1e-6)
    assert best[0].tolist() == right[1].tolist()


def test_a_copy_of_the_first_may_be_joined_again():
    tower = trace_tower()
    before = ir.serde.serialize_model(tower.model).SerializeToString()
    tails = [trace_tail(GIVEN[0], GIVEN[1]), trace_tail(GIVEN[2])]
    totals = [run(join(tower.copy(), tail), pixels=PICTURE)[0] for tail in tails]
    assert ir.serde.serialize_model(tower.model).SerializeToString() == before
    for total, names in zip(totals, [("patches", "keys"), ("scores",)], strict=True):
        assert np.allclose(total[0], expected(names)[0].numpy(), rtol=1e-6)
