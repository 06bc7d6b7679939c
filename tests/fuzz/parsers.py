"""The byte parsers that are ours, as functions of bytes; each answers or raises a GapError."""

import json
import random
import tempfile
from pathlib import Path

from fuzz import mutations
from gap_runtime.bundle.onnx_file import read_onnx
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.evaluation.data import open_data
from gap_runtime.evaluation.results import read_answers

HERE = Path(__file__).parent / "corpus"


def _in_file(name, parse):
    """A parser of files on bytes."""
    home = tempfile.TemporaryDirectory(prefix="gap-fuzz-")
    path = Path(home.name) / name

    def run(data, _home=home):
        # The folder goes when nobody holds the parser any more.
        path.write_bytes(data)
        return parse(path)

    return run


def parse_safetensors(path):
    from gap_export.checkpoint.index import open_checkpoint

    return open_checkpoint(str(path))


PARSERS = {
    "onnx": lambda: _in_file("x.onnx", read_onnx),
    "safetensors": lambda: _in_file("x.safetensors", parse_safetensors),
    "torch": lambda: _in_file("x.bin", parse_safetensors),
    "answers": lambda: _in_file("x.jsonl", read_answers),
    "lines": lambda: _in_file("x.jsonl", lambda path: open_data(str(path))),
    "list": lambda: _in_file("x.json", lambda path: open_data(str(path))),
    "table": lambda: _in_file("x.csv", lambda path: open_data(str(path))),
    "pickle": lambda: _in_file("refs(unc).p", _read_refer),
    "manifest": lambda: _in_file("manifest.json", lambda path: read_manifest(path.parent)),
}


INSTANCES = {
    "images": [{"id": k, "file_name": "0.png", "width": 20, "height": 10} for k in range(4)],
    "annotations": [
        {"id": k, "image_id": k, "bbox": [1, 2, 8, 7], "category_id": 1} for k in range(4)
    ],
    "categories": [{"id": 1, "name": "mug"}],
}
"""What the pickles of the corpus refer to."""


def _read_refer(path):
    (path.parent / "instances.json").write_text(json.dumps(INSTANCES))
    return open_data(f"refcoco:val@{path.parent}")


def corpus(name):
    """Bytes to begin with: those of the repository, by parser."""
    found = [path.read_bytes() for path in sorted((HERE / name).glob("*"))]
    assert found, f"nothing to begin with for {name}"
    return found


def parsed(name):
    """A kind of cases: the corpus of a parser, changed."""

    def begin(_case):
        parse, seeds = PARSERS[name](), corpus(name)

        def make(rng):
            data = mutations.change_bytes(rng.choice(seeds), rng)
            return f"{len(data)} bytes", lambda: parse(data)

        return make

    begin.__doc__ = f"Bytes for the parser of {name}."
    return begin


def sample(name, count, seed=0):
    """Changed bytes of a parser's corpus, for tests."""
    seeds, rng = corpus(name), random.Random(f"{name}:{seed}")
    return [mutations.change_bytes(rng.choice(seeds), rng) for _ in range(count)]
