"""Layers that differ are never taken as copies: made-up stacks, exported and run.

Every stack has seven layers that are built alike but for one thing. What onnxruntime gives for
the exported graph, with random weights, has to be what torch gives for the module itself.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from gap_export.dialects import native
from gap_export.tracing import repeat_layers
from gap_export.tracing.repeat_layers import trace_stack
from gap_runtime.bundle.tensors import FREE_ROWS, TensorSpec

LAYERS, WIDTH, SLOTS, OTHER = 7, 12, 9, 3


class Layer(nn.Module):
    """Reads rows, a shared mask and a cache of its own, and writes the cache."""

    def __init__(self, mlp=20, *, scale=0.5, shift=None, activation=torch.tanh):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, mlp), nn.Linear(mlp, WIDTH)
        self.scale, self.shift, self.activation = scale, shift, activation
        self.mix, self.tag = nn.Linear(WIDTH, WIDTH), "tag"

    def forward(self, x_SD, mask, cache):
        cache = cache + x_SD.mean(dim=0) * self.scale
        x_SD = (
            self.mix(x_SD) + self.down(self.activation(self.up(x_SD))) * mask + cache.mean(dim=0)
        )
        return (x_SD if self.shift is None else x_SD + self.shift), cache


class Stack(nn.Module):
    """A stack of layers between two others."""

    def __init__(self, make, between=None, behind=None):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(make(k) for k in range(LAYERS))
        self.between, self.behind = between, behind

    def forward(self, rows, mask, caches):
        x_SD, mask, written, seen = self.first(rows), mask.exp(), [], []
        for k, layer in enumerate(self.layers):
            assert layer.tag == "tag"
            x_SD, cache = layer(x_SD, mask, caches[k])
            written.append(cache)
            seen.append(x_SD)
            if self.between is not None:
                x_SD = self.between(k, x_SD, mask)
        x_SD = self.last(x_SD)
        return (x_SD if self.behind is None else self.behind(self, x_SD, seen)), *written


def plain(_):
    return Layer()


def one(special):
    """A maker of layers, one of which is another."""
    return lambda k: special() if k == OTHER else Layer()


def spec(name, *shape):
    return TensorSpec(name=name, dtype="float32", shape=shape, meaning=name)


class Windowed(Layer):
    """Mixes rows within windows; every third layer mixes all."""

    def __init__(self, k):
        super().__init__()
        self.window = None if k % 3 == 2 else 2

    def forward(self, x_SD, mask, cache):
        if self.window is None:
            mixed = x_SD.mean(dim=0, keepdim=True)
        else:
            mixed = torch.cat([x_SD[:1], x_SD[:-1]]) + x_SD
        return super().forward(x_SD + mixed, mask, cache)


class Masked(Layer):
    """Has a mask of its own, whose values no checkpoint holds."""

    def __init__(self, k):
        super().__init__()
        self.number = k

    def forward(self, x_SD, mask, cache):
        own = torch.tensor([float(self.number == OTHER), 0.0] * (WIDTH // 2))
        return super().forward(x_SD + own, mask, cache)


def deep_stack(k, x_SD, mask):
    """Adds to what the first three layers give, as DeepStack does."""
    return x_SD + mask[:, :1] * (k + 1) if k < 3 else x_SD


def look_behind(stack, x_SD, seen):
    """Reads what some layers gave, and a weight of one of them."""
    return x_SD + seen[2] - seen[-2] + stack.layers[4].up(x_SD).mean()


class Borrowing(Layer):
    """Uses a weight of another layer besides its own."""

    lender = None

    def forward(self, x_SD, mask, cache):
        x_SD = x_SD if self.lender is None else self.lender[0](x_SD)
        return super().forward(x_SD, mask, cache)


def make_borrowing():
    stack = Stack(lambda _: Borrowing())
    # In a tuple, so that it is not a parameter of its own.
    stack.layers[5].lender = (stack.layers[4].mix,)
    return stack


class Twice(Layer):
    """Registers one weight of its own under a second name, and uses both."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.mix.weight

    def forward(self, x_SD, mask, cache):
        return super().forward(self.again(x_SD), mask, cache)


def make_tied(*numbers):
    """A stack in which layers have one and the same weight, each as its own."""
    stack = Stack(plain)
    for number in numbers:
        stack.layers[number].mix.weight = stack.layers[numbers[0]].mix.weight
    return stack


