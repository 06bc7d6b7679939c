"""A minimal bundle with made-up graphs, for tests that run no graph."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gap_runtime.bundle import describe_file
from gap_runtime.manifest import (
    BoxFormat,
    BundleLayout,
    CacheShape,
    Manifest,
    Preprocess,
    Prompt,
    Pruning,
    RatioEntry,
    Source,
    Stage,
)
from gap_runtime.tensors import StoredTensor, TensorSpec

BOX_WORD = "[0.25,0.25,0.75,0.50]"
WORDS = (
    *("<unk>", "<image>", "USER:", "ASSISTANT:", "Where", "is", "the", "red", "mug", "?"),
    *("</s>", BOX_WORD),
)


@pytest.fixture
def llava_box():
    # Copied from gap_export/models/llava.py.
    return BoxFormat(
        attempt=r"\[[^\[\]]*\]?",
        pattern=(
            r"\[\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*,"
            r"\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*\]"
        ),
        scale=1.0,
        frame="padded-square",
    )


@pytest.fixture
def prompt():
    return Prompt(
        template="USER: <image> Where is {phrase} ? ASSISTANT:",
        image_token="<image>",
        tokenizer="tokenizer.json",
        stop_ids=(10,),
    )


@pytest.fixture
def layout():
    return BundleLayout(
        prefix=1, patches=16, grid=(4, 4), extra=0, suffix=7, answer=5, capacity=21
    )


@pytest.fixture
def tokenizer_file(tmp_path):
    """One token per word of WORDS, numbered in order."""
    words = {word: k for k, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<image>", "</s>"])
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def manifest(llava_box, prompt, layout):
    def spec(name, *shape, dtype="float32"):
        return TensorSpec(name=name, dtype=dtype, shape=shape, meaning=f"the {name}")

    def vision(ratio, kept):
        return Stage(
            name=f"vision-{kept}",
            role="vision",
            file=f"vision-{kept}.onnx",
            ratio=ratio,
            kept=kept,
            inputs=(spec("pixels", 1, 3, 8, 8),),
            outputs=(
                spec("visual_tokens", 1, kept, 2),
                spec("position_ids", 1, layout.at(kept).prompt, dtype="int64"),
            ),
        )

    caches = [spec(f"cache_{part}_00", 1, 1, layout.capacity, 2) for part in ("key", "value")]

    decoder = Stage(
        name="decoder",
        role="decoder",
        file="decoder.onnx",
        ratio=None,
        kept=None,
        inputs=(spec("embeddings", 1, "S", 2), spec("write_slot", 1, dtype="int64"), *caches),
        outputs=(spec("logits", 1, 12),),
    )
    return Manifest(
        schema=1,
        name="tiny-8of16",
        family="llava",
        dtype="float32",
        target="onnxruntime",
        opset=24,
        source=Source(checkpoint="tiny", revision=None, index_sha256="0" * 64),
        versions={"gap-export": "0.1.0"},
        layout=layout,
        pruning=Pruning(strategy="cls_attention", positions="gap", seed=0),
        ratios=(
            RatioEntry(ratio=0.5, kept=8, patches=16),
            RatioEntry(ratio=0.75, kept=4, patches=16),
        ),
        stages=(vision(0.5, 8), vision(0.75, 4), decoder),
        cache=CacheShape(layers=1, heads=1, head_dim=2, dtype="float32"),
        embedding=StoredTensor(file="weights.bin", offset=8, dtype="float32", shape=(12, 2)),
        preprocess=Preprocess(
            mode="pad", side=8, fill=(122, 116, 104), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        prompt=prompt,
        box=llava_box,
        reference=None,
        files={},
    )


@pytest.fixture
def make_bundle(tmp_path, manifest, tokenizer_file):
    """A function that writes the bundle, fields of its manifest replaced, and gives its folder."""

    def make(*, weights=None, **changes):
        folder = tmp_path / "bundle"
        folder.mkdir()
        table = np.arange(24, dtype="<f4").tobytes() if weights is None else weights
        contents = {
            "decoder.onnx": b"no graph at all",
            "vision-8.onnx": b"no graph either",
            "vision-4.onnx": b"nor is this",
            "weights.bin": b"\xff" * 8 + table,
            "tokenizer.json": tokenizer_file.read_bytes(),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        files = {name: describe_file(folder / name) for name in contents}
        dataclasses.replace(manifest, **{"files": files, **changes}).write(folder)
        return folder

    return make


@pytest.fixture
def edit_manifest():
    """A function that changes keys of a bundle's manifest.json."""

    def edit(folder, **changes):
        path = folder / "manifest.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**data, **changes}), encoding="utf-8")

    return edit
