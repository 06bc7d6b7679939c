"""What the functions of a user's own pruner give is looked at before anything uses it."""

import json
import math
import os
import re
import sys

import pytest
import torch

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerVision, Geometry, VisionFeatures
from gap_export.interfaces.pruner import load_pruner
from gap_runtime import registry
from gap_runtime.errors import ConfigError

FILE = """
import torch
from gap_export.interfaces.features import EagerChoice, Kept

NEEDS = frozenset()
EXTRA = {extra}
{more}

class Silent(Exception):
    def __str__(self):
        raise SystemError("no text")


def prune(features, kept, config):
    index = torch.arange(kept)[None]
    weights = torch.ones(1, 6)
    return {graph}


def prune_eagerly(vision, kept, config):
    order = tuple(range(kept))
    rows, ones = vision.patches[:kept], torch.ones(6)
    return {eager}


def count_adaptively(vision):
    return {count}
"""
GRAPH, EAGER = "Kept(order=index)", "EagerChoice(order=order, scores=None)"
KEPT, TOKENS, WIDTH = 4, 6, 3
GEOMETRY = Geometry(grids=((2, 3),))
FEATURES = VisionFeatures(
    patches_BNC=torch.zeros(1, TOKENS, WIDTH), geometry=GEOMETRY, values={}, text_sign=1
)
VISION = EagerVision(
    patches=torch.zeros(TOKENS, WIDTH),
    tokens=torch.zeros(TOKENS, WIDTH),
    leading=0,
    layer=0,
    geometry=GEOMETRY,
    arrange=lambda values: values,
)
CONFIG = PruneConfig(strategy="mine.py")
ORDER = "expected a tuple of 4 integers from 0 to 5, each once"


@pytest.fixture
def load(tmp_path):
    def write(*, extra=0, graph=GRAPH, eager=EAGER, count=3, more=""):
        path = tmp_path / "mine.py"
        text = FILE.format(extra=extra, graph=graph, eager=eager, count=count, more=more)
        path.write_text(text, encoding="utf-8")
        return load_pruner(str(path))

    return write


@pytest.mark.parametrize(
    ("graph", "extra", "said"),
    [
        ("None", 0, "a NoneType, expected a Kept"),
        ("index", 0, "a Tensor, expected a Kept"),
        ("Kept(order=[0, 1, 2, 3])", 0, "a list as order, expected a tensor [1, 4]"),
        ("Kept(order=index.float())", 0, "float32 [1, 4] as order, expected int64 [1, 4]"),
        ("Kept(order=index[:, 1:])", 0, "int64 [1, 3] as order, expected int64 [1, 4]"),
        ("Kept(order=index[0])", 0, "int64 [4] as order, expected int64 [1, 4]"),
        ("Kept(order=(0, 1, 2))", 0, f"a tuple of 3 as order, {ORDER}"),
        ("Kept(order=(0, 1, 2, 2))", 0, f"a tuple of 4 as order, {ORDER}"),
        ("Kept(order=(0, 1, 2, 6))", 0, f"a tuple of 4 as order, {ORDER}"),
        ("Kept(order=(-1, 1, 2, 3))", 0, f"a tuple of 4 as order, {ORDER}"),
        ("Kept(order=(0.0, 1, 2, 3))", 0, f"a tuple of 4 as order, {ORDER}"),
        (
            "Kept(order=index, mix_BKN=torch.zeros(1, 4, 5))",
            0,
            "float32 [1, 4, 5] as mix_BKN, expected float32 [1, 4, 6]",
        ),
        ("Kept(order=index, extra_BN=weights)", 0, "extra_BN with values, but EXTRA is 0"),
        ("Kept(order=index)", 1, "extra_BN without values, but EXTRA is 1"),
        (
            "Kept(order=index, extra_BN=weights[0])",
            1,
            "float32 [6] as extra_BN, expected float32 [1, 6]",
        ),
        (
            "Kept(order=index, extra_BN=weights, extra_divisor=0)",
            1,
            "extra_divisor 0, expected a number that is not 0",
        ),
    ],
)
def test_a_choice_in_the_graph_that_cannot_be_one(load, graph, extra, said):
    pruner = load(graph=graph, extra=extra)
    with pytest.raises(ConfigError, match=rf"mine\.py: prune gave {re.escape(said)}; see 'Add"):
        pruner.prune(FEATURES, KEPT, CONFIG)


@pytest.mark.parametrize(
    ("eager", "extra", "said"),
    [
        ("None", 0, "a NoneType, expected an EagerChoice"),
        ("list(order)", 0, "a list, expected an EagerChoice"),
        ("EagerChoice(order=order[1:], scores=None)", 0, f"a tuple of 3 as order, {ORDER}"),
        ("EagerChoice(order=(9,) * kept, scores=None)", 0, f"a tuple of 4 as order, {ORDER}"),
        ("EagerChoice(order='abcd', scores=None)", 0, f"a str as order, {ORDER}"),
        (
            "EagerChoice(order=torch.arange(kept), scores=None)",
            0,
            f"a Tensor as order, {ORDER}",
        ),
        *(
            (
                f"EagerChoice(order=order, scores={scores})",
                0,
                "scores that are no tuple of 6 numbers",
            )
            for scores in ("(1.0,)", "('a',) * 6", "(float('nan'),) * 6", "torch.ones(6)", "5")
        ),
        (
            "EagerChoice(order=order, scores=None, rows=rows[1:])",
            0,
            "float32 [3, 3] as rows, expected float32 [4, 3]",
        ),
        (
            "EagerChoice(order=order, scores=None, extra=rows[0])",
            0,
            "extra with values, but EXTRA is 0",
        ),
        (
            "EagerChoice(order=order, scores=None, extra=rows[0])",
            1,
            "extra_weights without values, but EXTRA is 1",
        ),
        (
            "EagerChoice(order=order, scores=None, extra=rows[0], extra_weights=rows)",
            1,
            "float32 [4, 3] as extra_weights, expected float32 [6]",
        ),
    ],
)
def test_a_choice_for_the_reference_that_cannot_be_one(load, eager, extra, said):
    pruner = load(eager=eager, extra=extra)
    wanted = rf"mine\.py: prune_eagerly gave {re.escape(said)}; see 'Add"
    with pytest.raises(ConfigError, match=wanted):
        pruner.prune_eagerly(VISION, KEPT, CONFIG)


