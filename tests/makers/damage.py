"""Checkpoints of every family, damaged in one place."""

import json

import torch
from safetensors.torch import load_file

from makers.checkpoints import edit_tensors

LORA = "llama_model.base_model.model.model.layers.0.self_attn"


def weight_files(place):
    if place.is_file():
        return [place]
    return sorted([*place.glob("*.safetensors"), *place.glob("pytorch_model*.bin")])


def edit(place, change):
    """Change the tensors of a checkpoint in place, file by file, and the index with them."""
    if not place.is_file() and list(place.glob("*.safetensors")):

        def changed(tensors):
            change(tensors)
            return tensors

        edit_tensors(place, changed)
        return
    places = {}
    for path in weight_files(place):
        whole = torch.load(path, weights_only=True)
        change(whole.get("model", whole))
        torch.save(whole, path)
        places |= dict.fromkeys(whole, path.name)
    index = place / "pytorch_model.bin.index.json"
    if index.is_file():
        index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def change_one(case, role, key, make):
    """Replace one tensor; the path of its file."""
    held = []

    def change(tensors):
        if key in tensors:
            held.append(True)
            tensors |= make(tensors.pop(key))

    for path in weight_files(case.place(role)):
        before = len(held)
        if path.suffix == ".safetensors":
            held += [True] * (key in load_file(path))
        else:
            whole = torch.load(path, weights_only=True)
            held += [True] * (key in whole.get("model", whole))
        if len(held) > before:
            file = path
    edit(case.place(role), change)
    assert len(held) == 2
    return file


def change_json(path, **values):
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | values), encoding="utf-8")
