"""A minimal bundle with made-up graphs, for tests that run no graph."""

import dataclasses
import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from gap_runtime.bundle.hashes import describe_file
from gap_runtime.bundle.manifest import (
    SCHEMA,
    BundleLayout,
    CacheShape,
    Manifest,
    PhraseInput,
    Prompt,
    Pruning,
    RatioEntry,
    Reference,
    ReferenceSample,
    Source,
    Stage,
)
from gap_runtime.bundle.tensors import FREE_ROWS, StoredTensor, TensorSpec
from gap_runtime.grounding import grounder
from gap_runtime.machines.target import load_target
from gap_runtime.pictures.boxes import Box, BoxFormat
from gap_runtime.pictures.load import make_pixels
from gap_runtime.pictures.preprocess import Bucket, Preprocess

BOX_WORD = "[0.25,0.25,0.75,0.50]"
WORDS = (
    *("<unk>", "<image>", "USER:", "ASSISTANT:", "Where", "is", "the", "red", "mug", "?"),
    *("</s>", BOX_WORD),
)


CACHE_PARTS = ("key", "value")


@pytest.fixture
def llava_box():
    # Copied from gap_export/blocks/hub.py.
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
    return BundleLayout(prefix=1, suffix=7, answer=5, capacity=21)


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


def make_tensor(name, *shape, dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape, meaning=f"the {name}")


def make_vision(entry, layout, pixels, more=()):
    name = f"vision-{entry.bucket}-{entry.kept}" if entry.bucket else f"vision-{entry.kept}"
    counts = layout.at(entry)
    return Stage(
        name=name,
        role="vision",
        file=f"{name}.onnx",
        bucket=entry.bucket,
        ratio=entry.ratio,
        kept=entry.kept,
        inputs=(make_tensor("pixels", *pixels), *more),
        outputs=(
            make_tensor("visual_tokens", 1, counts.visual, 2),
            make_tensor("kept_index", 1, entry.kept, dtype="int64"),
            make_tensor("position_ids", 1, counts.prompt, dtype="int64"),
        ),
    )


def make_decoder(layout):
    caches = [make_tensor(f"cache_{part}_00", 1, 1, layout.capacity, 2) for part in CACHE_PARTS]
    return Stage(
        name="decoder",
        role="decoder",
        file="decoder.onnx",
        bucket=None,
        ratio=None,
        kept=None,
        inputs=(
            make_tensor("embeddings", 1, FREE_ROWS, 2),
            make_tensor("position_ids", 1, FREE_ROWS, dtype="int64"),
            make_tensor("write_slot", 1, dtype="int64"),
            *caches,
        ),
        outputs=(make_tensor("logits", 1, 12),),
    )


@pytest.fixture
def manifest(llava_box, prompt, layout):
    """One bucket of 4x4 patches, two ratios."""
    entries = (
        RatioEntry(ratio=0.5, bucket="", patches=16, kept=8, extra=0),
        RatioEntry(ratio=0.75, bucket="", patches=16, kept=4, extra=0),
    )
    visions = (make_vision(entry, layout, (1, 3, 8, 8)) for entry in entries)
    return Manifest(
        schema=SCHEMA,
        name="tiny-8of16",
        family="llava",
        dtype="float32",
        quantization=None,
        target=load_target("cpu"),
        source=Source(checkpoint="tiny", revision=None, index_sha256="0" * 64),
        versions={"gap-export": "0.1.0"},
        layout=layout,
        pruning=Pruning(strategy="cls_attention", positions="gap", seed=0, extra_token=None),
        buckets=(Bucket(name="", canvas=None, grids=((4, 4),), strip=1, fixed=()),),
        ratios=entries,
        stages=(*visions, make_decoder(layout)),
        cache=CacheShape(layers=1, heads=1, head_dim=2, dtype="float32"),
        embedding=StoredTensor(file="weights.bin", offset=8, dtype="float32", shape=(12, 2)),
        preprocess=Preprocess(
            mode="pad",
            side=8,
            fill=(122, 116, 104),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            canvases=(),
        ),
        prompt=prompt,
        phrase=None,
        box=llava_box,
        reference=None,
        files={},
    )


