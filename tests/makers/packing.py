"""Checkpoints in the hub's formats of quantized layers, packed value by value from the definition.

Nothing here is shared with the code that reads them, neither the graph's nor the reference's.
"""

import json

import numpy as np
import torch

from makers.checkpoints import edit_tensors

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that lies in each nibble of a word, from the lowest up."""


def quantize_layer(weight, *, bits, group, symmetric, order):
    """Integers, zero points and scales (float16) of a weight [out, in], and what they stand for.

    Args:
        weight: float array [out, in].
        bits: Of a value.
        group: Inputs that share a scale.
        symmetric: Whether all zero points are the middle.
        order: Group of each input.
    """
    outputs, inputs = weight.shape
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    values = np.zeros((inputs, outputs), np.int64)
    zeros = np.zeros((inputs // group, outputs), np.int64)
    scales = np.zeros((inputs // group, outputs), np.float16)
    truth = np.zeros((outputs, inputs))
    for g in range(inputs // group):
        members = [i for i in range(inputs) if order[i] == g]
        for o in range(outputs):
            found = weight[o, members]
            low, high = min(found.min(), 0.0), max(found.max(), 0.0)
            if symmetric:
                scale, zero = np.float16(2 * max(-low, high) / top), middle
            else:
                scale = np.float16((high - low) / top)
                # A zero point of zero cannot be said in GPTQ's first format.
                zero = min(max(round(-low / float(scale)), 1), top)
            zeros[g, o], scales[g, o] = zero, scale
            for i in members:
                value = min(max(round(weight[o, i] / float(scale)) + zero, 0), top)
                values[i, o] = value
                truth[o, i] = (value - zero) * float(scale)
    return values, zeros, scales, truth


def to_word(numbers, bits):
    """One int32 of several numbers, the first in the lowest bits."""
    word = 0
    for place, number in enumerate(numbers):
        word |= int(number) << (bits * place)
    return word - 2**32 if word >= 2**31 else word


def pack_rows(values, bits, columns=None):
    """Words of the values of each row [rows, columns]; `columns`: which one lies at each place."""
    per = 32 // bits
    columns = columns or tuple(range(per))
    return torch.tensor(
        [
            [to_word([row[start + k] for k in columns], bits) for start in range(0, len(row), per)]
            for row in values.tolist()
        ],
        dtype=torch.int32,
    )


def pack_awq(values, zeros, scales):
    """The three tensors of a layer, by their last word."""
    return {
        "qweight": pack_rows(values, 4, AWQ_COLUMNS),
        "qzeros": pack_rows(zeros, 4, AWQ_COLUMNS),
        "scales": torch.from_numpy(scales),
    }


def pack_gptq(values, zeros, scales, *, bits, form, order):
    """The four tensors of a layer, by their last word."""
    return {
        "qweight": pack_rows(values.T, bits).T.contiguous(),
        "qzeros": pack_rows(zeros - (1 if form == "gptq" else 0), bits),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.tensor(order, dtype=torch.int32),
    }


def pack_checkpoint(
    folder,
    *,
    method,
    bits=4,
    group=32,
    symmetric=False,
    form=None,
    desc_act=False,
    head=False,
    keep=(),
    biases=False,
    nested=False,
    seed=0,
):
    """Quantize the language model's linear layers of a checkpoint in place; their true weights.

    Args:
        folder: In Hugging Face's or in the authors' layout.
        method: `awq` or `gptq`.
        bits: Of a value.
        group: Inputs that share a scale; -1 for all.
        symmetric: Whether all zero points are the middle.
        form: `gptq` or `gptq_v2`; the first where None.
        desc_act: Whether inputs are in groups of their own choice.
        head: Whether to quantize the head too.
        keep: Words in keys of layers that stay as they are.
        biases: Whether to add biases of zeros, as old packers do.
        nested: Whether the config says so of the language model alone.
        seed: Of the choice of groups.
    """
    rng = np.random.default_rng(seed)
    form = form or "gptq"
    truths = {}

    def edit(tensors):
        done = {}
        for key, tensor in tensors.items():
            is_layer = "layers." in key and "vision" not in key and key.endswith("_proj.weight")
            is_layer |= head and key.endswith("lm_head.weight")
            if not is_layer or any(word in key for word in keep):
                done[key] = tensor
                continue
            layer = key.removesuffix(".weight")
            inputs = tensor.shape[1]
            size = inputs if group == -1 else group
            order = np.arange(inputs) // size
            if desc_act:
                order = rng.permutation(order)
            values, zeros, scales, truths[key] = quantize_layer(
                tensor.double().numpy(), bits=bits, group=size, symmetric=symmetric, order=order
            )
            made = (
                pack_awq(values, zeros, scales)
                if method == "awq"
                else pack_gptq(values, zeros, scales, bits=bits, form=form, order=order)
            )
            if biases:
                made["bias"] = torch.zeros(tensor.shape[0], dtype=torch.float16)
            done |= {f"{layer}.{part}": value for part, value in made.items()}
        return done

    edit_tensors(folder, edit)
    found = {"quant_method": method, "bits": bits, "group_size": group}
    if method == "awq":
        found |= {
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": ["vision_tower"],
        }
    else:
        found |= {"checkpoint_format": form, "desc_act": desc_act, "sym": symmetric}
    set_quantization(folder, found, nested=nested)
    return truths


def set_quantization(folder, quantization, *, nested=False):
    """Write a quantization_config into a folder's config."""
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    (data["text_config"] if nested else data)["quantization_config"] = quantization
    path.write_text(json.dumps(data), encoding="utf-8")
