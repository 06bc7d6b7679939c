"""What the user asks for: configuration files, flags and `--set`, as frozen records."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from gap_runtime.bundle.layout import (
    ExtraRule,
    PositionMode,
    count_kept,
    find_ratio,
    require_ratio,
)
from gap_runtime.bundle.manifest import PhraseSource, WeightDtype
from gap_runtime.errors import ConfigError, RecordError, UnknownNameError, describe_unknown
from gap_runtime.machines.target import ModelDtype
from gap_runtime.pictures.boxes import Frame
from gap_runtime.records import load_record
from gap_runtime.registry import list_plugins, read_constant

Method = Literal["awq", "nearest"]
POSITION_LINES: Final[dict[PositionMode, str]] = {
    "gap": "every kept token has the position ID and the order that it had before pruning",
    "compact": "raster order, IDs counted anew without gaps; an ablation, boxes are lost",
    "permuted": "the pruner's own order, each token with its ID; an ablation",
    "permuted-compact": "the pruner's own order, IDs counted anew; an ablation",
}
"""How slots are ordered and numbered: a line for people about each mode."""
POSITION_MODES: Final[tuple[PositionMode, ...]] = get_args(PositionMode)
EXTRA_RULES: Final[tuple[ExtraRule, ...]] = get_args(ExtraRule)
DTYPES: Final[tuple[ModelDtype, ...]] = get_args(ModelDtype)
_DTYPE_NAMES: Final = {
    "fp32": "float32",
    "float": "float32",
    "single": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}
"""Names under which dtypes are known elsewhere."""
PRUNERS: Final = "gap_export.pruners"
_RATIOS: Final = "prune.ratios"
_KEEP: Final = "prune.keep"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")

_FAMILIES: Final = "gap_export.models"
NO_WAY: Final = (
    "`gap-export list` shows their models, and CONTRIBUTING.md says how a family is added"
)
"""What to do about a model that no family has a word for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """Which visual tokens stay, and with which position IDs.

    `ratios` are shares to remove, in [0, 1); or `keep` are counts that stay, of all visual tokens
    of a picture, those that mark the ends of rows among them. `seed` is for strategies that draw.
    `extra_token` is where the token goes that a strategy makes of the removed ones. `phrase` is
    what those that read the phrase compare with: CLIP's text tower (`clip`) or the language
    model's own token `embeddings`; the family's own where it is null.
    """

    strategy: str = "cls_attention"
    ratios: tuple[float, ...] = (0.5,)
    keep: tuple[int, ...] = ()
    positions: PositionMode = "gap"
    seed: int = 0
    extra_token: ExtraRule = "last-visual"
    phrase: PhraseSource | None = None

    @property
    def name(self) -> str:
        """The strategy for people: a file of the user's by its name alone."""
        return Path(self.strategy).name


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

    `description` is a line for people.
    `parts` are further checkpoints that the model is made of, by role: folders, files or hub
    ids; looked for in the checkpoint's folder and beside it too.
    """

    family: str
    checkpoint: str
    description: str = ""
    revision: str | None = None
    dtype: ModelDtype | None = None
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


def load_config(
    model: str, overrides: dict[str, Any], *, checkpoint: str | None = None
) -> NamedConfig:
    """The configuration of a model.

    Args:
        model: A name in export_configs/, a `.toml` path, a checkpoint folder or a hub id.
        overrides: Values by dotted key that win over the file's.
        checkpoint: A folder or hub id to use instead of the configured one.

    Raises:
        ConfigError: Nothing of that name, an unknown key, or a value that cannot be used.
    """
    name, data, where = _find(model)
    if checkpoint is not None:
        data["checkpoint"] = checkpoint
    if _KEEP in overrides and _RATIOS in overrides:
        raise ConfigError(f"{_KEEP} and {_RATIOS} are two ways to say one thing; give one")
    for key, value in overrides.items():
        _assign(data, key, value)
    if "prompt.template" in overrides and "prompt.yields" not in overrides:
        _assign(data, "prompt.yields", value=False)
    _settle_counts(data, overrides, where)
    _settle_names(data)
    config = load_record(ExportConfig, data, where)
    _require_usable(config, where)
    return NamedConfig(name=name, config=config)


def _settle_counts(data: dict[str, Any], overrides: dict[str, Any], where: str) -> None:
    """One of shares and counts; what is asked for wins over the file's other one."""
    prune = data.setdefault("prune", {})
    if not isinstance(prune, dict):
        return
    for name in ("ratios", "keep"):
        value = prune.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            prune[name] = [value]
        elif isinstance(value, str) and re.fullmatch(r"(\d+(\.\d+)?,)+\d+(\.\d+)?", value):
            prune[name] = [float(n) if "." in n else int(n) for n in value.split(",")]
    if "keep" in prune and _RATIOS in overrides:
        del prune["keep"]
    elif "keep" in prune and "ratios" in prune and _KEEP not in overrides:
        raise ConfigError(
            f"{where}: {_KEEP} and {_RATIOS} are two ways to say one thing; give one"
        )
    if prune.get("keep"):
        prune["ratios"] = []


