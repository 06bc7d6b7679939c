"""Manifests: what one may say of layout, ratios, buckets, graphs and phrases."""

import dataclasses

import pytest

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import SCHEMA
from gap_runtime.bundle.tensors import FREE_ROWS
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.errors import SchemaError
from gap_runtime.machines.target import load_target


def test_what_is_written_is_what_is_read(make_bundle, manifest):
    found = read_manifest(make_bundle())
    assert set(found.files) > {"decoder.onnx", "weights.bin"}
    assert dataclasses.replace(found, files={}) == manifest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding", {"file": "lost.bin", "offset": 8, "dtype": "float32", "shape": [12, 2]}),
        ("embedding", {"file": "weights.bin", "offset": 9, "dtype": "float32", "shape": [12, 2]}),
        ("embedding", {"file": "weights.bin", "offset": -8, "dtype": "float32", "shape": [12, 2]}),
        ("embedding", {"file": "weights.bin", "offset": 8, "dtype": "float32", "shape": [6, 4]}),
        ("embedding", {"file": "weights.bin", "offset": 8, "dtype": "float8", "shape": [12, 2]}),
        ("cache", {"layers": 1, "heads": 2, "head_dim": 2, "dtype": "float32"}),
        ("cache", {"layers": 1, "heads": 1, "head_dim": 2, "dtype": "float16"}),
        ("box", {"attempt": "x", "pattern": "[", "scale": 1.0, "frame": "original"}),
        ("box", {"attempt": "x", "pattern": "x", "scale": 1.0, "frame": "original"}),
        ("ratios", []),
        ("ratios", [{"ratio": 0.5, "bucket": "", "kept": 9, "patches": 16, "extra": 0}]),
        ("buckets", []),
        ("stages", []),
        ("dtype", "float8"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(make_bundle, edit_manifest, key, value):
    folder = make_bundle()
    edit_manifest(folder, **{key: value})
    with pytest.raises(SchemaError):
        read_manifest(folder)


@pytest.mark.parametrize("field", ["prefix", "suffix", "answer", "capacity"])
def test_a_layout_that_does_not_fit_the_graphs_is_refused(make_bundle, manifest, field):
    wrong = dataclasses.replace(manifest.layout, **{field: getattr(manifest.layout, field) + 1})
    with pytest.raises(SchemaError, match=r"json: (layout\.capacity|cache) does not fit the gra"):
        read_manifest(make_bundle(layout=wrong))


def refused_key(folder):
    """The key that a bundle's manifest is refused for."""
    with pytest.raises(SchemaError) as caught:
        read_manifest(folder)
    told = str(caught.value).rpartition("manifest.json: ")[2]
    assert told.endswith(" does not fit the graphs; export again")
    return told.partition(" ")[0]


@pytest.mark.parametrize("field", ["prefix", "suffix"])
def test_a_prompt_of_another_length_than_the_graphs_is_refused(make_bundle, manifest, field):
    # The answer makes up for it, so that the cache fits.
    layout = dataclasses.replace(
        manifest.layout,
        **{field: getattr(manifest.layout, field) + 1, "answer": manifest.layout.answer - 1},
    )
    assert refused_key(make_bundle(layout=layout)) == "layout"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"patches": 15}, "ratios"),
        ({"bucket": "other"}, "ratios"),
        ({"kept": 0}, "ratios"),
        ({"kept": -1}, "ratios"),
        ({"extra": -1}, "ratios"),
        ({"extra": 1}, "ratios"),  # without a rule where it goes
        ({"kept": 9}, "layout.capacity"),
        ({"extra": 5}, "layout.capacity"),
    ],
)
def test_a_ratio_that_does_not_fit_is_refused(make_bundle, manifest, changes, key):
    first, second = manifest.ratios
    ratios = (first, dataclasses.replace(second, **changes))
    assert refused_key(make_bundle(ratios=ratios)) == key


def test_a_ratio_without_a_graph_is_refused(make_bundle, manifest):
    first, second = manifest.ratios
    folder = make_bundle(ratios=(first, dataclasses.replace(second, kept=5)))
    with pytest.raises(SchemaError, match="no vision stage for 5 kept"):
        read_manifest(folder)


