"""The prompt's numbers: its template, and the tokens before and after the picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from gap_export.checkpoint.tokenizer import find_added, read_tokenizer
from gap_export.checkpoint.tokenizer_files import TOKENIZER_FILE
from gap_export.config.records import NamedConfig, PruneConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import ModelSpec, TextSpec
from gap_export.interfaces.features import Feature, Pruner
from gap_runtime.bundle.manifest import PhraseInput, Prompt
from gap_runtime.errors import ConfigError
from gap_runtime.grounding.prompt import IMAGE_FIELD, PromptEncoder

TEXT_TOKENIZER_FILE: Final = "text_tokenizer.json"
_LEAST_SUFFIX: Final = 64
_PHRASE_ROOM: Final = 32


def plan_prompt(
    named: NamedConfig, tokenizer: Tokenizer | None, spec: ModelSpec, *, reference: bool
) -> tuple[Prompt, int, int]:
    """The prompt record and the numbers of tokens before and (at most) after the image.

    Args:
        named: Its numbers win over the family's.
        tokenizer: Of the language model, None where the checkpoint has none.
        spec: The model's template, and what stands for the picture in it.
        reference: Whether PyTorch will be asked, which a tokenizer is needed for.

    Raises:
        CheckpointError: There is no tokenizer, or not the one of this checkpoint.
        ConfigError: The shortest prompt is longer than the configured one may be.
    """
    config = named.config.prompt
    # One that yields has been weighed against the checkpoint's own by the family.
    given = None if config.yields else config.template
    template = given or spec.template
    if tokenizer is None:
        if reference:
            raise CheckpointError(
                f"{spec.tokenizer.folder}: no {TOKENIZER_FILE} in it; add the model's tokenizer, "
                "or export the graphs alone with --no-reference"
            )
        prompt = Prompt(
            template=template, image_token=None, tokenizer=None, stop_ids=spec.stop_ids
        )
        prefix = spec.prefix if config.prefix is None else config.prefix
        return prompt, prefix, config.suffix or _LEAST_SUFFIX
    image_token = None
    if spec.image_token_id is not None:
        image_token = _image_token(tokenizer, spec.image_token_id, spec.tokenizer.folder)
    if spec.image_text or image_token:
        template = template.replace(IMAGE_FIELD, spec.image_text or image_token or IMAGE_FIELD)
    prompt = Prompt(
        template=template,
        image_token=image_token,
        tokenizer=TOKENIZER_FILE,
        stop_ids=spec.stop_ids,
    )
    encoded = PromptEncoder(tokenizer, prompt, rows=sys.maxsize).encode("x")
    _require_covered(tokenizer, encoded.prefix + encoded.suffix, spec)
    suffix = config.suffix or max(_LEAST_SUFFIX, len(encoded.suffix) + _PHRASE_ROOM)
    if len(encoded.suffix) > suffix:
        raise ConfigError(
            f"{named.name}: the prompt has {len(encoded.suffix)} tokens after the image "
            f"for the shortest phrase, prompt.suffix is {suffix}; raise it with "
            f"--set prompt.suffix={len(encoded.suffix) + _PHRASE_ROOM}"
        )
    return prompt, len(encoded.prefix), suffix


def _require_covered(tokenizer: Tokenizer, ids: list[int], spec: ModelSpec) -> None:
    """Refuse a tokenizer whose vocabulary, or a prompt whose tokens, the table has no rows for.

    Tokens that were added after training and that no prompt needs are no harm: the runtime
    refuses phrases that hold them.
    """
    where, rows = spec.tokenizer.folder, spec.decoder.vocabulary
    pieces = tokenizer.get_vocab_size(with_added_tokens=False)
    if pieces > rows:
        raise CheckpointError(
            f"{where}: its tokenizer has {pieces} tokens, the embedding table {rows} rows; give "
            "the tokenizer that belongs to this checkpoint"
        )
    for token_id in ids:
        if token_id >= rows:
            raise CheckpointError(
                f"{where}: the prompt holds '{find_added(tokenizer, token_id)}', token {token_id} "
                f"of its tokenizer, but the embedding table has {rows} rows, so the model was not "
                "trained with it; give the tokenizer that belongs to this checkpoint, or another "
                "prompt: --set prompt.template=..."
            )


def _image_token(tokenizer: Tokenizer, token_id: int, folder: Path) -> str:
    token = find_added(tokenizer, token_id)
    if token is None:
        raise CheckpointError(
            f"{folder}: its tokenizer has no token {token_id}, which config.json names as the "
            "image token; give the tokenizer that belongs to this checkpoint"
        )
    return token


def plan_phrase(pruner: Pruner, text: TextSpec | None, config: PruneConfig) -> PhraseInput | None:
    """How the vision graph is told the phrase, None where the pruner does not read it.

    Raises:
        CheckpointError: CLIP's text tower has no tokenizer.
    """
    if Feature.TEXT not in pruner.NEEDS:
        return None
    if text is None or config.phrase == "embeddings":
        return PhraseInput(source="embeddings", tokenizer=None, length=0, end_id=0)
    if read_tokenizer(text.tokenizer) is None:
        raise CheckpointError(
            f"{text.tokenizer}: no tokenizer in it; CLIP's is needed to read phrases"
        )
    return PhraseInput(
        source="clip", tokenizer=TEXT_TOKENIZER_FILE, length=text.length, end_id=text.end_id
    )