def _settle_names(data: dict[str, Any]) -> None:
    """The project's own names for what was asked for under others."""
    dtype, prune = data.get("dtype"), data["prune"]
    if isinstance(dtype, str):
        data["dtype"] = _DTYPE_NAMES.get(dtype.lower(), dtype)
    if isinstance(prune, dict) and isinstance(prune.get("strategy"), str):
        prune["strategy"] = resolve_pruner(prune["strategy"])


def resolve_pruner(name: str) -> str:
    """The strategy that a name stands for: its own, a published one, or a file's whole path.

    A name that is not known comes back as it is.
    """
    if is_pruner_file(name):
        return str(Path(name).expanduser().resolve())
    names = list_plugins(PRUNERS)
    if name in names:
        return name
    for each in names:
        published = read_constant(PRUNERS, each, "PUBLISHED_AS") or each
        if _plain(name) in {_plain(each), _plain(published)}:
            return each
    return name


def is_pruner_file(strategy: str) -> bool:
    """Whether a pruner is a file of the user's, not one of those that are shipped."""
    return strategy.endswith(".py")


def _plain(name: str) -> str:
    """A name without what people write in different ways."""
    return re.sub(r"[-_ ]", "", name).casefold()


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of one `--set KEY=VALUE`; the value is TOML, or a bare string.

    Raises:
        ConfigError: There is no `=`.
    """
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for example prompt.answer=32")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def count_ratios(
    config: PruneConfig, patches: int, fixed: int = 0, *, named_by: int | None = None
) -> list[tuple[float, int]]:
    """Each ratio with its kept count, in the order given.

    Args:
        config: Ratios or counts.
        patches: Visual tokens before pruning.
        fixed: How many of them cannot be removed.
        named_by: Visual tokens of the largest bucket, `patches` by default. A count is called by
            the share of them, so that it has one name in a bundle.

    Raises:
        ConfigError: A ratio or count cannot be used, or two come to the same count.
    """
    if config.keep:
        return [
            (find_ratio(named_by or patches, kept), kept)
            for kept in _require_counts(config.keep, patches, fixed)
        ]
    pairs: list[tuple[float, int]] = []
    for ratio in config.ratios:
        kept = count_kept(patches, ratio)
        if kept <= fixed:
            raise ConfigError(
                f"ratio {ratio:g} keeps {kept} of {patches} visual tokens, of which {fixed} mark "
                f"the ends of rows and stay; use at most {(patches - fixed - 1) / patches:.4g}"
            )
        for other, count in pairs:
            if count == kept:
                raise ConfigError(
                    f"ratios {other:g} and {ratio:g} both keep {kept} of {patches}; give one"
                )
        pairs.append((ratio, kept))
    return pairs


def _require_counts(keep: tuple[int, ...], patches: int, fixed: int) -> tuple[int, ...]:
    """Counts that can be kept, each once."""
    for kept in keep:
        if kept > patches:
            raise ConfigError(
                f"keep {kept}: there are {patches} visual tokens; keep at most so many"
            )
        if kept <= fixed:
            raise ConfigError(
                f"keep {kept}: {fixed} of {patches} visual tokens mark the ends of rows and stay; "
                f"keep at least {fixed + 1}"
            )
        if keep.count(kept) > 1:
            raise ConfigError(f"keep {kept} is given twice; give it once")
    return keep


def package_data(name: str) -> Path:
    """A data folder: inside the package when installed, beside it in a checkout."""
    home = Path(__file__).resolve().parent
    inside = home / name
    return inside if inside.is_dir() else home.parent / name


def is_model(word: str) -> bool:
    """Whether a word leads to a model: a name, a file, a folder, or the form of a hub id."""
    return (
        word.endswith(".toml")
        or word.startswith((".", "/", "~"))
        or word in list_configs()
        or Path(word).is_dir()
        or _HUB_ID.fullmatch(word) is not None
    )


def list_configs() -> list[str]:
    """Names in export_configs/."""
    return sorted(path.stem for path in package_data("export_configs").glob("*.toml"))


def read_config_file(name: str) -> ExportConfig:
    """The configuration of a name in export_configs/, as the file has it."""
    path = package_data("export_configs") / f"{name}.toml"
    return load_record(ExportConfig, _read_model_file(path), path.name)


def _find(model: str) -> tuple[str, dict[str, Any], str]:
    """Bundle name, raw data and the source's name for messages."""
    if model.endswith(".toml"):
        path = Path(model)
        if not path.is_file():
            raise ConfigError(f"{model}: no such configuration file")
        return path.stem, _read_model_file(path), path.name
    if model in list_configs():
        # Before folders: one of the same name can still be given as ./NAME.
        path = package_data("export_configs") / f"{model}.toml"
        return model, _read_model_file(path), path.name
    folder = Path(model).expanduser()
    if folder.is_dir():
        data = {"family": resolve_family(folder), "checkpoint": str(folder)}
        return folder.resolve().name, data, str(folder)
    if model.startswith((".", "/", "~")):
        raise ConfigError(f"{model}: no such folder")
    if _HUB_ID.fullmatch(model):
        return model.rpartition("/")[2], {"family": "", "checkpoint": model}, model
    hint = describe_unknown("model", model, list_configs())
    raise UnknownNameError(f"{hint}; or give a .toml file, a checkpoint folder or a hub id")


