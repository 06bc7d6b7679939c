"""Bundles on disk: opened when whole, refused when a file is missing or not as exported."""

import contextlib
import dataclasses
import queue
import struct

import numpy as np
import pytest

from gap_runtime.bundle import bundle as bundle_module
from gap_runtime.bundle.bundle import Bundle, embedding_rows
from gap_runtime.bundle.manifest import SCHEMA
from gap_runtime.bundle.tensors import StoredTensor
from gap_runtime.errors import BundleError, ConfigError, HashError, SchemaError


def test_a_whole_bundle_opens(make_bundle):
    folder = make_bundle()
    bundle = Bundle.open(folder)
    assert bundle.folder == folder
    assert bundle.manifest.name == "tiny-8of16"
    assert set(bundle.manifest.files) == {
        "decoder.onnx",
        "vision-8.onnx",
        "vision-4.onnx",
        "weights.bin",
        "tokenizer.json",
    }


def test_a_path_may_be_text(make_bundle):
    assert Bundle.open(str(make_bundle())).manifest.schema == SCHEMA


def test_missing_file_is_named(make_bundle):
    folder = make_bundle()
    (folder / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"decoder\.onnx: missing"):
        Bundle.open(folder)


@pytest.mark.parametrize("content", [b"no graph", b"no graph at all, but longer", b""])
def test_changed_size_is_refused(make_bundle, content):
    folder = make_bundle()
    (folder / "decoder.onnx").write_bytes(content)
    with pytest.raises(HashError, match=rf"decoder\.onnx: {len(content)} bytes, expected 15"):
        Bundle.open(folder)


def test_changed_content_of_the_same_size_is_refused(make_bundle):
    folder = make_bundle()
    (folder / "decoder.onnx").write_bytes(b"no graph at alL")
    with pytest.raises(HashError, match=r"decoder\.onnx: BLAKE3 .*the file has changed"):
        Bundle.open(folder)


def test_large_files_are_hashed_only_when_asked_for(make_bundle, monkeypatch):
    folder = make_bundle()
    path = folder / "weights.bin"
    path.write_bytes(bytes(path.stat().st_size))
    monkeypatch.setattr("gap_runtime.bundle.bundle._SMALL_BYTES", path.stat().st_size - 1)
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert Bundle.open(folder).folder == folder
    with pytest.raises(HashError, match=r"weights\.bin"):
        Bundle.open(folder, verify_all=True)


def test_hashing_tells_how_far_it_is(make_bundle):
    folder, told = make_bundle(), []

    @contextlib.contextmanager
    def begin(total):
        told.append([total])
        yield told[-1].append

    files = Bundle.open(folder, verify_all=True, begin=begin).manifest.files.values()
    ((total, *parts),) = told
    assert total == sum(parts) == sum(entry.size for entry in files) > 0


def test_files_that_the_manifest_does_not_list_are_left_alone(make_bundle):
    folder = make_bundle()
    (folder / "engine.plan").write_bytes(b"built here")
    assert Bundle.open(folder).folder == folder


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(BundleError, match="nowhere: no such bundle folder"):
        Bundle.open(tmp_path / "nowhere")


def test_a_file_is_no_bundle(tmp_path):
    path = tmp_path / "bundle"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match="no such bundle folder"):
        Bundle.open(path)


