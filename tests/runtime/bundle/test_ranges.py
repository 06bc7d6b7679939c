"""Every value of a manifest that nothing could mean is refused, and named by its place."""

import dataclasses
import json
import math
from types import NoneType

import pytest

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.ranges import find_absurd_value, is_plain_name
from gap_runtime.errors import BundleError, SchemaError


@pytest.fixture
def folder(make_bundle, make_samples, manifest):
    return make_bundle(**make_samples(manifest))


def put(data, place, value):
    *path, last = place
    for key in path:
        data = data[key]
    data[last] = value


SAMPLE = ("reference", "samples", 0)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("name",), "../../.ssh", "name is '../../.ssh'"),
        (("name",), "a\nb", "name is"),
        (("name",), "", "name is ''"),
        (("stages", 0, "name"), "../x", "stages[0].name"),
        (("target", "name"), "/tmp", "target.name"),
        (("target", "backend"), "", "target.backend"),
        (("target", "opset"), -1, "target.opset is -1"),
        (("target", "workspace_mib"), 0, "target.workspace_mib is 0"),
        (("target", "memory_mib"), -5, "target.memory_mib is -5"),
        (("target", "compute_capabilities"), ["x"], "target.compute_capabilities is 'x'"),
        (("target", "block"), 0, "target.block is 0"),
        (("buckets", 0, "strip"), 0, "buckets[0].strip is 0"),
        (("family",), "../x", "family is '../x'"),
        (("pruning", "seed"), -1, "pruning.seed is -1"),
        (("source", "index_sha256"), "", "source.index_sha256"),
        (("layout", "prefix"), -1, "layout.prefix is -1"),
        (("layout", "answer"), 0, "layout.answer is 0"),
        (("cache", "layers"), 0, "cache.layers is 0"),
        (("ratios", 0, "ratio"), 1.0, "ratios[0].ratio is 1.0"),
        (("ratios", 0, "ratio"), -0.5, "ratios[0].ratio is -0.5"),
        (("ratios", 1, "ratio"), 0.5, "each ratio once"),
        (("preprocess", "fill"), [0, 0, 256], "preprocess.fill"),
        (("preprocess", "mean"), [0, 0, 1e30], "preprocess.mean"),
        (("preprocess", "std"), [0.5, 0.5, 0], "preprocess.std"),
        (("prompt", "template"), "USER: <image> ?", "prompt.template"),
        (("prompt", "template"), "{phrase}", "prompt.template"),
        (("prompt", "stop_ids"), [-1], "prompt.stop_ids is (-1,)"),
        (("box", "scale"), 0.0, "box.scale is 0.0"),
        (("box", "attempt"), "nothing", "reference.samples[0].boxes"),
        (("box", "form"), "no digits", "box.form"),
        (("box", "pattern"), "(" * 600, "box.pattern"),
        (("box", "pattern"), "(a{1000}){1000}", "box.pattern"),
        (("box", "attempt"), "(?x) a", "box.attempt"),
        ((*SAMPLE, "token_ids"), [-1], "reference.samples[0].token_ids"),
        ((*SAMPLE, "prompt_ids"), [10**6], "reference.samples[0].prompt_ids"),
        ((*SAMPLE, "token_margins"), [-0.5, 0.5], "reference.samples[0].token_margins"),
        ((*SAMPLE, "token_margins"), [], "reference.samples[0].token_margins"),
        ((*SAMPLE, "boxes"), [[5, 5, 1, 1]], "reference.samples[0].boxes"),
        ((*SAMPLE, "answer"), "[" * 10_001, "at most 10,000 characters"),
        ((*SAMPLE, "kept"), 5, "reference.samples[0].kept is 5"),
        ((*SAMPLE, "ratio"), 0.9, "reference.samples[0].kept"),
        ((*SAMPLE, "key"), "00-/kept-4", "reference.samples"),
        (("stages", 0, "inputs", 0, "shape"), [1, 3, 0, 8], "stages[0]: shape of pixels"),
    ],
)
def test_an_absurd_value_is_named(folder, place, value, said):
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    put(data, place, value)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SchemaError, match=r"manifest\.json: ") as caught:
        Bundle.open(folder)
    assert said in str(caught.value)
    assert str(caught.value).endswith("; export again")


