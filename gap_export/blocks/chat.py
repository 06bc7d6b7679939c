"""What a checkpoint's own chat template makes of a question, read with the library.

A shipped prompt is for the models that have its marks around a question: the word before the
picture and what stands behind the phrase (`USER:` and `ASSISTANT:`, `[INST]` and `[/INST]`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gap_export.checkpoint.added_tokens import find_controls
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.tokenizer import load_library_tokenizer
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import PromptConfig
from gap_export.errors import CheckpointError
from gap_runtime.grounding.prompt import IMAGE_FIELD, PHRASE_FIELD
from gap_runtime.grounding.tokens import AskedOfTokenizer
from gap_runtime.records.files import read_text
from gap_runtime.records.plain import read_table

REGION_QUESTION: Final = (
    "Please provide the bounding box coordinate of the region this sentence describes: {phrase}"
)
"""How several families ask for a box."""
_FILES: Final = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Where a chat template may lie under the key of that name, that of the processor first."""
_PLAIN: Final = "chat_template.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPrompt:
    """A template, and what people are told of where it is from."""

    template: str
    notes: tuple[str, ...] = ()


def choose_prompt(
    checkpoint: Checkpoint,
    *,
    question: str,
    templates: Mapping[str, str],
    text: Any,
    image_token_id: int | None,
    config: PromptConfig,
) -> ChosenPrompt:
    """The template that a model is asked with.

    What the user gives wins. A shipped one wins for the models that it is for; for all others,
    and where none is shipped, the folder's own does, then the family's for that language model.

    Args:
        checkpoint: Its folder may have a chat template.
        question: What is asked, with `{phrase}`.
        templates: The family's, by the type of the language model.
        text: The language model's config.
        image_token_id: The token of the picture; None where the authors' code cuts the text there,
            and knows no chat templates.
        config: What the user or the model file asks for.

    Raises:
        CheckpointError: Nothing is known for such a language model, and nothing is given.
    """
    if config.template is not None and not config.yields:
        return ChosenPrompt(template=config.template)
    notes: list[str] = []
    own = None
    if image_token_id is not None:
        own = _read_own(checkpoint.folder, question, image_token_id, notes)
    known, shipped = own or templates.get(text.model_type), config.template
    if shipped is None:
        if known is None:
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: no prompt is known for a language model of "
                f"type '{text.model_type}', and the folder has no chat template that can be used; "
                "give the one that it was trained with: --set prompt.template='<image> ... "
                "{phrase}'"
            )
        return ChosenPrompt(template=known, notes=tuple(notes))
    if known is None or _marks(known) == _marks(shipped):
        if own is not None and own != shipped:
            notes.append(
                f"asked with the model file's prompt; {checkpoint.folder} has a chat template of "
                f"the same kind, which can be asked with by --set prompt.template={own!r}"
            )
        return ChosenPrompt(template=shipped, notes=tuple(notes))
    whose = "the folder's own chat template" if own else f"that of a {text.model_type} of its kind"
    notes.append(
        f"asked with {whose}, {known!r}: the model file's prompt is for models of another kind "
        "than this checkpoint"
    )
    return ChosenPrompt(template=known, notes=tuple(notes))


def _marks(template: str) -> tuple[str, str]:
    """The word before the picture, and what stands behind the phrase."""
    before, _, after = template.partition(IMAGE_FIELD)
    words = before.split()
    return words[-1] if words else "", after.partition(PHRASE_FIELD)[2].strip()


def _read_own(folder: Path, question: str, image_id: int, notes: list[str]) -> str | None:
    """The folder's chat template around a question; None where it has none that can be used."""
    found = _find_chat_template(folder)
    files = TokenizerFiles(folder=folder)
    if found is None or not files.exists:
        return None
    with _asked_of(folder):
        tokenizer, reason = load_library_tokenizer(folder), ""
        image_token = str(tokenizer.convert_ids_to_tokens(image_id) or IMAGE_FIELD)
    asked = {"type": "text", "text": question}
    for content in ([{"type": "image"}, asked], f"{image_token}\n{question}"):
        try:
            text = _render(tokenizer, found, content)
        except ValueError as error:
            reason = str(error)
            continue
        text = text.replace(image_token, IMAGE_FIELD)
        counts = text.count(IMAGE_FIELD), text.count(PHRASE_FIELD)
        if counts == (1, 1) and text.index(IMAGE_FIELD) < text.index(PHRASE_FIELD):
            with _asked_of(folder):
                return _without_start(text, tokenizer, files)
        reason = "it does not give the picture once and the phrase behind it"
    notes.append(f"{folder}: its chat template cannot be used ({reason:.160})")
    return None


def _asked_of(folder: Path) -> AskedOfTokenizer:
    """Where the library's tokenizer of a folder is asked, which may fail in every way."""

    def refuse(error: BaseException) -> CheckpointError:
        reason = " ".join(str(error).split())
        return CheckpointError(
            f"{folder}: its tokenizer cannot be read ({reason:.160}); download it again"
        )

    return AskedOfTokenizer(refuse)


def _render(tokenizer: Any, chat_template: str, content: Any) -> str:
    """What a chat template makes of one message of the user."""
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # a template is a program, which can fail in every way
        raise ValueError(" ".join(str(error).split())) from error
    return text


def _without_start(text: str, tokenizer: Any, files: TokenizerFiles) -> str:
    """A prompt without the token that its tokenizer begins every prompt with."""
    controls, start = find_controls(files), tokenizer.bos_token
    ids = controls[0] if controls is not None else tokenizer("")["input_ids"]
    has_start = start is not None and tokenizer.bos_token_id in ids
    return text.removeprefix(start) if has_start else text


def _find_chat_template(folder: Path) -> str | None:
    """The chat template of a folder, by the library's order of files."""
    if (folder / _PLAIN).is_file():
        return read_text(folder / _PLAIN, CheckpointError)
    for name in _FILES:
        if not (folder / name).is_file():
            continue
        found = read_table(folder / name, CheckpointError).get("chat_template")
        if isinstance(found, list):
            # Several by name, of which one is the usual.
            named = {
                str(each.get("name")): each.get("template")
                for each in found
                if isinstance(each, dict)
            }
            found = named.get("default")
        if isinstance(found, str) and found:
            return found
    return None