def make_tied_to(name):
    """A stack in which a layer's weight is that of a module before or behind the stack."""
    stack = Stack(plain)
    stack.layers[OTHER].mix.weight = getattr(stack, name).weight
    return stack


CASES = {
    # Which layers are copied from which.
    "alike": (lambda: Stack(plain), {2: 1, 3: 1, 4: 1, 5: 1, 6: 1}),
    "attribute": (lambda: Stack(one(lambda: Layer(scale=0.25))), {2: 1, 4: 1, 5: 1, 6: 1}),
    "shape": (lambda: Stack(one(lambda: Layer(28))), {2: 1, 4: 1, 5: 1, 6: 1}),
    "operator": (lambda: Stack(one(lambda: Layer(shift=1.5))), {2: 1, 4: 1, 5: 1, 6: 1}),
    "function": (
        lambda: Stack(one(lambda: Layer(activation=torch.sigmoid))),
        {2: 1, 4: 1, 5: 1, 6: 1},
    ),
    "constant": (lambda: Stack(Masked), {2: 1, 4: 1, 5: 1, 6: 1}),
    "windows": (lambda: Stack(Windowed), {3: 1, 4: 1, 5: 2, 6: 1}),
    "last": (
        lambda: Stack(lambda k: Layer(scale=0.1 if k == LAYERS - 1 else 0.5)),
        {2: 1, 3: 1, 4: 1, 5: 1},
    ),
    "between": (lambda: Stack(plain, deep_stack), {2: 1, 3: 1, 4: 1, 5: 1, 6: 1}),
    "looked at": (
        lambda: Stack(plain, behind=look_behind),
        {2: 1, 3: 1, 5: 1, 6: 1},
    ),
    "borrowed": (make_borrowing, {2: 1, 3: 1, 6: 1}),
    "twice in a layer": (lambda: Stack(lambda _: Twice()), {2: 1, 3: 1, 4: 1, 5: 1, 6: 1}),
    "twice in one layer": (lambda: Stack(one(Twice)), {2: 1, 4: 1, 5: 1, 6: 1}),
    "in two layers": (lambda: make_tied(2, 4), {3: 1, 5: 1, 6: 1}),
    "in all layers": (lambda: make_tied(*range(LAYERS)), {2: 1, 3: 1, 4: 1, 5: 1, 6: 1}),
    "in a layer and before": (lambda: make_tied_to("first"), {2: 1, 4: 1, 5: 1, 6: 1}),
    "in a layer and behind": (lambda: make_tied_to("last"), {2: 1, 4: 1, 5: 1, 6: 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_exported_answers_are_torchs(case, tmp_path, monkeypatch):
    make, expected = CASES[case]
    copied = {}
    find = repeat_layers.find_copies
    monkeypatch.setattr(
        repeat_layers, "find_copies", lambda *given: copied.update(find(*given)) or copied
    )
    traced = trace_stack(
        make,
        "layers",
        dtype="float32",
        dialect=native,
        opset=24,
        inputs=[
            spec("rows", FREE_ROWS, WIDTH),
            spec("mask", FREE_ROWS, WIDTH),
            *(spec(f"cache_{k}", SLOTS, WIDTH) for k in range(LAYERS)),
        ],
        outputs=[
            spec("out", FREE_ROWS, WIDTH),
            *(spec(f"next_{k}", SLOTS, WIDTH) for k in range(LAYERS)),
        ],
        nested=LAYERS,
    )
    assert {number: each.source.number for number, each in copied.items()} == expected

    torch.manual_seed(3)
    module = make().eval()
    given = [torch.randn(5, WIDTH), torch.rand(5, WIDTH)]
    caches = [torch.randn(SLOTS, WIDTH) for _ in range(LAYERS)]
    with torch.no_grad():
        wanted = module(*given, caches)
    found = run(traced, module, [*given, *caches], tmp_path / "graph.onnx")
    for each, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each, other.numpy(), rtol=1e-5, atol=1e-5)


def run(traced, module, arguments, path):
    """What onnxruntime gives for a graph with a module's weights."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    graph = traced.model.graph
    for name in traced.parameters & set(graph.initializers):
        graph.initializers[name].const_value = ir.tensor(weights[name].detach().numpy())
    ir.save(traced.model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return session.run(
        [spec.name for spec in traced.outputs],
        dict(zip(names, [each.numpy() for each in arguments], strict=True)),
    )
