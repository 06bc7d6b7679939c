"""Any change of a manifest ends in the same manifest when it is written again, or in one line."""

import copy
import dataclasses
import json

import pytest

from gap_runtime.bundle.layout import TokenLayout, count_kept, find_ratio
from gap_runtime.bundle.manifest import BundleLayout
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.errors import BundleError, ConfigError
from gap_runtime.records import dump_record

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

FEW = hypothesis.settings(
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
ODD = st.sampled_from(
    (
        *(None, True, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "0"),
        *(
            "a\nb",
            "../x",
            "\x1b[2J",
            "\ud800",
            "(" * 9,
            [],
            {},
            [0],
            [[1, 2]],
            {"a": 1},
            [1.0] * 4,
        ),
    )
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
COUNTS = st.integers(-2, 40)


def list_places(value, here=()):
    """Every place in plain data but the whole of it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield (*here, key)
        if isinstance(each, dict | list):
            yield from list_places(each, (*here, key))


def put(data, place, value):
    *path, last = place
    for key in path:
        data = data[key]
    data[last] = value


def read(folder, data):
    """The manifest, or the line that refuses it."""
    text = json.dumps(data).encode("utf-8", "surrogatepass")
    (folder / "manifest.json").write_bytes(text)
    try:
        return read_manifest(folder), None
    except BundleError as error:
        return None, str(error)


@FEW
@hypothesis.given(drawn=st.data())
def test_a_manifest_is_read_as_it_is_or_refused_in_a_line(
    make_bundle, make_samples, manifest, tmp_path, drawn
):
    folder = tmp_path / "bundle"
    if not folder.exists():
        make_bundle(**make_samples(manifest))
        (folder / "manifest.json").rename(folder / "whole.json")
    data = json.loads((folder / "whole.json").read_text("utf-8"))
    place = drawn.draw(st.sampled_from(list(list_places(data))))
    put(data, place, drawn.draw(ODD | PLAIN))
    found, said = read(folder, data)
    if found is None:
        assert said.isprintable()
        assert 0 < len(said) < 2000
    else:
        # Nothing was mended on the way: it would be written as it was read.
        again, _ = read(folder, dump_record(found))
        assert again == found


@FEW
@hypothesis.given(
    counts=st.fixed_dictionaries(dict.fromkeys(("prefix", "suffix", "answer"), COUNTS)),
    over=st.sampled_from((0, 0, 0, 1, -1)),
)
def test_a_layout_is_that_of_its_graphs_or_refused(make_bundle, tmp_path, counts, over):
    folder = tmp_path / "bundle"
    if not folder.exists():
        make_bundle()
        (folder / "manifest.json").rename(folder / "whole.json")
    data = copy.deepcopy(json.loads((folder / "whole.json").read_text("utf-8")))
    # Slots by hand, in the order in which they lie: text, 8 or 4 of 16 patches, text, answer.
    prompts = {8: counts["prefix"] + 8 + counts["suffix"]}
    prompts[4] = prompts[8] - 4
    capacity = prompts[8] + counts["answer"] + over
    data["layout"] = {**counts, "capacity": capacity}
    for stage in data["stages"]:
        for tensor in (*stage["inputs"], *stage["outputs"]):
            if tensor["name"] == "position_ids" and stage["role"] == "vision":
                tensor["shape"] = [1, prompts[stage["kept"]]]
            if tensor["name"].startswith("cache_"):
                tensor["shape"][2] = capacity
    found, said = read(folder, data)
    usable = min(counts["prefix"], counts["suffix"]) >= 0 and counts["answer"] >= 1 and not over
    if usable and min(prompts.values()) > 0:
        assert said is None
        assert found.layout == BundleLayout(**counts, capacity=capacity)
    else:
        assert "layout" in said or "shape" in said


@hypothesis.given(
    patches=st.integers(1, 10**6), ratio=st.floats() | st.sampled_from((0.5, 0.9, 1 / 3, 1.0))
)
def test_any_ratio_keeps_some_patches_or_is_refused(patches, ratio):
    least = patches * (1 - ratio)
    if not 0 <= ratio < 1 or least < 0.5 - 1e-6:
        with pytest.raises(ConfigError) as caught:
            count_kept(patches, ratio)
        assert str(caught.value).isprintable()
    elif least > 0.5 + 1e-6:
        assert abs(count_kept(patches, ratio) - least) <= 0.5 + 1e-6


@hypothesis.given(patches=st.integers(1, 10**5), drawn=st.data())
def test_any_count_is_that_of_its_ratio(patches, drawn):
    kept = drawn.draw(st.integers(1, patches))
    assert count_kept(patches, find_ratio(patches, kept)) == kept


@hypothesis.given(counts=st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
def test_slots_and_positions_differ_by_what_was_removed(counts):
    names = [field.name for field in dataclasses.fields(TokenLayout)]
    layout = TokenLayout(**dict(zip(names, counts, strict=True)))
    _, patches, kept, extra, *_ = counts
    assert layout.positions - layout.capacity == patches - kept
    assert layout.capacity == sum(counts) - patches
    assert layout.visual == kept + extra