def test_a_ratio_keeps_no_more_than_there_is(make_bundle, manifest):
    # A bucket of fewer patches than the graph was made for.
    bucket = dataclasses.replace(manifest.buckets[0], grids=((1, 7),))
    ratios = tuple(dataclasses.replace(entry, patches=7) for entry in manifest.ratios)
    assert refused_key(make_bundle(buckets=(bucket,), ratios=ratios)) == "ratios"


def test_capacity_is_that_of_the_ratio_with_most_slots(make_bundle, tiled, with_extra):
    # Of tiles the largest count stands last; an extra token takes a slot too.
    assert max(entry.kept for entry in tiled["ratios"]) == tiled["ratios"][-1].kept == 12
    assert read_manifest(make_bundle(**tiled)).layout.capacity == 1 + 12 + 7 + 5
    assert with_extra["layout"].capacity == 1 + 8 + 1 + 7 + 5


@pytest.mark.parametrize("capacity", [24, 26])
def test_capacity_of_another_bucket_is_refused(make_bundle, tiled, capacity):
    layout = dataclasses.replace(tiled["layout"], capacity=capacity)
    key = refused_key(make_bundle(**{**tiled, "layout": layout}))
    assert key in {"cache", "layout.capacity"}


def test_extra_token_has_a_slot_behind_the_kept_ones(make_bundle, with_extra):
    manifest = read_manifest(make_bundle(**with_extra))
    first, second = (manifest.layout.at(entry) for entry in manifest.ratios)
    assert (first.kept, first.extra, first.visual, first.prompt) == (8, 1, 9, 17)
    assert (second.kept, second.extra, second.visual, second.prompt) == (4, 0, 4, 12)
    # Position IDs count it besides all patches.
    assert (first.positions, second.positions) == (30, 29)
    assert manifest.layout.capacity == first.capacity == 22


def test_extra_token_that_the_graph_does_not_give_is_refused(make_bundle, manifest, with_extra):
    # As many visual tokens as the graph gives, but one of them is said to be no patch.
    first, second = with_extra["ratios"]
    stages = tuple(
        dataclasses.replace(stage, kept=7) if stage.kept == 8 else stage
        for stage in manifest.stages
    )
    changes = {
        "pruning": with_extra["pruning"],
        "ratios": (dataclasses.replace(first, kept=7), second),
        "stages": stages,
    }
    assert refused_key(make_bundle(**changes)) == "layout"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"grids": ()}, "buckets"),
        ({"grids": ((0, 4), (4, 4))}, "buckets"),
        ({"grids": ((4, 0), (4, 4))}, "buckets"),
        ({"grids": ((-4, -4),)}, "buckets"),
        ({"fixed": (16,)}, "ratios"),  # in range, for it is one token more
        ({"fixed": (17,)}, "buckets"),
        ({"fixed": (-1,)}, "buckets"),
        ({"fixed": (3, 3)}, "buckets"),
        ({"fixed": (5, 3)}, "buckets"),
        ({"canvas": (8, 8)}, "buckets"),
        ({"grids": ((4, 5),)}, "ratios"),
        ({"grids": ((3, 4),), "fixed": (0, 5, 9, 15)}, "ratios"),  # half of what is kept
    ],
)
def test_a_bucket_that_does_not_fit_is_refused(make_bundle, manifest, changes, key):
    bucket = dataclasses.replace(manifest.buckets[0], **changes)
    assert refused_key(make_bundle(buckets=(bucket,))) == key


def test_fewer_extra_tokens_than_none_are_refused(make_bundle, with_extra):
    first, second = with_extra["ratios"]
    ratios = (first, dataclasses.replace(second, extra=-1))
    assert refused_key(make_bundle(**{**with_extra, "ratios": ratios})) == "ratios"


def change_tensor(stage, name, shape):
    """The stage with another shape of one of its inputs or outputs."""
    changed = {
        side: tuple(
            dataclasses.replace(spec, shape=shape) if spec.name == name else spec
            for spec in getattr(stage, side)
        )
        for side in ("inputs", "outputs")
    }
    return dataclasses.replace(stage, **changed)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pixels", (1, 3, 8, 9)),
        ("pixels", (1, 1, 3, 8, 8)),
        ("visual_tokens", (1, 3, 2)),
        ("visual_tokens", (1, 4, 3)),
        ("kept_index", (1, 3)),
        ("position_ids", (1, 11)),
    ],
)
def test_a_vision_graph_of_another_shape_is_refused(make_bundle, manifest, name, shape):
    first, second, decoder = manifest.stages
    stages = (first, change_tensor(second, name, shape), decoder)
    assert refused_key(make_bundle(stages=stages)) == "layout"


