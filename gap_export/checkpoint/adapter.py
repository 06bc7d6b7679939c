"""LoRA adapters as PEFT saves them: what they add to a model's weights, and what they replace.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
Training scripts save what was trained besides LoRA in `non_lora_trainables.bin` beside it, or in
`mm_projector.bin` where nothing else was. Such a folder has the model's config and is given as the
checkpoint, the model that it was made from as its part `base`; a plain adapter is the part
`adapter` of a whole model.

W becomes W + alpha / rank * up @ down, with the square root of the rank where `use_rslora` is on.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from gap_export.checkpoint.folder import ADAPTER_CONFIG
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource, require_shape, stored
from gap_export.checkpoint.tensor import TensorLocation
from gap_export.config.records import DTYPES
from gap_export.errors import CheckpointError
from gap_runtime.errors import PatternError
from gap_runtime.records.patterns import Matcher

BASE: Final = "base"
ADAPTER: Final = "adapter"
"""Parts: the model that an adapter was made from, and an adapter of the checkpoint."""
_PAIR: Final = re.compile(r"(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight")
_WRAPPERS: Final = re.compile(r"\.(base_layer|modules_to_save(\.[\w-]+)?)(?=\.)")
_AXES: Final = 2
"""Of a linear layer's weight, and of what LoRA adds to it."""
_MOST: Final = 1e6
"""Larger is no alpha that anybody trained with."""
UNMERGED: Final = "merge it with PEFT's merge_and_unload() and give the merged model"
"""What to do about an adapter that cannot be merged here."""
_OTHER_KINDS: Final = (
    *("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
"""Settings with which an adapter is more than a product that is added to a weight."""
_CHANGED_BASES: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin a training that change the weights of the base too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """Two matrices whose product, scaled, is added to a weight."""

    down: TensorLocation
    up: TensorLocation
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What an adapter changes, by the names of the weights in the modules here.

    `part` is the role of its files among the checkpoint's parts; None where they are its own.
    `values` are tensors that stand in for the model's.
    """

    part: str | None
    pairs: dict[str, LoraPair]
    values: dict[str, TensorLocation]


def is_partial(checkpoint: Checkpoint) -> bool:
    """Whether a folder holds changes to a model instead of one: LoRA, or no layer at all."""
    keys = checkpoint.tensors.keys() | checkpoint.unreadable.keys()
    # PEFT calls everything that it saves a part of its `base_model`, whole layers too.
    layers = (key for key in keys if ".layers." in key and not key.startswith("base_model."))
    return bool(keys) and all(".lora_" in key for key in layers)


def find_base(checkpoint: Checkpoint, usual: str) -> str:
    """Where the model is that a folder holds changes to, as its training script wrote it down."""
    settings = checkpoint.read_json(ADAPTER_CONFIG) or {}
    config = checkpoint.read_json("config.json") or {}
    return str(settings.get("base_model_name_or_path") or config.get("_name_or_path") or usual)


def describe_unmerged(checkpoint: Checkpoint, *, merges: bool) -> tuple[str, ...]:
    """Lines for people about an adapter that lies beside a whole model's weights.

    Args:
        checkpoint: Of the model.
        merges: Whether its family merges adapters.
    """
    is_beside = (checkpoint.folder / ADAPTER_CONFIG).is_file() and not is_partial(checkpoint)
    if not is_beside or ADAPTER in checkpoint.parts:
        return ()
    files = sorted(checkpoint.folder.glob("adapter_model.*"))
    return tuple(
        f"{file}: an adapter beside the weights of a whole model, which is not merged; if it is "
        f"to be, {f'--set parts.{ADAPTER}={file}' if merges else UNMERGED}"
        for file in files[-1:]
    )


def choose_base(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint whose weights are the model's: its base where it holds changes to one.

    Raises:
        CheckpointError: The base was left out, or the checkpoint needs none.
    """
    if is_partial(checkpoint):
        if BASE not in checkpoint.parts:
            raise CheckpointError(
                f"{checkpoint.folder}: holds changes to a model (LoRA, or the projector alone); "
                "give the model that it was trained from: --set parts.base=DIR"
            )
        return require_whole(checkpoint.parts[BASE], BASE)
    if BASE in checkpoint.parts:
        raise CheckpointError(
            f"{checkpoint.folder}: holds a whole model, which needs no base; leave it out: "
            "--set parts.base="
        )
    return checkpoint


def require_whole(part: Checkpoint, role: str) -> Checkpoint:
    """Refuse changes to a model as the language model that a checkpoint is made from.

    Raises:
        CheckpointError: The part is an adapter, or a projector alone.
    """
    marks = (".lora_", "mm_projector")
    if is_partial(part) and any(mark in key for key in part.tensors for mark in marks):
        raise CheckpointError(
            f"{part.folder}: holds changes to a model (LoRA, or a projector alone), expected a "
            f"whole one as the part '{role}'; merge them first with PEFT's merge_and_unload(), or "
            f"give the model that they were made from: --set parts.{role}=DIR"
        )
    return part


def read_adapters(checkpoint: Checkpoint, rename: Callable[[str], str]) -> list[Adapter]:
    """The adapters of a checkpoint in the order in which they are applied: its own, its part's.

    Args:
        checkpoint: With its parts.
        rename: Name of a weight in the modules here, by its key in the model.

    Raises:
        CheckpointError: One cannot be read, or is of a kind that cannot be merged here.
    """
    own = [_read_adapter(checkpoint, None, rename)] if is_partial(checkpoint) else []
    return own + read_part(checkpoint, rename)


def read_part(checkpoint: Checkpoint, rename: Callable[[str], str]) -> list[Adapter]:
    """The adapter among a checkpoint's parts, if there is one; see read_adapters."""
    if ADAPTER not in checkpoint.parts:
        return []
    part = checkpoint.parts[ADAPTER]
    if not is_partial(part):
        raise CheckpointError(
            f"{part.folder}: holds a whole model, expected an adapter; give it as the model: "
            "--checkpoint DIR"
        )
    return [_read_adapter(part, ADAPTER, rename)]


def replace_values(
    base: Checkpoint, adapters: Iterable[Adapter], rename: Callable[[str], str]
) -> Checkpoint:
    """A checkpoint with the tensors that adapters bring in the place of its own."""
    for adapter in adapters:
        kept = {k: each for k, each in base.tensors.items() if rename(k) not in adapter.values}
        base = dataclasses.replace(base, tensors=kept | adapter.values)
    return base


def merge_into(sources: dict[str, TensorSource], adapters: Iterable[Adapter]) -> None:
    """Merge adapters into the weights of a model whose files are more than one, in place.

    Raises:
        CheckpointError: As add_adapters does, or a tensor that stands in has no place.
    """
    for adapter in adapters:
        for name, value in adapter.values.items():
            if name not in sources:
                raise CheckpointError(
                    f"{value.shown}: tensor '{value.key}' is none that this model has; give an "
                    "adapter that was trained on it"
                )
            require_shape(value, sources[name].shape)
            sources[name] = stored(value)
        add_adapters(sources, [adapter])


def add_adapters(sources: dict[str, TensorSource], adapters: Iterable[Adapter]) -> None:
    """Add adapters' products to the weights of a model, in place.

    Raises:
        CheckpointError: A weight is none that the model has, has another shape, or is quantized.
    """
    for adapter in adapters:
        for name, pair in adapter.pairs.items():
            source = sources.get(name)
            if source is None:
                raise CheckpointError(
                    f"{pair.down.shown}: tensor '{pair.down.key}' changes a layer that this model "
                    "has not; give the model that it was trained from"
                )
            if source.packed is not None:
                raise CheckpointError(
                    f"{pair.down.shown}: tensor '{pair.down.key}' changes a layer that came "
                    "quantized; give the model that it was made from, before it was quantized"
                )
            if len(source.shape) != _AXES:
                raise CheckpointError(
                    f"{pair.down.shown}: tensor '{pair.down.key}' changes a weight of shape "
                    f"{list(source.shape)}, expected a linear layer's; {UNMERGED}"
                )
            require_shape(pair.down, (pair.down.shape[0], source.shape[1]))
            require_shape(pair.up, (source.shape[0], pair.down.shape[0]))
            sources[name] = add_pair(source, pair.down, pair.up, pair.scale)


def add_pair(
    source: TensorSource, down: TensorLocation, up: TensorLocation, scale: float
) -> TensorSource:
    """A weight with `scale * up @ down` added, made row by row where the weight can be."""
    make, count = source.make, len(source.inputs)

    def add(*values: Tensor) -> Tensor:
        weight = values[0] if make is None else make(*values[:count])
        down_RI, up_OR = values[count:]
        return weight + scale * (up_OR @ down_RI)

    return dataclasses.replace(
        source,
        inputs=(*source.inputs, down, up),
        make=add,
        cut=(*source.cut, False, True) if source.cut else (),
    )


def _read_adapter(
    checkpoint: Checkpoint, part: str | None, rename: Callable[[str], str]
) -> Adapter:
    """The adapter that lies in a folder."""
    settings = checkpoint.read_json(ADAPTER_CONFIG) or {}
    where = checkpoint.folder / ADAPTER_CONFIG
    if settings:
        _require_mergeable(settings, str(where))
    halves: dict[str, dict[str, TensorLocation]] = {}
    values = {}
    for key, tensor in checkpoint.tensors.items():
        found = _PAIR.fullmatch(key)
        if found is not None and not settings:
            raise CheckpointError(
                f"{checkpoint.folder}: no {ADAPTER_CONFIG} beside '{tensor.shown.name}', which "
                "holds LoRA; put the one of its training there, it says how LoRA is scaled"
            )
        if tensor.dtype not in DTYPES:
            raise _unusable(checkpoint, key, tensor.dtype)
        if found is not None:
            _require_matrix(tensor)
            halves.setdefault(_model_key(found[1]), {})[found[2]] = tensor
        elif ".lora_" in key:
            raise CheckpointError(
                f"{tensor.shown}: tensor '{key}' is of a kind of LoRA that is not merged here "
                f"(embeddings, biases or magnitudes); {UNMERGED}"
            )
        else:
            values[rename(_model_key(key))] = tensor
    for key, dtype in checkpoint.unreadable.items():
        raise _unusable(checkpoint, key, dtype)
    pairs = {}
    matcher = Matcher()
    for layer, half in halves.items():
        if len(half) == 1:
            (alone,) = half.values()
            raise CheckpointError(
                f"{alone.shown}: tensor '{alone.key}' has no counterpart (lora_A, lora_B); "
                "download the adapter again"
            )
        scale = _find_scale(settings, layer, half["A"], str(where), matcher)
        name = rename(f"{layer}.weight")
        pairs[name] = LoraPair(down=half["A"], up=half["B"], scale=scale)
    return Adapter(part=part, pairs=pairs, values=values)


def _require_mergeable(settings: Mapping[str, Any], where: str) -> None:
    """Refuse adapters whose merging is more than a product that is added."""
    if settings.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{where}: an adapter of type {settings['peft_type']}, expected LORA; {UNMERGED}"
        )
    for name in _OTHER_KINDS:
        if settings.get(name):
            raise CheckpointError(f"{where}: {name} is on, which is not merged here; {UNMERGED}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise CheckpointError(
            f"{where}: init_lora_weights '{start}' changed the weights of the base too; {UNMERGED}"
        )


def _require_matrix(tensor: TensorLocation) -> None:
    """Refuse half of a pair that is no matrix, as that of a convolution is."""
    if len(tensor.shape) != _AXES:
        raise CheckpointError(
            f"{tensor.shown}: tensor '{tensor.key}' has shape {list(tensor.shape)}, expected that "
            f"of a matrix; {UNMERGED}"
        )


def _model_key(key: str) -> str:
    """A key of the model, from what PEFT's and the authors' savers make of it."""
    key = key.removeprefix("base_model.model.")
    if key.startswith("model.model."):
        key = key.removeprefix("model.")
    return _WRAPPERS.sub("", key)


def _find_scale(
    settings: Mapping[str, Any], layer: str, down: TensorLocation, where: str, matcher: Matcher
) -> float:
    """What a pair of a layer is scaled by, as PEFT finds it."""

    def find(patterns: str, usual: str) -> Any:
        table = settings.get(patterns) or {}
        if not isinstance(table, dict):
            raise CheckpointError(f"{where}: {patterns} is no object; download the adapter again")
        for key, own in table.items():
            try:
                if matcher.match_whole(rf"(?:.*\.)?(?:{key})", layer) is not None:
                    return own
            except PatternError as error:
                raise CheckpointError(f"{where}: {patterns}: {error}") from error
        return settings.get(usual)

    rank, alpha = find("rank_pattern", "r"), find("alpha_pattern", "lora_alpha")
    if type(rank) is not int or type(alpha) not in {int, float} or rank < 1:
        raise CheckpointError(
            f"{where}: r {rank!r} and lora_alpha {alpha!r}, expected numbers; download the "
            "adapter again"
        )
    if not abs(alpha) <= _MOST:  # NaN is neither
        raise CheckpointError(
            f"{where}: lora_alpha {alpha!r:.60}, expected a number; download the adapter again"
        )
    if down.shape[0] != rank:
        raise CheckpointError(
            f"{down.shown}: tensor '{down.key}' has rank {down.shape[0]}, {where} says r {rank}; "
            "download the adapter again"
        )
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _unusable(checkpoint: Checkpoint, key: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder}: tensor '{key}' is stored as {dtype}, which cannot be used; save "
        "the adapter in float32, float16 or bfloat16"
    )