def _read_model_file(path: Path) -> dict[str, Any]:
    """A model file; relative folders in it are relative to the file."""
    data = _read_toml(path)
    checkpoint = data.get("checkpoint")
    check = data.get("check")
    if isinstance(check, dict) and isinstance(check.get("samples"), str):
        check["samples"] = str(path.resolve().parent / Path(check["samples"]).expanduser())
    prune = data.get("prune")
    if isinstance(prune, dict) and is_pruner_file(str(prune.get("strategy"))):
        prune["strategy"] = str(path.resolve().parent / Path(prune["strategy"]).expanduser())
    if isinstance(checkpoint, str):
        beside = path.resolve().parent / checkpoint
        if checkpoint.startswith(".") or beside.is_dir():
            data["checkpoint"] = str(beside.resolve())
    return data


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: not valid TOML ({error})") from error


def resolve_family(folder: Path) -> str:
    """The family that the `model_type` of a folder's config.json names."""
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        advice = describe_folder(folder) or (
            "no config.json in it that tells the family; give the model's name and the folder: "
            f"gap-export NAME --checkpoint {folder} (NAME: {', '.join(list_configs())})"
        )
        raise ConfigError(f"{folder}: {advice}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    found = str(data.get("model_type", "")) if isinstance(data, dict) else ""
    family = find_family(found)
    if family is None:
        raise UnknownNameError(f"{path}: {describe_model_type(found)}")
    return family


def describe_folder(folder: Path) -> str | None:
    """What a folder is that is no model, and what to give instead; None where nothing is known."""
    if (folder / "config.json").is_file():
        return None
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        found = re.search(r'"base_model_name_or_path":\s*"([^"]+)"', adapter.read_text("utf-8"))
        base = found[1] if found else "FOLDER"
        return (
            "an adapter of PEFT, not a model; give the model and the adapter: gap-export NAME "
            f"--checkpoint {base} --set parts.adapter={folder}"
        )
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        head = folder / "refs" / "main"
        commits = sorted(path.name for path in (folder / "snapshots").iterdir())
        commit = head.read_text("utf-8").strip() if head.is_file() else ""
        chosen = commit if commit in commits else commits[-1] if commits else "COMMIT"
        return f"the top of a hub cache; give the files' folder: {folder / 'snapshots' / chosen}"
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if inner:
        return (
            f"no config.json in it, but in {len(inner)} of its folders; give one, as {inner[-1]}"
        )
    return None


def find_family(model_type: str) -> str | None:
    """The family that reads checkpoints of a `model_type`; None where none does."""
    name = model_type.replace("-", "_")
    names = list_plugins(_FAMILIES)
    if name in names:
        return name
    further = (each for each in names if name in (read_constant(_FAMILIES, each, "TYPES") or ()))
    return next(further, None)


def describe_model_type(found: str) -> str:
    """One line about a `model_type` that no family reads: which there are, the nearest way."""
    names = list_plugins(_FAMILIES)
    ways = (read_constant(_FAMILIES, name, "NEIGHBOURS") or {} for name in names)
    advice = next(
        (text for way in ways for pattern, text in way.items() if re.search(pattern, found)),
        NO_WAY,
    )
    return (
        f"model_type '{found}' is none of the families that there are ({', '.join(names)}); "
        f"{advice}"
    )


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables."""
    *tables, last = key.split(".")
    for name in tables:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {key}: '{name}' is a value, not a table")
    data[last] = value


def _require_usable(config: ExportConfig, where: str) -> None:
    """Reject values that no model could use."""
    _require_strategy(config.prune.strategy)
    families = list_plugins(_FAMILIES)
    if config.family and config.family not in families:
        raise UnknownNameError(f"{where}: {describe_unknown('family', config.family, families)}")
    _require_counted(config.prune, where)
    for key, count, least in (
        ("prune.seed", config.prune.seed, 0),
        ("prompt.prefix", config.prompt.prefix, 0),
        ("prompt.suffix", config.prompt.suffix, 1),
        ("prompt.answer", config.prompt.answer, 1),
        ("check.memory_mib", config.check.memory_mib, 0),
        ("image.tiles", config.image.tiles, 1),
        ("vision.heads", config.vision.heads, 1),
        ("vision.side", config.vision.side, 1),
    ):
        if count is not None and count < least:
            raise ConfigError(f"{where}: {key} is {count}, expected at least {least}")
    if config.prompt.template is not None:
        _require_template(config.prompt.template, where)


def _require_strategy(strategy: str) -> None:
    """Reject a pruner that is neither shipped nor a file."""
    names = list_plugins(PRUNERS)
    if is_pruner_file(strategy):
        if not Path(strategy).is_file():
            raise ConfigError(f"{strategy}: no such pruner file")
    elif strategy not in names:
        hint = describe_unknown("pruner", strategy, names)
        raise UnknownNameError(f"{hint}; or give a file of your own: --pruner ./mine.py")


def _require_counted(prune: PruneConfig, where: str) -> None:
    """Reject shares and counts that no model could use."""
    if not (prune.ratios or prune.keep):
        raise ConfigError(f"{where}: prune.ratios is empty; give at least one")
    for ratio in prune.ratios:
        require_ratio(ratio)
    for kept in prune.keep:
        if kept < 1:
            raise ConfigError(f"keep {kept}: at least 1 visual token is needed")


def _require_template(template: str, where: str) -> None:
    """Reject a template without the phrase or the image, or with text that varies before it."""
    from gap_runtime.grounding.prompt import (  # noqa: PLC0415 - numpy, which --help does without
        IMAGE_FIELD,
        PHRASE_FIELD,
    )

    for part in (IMAGE_FIELD, PHRASE_FIELD):
        if template.count(part) != 1:
            raise ConfigError(f"{where}: prompt.template must hold {part} once")
    if template.index(IMAGE_FIELD) > template.index(PHRASE_FIELD):
        raise ConfigError(
            f"{where}: prompt.template must hold {IMAGE_FIELD} before {PHRASE_FIELD}"
        )