@pytest.mark.parametrize("count", ["-1", "7", "3.0", "True", "None", "'3'", "float('nan')", "[]"])
def test_a_count_that_cannot_be_one(load, count):
    pruner = load(count=count)
    with pytest.raises(
        ConfigError, match=r"mine\.py: count_adaptively gave .*expected an integer"
    ):
        pruner.count_adaptively(VISION)


@pytest.mark.parametrize("name", ["prune", "prune_eagerly", "count_adaptively"])
@pytest.mark.parametrize("failure", ["1 / 0", "exit(3)", "(_ for _ in ()).throw(Silent)"])
def test_a_function_that_fails(load, name, failure):
    key = {"prune": "graph", "prune_eagerly": "eager", "count_adaptively": "count"}[name]
    pruner = load(**{key: failure})
    asked = {"prune": (FEATURES, KEPT, CONFIG), "prune_eagerly": (VISION, KEPT, CONFIG)}
    with pytest.raises(ConfigError, match=r"mine\.py: line \d+: (Zero|SystemExit|Silent)"):
        getattr(pruner, name)(*asked.get(name, (VISION,)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("EXTRA = []", "EXTRA is [], expected 0 or 1"),
        ("EXTRA = True", "EXTRA is True, expected 0 or 1"),
        ("EXTRA = torch.ones(2)", "EXTRA is tensor([1., 1.]), expected 0 or 1"),
        ("DRAWS = 'yes'", "DRAWS is 'yes', expected True or False"),
        ("DRAWS = torch.ones(2)", "DRAWS is tensor([1., 1.]), expected True or False"),
        ("class Odd:\n    def __repr__(self): 1 / 0\nNEEDS = Odd()", "line 8: ZeroDivisionError"),
        ("del NEEDS\ndef __getattr__(name): 1 / 0", "line 8: ZeroDivisionError"),
    ],
)
def test_a_file_that_says_odd_things_of_itself(load, more, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(more=more)


@pytest.mark.parametrize("name", ["prune", "prune_eagerly", "count_adaptively"])
@pytest.mark.parametrize("odd", ["dict", "max", "3", "type('C', (), {})", "lambda *all: None"])
def test_a_function_that_is_none(load, tmp_path, name, odd):
    load()
    path = tmp_path / "mine.py"
    path.write_text(path.read_text(encoding="utf-8") + f"\n{name} = {odd}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"mine\.py: {name} is (no function|\(all\)), expected"):
        load_pruner(str(path))


def test_right_choices_are_taken(load):
    """Also with nothing removed, where `mix` and `extra` are ignored."""
    extra = "EagerChoice(order=order, scores=(-1.0, 0, 1, 2, float('inf'), 5), extra=ones[:3], "
    pruner = load(
        extra=1,
        graph="Kept(order=index, mix_BKN=torch.ones(1, kept, 6), extra_BN=weights)",
        eager=f"{extra}extra_weights=ones, rows=rows)",
    )
    assert pruner.prune(FEATURES, KEPT, CONFIG).extra_divisor == 1
    assert pruner.prune_eagerly(VISION, KEPT, CONFIG).scores[4] == math.inf
    assert pruner.count_adaptively(VISION) == 3
    assert load(extra=1).prune(FEATURES, TOKENS, CONFIG).extra_BN is None
    assert load(extra=1).prune_eagerly(VISION, TOKENS, CONFIG).extra is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("import os; os.replace = None", "os.replace"),
        ("import json; json.dumps = None", "json.dumps"),
        ("import builtins; builtins.isinstance = lambda *_: False", "builtins.isinstance"),
        ("import sys; sys.stdout = sys.stderr = None", "sys.stdout"),
        ("torch.topk = None", "torch.topk"),
        ("import gap_export.config.pruners as m; m.IVC = 3", "gap_export.config.pruners.IVC"),
        (
            "import gap_runtime.registry as m; del m.load_plugin",
            "gap_runtime.registry.load_plugin",
        ),
        ("torch.set_default_dtype(torch.float16)", "torch's usual dtype or device"),
        ("torch.set_default_device('meta')", "torch's usual dtype or device"),
    ],
)
def test_what_a_file_replaces_is_put_back_and_told(load, more, said):
    kept = (os.replace, json.dumps, isinstance, sys.stdout, torch.topk)
    with pytest.raises(ConfigError, match=rf"mine\.py: changed .*{re.escape(said)}.*; leave that"):
        load(more=more)
    assert (os.replace, json.dumps, isinstance, sys.stdout, torch.topk) == kept
    assert (torch.get_default_dtype(), torch.zeros(1).device.type) == (torch.float32, "cpu")
    assert callable(registry.load_plugin)


def test_what_a_function_replaces_is_put_back_and_told(load):
    kept = torch.topk
    pruner = load(graph="setattr(torch, 'topk', None)")
    with pytest.raises(ConfigError, match=r"mine\.py: changed torch\.topk; leave that"):
        pruner.prune(FEATURES, KEPT, CONFIG)
    assert torch.topk is kept
