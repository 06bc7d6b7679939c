"""What an export will make: every number settled from indices alone, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.config import (
    DIALECT,
    DTYPES,
    IMAGE_FIELD,
    OPSET,
    NamedConfig,
    count_ratios,
    load_target,
    resolve_family,
)
from gap_export.errors import CheckpointError, ExportError
from gap_export.family import Family, ModelSpec
from gap_export.features import Pruner
from gap_export.placement import require_replaceable
from gap_export.reference import Sample, read_samples
from gap_runtime.display import format_bytes
from gap_runtime.errors import BundleError, ConfigError
from gap_runtime.layout import TokenLayout
from gap_runtime.manifest import BundleLayout, Prompt
from gap_runtime.prompt import PromptEncoder, load_tokenizer
from gap_runtime.registry import load_plugin
from gap_runtime.tensors import ITEM_BYTES

REFERENCE_DTYPE: Final = "float32"
TOKENIZER_FILE: Final = "tokenizer.json"
_LEAST_SUFFIX: Final = 64
_PHRASE_ROOM: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export and how, besides the configuration."""

    named: NamedConfig
    target: str
    out: Path | None
    weights: str
    reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Everything that follows from the request and the checkpoint's index, before any work."""

    request: ExportRequest
    checkpoint: Checkpoint
    family_name: str
    family: Family
    pruner: Pruner
    spec: ModelSpec
    dtype: str
    layout: BundleLayout
    pairs: list[tuple[float, int]]
    prompt: Prompt
    samples: list[Sample]
    out: Path

    @property
    def cache_bytes_per_slot(self) -> int:
        """Bytes of the KV cache per slot, all layers."""
        spec = self.spec
        return 2 * spec.layers * spec.cache_heads * spec.head_dim * ITEM_BYTES[self.dtype]


def plan_export(request: ExportRequest) -> ExportPlan:
    """Read configs and indices and settle every number, without tracing or writing.

    Raises:
        GapError: Anything about the request or the checkpoint that cannot work.
    """
    config = request.named.config
    _require_target(request.target)
    checkpoint = open_checkpoint(config.checkpoint, config.revision)
    family_name = resolve_family(checkpoint.folder, config.family)
    family: Family = load_plugin("gap_export.models", family_name, "family")
    pruner: Pruner = load_plugin("gap_export.pruners", config.prune.strategy, "pruner")
    lacking = sorted(need.value for need in pruner.NEEDS - family.FEATURES)
    if lacking:
        raise ConfigError(
            f"pruner '{config.prune.strategy}' needs {', '.join(lacking)}, which family "
            f"'{family_name}' does not give; choose another --pruner"
        )
    spec = family.read_spec(checkpoint)
    pairs = count_ratios(config.prune, spec.patches)
    prompt, prefix, suffix = _plan_prompt(request, checkpoint, spec)
    most_kept = max(kept for _, kept in pairs)
    widest = TokenLayout(
        prefix=prefix,
        patches=spec.patches,
        kept=most_kept,
        extra=0,
        suffix=suffix,
        answer=config.prompt.answer,
    )
    layout = BundleLayout(
        prefix=prefix,
        patches=spec.patches,
        grid=spec.grid,
        extra=0,
        suffix=suffix,
        answer=config.prompt.answer,
        capacity=widest.capacity,
    )
    counts = "-".join(str(kept) for _, kept in pairs)
    default_out = Path(f"{request.named.name}-{counts}of{spec.patches}")
    out = (request.out or default_out).expanduser()
    out = out.resolve() if out.is_symlink() else out
    require_replaceable(out)
    samples: list[Sample] = []
    if request.reference:
        samples = read_samples(config.check.samples)
        _require_memory(checkpoint)
    return ExportPlan(
        request=request,
        checkpoint=checkpoint,
        family_name=family_name,
        family=family,
        pruner=pruner,
        spec=spec,
        dtype=config.dtype or _stored_dtype(checkpoint),
        layout=layout,
        pairs=pairs,
        prompt=prompt,
        samples=samples,
        out=out,
    )


def _require_target(name: str) -> None:
    """Refuse a target whose graphs this version does not make."""
    target = load_target(name)
    if (target.dialect, target.opset) != (DIALECT, OPSET):
        raise ConfigError(
            f"target '{name}' takes the {target.dialect} dialect of opset {target.opset}; this "
            f"version exports {DIALECT} of opset {OPSET}"
        )


def _plan_prompt(
    request: ExportRequest, checkpoint: Checkpoint, spec: ModelSpec
) -> tuple[Prompt, int, int]:
    """The prompt record and the numbers of tokens before and (at most) after the image."""
    config = request.named.config.prompt
    template = config.template or spec.template
    tokenizer = checkpoint.folder / TOKENIZER_FILE
    if not tokenizer.is_file():
        if request.reference:
            raise CheckpointError(
                f"{checkpoint.folder}: no {TOKENIZER_FILE} in it; add the model's tokenizer, or "
                "export the graphs alone with --no-reference"
            )
        prompt = Prompt(template=template, image_token="", tokenizer=None, stop_ids=spec.stop_ids)
        prefix = spec.prefix if config.prefix is None else config.prefix
        return prompt, prefix, config.suffix or _LEAST_SUFFIX
    image_token = _image_token(tokenizer, spec.image_token_id)
    prompt = Prompt(
        template=template.replace(IMAGE_FIELD, image_token),
        image_token=image_token,
        tokenizer=TOKENIZER_FILE,
        stop_ids=spec.stop_ids,
    )
    encoded = PromptEncoder(tokenizer, prompt).encode("x")
    suffix = config.suffix or max(_LEAST_SUFFIX, len(encoded.suffix) + _PHRASE_ROOM)
    if len(encoded.suffix) > suffix:
        raise ConfigError(
            f"{request.named.name}: the prompt has {len(encoded.suffix)} tokens after the image "
            f"for the shortest phrase, prompt.suffix is {suffix}; raise it with "
            f"--set prompt.suffix={len(encoded.suffix) + _PHRASE_ROOM}"
        )
    return prompt, len(encoded.prefix), suffix


def _image_token(tokenizer: Path, token_id: int) -> str:
    try:
        token = load_tokenizer(tokenizer).id_to_token(token_id)
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    if token is None:
        raise CheckpointError(
            f"{tokenizer}: no token {token_id}, which config.json names as the image "
            "token; give the tokenizer that belongs to this checkpoint"
        )
    return str(token)


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of the checkpoint's bytes have: no conversion is the default."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.length
    floats = {name: size for name, size in sizes.items() if name in DTYPES}
    return max(floats, key=lambda name: floats[name]) if floats else "float32"


def _require_memory(checkpoint: Checkpoint) -> None:
    """Refuse a reference that the machine would be killed for."""
    tensors = checkpoint.tensors.values()
    needed = sum(t.length // ITEM_BYTES[t.dtype] for t in tensors) * ITEM_BYTES[REFERENCE_DTYPE]
    available = psutil.virtual_memory().available
    if needed > available:
        raise ExportError(
            f"{checkpoint.folder}: PyTorch's reference in {REFERENCE_DTYPE} takes "
            f"{format_bytes(needed)}, {format_bytes(available)} of memory is free; export with "
            "--no-reference, or on a larger machine"
        )