def test_folder_without_a_manifest(tmp_path):
    with pytest.raises(BundleError, match=r"no manifest\.json in it, so it is no bundle"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"schema": 1', b"\xff\xfe{", b"schema: 1"])
def test_broken_json_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json: not valid JSON"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"manifest"'])
def test_json_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(SchemaError):
        Bundle.open(tmp_path)


def test_unknown_manifest_key_is_named(make_bundle, edit_manifest):
    folder = make_bundle()
    edit_manifest(folder, colour="red")
    with pytest.raises(SchemaError, match=r"manifest\.json: unknown key 'colour'; .*have schema"):
        Bundle.open(folder)


def test_wrong_type_in_the_manifest_is_located(make_bundle, edit_manifest):
    folder = make_bundle()
    entry = {"ratio": 0.5, "bucket": "", "kept": "8", "patches": 16, "extra": 0}
    edit_manifest(folder, ratios=[entry])
    with pytest.raises(SchemaError, match=r"ratios\[0\]\.kept: found '8' \(str\), expected int"):
        Bundle.open(folder)


def test_first_ratio_is_the_default(make_bundle):
    assert Bundle.open(make_bundle()).choose_ratio(None).ratio == 0.5


def test_a_ratio_is_found_by_its_value(make_bundle):
    assert Bundle.open(make_bundle()).choose_ratio(0.75).kept == 4


def test_a_ratio_is_found_as_it_was_shown(make_bundle):
    bundle = Bundle.open(make_bundle())
    first, *rest = bundle.manifest.ratios
    ratios = (dataclasses.replace(first, ratio=8 / 15), *rest)
    manifest = dataclasses.replace(bundle.manifest, ratios=ratios)
    bundle = dataclasses.replace(bundle, manifest=manifest)
    assert bundle.choose_ratio(0.533333) is bundle.choose_ratio(8 / 15) is ratios[0]
    assert bundle.choose_ratios([0.533333]) == (8 / 15,)
    with pytest.raises(ConfigError, match=r"no ratio 0\.53; have 0\.533333"):
        bundle.choose_ratio(0.53)


@pytest.mark.parametrize("ratio", [0.4, 0.50001, 0, -1, float("nan")])
def test_unknown_ratio_lists_what_there_is(make_bundle, ratio):
    bundle = Bundle.open(make_bundle())
    with pytest.raises(ConfigError, match=rf"no ratio {ratio:g}; have 0\.5, 0\.75"):
        bundle.choose_ratio(ratio)


@pytest.mark.parametrize("bucket", ["wide", "tall"])
def test_a_ratio_of_a_bucket(make_bundle, tiled, bucket):
    bundle = Bundle.open(make_bundle(**tiled))
    kept = {"wide": (7, 11), "tall": (8, 12)}[bucket]
    assert bundle.choose_ratio(None, bucket).kept == kept[0]
    assert bundle.choose_ratio(0.5, bucket).kept == kept[0]
    assert bundle.choose_ratio(0.25, bucket).kept == kept[1]
    assert {bundle.choose_ratio(ratio, bucket).bucket for ratio in (0.5, 0.25)} == {bucket}


def test_a_bundle_is_shown_on_one_line(make_bundle):
    folder = make_bundle()
    shown = repr(Bundle.open(folder))
    assert shown.startswith(f"Bundle('{folder}', llava, float32, pruner ")
    assert shown.endswith("ratios 0.5, 0.75)")


def test_an_entry_by_its_count(make_bundle):
    bundle = Bundle.open(make_bundle())
    assert bundle.choose_ratio(None, keep=4).ratio == 0.75
    with pytest.raises(ConfigError, match=r"no ratio keeps 5; have 8 of 16, 4 of 16; export with"):
        bundle.choose_ratio(None, keep=5)
    with pytest.raises(ConfigError, match="two ways to say one thing"):
        bundle.choose_ratio(0.5, keep=8)


def test_several_ratios_and_counts(make_bundle):
    bundle = Bundle.open(make_bundle())
    assert bundle.choose_ratios() == (0.5, 0.75)
    assert bundle.choose_ratios([0.75, 0.75]) == (0.75,)
    assert bundle.choose_ratios(keep=[4, 8]) == (0.75, 0.5)
    with pytest.raises(ConfigError, match=r"no ratio 0\.9"):
        bundle.choose_ratios([0.5, 0.9])


def test_a_count_that_only_one_kind_of_picture_has(make_bundle, tiled):
    """It is not what was asked for."""
    tiles = Bundle.open(make_bundle(**tiled))
    assert tiles.choose_ratio(None, "wide", keep=7).ratio == 0.5
    with pytest.raises(ConfigError, match="no ratio keeps 7; have 8 of 16, 12 of 16"):
        tiles.choose_ratios(keep=[7])


def test_a_ratio_of_any_bucket_is_the_first(make_bundle, tiled):
    bundle = Bundle.open(make_bundle(**tiled))
    assert bundle.choose_ratio(None).bucket == "wide"
    assert bundle.choose_ratio(0.25).kept == 11


@pytest.mark.parametrize("bucket", [None, "wide", "tall"])
def test_unknown_ratio_lists_each_one_once(make_bundle, tiled, bucket):
    bundle = Bundle.open(make_bundle(**tiled))
    with pytest.raises(ConfigError, match=r"no ratio 0\.75; have 0\.5, 0\.25; export with"):
        bundle.choose_ratio(0.75, bucket)


def test_vision_stage_is_chosen_by_its_bucket_too(manifest, tiled):
    changed = dataclasses.replace(manifest, **tiled)
    files = [changed.stage("vision", entry).file for entry in changed.ratios]
    assert files == [
        "vision-wide-7.onnx",
        "vision-wide-11.onnx",
        "vision-tall-8.onnx",
        "vision-tall-12.onnx",
    ]
    crossed = dataclasses.replace(changed.ratios[0], bucket="tall")
    with pytest.raises(BundleError, match="no vision stage for 7 kept"):
        changed.stage("vision", crossed)


def test_vision_stage_is_chosen_by_its_kept_count(manifest):
    first, second = manifest.ratios
    assert manifest.stage("vision", first).file == "vision-8.onnx"
    assert manifest.stage("vision", second).file == "vision-4.onnx"


def test_decoder_stage_serves_every_count(manifest):
    assert manifest.stage("decoder").file == "decoder.onnx"
    assert manifest.stage("decoder", manifest.ratios[1]).file == "decoder.onnx"


def test_stage_that_is_not_there(manifest):
    entry = dataclasses.replace(manifest.ratios[0], kept=5)
    with pytest.raises(BundleError, match="no vision stage for 5 kept"):
        manifest.stage("vision", entry)


TABLE = [[1.0, -2.0], [0.5, 3.140625], [65280.0, 0.0]]


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        ("float32", struct.pack("<6f", 1, -2, 0.5, 3.140625, 65280, 0)),
        ("float16", struct.pack("<6e", 1, -2, 0.5, 3.140625, 65280, 0)),
        # Sign, eight bits of exponent, seven of fraction.
        ("bfloat16", struct.pack("<6H", 0x3F80, 0xC000, 0x3F00, 0x4049, 0x477F, 0x0000)),
    ],
)
def test_embedding_rows_are_float32_of_any_dtype(make_bundle, dtype, weights):
    # A row for each of the decoder's tokens: the last ones are the first again.
    stored = StoredTensor(file="weights.bin", offset=8, dtype=dtype, shape=(12, 2))
    table = Bundle.open(make_bundle(weights=4 * weights, embedding=stored)).map_embedding()
    rows = embedding_rows(table, [2, 0, 1, 0])
    assert rows.dtype == np.float32
    assert rows.tolist() == [TABLE[2], TABLE[0], TABLE[1], TABLE[0]]


def test_embedding_rows_of_no_tokens(make_bundle):
    assert embedding_rows(Bundle.open(make_bundle()).map_embedding(), []).shape == (0, 2)


def test_embedding_is_mapped_and_cannot_be_written(make_bundle):
    table = Bundle.open(make_bundle()).map_embedding()
    assert isinstance(table, np.memmap)
    assert not table.flags.writeable


def test_stored_tensor_knows_its_bytes():
    stored = StoredTensor(file="x", offset=0, dtype="bfloat16", shape=(3, 5))
    assert stored.length == 30


def test_the_embedding_table_is_read_ahead(make_bundle, monkeypatch):
    asked = queue.Queue()
    monkeypatch.setattr(bundle_module, "read_blocks", lambda *part: asked.put(part) or [])
    bundle = Bundle.open(make_bundle())
    stored = bundle.manifest.embedding
    bundle.map_embedding()
    assert asked.get(timeout=60) == (bundle.folder / stored.file, stored.offset, stored.length)


def test_a_ratio_that_none_can_have_is_not_to_be_exported(make_bundle):
    with pytest.raises(ConfigError, match=r"no ratio 1\.5; have .*; ratios lie in \[0, 1\)$"):
        Bundle.open(make_bundle()).choose_ratio(1.5)
