"""Which model is exported: its checkpoint, family, parts, and the pruner that it can serve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gap_export.checkpoint.adapter import ADAPTER, UNMERGED, describe_unmerged
from gap_export.checkpoint.index import Checkpoint, Fetch, open_checkpoint, open_part
from gap_export.config.load import settle_family
from gap_export.config.pruners import PRUNERS
from gap_export.config.records import GRID_MODE, ExportConfig, NamedConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import Family, ModelSpec
from gap_export.interfaces.features import CLS_FEATURES, Feature, Pruner, settle_needs
from gap_export.interfaces.pruner import load_pruner
from gap_runtime.errors import ConfigError, UnknownNameError, describe_unknown
from gap_runtime.registry import list_plugins, load_plugin


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint, its family and the pruner that is asked for.

    `named` has the family in it, also where that was not known before.
    """

    named: NamedConfig
    checkpoint: Checkpoint
    family_name: str
    family: Family
    pruner: Pruner
    spec: ModelSpec


def read_model(named: NamedConfig, fetch: Fetch | None = None) -> Model:
    """Open a configured checkpoint with its parts, and see that the pruner can be served.

    Args:
        named: The configuration.
        fetch: See `plan_export`.

    Raises:
        GapError: The checkpoint is broken, or lacks what the pruner needs.
    """
    config = named.config
    family_name = config.family
    parts_beside: frozenset[str] = frozenset()
    if family_name:
        family: Family = load_plugin("gap_export.models", family_name, "family")
        usual = {**family.PARTS, **config.parts}
        parts_beside = frozenset(Path(location).name for location in usual.values())
    checkpoint = open_checkpoint(
        config.checkpoint, config.revision, ignored=parts_beside, fetch=fetch
    )
    if not family_name:
        named = settle_family(named, checkpoint.folder)
        config = named.config
        family_name = config.family
        family = load_plugin("gap_export.models", family_name, "family")
    strategy = config.prune.name
    pruner = load_pruner(config.prune.strategy)
    source = config.prune.phrase or ("clip" if "clip" in family.PARTS else "embeddings")
    reads_clip = Feature.TEXT in pruner.NEEDS and source == "clip"
    unknown = sorted(set(config.parts) - set(family.PARTS))
    if ADAPTER in unknown:
        raise ConfigError(
            f"parts.{ADAPTER}: none is merged into a model of family '{family_name}'; {UNMERGED}"
        )
    if unknown:
        raise UnknownNameError(describe_unknown("part", unknown[0], family.PARTS))
    parts = _open_parts(checkpoint, family, config, fetch, reads_clip=reads_clip)
    checkpoint = replace(checkpoint, parts=parts)
    spec = family.read_spec(checkpoint, config)
    _require_patches(checkpoint, spec)
    left = describe_unmerged(checkpoint, merges=ADAPTER in family.PARTS)
    spec = replace(spec, notes=(*spec.notes, *left))
    if config.box.frame is not None:
        spec = replace(spec, box=replace(spec.box, frame=config.box.frame))
    if config.prune.positions == GRID_MODE and spec.decoder.axes == 1:
        raise ConfigError(
            f"prune.positions '{GRID_MODE}': a token of family '{family_name}' has one position "
            "ID, so no row and column can be kept apart from it; use gap, or compact, which it "
            "would be"
        )
    given = set(spec.features) | {Feature.TOKENS, Feature.TEXT}
    if not reads_clip:
        given.add(Feature.TEXT_PATCHES)
    lacking = sorted(need.value for need in settle_needs(pruner.NEEDS, given) - given)
    if reads_clip and spec.text is None:
        raise ConfigError(
            f"pruner '{strategy}' compares patches with the phrase through CLIP's text tower, "
            f"which family '{family_name}' does not have; use --set prune.phrase=embeddings"
        )
    if lacking:
        raise ConfigError(
            f"pruner '{strategy}' needs {', '.join(lacking)}, which family '{family_name}' does "
            f"not give{_explain_lack(pruner, spec)}; choose another --pruner: "
            f"{', '.join(_list_served(given))}"
        )
    return Model(
        named=named,
        checkpoint=checkpoint,
        family_name=family_name,
        family=family,
        pruner=pruner,
        spec=spec,
    )


def _require_patches(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Refuse a tower whose pictures become no visual token.

    Raises:
        CheckpointError: One does.
    """
    if any(rows < 1 or columns < 1 for each in spec.buckets for rows, columns in each.grids):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: a picture becomes 0 visual tokens, as "
            "patch_size is more than image_size; download the checkpoint again"
        )


def _explain_lack(pruner: Pruner, spec: ModelSpec) -> str:
    """Why a tower does not give what a pruner needs, where that is for the lack of CLS."""
    if not pruner.NEEDS & CLS_FEATURES or spec.features.keys() & CLS_FEATURES:
        return ""
    return ", as its vision tower has no CLS token"


def _list_served(given: set[Feature]) -> list[str]:
    """The pruners that need nothing else than this."""
    return [
        name
        for name in list_plugins(PRUNERS)
        if given >= settle_needs(load_pruner(name).NEEDS, given)
    ]


def _open_parts(
    checkpoint: Checkpoint,
    family: Family,
    config: ExportConfig,
    fetch: Fetch | None,
    *,
    reads_clip: bool,
) -> dict[str, Checkpoint]:
    """The further checkpoints that a model is made of, by role."""
    parts = {}
    for role, location in (family.find_parts(checkpoint, text=reads_clip) | config.parts).items():
        if not location:
            continue
        try:
            parts[role] = open_part(location, checkpoint.folder, role, fetch=fetch)
        except CheckpointError as error:
            if role in config.parts or role in family.find_parts(checkpoint, text=False):
                raise
            # Only the phrase wants it, which can be read in another way.
            raise CheckpointError(
                f"{error}; or compare with the language model's own embeddings: "
                "--set prune.phrase=embeddings"
            ) from error
    return parts