@pytest.mark.parametrize(("given", "taken"), [(3, 3), (1, 3), (3, 1)])
def test_both_graphs_have_as_many_axes_of_positions(make_bundle, manifest, given, taken):
    *visions, decoder = manifest.stages
    stages = (
        *(change_tensor(each, "position_ids", (given, shape_of(each)[1])) for each in visions),
        change_tensor(decoder, "position_ids", (taken, FREE_ROWS)),
    )
    if given == taken:
        assert read_manifest(make_bundle(stages=stages)).stages == stages
    else:
        assert refused_key(make_bundle(stages=stages)) == "layout"


def shape_of(stage):
    """Of a vision graph's position IDs."""
    (spec,) = [each for each in stage.outputs if each.name == "position_ids"]
    return spec.shape


def test_several_grids_and_fixed_tokens_add_up(make_bundle, manifest):
    bucket = dataclasses.replace(
        manifest.buckets[0], grids=((1, 5), (2, 4)), strip=2, fixed=(0, 8, 15)
    )
    assert bucket.patches == 16
    assert read_manifest(make_bundle(buckets=(bucket,))).buckets == (bucket,)


def test_a_second_bucket_needs_tiles(make_bundle, manifest):
    other = dataclasses.replace(manifest.buckets[0], name="other")
    assert refused_key(make_bundle(buckets=(*manifest.buckets, other))) == "buckets"


def test_a_bundle_of_tiles_opens(make_bundle, manifest, tiled):
    found = read_manifest(make_bundle(**tiled))
    assert dataclasses.replace(found, files={}) == dataclasses.replace(manifest, **tiled)
    assert [bucket.patches for bucket in found.buckets] == [14, 16]
    assert found.bucket("tall").canvas == (8, 16)
    with pytest.raises(SchemaError, match="no bucket 'square'"):
        found.bucket("square")


@pytest.mark.parametrize(
    "canvases",
    [
        ((16, 8), (8, 16), (16, 12)),
        ((16, 8), (8, 16), (0, 8)),
        ((16, 8), (8, 16), (8, 0)),
        ((16, 8), (8, 16), (-8, 8)),
        ((16, 8), (8, 16), (8, -16)),
        ((16, 8), (8, 16), (4, 4)),
    ],
)
def test_canvases_are_positive_multiples_of_the_side(make_bundle, tiled, canvases):
    spec = dataclasses.replace(tiled["preprocess"], canvases=canvases)
    assert refused_key(make_bundle(**{**tiled, "preprocess": spec})) == "preprocess.canvases"


def test_tiles_need_a_canvas_to_lie_on(make_bundle, tiled):
    spec = dataclasses.replace(tiled["preprocess"], canvases=())
    assert refused_key(make_bundle(**{**tiled, "preprocess": spec})) == "buckets"


