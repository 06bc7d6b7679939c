"""Bundles on disk: opened when whole, refused when anything is not as exported."""

import dataclasses
import struct

import numpy as np
import pytest

from gap_runtime.bundle import Bundle, describe_file, embedding_rows, hash_file
from gap_runtime.errors import BundleError, ConfigError, HashError, SchemaError
from gap_runtime.manifest import read_manifest
from gap_runtime.tensors import StoredTensor


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
    assert Bundle.open(str(make_bundle())).manifest.schema == 1


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
        ("ratios", [{"ratio": 0.5, "kept": 9, "patches": 16}]),
        ("stages", []),
        ("dtype", "float8"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(make_bundle, edit_manifest, key, value):
    folder = make_bundle()
    edit_manifest(folder, **{key: value})
    with pytest.raises(SchemaError):
        read_manifest(folder)


@pytest.mark.parametrize("field", ["prefix", "suffix", "answer", "capacity", "extra"])
def test_a_layout_that_does_not_fit_the_graphs_is_refused(make_bundle, manifest, field):
    wrong = dataclasses.replace(manifest.layout, **{field: getattr(manifest.layout, field) + 1})
    with pytest.raises(SchemaError, match="layout"):
        read_manifest(make_bundle(layout=wrong))


def test_newer_schema_asks_for_an_upgrade(make_bundle, edit_manifest):
    folder = make_bundle()
    edit_manifest(folder, schema=2)
    with pytest.raises(SchemaError, match=r"schema 2, this version reads 1; upgrade gap-runtime"):
        Bundle.open(folder)


def test_newer_schema_is_named_even_when_its_keys_are_unknown(make_bundle, edit_manifest):
    folder = make_bundle()
    edit_manifest(folder, schema=2, novelty=True)
    with pytest.raises(SchemaError, match="upgrade gap-runtime"):
        Bundle.open(folder)


@pytest.mark.parametrize("schema", [0, -1, None, "1", "2", [1]])
def test_other_schema_asks_for_another_export(make_bundle, edit_manifest, schema):
    folder = make_bundle()
    edit_manifest(folder, schema=schema)
    with pytest.raises(SchemaError, match="this version reads 1; export again"):
        Bundle.open(folder)


@pytest.mark.parametrize("schema", [True, 1.0])
def test_schema_must_be_an_integer(make_bundle, edit_manifest, schema):
    folder = make_bundle()
    edit_manifest(folder, schema=schema)
    with pytest.raises(SchemaError, match="schema"):
        Bundle.open(folder)


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
    with pytest.raises(HashError, match=r"decoder\.onnx: sha256 .*the file has changed"):
        Bundle.open(folder)


def test_large_files_are_hashed_only_when_asked_for(make_bundle, monkeypatch):
    folder = make_bundle()
    path = folder / "weights.bin"
    path.write_bytes(bytes(path.stat().st_size))
    monkeypatch.setattr("gap_runtime.bundle._SMALL_BYTES", path.stat().st_size - 1)
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert Bundle.open(folder).folder == folder
    with pytest.raises(HashError, match=r"weights\.bin"):
        Bundle.open(folder, verify_all=True)


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
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read as JSON"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"manifest"'])
def test_json_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(SchemaError):
        Bundle.open(tmp_path)


def test_unknown_manifest_key_is_named(make_bundle, edit_manifest):
    folder = make_bundle()
    edit_manifest(folder, colour="red")
    with pytest.raises(SchemaError, match=r"manifest\.json: unknown key 'colour'; have schema"):
        Bundle.open(folder)


def test_wrong_type_in_the_manifest_is_located(make_bundle, edit_manifest):
    folder = make_bundle()
    edit_manifest(folder, ratios=[{"ratio": 0.5, "kept": "8", "patches": 16}])
    with pytest.raises(SchemaError, match=r"ratios\[0\]: kept: found '8' \(str\), expected int"):
        Bundle.open(folder)


def test_first_ratio_is_the_default(make_bundle):
    assert Bundle.open(make_bundle()).choose_ratio(None).ratio == 0.5


def test_a_ratio_is_found_by_its_value(make_bundle):
    assert Bundle.open(make_bundle()).choose_ratio(0.75).kept == 4


@pytest.mark.parametrize("ratio", [0.4, 0.50001, 0, -1, float("nan")])
def test_unknown_ratio_lists_what_there_is(make_bundle, ratio):
    bundle = Bundle.open(make_bundle())
    with pytest.raises(ConfigError, match=rf"no ratio {ratio:g}; have 0\.5, 0\.75"):
        bundle.choose_ratio(ratio)


def test_vision_stage_is_chosen_by_its_kept_count(manifest):
    assert manifest.stage("vision", 8).file == "vision-8.onnx"
    assert manifest.stage("vision", 4).file == "vision-4.onnx"


def test_decoder_stage_serves_every_count(manifest):
    assert manifest.stage("decoder").file == "decoder.onnx"
    assert manifest.stage("decoder", 4).file == "decoder.onnx"


def test_stage_that_is_not_there(manifest):
    with pytest.raises(BundleError, match="no vision stage for 5 kept"):
        manifest.stage("vision", 5)


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
    stored = StoredTensor(file="weights.bin", offset=8, dtype=dtype, shape=(3, 2))
    table = Bundle.open(make_bundle(weights=weights, embedding=stored)).map_embedding()
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


def test_hash_is_sha256(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    # The example of FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_file(path) == expected
    assert describe_file(path).size == 3


def test_hash_of_a_file_longer_than_a_block(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"a" * 1_000_000 + b"b" * 1_000_000)
    # From coreutils' sha256sum.
    assert hash_file(path) == "af1d4dc65b0fc058024a01f569b02a5ae351de9a8f9ea052a52c135d920c3e07"
