"""What Hugging Face's config files say, read for every family alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.packed import read_packing, without_quantization
from gap_export.config.families import NO_WAY, describe_model_type, find_family
from gap_export.errors import CheckpointError
from gap_runtime.pictures.boxes import BoxFormat

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
AS_PUBLISHED: Final = "give the checkpoint as it was published, or mend the value"
"""What to do about a value that nothing here has a use for."""
_NUMBER: Final = r"\s*(-?\d+(?:\.\d+)?)\s*"
FRACTION_BOX: Final = BoxFormat(
    attempt=r"\[[^\[\]]*\]?",
    pattern=rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]",
    scale=1.0,
    frame="padded-square",
    form="[0.##, 0.##, 0.##, 0.##]",
)
"""`[0.12, 0.34, 0.56, 0.78]`: fractions of the picture on its square canvas."""

_LIBRARY_NAMES: Final = (
    (
        re.compile(
            r"^model\.(?=(vision_tower|multi_modal_projector|language_model|image_newline)\b)"
        ),
        "",
    ),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "language_model."),
)
IGNORED: Final = (
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    r"embeddings\.position_ids$",
)
"""Patterns of keys of buffers that every module makes itself."""

_LIBRARY_ERRORS: Final = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    StrictDataclassError,
)
"""What the library's config classes raise over values that they cannot use."""

Config = TypeVar("Config")


def parse_config(make: Callable[[], Config], where: str, kind: str) -> Config:
    """A library's config object, its many errors turned into one line.

    Raises:
        CheckpointError: The library refuses it.
    """
    try:
        return make()
    except _LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{where}: not a {kind} config ({reason:.200}); {AS_PUBLISHED}"
        ) from error


def read_library_config(
    checkpoint: Checkpoint, family: str, make: Callable[[dict[str, Any]], Config], kind: str
) -> tuple[dict[str, Any], Config, str]:
    """A checkpoint's config.json as it is, as the library's object, and its name for messages.

    Args:
        checkpoint: A folder in the library's own layout.
        family: Whose it has to be.
        make: The library's, from the file's data without what they say of packed weights.
        kind: The model's name, for messages.

    Raises:
        CheckpointError: It is another family's, packed in a way that is not read, or refused by
            the library.
    """
    where = str(checkpoint.folder / "config.json")
    data = checkpoint.require_json("config.json")
    require_model_type(data, family, where)
    read_packing(data, where)
    data = without_quantization(data)
    return data, parse_config(lambda: make(data), where, kind), where


def library_name(key: str) -> str:
    """Name of a tensor in the modules here, from any key that transformers has written."""
    for pattern, replacement in _LIBRARY_NAMES:
        key = pattern.sub(replacement, key)
    return key


def require_model_type(data: dict[str, Any], family: str, where: str) -> None:
    """Refuse a config of another family than the one that was asked for.

    Raises:
        CheckpointError: Its `model_type` is another family's, or none's.
    """
    found = str(data.get("model_type", ""))
    other = find_family(found)
    if other is None:
        raise CheckpointError(f"{where}: {describe_model_type(found)}")
    if other != family:
        raise CheckpointError(
            f"{where}: model_type '{found}', expected '{family}'; name a model of family "
            f"'{other}' (`gap-export list`), or give the folder alone: gap-export FOLDER"
        )


def require_clip_tower(vision: Any, where: str) -> None:
    """Refuse a vision config that is not CLIP's; see `require_tower`."""
    require_tower(vision, where, "clip_vision_model")


def require_tower(vision: Any, where: str, kind: str) -> None:
    """Refuse a vision config of another `model_type`, or whose sizes are not one number each.

    Raises:
        CheckpointError: Something else than such a tower is described.
    """
    if vision.model_type != kind:
        raise CheckpointError(
            f"{where}: vision_config.model_type '{vision.model_type}', expected {kind}; {NO_WAY}"
        )
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise CheckpointError(
                f"{where}: vision_config.{name} {getattr(vision, name)}, expected one number; "
                f"{AS_PUBLISHED}"
            )
    if vision.num_channels != 3:
        raise CheckpointError(
            f"{where}: vision_config.num_channels {vision.num_channels}, expected 3; {NO_WAY}"
        )