@pytest.fixture
def tiled(manifest):
    """The changes that make it a bundle of tiles: two buckets, each of two grids and newlines."""
    layout = dataclasses.replace(manifest.layout, capacity=25)
    # A whole view of 2x2, then rows of the mosaic that end in a newline.
    wide = Bucket(name="wide", canvas=(16, 8), grids=((2, 2), (2, 4)), strip=1, fixed=(8, 13))
    tall = Bucket(
        name="tall", canvas=(8, 16), grids=((2, 2), (4, 2)), strip=1, fixed=(6, 9, 12, 15)
    )
    entries = (
        RatioEntry(ratio=0.5, bucket="wide", patches=14, kept=7, extra=0),
        RatioEntry(ratio=0.25, bucket="wide", patches=14, kept=11, extra=0),
        RatioEntry(ratio=0.5, bucket="tall", patches=16, kept=8, extra=0),
        RatioEntry(ratio=0.25, bucket="tall", patches=16, kept=12, extra=0),
    )
    visions = (make_vision(entry, layout, (1, 3, 3, 8, 8)) for entry in entries)
    return {
        "layout": layout,
        "buckets": (wide, tall),
        "ratios": entries,
        "stages": (*visions, make_decoder(layout)),
        "box": dataclasses.replace(manifest.box, frame="original"),
        "preprocess": dataclasses.replace(
            manifest.preprocess, mode="anyres", canvases=((16, 8), (8, 16), (16, 16))
        ),
    }


@pytest.fixture
def resizing(manifest):
    """The changes that make a bundle of pictures resized to one of two sizes."""
    wide = Bucket(name="16x8", canvas=(16, 8), grids=((2, 4),), strip=1, fixed=())
    square = Bucket(name="8x8", canvas=(8, 8), grids=((2, 2),), strip=1, fixed=())
    entries = (
        RatioEntry(ratio=0.5, bucket="16x8", patches=8, kept=4, extra=0),
        RatioEntry(ratio=0.5, bucket="8x8", patches=4, kept=2, extra=0),
    )
    capacity = max(manifest.layout.at(entry).capacity for entry in entries)
    layout = dataclasses.replace(manifest.layout, capacity=capacity)
    visions = (
        make_vision(entries[0], layout, (1, 3, 8, 16)),
        make_vision(entries[1], layout, (1, 3, 8, 8)),
    )
    return {
        "layout": layout,
        "buckets": (wide, square),
        "ratios": entries,
        "stages": (*visions, make_decoder(layout)),
        "preprocess": dataclasses.replace(manifest.preprocess, mode="resize"),
    }


@pytest.fixture
def with_extra(manifest):
    """The changes that make a token of the removed patches at the first ratio."""
    layout = dataclasses.replace(manifest.layout, capacity=22)
    first, second = manifest.ratios
    entries = (dataclasses.replace(first, extra=1), second)
    visions = (make_vision(entry, layout, (1, 3, 8, 8)) for entry in entries)
    return {
        "layout": layout,
        "ratios": entries,
        "stages": (*visions, make_decoder(layout)),
        "pruning": dataclasses.replace(manifest.pruning, extra_token="last-visual"),
    }


@pytest.fixture
def two_before(manifest):
    """The changes that put two tokens before the picture."""
    layout = dataclasses.replace(manifest.layout, prefix=2, capacity=22)
    visions = (make_vision(entry, layout, (1, 3, 8, 8)) for entry in manifest.ratios)
    template = f"the {manifest.prompt.template}"
    return {
        "layout": layout,
        "prompt": dataclasses.replace(manifest.prompt, template=template),
        "stages": (*visions, make_decoder(layout)),
    }


