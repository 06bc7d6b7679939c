"""Checkpoints whose linear layers came quantized, in the two formats of the hub.

A layer X [out, in] has four tensors in place of X.weight; `bits` are 4 or 8, a word of 32 bits
holds `per` = 32 / bits values, and `group` inputs share a scale and a zero point:

    tensor            AWQ ("gemm", 4 bits)      GPTQ
    X.qweight  int32  [in, out / per]           [in / per, out]
    X.qzeros   int32  [in / group, out / per]   [in / group, out / per]
    X.scales   float  [in / group, out]         [in / group, out]
    X.g_idx    int32  -                         [in], the group of each input; may be missing

    weight[o, i] = (value[i, o] - zero[group of i, o]) * scale[group of i, o]

GPTQ packs from the lowest bits up. AWQ has output 8j + k in the nibble `_AWQ_NIBBLES[k]` of word
j. GPTQ's first format stores zero points less one, by a subtraction from whole words.

References:
    AutoAWQ, awq/utils/packing_utils.py; GPTQModel, gptqmodel/utils/model.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import (
    PackedValues,
    TensorSource,
    match_tensors,
    require_shape,
    stored,
)
from gap_export.checkpoint.tensor import TensorLocation, read_tensor
from gap_export.config.records import DTYPES
from gap_export.errors import CheckpointError

# I inputs, O outputs, G groups.

_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_NIBBLES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
_ONES: Final = {4: 0x11111111, 8: 0x01010101}
"""A one in every value of a word."""
_WORD: Final = 32
_LEAST_GROUP: Final = 16
_BITS: Final = {"awq": (4,), "gptq": (4, 8)}
_FORM_KEYS: Final = {"awq": ("version", "format"), "gptq": ("checkpoint_format", "format")}
_FORMS: Final = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
"""Names of each method's formats, the one first that is meant where none is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a checkpoint's layers are packed; `group` is None for all inputs of a layer."""

    method: str
    form: str
    bits: int
    group: int | None

    @property
    def per(self) -> int:
        """Values in a word."""
        return _WORD // self.bits


def read_packing(data: dict[str, Any], where: str) -> Packing | None:
    """How a config says that the checkpoint is quantized; None where it is not.

    Raises:
        CheckpointError: In a way that cannot be read.
    """
    found = find_quantization(data)
    if not found:
        return None
    method = str(found.get("quant_method")).lower()
    if method not in _FORMS:
        raise CheckpointError(
            f"{where}: the checkpoint is quantized by '{method}', which cannot be read; have "
            f"{', '.join(_FORMS)}, or give the checkpoint that it was made from"
        )
    named = (found[key] for key in _FORM_KEYS[method] if found.get(key))
    form = str(next(named, _FORMS[method][0])).lower()
    group = found.get("group_size", 128)
    for key, value, allowed in (
        ("format", form, _FORMS[method]),
        ("bits", found.get("bits"), _BITS[method]),
    ):
        if value not in allowed:
            raise CheckpointError(
                f"{where}: quantization_config: {key} {value!r}, expected "
                f"{' or '.join(str(each) for each in allowed)} for {method}; give the checkpoint "
                "that it was made from"
            )
    if type(group) is not int or (group != -1 and (group < 1 or group % _LEAST_GROUP)):
        raise CheckpointError(
            f"{where}: quantization_config: group_size {group!r}, expected -1 or a multiple of "
            f"{_LEAST_GROUP}; give the checkpoint that it was made from"
        )
    return Packing(
        method=method, form=form, bits=found["bits"], group=None if group == -1 else group
    )


def find_quantization(data: dict[str, Any]) -> dict[str, Any]:
    """What a config says of quantization, of the whole model or of its language model."""
    for each in (data, data.get("text_config")):
        found = each.get("quantization_config") if isinstance(each, dict) else None
        if found:
            return dict(found) if isinstance(found, dict) else {"quant_method": found}
    return {}


def without_quantization(data: dict[str, Any]) -> dict[str, Any]:
    """A config as that of the model before it was quantized."""
    plain = {key: value for key, value in data.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = without_quantization(plain["text_config"])
    return plain


def match_sources(
    checkpoint: Checkpoint,
    expected: dict[str, tuple[int, ...]],
    *,
    packing: Packing | None,
    packable: Iterable[str],
    rename: Callable[[str], str],
    ignored: Iterable[str] = (),
    optional: frozenset[str] = frozenset(),
) -> dict[str, TensorSource]:
    """Where the tensors of a checkpoint come from, some of which may be packed, by name.

    Args:
        checkpoint: The index of tensors.
        expected: Shapes by name.
        packing: How layers are packed; None where none are.
        packable: Names of the weights that may be.
        rename: Name of a checkpoint key.
        ignored: Patterns of keys that no module has and that are no mistake.
        optional: Names that may be missing.

    Raises:
        CheckpointError: What match_tensors refuses, and packed layers that are not whole.
    """
    layers = _find_layers(checkpoint, set(packable), rename, ignored)
    if layers and packing is None:
        raise CheckpointError(
            f"{checkpoint.folder}: '{next(iter(layers.values()))}.qweight' is quantized, but "
            "config.json has no quantization_config; add it (older packers wrote it into "
            "quantize_config.json)"
        )
    own = {f"{layer}.{part}" for layer in layers.values() for part in _PARTS}
    for name, layer in layers.items():
        bias = checkpoint.tensors.get(f"{layer}.bias")
        if bias is not None and rename(bias.key) not in expected:
            _require_zero(bias)
            own.add(bias.key)
        if f"{layer}.weight" in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.folder}: '{layer}.weight' and '{layer}.qweight' are the same tensor "
                f"({name}) in two forms; remove one"
            )
    found = match_tensors(
        dataclasses.replace(
            checkpoint,
            tensors={key: each for key, each in checkpoint.tensors.items() if key not in own},
        ),
        {name: shape for name, shape in expected.items() if name not in layers},
        rename=rename,
        ignored=ignored,
        optional=optional,
    )
    sources = {name: stored(tensor) for name, tensor in found.items()}
    for name, layer in layers.items():
        assert packing is not None
        sources[name] = _Layer(checkpoint, layer, expected[name], packing).source()
    return sources


def _find_layers(
    checkpoint: Checkpoint,
    packable: set[str],
    rename: Callable[[str], str],
    ignored: Iterable[str],
) -> dict[str, str]:
    """The packed layers' keys without their last word, by the name of the weight."""
    skip = re.compile("|".join(ignored) or r"(?!)")
    layers: dict[str, str] = {}
    for key in (*checkpoint.tensors, *checkpoint.unreadable):
        layer, _, part = key.rpartition(".")
        if part != _PARTS[0] or skip.search(key):
            continue
        name = rename(f"{layer}.weight")
        if name not in packable:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor '{key}' is quantized, expected only linear layers "
                "of the language model; give the checkpoint that it was made from"
            )
        if name in layers:
            raise CheckpointError(
                f"{checkpoint.folder}: '{layers[name]}.qweight' and '{key}' are the same tensor "
                "under two names; remove one"
            )
        layers[name] = layer
    return layers