def require_patches_alone(config: Any, where: str) -> None:
    """Refuse a config whose visual tokens are not the patches of one layer without CLS.

    Raises:
        CheckpointError: The projector takes something else.
    """
    if config.vision_feature_select_strategy != "default":
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy '{config.vision_feature_select_strategy}' "
            f"keeps the CLS token among the patches; expected 'default'; {NO_WAY}"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise CheckpointError(
            f"{where}: vision_feature_layer {config.vision_feature_layer}, expected one layer; "
            f"{NO_WAY}"
        )


def refuse_quantized(data: dict[str, Any], where: str) -> None:
    """Refuse a quantized checkpoint.

    Raises:
        CheckpointError: The config names a quantization.
    """
    if data.get("quantization_config"):
        raise CheckpointError(
            f"{where}: the checkpoint is quantized; give the one that it was made from"
        )


def untie_stored_head(checkpoint: Checkpoint, library: Any, head: str) -> None:
    """Take a head that lies in the files for one of its own, whatever the config says.

    Files are right where a config says otherwise, as its default does: so for the library.

    Args:
        checkpoint: The files.
        library: The library's config, which is changed.
        head: Name of the tensor in the modules here.
    """
    if any(library_name(key) == head for key in checkpoint.tensors):
        library.tie_word_embeddings = library.text_config.tie_word_embeddings = False


def find_image_token(data: dict[str, Any], default: int) -> int:
    """The image token under any of the names that configs have had."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(data.get(name), int):
            return int(data[name])
    return default


def find_stop_ids(
    checkpoint: Checkpoint, configured: int | list[int] | None, vocabulary: int
) -> tuple[int, ...]:
    """End-of-sequence tokens: the generation config's, else the text config's.

    Tokens that the embedding table has no row for, as those that a tokenizer got after the
    training, never come, and are left out.

    Args:
        checkpoint: Of the language model.
        configured: By its config.
        vocabulary: Rows of the table.

    Raises:
        CheckpointError: There are some, and none of them can ever come.
    """
    generation = checkpoint.read_json("generation_config.json") or {}
    found, where = generation.get("eos_token_id"), "generation_config.json"
    if found is None:
        found, where = configured, "config.json"
    ids = found if isinstance(found, list) else [] if found is None else [found]
    stops = tuple(token for token in dict.fromkeys(ids) if 0 <= token < vocabulary)
    if ids and not stops:
        raise CheckpointError(
            f"{checkpoint.folder / where}: eos_token_id {found!r}, which the model can never "
            f"answer with, expected one of its {vocabulary} tokens (0 to {vocabulary - 1}); give "
            "the number that the tokenizer has for its end of sentence, 2 for most of Llama's kind"
        )
    return stops


def read_normalization(
    checkpoint: Checkpoint, side: int | None
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the image processor, CLIP's where there is none.

    `side` is that of the tower's pictures, which the processor must make; None for any size.

    Raises:
        CheckpointError: The processor does something that the runtime does not.
    """
    data = processor_config(checkpoint)
    where = f"{checkpoint.folder}: image processor"
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if data.get(name) is False:
            raise _refuse_processor(where, f"{name} is off", "on")
    # Values that cannot be hashed are compared as others are.
    if data.get("resample") not in (None, int(Image.Resampling.BICUBIC)):
        raise _refuse_processor(where, f"resample {data['resample']}", "3 (bicubic)")
    if abs((data.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
        raise _refuse_processor(where, f"rescale_factor {data['rescale_factor']}", "1/255")
    for name in ("size", "crop_size") if side is not None else ():
        sizes = data.get(name) or side
        each = [*sizes.values()] if isinstance(sizes, dict) else [sizes]
        if not each or any(size != side for size in each):
            raise CheckpointError(
                f"{where}: {name} {sizes}, but the vision tower takes {side}; give the "
                f"preprocessor_config.json that was published with it, or mend {name}"
            )
    mean = tuple(float(v) for v in data.get("image_mean") or CLIP_MEAN)
    std = tuple(float(v) for v in data.get("image_std") or CLIP_STD)
    if len(mean) != 3 or len(std) != 3:
        counts = f"image_mean and image_std have {len(mean)} and {len(std)} values"
        raise _refuse_processor(where, counts, "3 values each")
    return mean, std


def _refuse_processor(where: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {found}, expected {expected}, as no runtime here does it otherwise; if the "
        "model was trained so, it cannot be exported; else mend the value"
    )


def processor_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The image processor's config under either of its file names; empty where there is none."""
    data = checkpoint.read_json("preprocessor_config.json")
    if data is None:
        data = (checkpoint.read_json("processor_config.json") or {}).get("image_processor")
    return data or {}
