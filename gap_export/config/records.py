"""Everything that decides an export, as frozen records."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from gap_export.config.pruners import IVC, USUAL
from gap_runtime.bundle.layout import (
    ExtraRule,
    PositionMode,
)
from gap_runtime.bundle.manifest import PhraseSource, WeightDtype
from gap_runtime.machines.target import ModelDtype
from gap_runtime.pictures.boxes import Frame

Method = Literal["awq", "nearest"]
CacheBits = Literal["int8"]
POSITION_LINES: Final[dict[PositionMode, str]] = {
    "gap": "every kept token has the position ID and the order that it had before pruning",
    "compact": "raster order, IDs counted anew without gaps; an ablation, boxes are lost",
    "permuted": "the pruner's own order, the kept IDs ascending, so that most tokens have "
    "another's; an ablation",
    "permuted-compact": "the pruner's own order, IDs counted anew; an ablation",
    "compact-grid": "rows and columns kept, text right behind them; where a token has three IDs",
}
"""How slots are ordered and numbered: a line for people about each mode."""
POSITION_MODES: Final[tuple[PositionMode, ...]] = get_args(PositionMode)
GRID_MODE: Final[PositionMode] = "compact-grid"
"""The mode that only tokens with IDs by row and column have."""
EXTRA_RULES: Final[tuple[ExtraRule, ...]] = get_args(ExtraRule)
DTYPES: Final[tuple[ModelDtype, ...]] = get_args(ModelDtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """Which visual tokens stay, and with which position IDs.

    `strategy` is empty for the family's own, as long as the family is not known.
    `ratios` are shares to remove, in [0, 1); or `keep` are counts that stay, of all visual tokens
    of a picture, those that mark the ends of rows among them. `seed` is for strategies that draw.
    `ivc` is for strategies with `+ivc`: the share of all visual tokens that always stays for its
    rotary cosines, and as many for its sines.
    `extra_token` is where the token goes that a strategy makes of the removed ones. `phrase` is
    what those that read the phrase compare with: CLIP's text tower (`clip`) or the language
    model's own token `embeddings`; the family's own where it is null.
    """

    strategy: str = USUAL
    ratios: tuple[float, ...] = (0.5,)
    keep: tuple[int, ...] = ()
    positions: PositionMode = "gap"
    seed: int = 0
    ivc: float = 0.05
    extra_token: ExtraRule = "last-visual"
    phrase: PhraseSource | None = None

    @property
    def name(self) -> str:
        """The strategy for people: a file of the user's by its name alone."""
        return Path(self.strategy).name

    @property
    def keeps_coordinates(self) -> bool:
        """Whether the tokens at extreme rotary positions stay whatever the strategy chooses."""
        return self.strategy.endswith(IVC)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """The question. Counts are tokens.

    `template` holds the image token and `{phrase}`; the checkpoint's or the family's own where it
    is null. `yields`: it gives way to the checkpoint's own chat template where that has other
    marks around a question, as model files for published models do.
    `prefix` matters only for a checkpoint without a tokenizer; it is counted otherwise.
    `suffix` is the most tokens after the picture; where it is null, the template's own and
    room for a phrase.
    """

    template: str | None = None
    yields: bool = False
    prefix: int | None = None
    suffix: int | None = None
    answer: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """Picture sizes, for families whose number of visual tokens depends on them.

    `canvas` lists canvases in pixels, each with the aspect of the pictures on it where that is
    another one: `672x672/4:3,336x672`. One vision graph is made for each. `tiles` is how many
    tiles a picture is cut into at most, for families that cut by aspect alone; as many as the
    model's own processor does where it is null.
    """

    canvas: str | None = None
    tiles: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """Facts about a vision tower whose file does not tell them; the family's own where null."""

    heads: int | None = None
    side: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxConfig:
    """The frame of the answers' boxes, as in a manifest; the family's own if null."""

    frame: Frame | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """What PyTorch answers at export, and in how much memory.

    `samples` is a folder with `samples.json`, a list of {image, phrase}; the packaged ones where
    it is null. With `memory_mib`, PyTorch reads weights layer by layer and keeps so many MiB of
    them; where it is null, it does that only if the model does not fit in the free memory.
    """

    samples: str | None = None
    memory_mib: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """Which weights are stored in fewer bits, and how their values are found.

    `weights` is `int8`, `int4` or null for none. `method` is `awq` (activation-aware, on the
    sample pictures) or `nearest` (rounding); null: `awq` for int4 where samples are answered,
    else `nearest`. The switches are for the decoder's linear layers, its head, and the vision
    tower with the projector.
    """

    weights: WeightDtype | None = None
    method: Method | None = None
    decoder: bool = True
    head: bool = True
    vision: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Everything that decides an export. `checkpoint` is a folder, a file or a hub id.

    `description` is a line for people. `kv_cache` is `int8` or null for the model's dtype.
    `parts` are further checkpoints that the model is made of, by role: folders, files or hub
    ids; looked for in the checkpoint's folder and beside it too.
    """

    family: str
    checkpoint: str
    description: str = ""
    revision: str | None = None
    dtype: ModelDtype | None = None
    kv_cache: CacheBits | None = None
    parts: dict[str, str] = field(default_factory=dict)
    image: ImageConfig = field(default_factory=ImageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    box: BoxConfig = field(default_factory=BoxConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedConfig:
    """A configuration and the name that its bundle starts with."""

    name: str
    config: ExportConfig