ABSURD = {
    int: (-1, 2**62),
    float: (-1e300, 1e300),
    str: ("", "\x1b[31m\n", "y" * 20_000),
    list: ({}, "x"),
    dict: ("x", []),
    bool: (2, "x"),
    NoneType: ("\x1b[31m\n", -1),
}
"""By type, what no value of a manifest can be."""
PHRASE = ("reference", "samples", "*", "phrase")
"""Any text that is not too long; the check compares its tokens."""


def list_values(value, here=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield (*here, key), each
        if isinstance(each, dict | list):
            yield from list_values(each, (*here, key))


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_no_value_may_be_absurd(folder, *, first):
    """Of every field of a manifest: one that is added without a check is found here.

    The default run has one place for each field, and one value for it.
    """
    path = folder / "manifest.json"
    whole = path.read_text(encoding="utf-8")
    accepted, seen = [], set()
    for number, (place, value) in enumerate(list_values(json.loads(whole))):
        field = tuple("*" if isinstance(key, int) else key for key in place)
        if first and field in seen:
            continue
        seen.add(field)
        values = ABSURD[type(value)]
        for absurd in [values[number % len(values)]] if first else values:
            # The only bucket has no name.
            if absurd == value or (field, absurd) == (PHRASE, "\x1b[31m\n"):
                continue
            data = json.loads(whole)
            put(data, place, absurd)
            path.write_text(json.dumps(data), encoding="utf-8")
            if is_read(folder):
                accepted.append((place, absurd))
    assert accepted == []


def is_read(folder):
    try:
        Bundle.open(folder)
    except BundleError as error:
        return not str(error).isprintable()
    return True


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("stages", 0, "ratio"), 0.25, "stages does not fit"),
        (("stages", 0, "kept"), 4, "no vision stage for 8 kept"),
        (("stages", 1, "bucket"), "wide", "no vision stage for 4 kept"),
        (("embedding", "shape", 0), 3, "embedding.shape does not fit"),
        (("target", "dtypes"), ["bfloat16"], "target.dtypes does not fit"),
    ],
)
def test_values_that_do_not_fit_each_other(make_bundle, place, value, said):
    folder = make_bundle()
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    put(data, place, value)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SchemaError) as caught:
        Bundle.open(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize("place", [("box", "form"), ("prompt", "template"), ("family",)])
def test_halves_of_characters_are_no_text(make_bundle, place):
    """JSON can name them, but no tokenizer and no terminal takes them."""
    folder = make_bundle()
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    put(data, place, "[# \ud83d {phrase} <image>")
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SchemaError, match="halves of characters"):
        Bundle.open(folder)


def test_a_count_is_that_of_its_ratio(make_bundle):
    """A reader of `info` would believe that a quarter had been removed."""
    folder = make_bundle()
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["ratios"][0]["ratio"] = data["stages"][0]["ratio"] = 0.25
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SchemaError, match="ratios does not fit"):
        Bundle.open(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, 2**63])
@pytest.mark.parametrize("place", [("box", "scale"), ("layout", "answer")])
def test_numbers_that_no_machine_holds(folder, place, value):
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    put(data, place, value)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError, match=r"finite|64 bits|digits|expected"):
        Bundle.open(folder)


@pytest.mark.parametrize("file", ["../x", "/x", "a/../../x", "", ".", "a\nb", "a\\b"])
def test_files_lie_inside_the_bundle(manifest, file):
    entry = dataclasses.replace(manifest, files={file: None})
    assert "files is" in str(find_absurd_value(entry))


def test_a_whole_manifest_has_none(folder):
    assert find_absurd_value(Bundle.open(folder).manifest) is None


@pytest.mark.parametrize(
    ("name", "is_plain"), [("a", True), ("a b-1.2", True), ("a" * 201, False), ("..", False)]
)
def test_plain_names(name, is_plain):
    assert is_plain_name(name) is is_plain
