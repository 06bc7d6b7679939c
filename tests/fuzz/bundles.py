"""A bundle changed in one place: its manifest, its files, its arrays."""

import json
import os
import shutil

import numpy as np
from blake3 import blake3

from fuzz import mutations
from fuzz.outcome import run_line
from gap_runtime.cli.main import main

MANIFEST = "manifest.json"
PHRASE = "the red square"


class BundleCase:
    """A copy of a bundle that is changed and put right again."""

    def __init__(self, bundle, home):
        self.source, self.folder = bundle, home / "bundle"
        shutil.copytree(bundle, self.folder)
        self.data = json.loads((bundle / MANIFEST).read_text("utf-8"))
        self.files = sorted(self.data["files"])
        self.picture = bundle / self.data["reference"]["samples"][0]["image"]
        self.commands = (
            ("info", self.folder),
            ("info", self.folder, "--json"),
            ("ground", self.folder, self.picture, PHRASE),
            ("ground", self.folder, self.picture, PHRASE, "--json", "--ratio", "0.5"),
            ("check", self.folder),
            ("bench", self.folder, "--runs", "1"),
            ("evaluate", self.folder, "--data", "refshapes:test", "--limit", "1"),
        )

    def restore(self, *names):
        for name in names:
            path = self.folder / name
            remove(path)
            shutil.copyfile(self.source / name, path)

    def run(self, rng, weights):
        return run_line(main, rng.choices(self.commands, weights)[0])

    def put(self, name, data, *, rehashed):
        """A file of the bundle, with or without the manifest saying so."""
        remove(self.folder / name)
        (self.folder / name).write_bytes(data)
        if rehashed:
            entry = {"size": len(data), "blake3": blake3(data).hexdigest()}
            changed = {**self.data, "files": {**self.data["files"], name: entry}}
            (self.folder / MANIFEST).write_text(json.dumps(changed), "utf-8")


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def manifests(case):
    """One key of the manifest changed."""
    places = list(mutations.paths(case.data))[1:]
    # Files and samples are many and alike: the other places come as often together.
    rare = [p for p in places if p[0] not in {"files", "reference", "stages"}]

    def make(rng):
        data, place = mutations.change_plain(case.data, rng, rng.choice((rare, places)))
        text = mutations.write_plain(data, rng)

        def run():
            (case.folder / MANIFEST).write_bytes(text)
            try:
                return case.run(rng, (6, 2, 4, 2, 1, 0.3, 0.3))
            finally:
                case.restore(MANIFEST)

        return place, run

    return make


WAYS = (
    "bytes",
    "bytes",
    "bytes",
    "empty",
    "gone",
    "folder",
    "pipe",
    "unreadable",
    "other",
    "loop",
)


def files(case):
    """One file of the bundle changed, replaced or unreadable."""

    def make(rng):
        name, way = rng.choice((*case.files, MANIFEST)), rng.choice(WAYS)
        rehashed = rng.random() < 0.6 and name != MANIFEST

        def run():
            try:
                damage_file(case, name, way, rng, rehashed=rehashed)
                with forbidden(on=way == "unreadable"):
                    return case.run(rng, (3, 1, 4, 2, 2, 0.3, 0.3))
            finally:
                case.restore(name, MANIFEST)

        return f"{name} {way}{' rehashed' if rehashed else ''}", run

    return make


def tokenizers(case):
    """One place of the tokenizer changed, or parts of the library's other kinds put in."""
    name = case.data["prompt"]["tokenizer"]
    whole = json.loads((case.source / name).read_text("utf-8"))
    # Of the vocabulary there is much, and all of it alike.
    rare = [place for place in mutations.paths(whole) if place and place[:2] != ("model", "vocab")]
    lost = {"SpecialToken": {"id": "lost", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [lost], "pair": [], "special_tokens": {}}
    parts = (
        ("post_processor", template),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": "x"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        ("decoder", {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}),
        ("decoder", {"type": "Strip", "content": "0", "start": 10**9, "stop": 10**9}),
        ("model", {"type": "WordPiece", "unk_token": "lost", "vocab": {}}),
        (
            "truncation",
            {"direction": "Left", "max_length": 1, "strategy": "OnlySecond", "stride": 9},
        ),
    )

    def make(rng):
        if rng.random() < 0.15:
            key, part = rng.choice(parts)
            data, place = (
                {**whole, key: part},
                f"{key}: {part['type' if 'type' in part else 'stride']}",
            )
        else:
            data, place = mutations.change_plain(whole, rng, rare)
        text = mutations.write_plain(data, rng)

        def run():
            case.put(name, text, rehashed=True)
            try:
                return case.run(rng, (0, 0, 6, 2, 1, 0, 0.2))
            finally:
                case.restore(name, MANIFEST)

        return place, run

    return make


def damage_file(case, name, way, rng, *, rehashed):
    path = case.folder / name
    if way == "bytes":
        case.put(name, mutations.change_bytes(path.read_bytes(), rng), rehashed=rehashed)
    elif way == "empty":
        case.put(name, b"", rehashed=rehashed)
    elif way == "other":
        other = case.source / rng.choice(case.files)
        case.put(name, other.read_bytes(), rehashed=rehashed)
    elif way == "unreadable":
        path.chmod(0)
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "pipe":
            os.mkfifo(path)
        elif way == "loop":
            path.symlink_to(path.name)


class forbidden:  # noqa: N801 - reads as what it does
    """Without root's rights, for which no permission is missing."""

    def __init__(self, *, on):
        self.on = on and os.geteuid() == 0

    def __enter__(self):
        if self.on:
            os.seteuid(65534)

    def __exit__(self, *_):
        if self.on:
            os.seteuid(0)


def arrays(case):
    """One array of the reference changed, its hash with it."""
    name = case.data["reference"]["arrays"]
    with np.load(case.source / name) as held:
        values = dict(held)

    def make(rng):
        key = rng.choice(sorted(values))
        way, changed = change_array(values[key], rng)

        def run():
            all_values = {k: v for k, v in values.items() if k != key}
            if changed is not None:
                all_values[key] = changed
            import io

            buffer = io.BytesIO()
            np.savez(buffer, **all_values)
            case.put(name, buffer.getvalue(), rehashed=True)
            try:
                return run_line(main, ("check", case.folder))
            finally:
                case.restore(name, MANIFEST)

        return f"{key} {way}", run

    return make


def change_array(array, rng):
    way = rng.choice(
        ("gone", "nan", "inf", "huge", "kind", "flat", "empty", "object", "text", "deep", "short")
    )
    array = array.copy()
    if way == "gone":
        return way, None
    if way in {"nan", "inf", "huge"}:
        value = {"nan": np.nan, "inf": -np.inf, "huge": 1e30}[way]
        if array.dtype.kind in "iu":
            array.flat[rng.randrange(array.size)] = 2**62
        else:
            array.flat[rng.randrange(array.size)] = value
        return way, array
    if way == "kind":
        return way, array.astype(rng.choice(("int8", "float64", "bool", "complex64", "S4")))
    if way == "flat":
        return way, array.ravel()
    if way == "empty":
        return way, array[:0]
    if way == "object":
        return way, array.astype(object)
    if way == "text":
        return way, np.array("x")
    if way == "deep":
        return way, array[None]
    return way, array[..., :-1]
