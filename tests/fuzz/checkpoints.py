"""Checkpoints changed in one value, file or header, planned as `--dry-run` does."""

import io
import json
import os
import shutil

import torch
from tools.places import ROOT

from fuzz import mutations
from fuzz.bundles import WAYS, forbidden, remove
from gap_export.checkpoint.index import open_checkpoint
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request

JSON = (
    *("config.json", "config.json", "config.json", "generation_config.json"),
    *("preprocessor_config.json", "preprocessor_config.json", "tokenizer_config.json"),
    *("tokenizer.json",),
)


def settings(case):
    """One value of one JSON file of a checkpoint."""
    folders = make_folders(case.folder.parent)

    def make(rng):
        folder = rng.choice(folders)
        name = rng.choice([each for each in JSON if (folder / each).is_file()])
        whole = (folder / name).read_bytes()
        data, place = mutations.change_plain(json.loads(whole), rng)
        text = mutations.write_plain(data, rng)

        def run():
            (folder / name).write_bytes(text)
            try:
                return plan(folder)
            finally:
                (folder / name).write_bytes(whole)

        return f"{folder.name}/{name} {place}", run

    return make


def plan(folder):
    request = make_request(folder, ratios=0.5, out=folder.parent / "out")
    return plan_export(request)


def make_folders(home):
    home = home / "checkpoints"
    if not home.exists():
        shutil.copytree(ROOT / "refshapes" / "checkpoint", home / "refshapes")
        # Weights are only indexed: the headers are enough, with holes behind them.
        shutil.copytree(ROOT / "refshapes" / "checkpoint-256", home / "refshapes-256")
    return sorted(path for path in home.iterdir() if path.is_dir())


def weight_files(case):
    """A weight file damaged: its header, its bytes, itself."""
    home = case.folder.parent / "weights"
    folder = home / "model"
    shutil.copytree(ROOT / "refshapes" / "checkpoint", folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def make(rng):
        way = rng.choice(("header",) * 14 + WAYS)
        if way == "header":
            changed, place = mutations.change_plain(header, rng)
            if rng.random() < 0.2:
                changed["__metadata__"] = rng.choice(mutations.ODD)
            text = mutations.write_plain(changed, rng)
            size = len(text) if rng.random() < 0.9 else rng.choice(mutations.MAGIC)
            data = size.to_bytes(8, "little") + text + whole[8 + length :]
        else:
            place, data = way, mutations.change_bytes(whole, rng)

        def run():
            remove(path)
            if way == "folder":
                path.mkdir()
            elif way == "pipe":
                os.mkfifo(path)
            elif way == "loop":
                path.symlink_to(path.name)
            elif way != "gone":
                path.write_bytes(b"" if way == "empty" else data)
                path.chmod(0 if way == "unreadable" else 0o600)
            try:
                with forbidden(on=way == "unreadable"):
                    return plan(folder)
            finally:
                remove(path)
                path.write_bytes(whole)

        return f"{way} {place}", run

    return make


def torch_files(case):
    """A torch file damaged."""
    home = case.folder.parent / "torch"
    home.mkdir(exist_ok=True)
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}
    buffer = io.BytesIO()
    torch.save({**tensors, "c": tensors["a"].T}, buffer)
    wholes = [buffer.getvalue()]
    buffer = io.BytesIO()
    torch.save({"model": tensors, "epoch": 3, "config": {"x": 1}}, buffer)
    wholes.append(buffer.getvalue())
    path = home / "pytorch_model.bin"

    def make(rng):
        data = mutations.change_bytes(rng.choice(wholes), rng)

        def run():
            path.write_bytes(data)
            return open_checkpoint(str(path))

        return "torch file", run

    return make


def configurations(case):
    """Model files of the user, and `--set`."""
    path = case.folder.parent / "mine.toml"
    text = (ROOT / "export_configs" / "refshapes.toml").read_text("utf-8")
    keys = (
        "prune.ratios",
        "prune.keep",
        "prune.seed",
        "prune.strategy",
        "prune.positions",
        "prompt.template",
        "prompt.suffix",
        "prompt.answer",
        "dtype",
        "check.samples",
        "quantize",
        "prune.phrase",
        "parts.clip",
        "family",
        "prune.options",
        "canvas",
    )

    def make(rng):
        data = mutations.change_bytes(text.encode(), rng) if rng.random() < 0.6 else text.encode()
        chosen = {rng.choice(keys): rng.choice(mutations.ODD)} if rng.random() < 0.6 else {}

        def run():
            path.write_bytes(data)
            request = make_request(
                path,
                settings=chosen,
                checkpoint=ROOT / "refshapes" / "checkpoint",
                out=path.parent / "o",
            )
            return plan_export(request)

        return f"{chosen!r:.80}", run

    return make