@pytest.mark.parametrize(
    "changes",
    [
        {"canvas": None},
        {"canvas": (16, 12)},
        {"canvas": (0, 8)},
        {"canvas": (-16, -8)},
        {"canvas": (24, 8)},  # of whole tiles, but not among the canvases
        {"name": "tall"},
        {"grids": ((2, 2),)},
        {"grids": ((2, 2), (2, 2), (2, 4))},
        {"grids": ((2, 3), (2, 4))},
        {"grids": ((3, 3), (2, 4))},
        {"grids": ((2, 2), (0, 4))},
        {"fixed": (8, 14)},
        {"fixed": (13, 8)},
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_bucket_of_tiles_that_does_not_fit_is_refused(make_bundle, tiled, changes, place):
    wide, tall = tiled["buckets"]
    wrong = dataclasses.replace(wide, **changes)
    buckets = (wrong, tall) if place == 0 else (tall, wrong)
    assert refused_key(make_bundle(**{**tiled, "buckets": buckets})) == "buckets"


def test_a_bucket_without_a_ratio_is_refused(make_bundle, tiled):
    changes = {**tiled, "ratios": tiled["ratios"][2:]}
    assert refused_key(make_bundle(**changes)) == "ratios"


def test_a_ratio_that_keeps_fixed_tokens_alone_is_refused(make_bundle, tiled):
    first, *others = tiled["ratios"]
    changes = {**tiled, "ratios": (dataclasses.replace(first, kept=2), *others)}
    assert refused_key(make_bundle(**changes)) == "ratios"


def test_tiles_need_graphs_of_as_many_views(make_bundle, tiled):
    # A graph for two tiles, a canvas of four.
    wide, tall = tiled["buckets"]
    buckets = (dataclasses.replace(wide, canvas=(16, 16)), tall)
    assert refused_key(make_bundle(**{**tiled, "buckets": buckets})) == "layout"


@pytest.mark.parametrize(
    ("mode", "canvas", "shape"),
    [
        ("pad", None, (1, 3, 8, 8)),
        ("anyres", (16, 8), (1, 3, 3, 8, 8)),
        ("anyres", (24, 16), (1, 7, 3, 8, 8)),
        # A picture that keeps its shape: (width, height) on the left, height first on the right.
        ("resize", (24, 16), (1, 3, 16, 24)),
    ],
)
def test_the_shape_of_pixels(manifest, mode, canvas, shape):
    bucket = dataclasses.replace(manifest.buckets[0], canvas=canvas)
    spec = dataclasses.replace(manifest.preprocess, mode=mode)
    assert spec.pixel_shape(bucket) == shape


def test_pictures_of_another_size_than_the_graphs_are_refused(make_bundle, manifest):
    spec = dataclasses.replace(manifest.preprocess, side=16)
    assert refused_key(make_bundle(preprocess=spec)) == "layout"


@pytest.mark.parametrize("side", [0, -8])
def test_pictures_without_a_size_are_refused(make_bundle, tiled, side):
    spec = dataclasses.replace(tiled["preprocess"], side=side)
    with pytest.raises(SchemaError, match=f"preprocess.side is {side}, expected pixels"):
        read_manifest(make_bundle(**{**tiled, "preprocess": spec}))


def test_a_phrase_that_the_graphs_read_opens(make_bundle, told_by_clip):
    found = read_manifest(make_bundle(**told_by_clip))
    assert found.phrase == told_by_clip["phrase"]
    assert "words.json" in found.files
    assert found.stage("text").file == "text.onnx"


def test_a_phrase_by_embeddings_opens(make_bundle, told_by_embeddings):
    assert read_manifest(make_bundle(**told_by_embeddings)).phrase.source == "embeddings"


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "embeddings"},
        {"source": "embeddings", "tokenizer": None},
        {"tokenizer": None},
        {"length": 7},
    ],
)
def test_a_phrase_that_does_not_fit_the_text_graph_is_refused(make_bundle, told_by_clip, changes):
    phrase = dataclasses.replace(told_by_clip["phrase"], **changes)
    assert refused_key(make_bundle(**{**told_by_clip, "phrase": phrase})) == "phrase"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "float61"}, "dtype 'float61' is unknown; did you mean float16"),
        ({"embedding": "float8"}, "embedding.dtype 'float8' is unknown; did you mean"),
        ({"embedding": "int64"}, "embedding.dtype 'int64' is unknown; have float32, float16"),
        ({"positions": "gaps"}, "pruning.positions 'gaps' is unknown; did you mean gap? have"),
        ({"role": "visoin"}, "stages[0].role 'visoin' is unknown; did you mean vision? have"),
        ({"frame": "orignal"}, "box.frame 'orignal' is unknown; did you mean original? have"),
    ],
)
def test_a_word_that_there_is_not_is_refused_with_its_path(
    make_bundle, manifest, edit_manifest, changes, said
):
    folder = make_bundle()
    ((name, word),) = changes.items()
    data = manifest.dump()
    if name == "embedding":
        edit_manifest(folder, embedding={**data["embedding"], "dtype": word})
    elif name == "positions":
        edit_manifest(folder, pruning={**data["pruning"], "positions": word})
    elif name == "role":
        edit_manifest(folder, stages=[{**data["stages"][0], "role": word}, *data["stages"][1:]])
    elif name == "frame":
        edit_manifest(folder, box={**data["box"], "frame": word})
    else:
        edit_manifest(folder, dtype=word)
    with pytest.raises(SchemaError) as caught:
        read_manifest(folder)
    assert said in str(caught.value)


def test_a_phrase_without_a_text_graph_is_refused(make_bundle, told_by_clip):
    stages = tuple(stage for stage in told_by_clip["stages"] if stage.role != "text")
    assert refused_key(make_bundle(**{**told_by_clip, "stages": stages})) == "phrase"