@pytest.fixture
def told_by_clip(manifest):
    """The changes that make the vision graph of the second ratio read the phrase through CLIP."""
    features = make_tensor("text_features", 1, 3)
    text = Stage(
        name="text",
        role="text",
        file="text.onnx",
        bucket=None,
        ratio=None,
        kept=None,
        inputs=(make_tensor("text_ids", 1, 6, dtype="int64"),),
        outputs=(features,),
    )
    silent, _, decoder = manifest.stages
    told = make_vision(manifest.ratios[1], manifest.layout, (1, 3, 8, 8), (features,))
    return {
        "stages": (silent, told, text, decoder),
        "phrase": PhraseInput(source="clip", tokenizer="words.json", length=6, end_id=10),
    }


@pytest.fixture
def told_by_embeddings(manifest):
    """The changes that make the vision graph of the second ratio read the phrase's embeddings."""
    silent, _, decoder = manifest.stages
    features = make_tensor("text_features", 1, 2)
    told = make_vision(manifest.ratios[1], manifest.layout, (1, 3, 8, 8), (features,))
    return {
        "stages": (silent, told, decoder),
        "phrase": PhraseInput(source="embeddings", tokenizer=None, length=0, end_id=0),
    }


@pytest.fixture
def make_bundle(tmp_path, manifest, tokenizer_file):
    """A function that writes the bundle, fields of its manifest replaced, and gives its folder.

    `more` are further files: bytes by name.
    """

    def make(*, weights=None, more=None, **changes):
        changed = dataclasses.replace(manifest, **changes)
        folder = tmp_path / "bundle"
        folder.mkdir()
        table = np.arange(24, dtype="<f4").tobytes() if weights is None else weights
        contents = {
            **{stage.file: b"no graph either" for stage in changed.stages},
            "decoder.onnx": b"no graph at all",
            "weights.bin": b"\xff" * 8 + table,
            "tokenizer.json": tokenizer_file.read_bytes(),
            **(more or {}),
        }
        if changed.phrase is not None and changed.phrase.tokenizer is not None:
            contents[changed.phrase.tokenizer] = tokenizer_file.read_bytes()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        files = {name: describe_file(folder / name) for name in contents}
        dataclasses.replace(changed, files={**files, **changes.get("files", {})}).write(folder)
        return folder

    return make


def _make_samples(manifest, image="photo.png", sizes=((8, 8),), wrong=()):
    """A reference that a fake backend agrees with, and its files.

    One sample per bucket and size; of the ratio and bucket pairs in `wrong` the answer differs.
    """
    samples, arrays, files = [], {}, {}
    for bucket, size in zip(manifest.buckets, sizes, strict=True):
        name = f"00-{bucket.name}"
        picture = Image.new("RGB", size, (200, 100, 50))
        file = io.BytesIO()
        picture.save(file, "png")
        files[f"{bucket.name}{image}"] = file.getvalue()
        arrays[f"{name}/pixels"] = make_pixels(picture, manifest.preprocess, bucket)
        for entry in manifest.ratios:
            if entry.bucket != bucket.name:
                continue
            layout = manifest.layout.at(entry)
            key, answer = f"{name}/kept-{entry.kept}", 11
            arrays[f"{key}/visual_tokens"] = np.arange(
                layout.visual * 2, dtype=np.float32
            ).reshape(1, -1, 2)
            arrays[f"{key}/kept_index"] = np.arange(entry.kept)[None]
            arrays[f"{key}/position_ids"] = np.arange(layout.prompt)[None]
            arrays[f"{key}/logits"] = np.eye(12, dtype=np.float32)[11]
            if (entry.ratio, entry.bucket) in wrong:
                answer = 8
            samples.append(
                ReferenceSample(
                    key=key,
                    sample=name,
                    image=f"{bucket.name}{image}",
                    phrase="the red mug",
                    bucket=bucket.name,
                    ratio=entry.ratio,
                    kept=entry.kept,
                    answer="[0.25,0.25,0.75,0.50]",
                    token_ids=(answer,),
                    # Padded pictures are square here, so that both frames are the same.
                    boxes=(Box(0.25 * size[0], 0.25 * size[1], 0.75 * size[0], 0.5 * size[1]),),
                    prompt_ids=(2, 4, 5, 6, 7, 8, 9, 3),
                    token_margins=(0.5, 0.5),
                )
            )
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    files["reference.npz"] = packed.getvalue()
    reference = Reference(arrays="reference.npz", dtype="float32", samples=tuple(samples))
    return {"reference": reference, "more": files}


