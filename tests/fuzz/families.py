"""Checkpoints of every family, and adapters, changed in one place and planned."""

import json
import os
from types import SimpleNamespace

import torch
from makers.families import EVERY_FAMILY, find_family
from makers.originals import make_adapter
from makers.qwen import TEMPLATE, make_qwen3_checkpoint, make_qwen_checkpoint
from safetensors.torch import load_file, save_file

from fuzz import mutations
from fuzz.bundles import forbidden, remove
from fuzz.outcome import WrongResultError
from gap_export.checkpoint.sources import make_tensor
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request

QWEN = {"qwen2.5-vl": make_qwen_checkpoint, "qwen3-vl": make_qwen3_checkpoint}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 123456\n"


def families(case):
    """One value of one JSON file of a small checkpoint of every family."""
    home = case.folder.parent / "families"
    home.mkdir()
    factory = SimpleNamespace(mktemp=lambda _: home)
    plans = {}
    for name in EVERY_FAMILY:
        found = find_family(name, factory).copy(home / f"copy-{name}")
        plans[name] = (found.home, lambda found=found: found.plan(home / "out"))
    for name, make_checkpoint in QWEN.items():
        folder = home / f"copy-{name}"
        make_checkpoint(folder / "model")
        plans[name] = (folder, lambda folder=folder: plan_qwen(folder))
    for folder, plan in plans.values():
        assert list_json(folder)
        plan()

    def make(rng):
        name = rng.choice(sorted(plans))
        folder, plan = plans[name]
        path = rng.choice(list_json(folder))
        whole = path.read_bytes()
        data, place = mutations.change_plain(json.loads(whole), rng)
        text = mutations.write_plain(data, rng)

        def run():
            path.write_bytes(text)
            try:
                return plan()
            finally:
                path.write_bytes(whole)

        return f"{name}: {path.name} {place}", run

    return make


def plan_qwen(folder):
    settings = {"prompt.template": TEMPLATE, "prompt.answer": 8}
    out = folder.parent / "out"
    return plan_export(make_request(folder / "model", settings=settings, ratios=0.5, out=out))


def list_json(folder):
    """The JSON files that a plan may read; configs come more often than tokens."""
    found = sorted(folder.rglob("*.json"))
    configs = [path for path in found if "config" in path.name]
    return configs * 3 + [path for path in found if "samples" not in path.parts]


def adapters(case):
    """An adapter on a small LLaVA: its settings, its tensors, its files."""
    home = case.folder.parent / "adapters"
    home.mkdir()
    family = find_family("llava", SimpleNamespace(mktemp=lambda _: home))
    layers = ("q_proj", "up_proj", "linear_1", "out_proj")
    adapter = make_adapter(home / "lora", family.place(), layers=layers)
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    settings = json.loads(config.read_text("utf-8")) | {
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 4},
        "alpha_pattern": {"linear_1": 3.0},
    }
    wholes = {config: config.read_bytes(), weights: weights.read_bytes()}
    tensors = load_file(weights)

    def make(rng):
        way = rng.choice(("settings", "settings", "tensor", "tensor", "bytes", "file"))
        place = ""
        if way == "settings":
            data, place = mutations.change_plain(settings, rng)
            text = mutations.write_plain(data, rng)
        elif way == "tensor":
            key = rng.choice(sorted(tensors))
            place, changed = change_tensor(tensors, key, rng)
        elif way == "bytes":
            text = mutations.change_bytes(wholes[weights], rng)
        else:
            path = rng.choice((config, weights))
            place = rng.choice(("gone", "empty", "folder", "pointer", "unreadable", "pipe"))

        def run():
            try:
                if way == "settings":
                    config.write_bytes(text)
                elif way == "tensor":
                    save_file(changed, weights)
                elif way == "bytes":
                    weights.write_bytes(text)
                else:
                    damage(path, place)
                with forbidden(on=place == "unreadable"):
                    return merge(family, adapter, home)
            finally:
                for path_, whole in wholes.items():
                    remove(path_)
                    path_.write_bytes(whole)

        return f"{way} {place}", run

    return make


def change_tensor(tensors, key, rng):
    """All tensors, one of them changed."""
    old = tensors[key]
    ways = {
        "gone": dict,
        "scalar": lambda: {key: torch.tensor(1.0)},
        "flat": lambda: {key: old.flatten()},
        "deep": lambda: {key: old[None].contiguous()},
        "turned": lambda: {key: old.T.contiguous()},
        "empty": lambda: {key: old[:0].contiguous()},
        "wider": lambda: {key: torch.cat([old, old], dim=-1)},
        "ranked": lambda: {key: torch.cat([old, old])},
        "whole numbers": lambda: {key: old.to(rng.choice((torch.int8, torch.int64, torch.bool)))},
        "small": lambda: {key: old.to(torch.float8_e4m3fn)},
        "double": lambda: {key: old.double()},
        "nan": lambda: {key: torch.full_like(old, float("nan"))},
        "renamed": lambda: {rng.choice(("", "x", f"{key}.weight", key.upper(), "a\nb")): old},
        "kind": lambda: {key.replace("lora_A", "lora_magnitude_vector"): old},
    }
    moved = rng.choice(("self_attn", "input_layernorm", "mlp.gate_proj", "q_proj"))
    if rng.random() < 0.15:
        renamed = {name.replace("self_attn.q_proj", moved): each for name, each in tensors.items()}
        return f"on {moved}", renamed
    way = rng.choice(sorted(ways))
    return f"{way} {key}", {name: each for name, each in tensors.items() if name != key} | ways[
        way
    ]()


def damage(path, place):
    remove(path)
    if place == "folder":
        path.mkdir()
    elif place == "pipe":
        os.mkfifo(path)
    elif place != "gone":
        path.write_text({"pointer": POINTER.format("0" * 64)}.get(place, ""))
        path.chmod(0 if place == "unreadable" else 0o600)


def merge(family, adapter, home):
    """The plan, and what it makes of every weight that the adapter changes."""
    plan = family.plan(home / "out", parts__adapter=str(adapter))
    for name, source in plan.sources.items():
        if source.make is not None and make_tensor(source).shape != source.shape:
            raise WrongResultError(f"{name} has another shape")