def test_a_graph_that_reads_a_phrase_that_nobody_tells_is_refused(make_bundle, told_by_clip):
    assert refused_key(make_bundle(**{**told_by_clip, "phrase": None})) == "phrase"


def test_a_phrase_of_another_width_is_refused(make_bundle, told_by_clip, told_by_embeddings):
    # The graph reads three numbers, an embedding has two.
    changes = {**told_by_embeddings, "stages": told_by_clip["stages"]}
    assert refused_key(make_bundle(**changes)) == "phrase"


def test_a_phrase_of_another_width_than_the_text_graphs_is_refused(make_bundle, told_by_clip):
    silent, told, *others = told_by_clip["stages"]
    stages = (silent, change_tensor(told, "text_features", (1, 4)), *others)
    assert refused_key(make_bundle(**{**told_by_clip, "stages": stages})) == "phrase"


def test_a_phrase_by_embeddings_has_the_models_own_tokenizer(make_bundle, told_by_embeddings):
    phrase = dataclasses.replace(told_by_embeddings["phrase"], tokenizer="words.json")
    assert refused_key(make_bundle(**{**told_by_embeddings, "phrase": phrase})) == "phrase"


def test_a_phrases_tokenizer_is_among_the_files(make_bundle, edit_manifest, told_by_clip):
    folder = make_bundle(**told_by_clip)
    edit_manifest(
        folder, phrase={"source": "clip", "tokenizer": "lost.json", "length": 6, "end_id": 10}
    )
    with pytest.raises(SchemaError, match=r"'lost\.json' is not among its files"):
        read_manifest(folder)


def test_newer_schema_asks_for_an_upgrade(make_bundle, edit_manifest):
    folder = make_bundle()
    edit_manifest(folder, schema=SCHEMA + 1)
    said = f"schema {SCHEMA + 1}, this version reads {SCHEMA}; upgrade gap-runtime"
    with pytest.raises(SchemaError, match=said):
        Bundle.open(folder)


def test_newer_schema_is_named_even_when_its_keys_are_unknown(make_bundle, edit_manifest):
    folder = make_bundle()
    edit_manifest(folder, schema=SCHEMA + 1, novelty=True)
    with pytest.raises(SchemaError, match="upgrade gap-runtime"):
        Bundle.open(folder)


@pytest.mark.parametrize("schema", [0, -1, 1, SCHEMA - 1, None, str(SCHEMA), [SCHEMA]])
def test_other_schema_asks_for_another_export(make_bundle, edit_manifest, schema):
    folder = make_bundle()
    edit_manifest(folder, schema=schema)
    with pytest.raises(SchemaError, match=f"this version reads {SCHEMA}; export again"):
        Bundle.open(folder)


@pytest.mark.parametrize("schema", [True, float(SCHEMA)])
def test_schema_must_be_an_integer(make_bundle, edit_manifest, schema):
    folder = make_bundle()
    edit_manifest(folder, schema=schema)
    with pytest.raises(SchemaError, match="schema"):
        Bundle.open(folder)


def test_a_manifest_from_before_the_facts_of_targets_opens(make_bundle, manifest, edit_manifest):
    """As bundles of schema 4 were written before targets said what their backend can."""
    folder = make_bundle()
    target = manifest.dump()["target"]
    for name in ("caches_in_place", "takes_zero_points", "provider", "block", "dtypes"):
        del target[name]
    edit_manifest(folder, target=target)
    found = Bundle.open(folder).manifest.target
    assert found == manifest.target
    assert set(target) == {
        *("name", "description", "backend", "dialect", "opset", "dtype", "packages"),
        *("compute_capabilities", "workspace_mib", "memory_mib"),
    }


@pytest.mark.parametrize(
    ("name", "in_place", "zero_points"),
    [
        *((name, True, True) for name in ("cpu", "standard", "portable")),
        *((name, True, False) for name in ("rtx", "datacenter-ada", "jetson-orin-jp7")),
        ("jetson-orin-jp6", False, False),
    ],
)
def test_what_targets_say_is_what_was_guessed_before(name, in_place, zero_points):
    """In place from opset 24 on or without engines; zero points where no engine is built."""
    found = load_target(name)
    assert (found.caches_in_place, found.takes_zero_points) == (in_place, zero_points)
    assert found.caches_in_place == (found.opset >= 24 or not found.packages)
    assert found.takes_zero_points == (not found.packages)