@pytest.fixture
def make_samples():
    """The function that makes a reference that a fake backend agrees with, and its files."""
    return _make_samples


class FakeStage:
    """A vision or text graph that takes what its stage declares, and gives what it promises."""

    def __init__(self, stage, calls):
        self.stage, self.calls = stage, calls

    def run(self, inputs):
        found = {name: (value.shape, str(value.dtype)) for name, value in inputs.items()}
        assert found == {spec.name: (spec.shape, spec.dtype) for spec in self.stage.inputs}
        self.calls.append((self.stage.name, inputs))
        return {
            spec.name: np.arange(math.prod(spec.shape)).reshape(spec.shape).astype(spec.dtype)
            for spec in self.stage.outputs
        }


class FakeDecoder:
    """Answers every prompt, which has several rows, with one token and stops."""

    def __init__(self, token, calls):
        self.token, self.calls = token, calls

    def fit(self, rows):
        return rows

    def run(self, embeddings, position_ids, write_slot, logits_rows):
        assert embeddings.shape[:2] == position_ids.shape
        assert write_slot >= 0
        assert min(logits_rows) >= 0
        self.calls.append((embeddings.copy(), position_ids, write_slot, logits_rows.tolist()))
        logits = np.zeros((len(logits_rows), 12), np.float32)
        logits[:, self.token if embeddings.shape[1] > 1 else 10] = 1
        return logits


class FakeBackend:
    """A backend that runs no graph and writes down what is opened and run.

    `opened` holds the names of stages, `calls` of each vision or text run its stage's name and
    inputs, `decoded` the arguments of each decoder run.
    """

    def __init__(self, token):
        self.token = token
        self.opened, self.calls, self.decoded = [], [], []

    def open_stage(self, bundle, stage, device):
        assert bundle.manifest.name == "tiny-8of16"
        assert stage.role in {"vision", "text"}
        assert device == ""
        self.opened.append(stage.name)
        return FakeStage(stage, self.calls)

    def open_decoder(self, bundle, stage, device):
        assert stage.role == "decoder"
        assert (bundle.manifest.target.opset, device) == (24, "")
        self.opened.append(stage.name)
        return FakeDecoder(self.token, self.decoded)


@pytest.fixture
def answer_with(monkeypatch):
    """A function that puts a fake backend in place, which answers with a token, and gives it."""

    def patch(token):
        backend = FakeBackend(token)
        monkeypatch.setattr(grounder, "open_backend", lambda name: (backend, name[:0]))
        return backend

    return patch


@pytest.fixture
def edit_manifest():
    """A function that changes keys of a bundle's manifest.json."""

    def edit(folder, **changes):
        path = folder / "manifest.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**data, **changes}), encoding="utf-8")

    return edit


def load_beside(name):
    """A module that lies beside this one: these tests run without the other folders."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fakes():
    """A TensorRT and a CUDA that are made up."""
    return load_beside("fake_tensorrt")


@pytest.fixture(scope="session")
def fake_onnxruntime():
    """The module with the made-up onnxruntime."""
    return load_beside("fake_onnxruntime")


@pytest.fixture(scope="session")
def pages():
    """The reader of HTML pages."""
    return load_beside("page_reader")