def _require_zero(bias: TensorLocation) -> None:
    """Refuse a bias that the model has no place for, unless it changes nothing."""
    if bool(read_tensor(bias).any()):
        raise CheckpointError(
            f"{bias.shown}: tensor '{bias.key}' is none that this model has, and not zero as "
            "packers leave it; give the checkpoint that it was made from"
        )


class _Layer:
    """A packed layer. Its zero points and groups are read at once: they decide the graph."""

    def __init__(
        self, checkpoint: Checkpoint, layer: str, shape: tuple[int, ...], packing: Packing
    ) -> None:
        self._checkpoint, self._layer, self._packing = checkpoint, layer, packing
        self._shape = outputs, inputs = shape
        self._group = group = packing.group or inputs
        per = packing.per
        if inputs % group or inputs % _LEAST_GROUP or outputs % per:
            raise CheckpointError(
                f"{checkpoint.folder}: layer '{layer}' of shape {list(shape)} cannot be packed in "
                f"groups of {group} inputs and {packing.bits} bits; is quantization_config that "
                "of this checkpoint?"
            )
        groups = inputs // group
        is_awq = packing.method == "awq"
        self._values = self._find(
            "qweight", (inputs, outputs // per) if is_awq else (inputs // per, outputs)
        )
        self._zeros = self._find("qzeros", (groups, outputs // per))
        self._scales = self._find("scales", (groups, outputs), DTYPES)
        self._order_I = self._read_order()

    def source(self) -> TensorSource:
        """Where the weight comes from: its integers, and itself made of them."""
        zeros_GO = self._unpack_zeros(read_tensor(self._zeros))
        middle = 2 ** (self._packing.bits - 1)
        return TensorSource(
            shape=self._shape,
            inputs=(self._values, self._zeros, self._scales),
            make=self._dequantize,
            packed=PackedValues(
                bits=self._packing.bits,
                group=self._group,
                is_symmetric=bool((zeros_GO == middle).all()),
                scales=self._scales,
                order_I=self._order_I,
                read_values=lambda: self._unpack_values(read_tensor(self._values)),
                read_zeros=lambda: self._unpack_zeros(read_tensor(self._zeros)),
            ),
        )

    def _find(
        self, part: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = ("int32",)
    ) -> TensorLocation:
        key = f"{self._layer}.{part}"
        tensor = self._checkpoint.tensors.get(key)
        if tensor is None and key not in self._checkpoint.unreadable:
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor '{key}' is missing, though "
                f"'{self._layer}.qweight' is there; download the checkpoint again"
            )
        dtype = self._checkpoint.unreadable[key] if tensor is None else tensor.dtype
        if tensor is None or dtype not in dtypes:
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor '{key}' is stored as {dtype}, expected "
                f"{' or '.join(dtypes)}; give the checkpoint that it was made from"
            )
        require_shape(tensor, shape)
        return tensor

    def _read_order(self) -> Tensor | None:
        """Inputs sorted by their groups; None where they lie so."""
        inputs, group = self._shape[1], self._group
        if self._packing.method == "awq" or f"{self._layer}.g_idx" not in {
            *self._checkpoint.tensors,
            *self._checkpoint.unreadable,
        }:
            return None
        place = self._find("g_idx", (inputs,))
        groups_I = read_tensor(place).long()
        in_order_I = torch.arange(inputs) // group
        if torch.equal(groups_I, in_order_I):
            return None
        order_I = torch.argsort(groups_I, stable=True)
        if not torch.equal(groups_I[order_I], in_order_I):
            raise CheckpointError(
                f"{place.shown}: tensor '{place.key}' does not put {group} inputs into each "
                f"of {inputs // group} groups; give the checkpoint that it was made from"
            )
        return order_I

    def _unpack_values(self, words: Tensor) -> Tensor:
        """Values uint8 [I, O] of qweight, sorted by group."""
        if self._packing.method == "awq":
            return _unpack(words, 4, _AWQ_NIBBLES, dim=2).flatten(1)
        bits = self._packing.bits
        values_IO = _unpack(words, bits, range(self._packing.per), dim=1).flatten(0, 1)
        return values_IO if self._order_I is None else values_IO[self._order_I]

    def _unpack_zeros(self, words: Tensor) -> Tensor:
        """Zero points uint8 [G, O] of qzeros."""
        if self._packing.method == "awq":
            return _unpack(words, 4, _AWQ_NIBBLES, dim=2).flatten(1)
        bits = self._packing.bits
        if self._packing.form == "gptq":
            words = words + _ONES[bits]
        return _unpack(words, bits, range(self._packing.per), dim=2).flatten(1)

    def _dequantize(self, values: Tensor, zeros: Tensor, scales_GO: Tensor) -> Tensor:
        """The weight [O, I], float32."""
        outputs, inputs = self._shape
        values_GIO = self._unpack_values(values).reshape(-1, self._group, outputs).float()
        zeros_GO = self._unpack_zeros(zeros).float()
        sorted_IO = ((values_GIO - zeros_GO[:, None]) * scales_GO[:, None]).flatten(0, 1)
        if self._order_I is None:
            return sorted_IO.T.contiguous()
        weight_OI = torch.empty(outputs, inputs)
        weight_OI[:, self._order_I] = sorted_IO.T
        return weight_OI


def _unpack(words: Tensor, bits: int, places: Iterable[int], *, dim: int) -> Tensor:
    """Values uint8 of words int32 [R, C] along a new dimension, by their places in a word."""
    mask = 2**bits - 1
    return torch.stack(
        [((words >> bits * place) & mask).to(torch.uint8) for place in places], dim=dim
    )
