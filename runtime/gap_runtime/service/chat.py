"""OpenAI's form of chat with a picture: a request to a question, a reply to a completion."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gap_runtime.errors import InputError
from gap_runtime.grounding.prompt import IMAGE_FIELD, PHRASE_FIELD
from gap_runtime.service.models import Models, Reply
from gap_runtime.service.questions import Question, read_image, read_number, require_phrases
from gap_runtime.service.settings import ServiceSettings

_ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_BORDER: Final = re.compile(r"(?<=\n)|(?<=[:>\]] )|(?<=[>\]])")
_BEHIND: Final = re.compile(r"<|\n|\s\[/|\s[A-Z]+:")
"""Where what a person would write ends: a mark of the chat, or the name of who answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A question, and how its answer is wanted."""

    question: Question
    stream: bool
    with_usage: bool


def read_chat(data: object, models: Models, settings: ServiceSettings) -> ChatRequest:
    """A request for a completion: the last text of the user, about the last picture.

    The text is a phrase, or the model's whole prompt around one. What cannot be had (several
    choices) is refused; what makes no difference to a greedy answer (temperature) is ignored.

    Raises:
        InputError: It cannot be understood.
    """
    if not isinstance(data, dict):
        raise InputError(f"the body is a JSON {type(data).__name__}, expected an object")
    choices = data.get("n")
    if isinstance(choices, bool) or choices not in (None, 1):
        raise InputError("'n' has to be 1: the answer is greedy, so there is but one")
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise InputError("'model' has to be the name of a model; see /v1/models")
    name, grounder = models.find(model)
    text, image = _read_messages(data.get("messages"))
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InputError("'stream_options' has to be an object")
    phrase = find_phrase(text, grounder.bundle.manifest.prompt.template)
    return ChatRequest(
        question=Question(
            image=read_image(image, settings),
            phrases=require_phrases([phrase], settings),
            model=name,
            ratio=read_number(data, "ratio"),
            counts=True,
        ),
        stream=data.get("stream") is True,
        with_usage=options.get("include_usage") is True,
    )


def _read_messages(messages: object) -> tuple[str, str]:
    """The text of the last message of the user, and the last picture."""
    if not isinstance(messages, list) or not messages:
        raise InputError("'messages' has to be a list of messages")
    text, image = "", ""
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise InputError("a message has to be an object with a 'role' and 'content'")
        if message["role"] != "user":
            continue
        texts, images = _read_content(message.get("content"))
        text, image = " ".join(texts), images[-1] if images else image
    if not text.strip():
        raise InputError("the last message of the user holds no text: say what to look for")
    if not image:
        raise InputError("no message holds a picture; send one as image_url with a data URL")
    return text, image


def _read_content(content: object) -> tuple[list[str], list[str]]:
    """Texts and pictures of a message."""
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list):
        raise InputError("'content' has to be a text or a list of parts")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, dict) else given
            if not isinstance(url, str) or not url:
                raise InputError("'image_url' has to hold the picture's 'url', a data URL")
            images.append(url)
        else:
            raise InputError("a part of 'content' has to be a text or an image_url")
    return texts, images


def find_phrase(text: str, template: str) -> str:
    """The phrase in a model's own prompt around it; a text that is no such prompt is a phrase.

    The prompt may be whole, or what a person would write of it: without the roles of the chat and
    without the picture's place.
    """
    head, _, tail = template.partition(PHRASE_FIELD)
    said = text.strip()
    for each in (head, head.replace(IMAGE_FIELD, "")):
        for start in sorted({0, *(found.start() for found in _BORDER.finditer(each))}):
            begin = each[start:].lstrip()
            if not begin.strip() or not said.startswith(begin):
                continue
            found = said[len(begin) :]
            for end in (tail.strip(), _BEHIND.split(tail, maxsplit=1)[0].strip()):
                if end and found.endswith(end):
                    return found[: -len(end)].strip()
            return found.strip()
    return said


def make_completion(reply: Reply, waited: Mapping[str, float]) -> dict[str, Any]:
    """The answer in OpenAI's form; `grounding` in it is what /v1/ground would give."""
    (found,) = reply.found
    return {
        **_head(reply, "chat.completion"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": found.answer, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _count_tokens(reply),
        "grounding": reply.dump(waited)["results"][0],
    }


def stream_completion(
    reply: Reply, waited: Mapping[str, float], *, with_usage: bool
) -> Iterator[str]:
    """The same as server-sent events. The answer is one piece: it is short, and was complete."""
    (found,) = reply.found
    head = _head(reply, "chat.completion.chunk")
    grounding = reply.dump(waited)["results"][0]
    steps: list[tuple[dict[str, Any], str | None, dict[str, Any]]] = [
        ({"role": "assistant", "content": ""}, None, {}),
        ({"content": found.answer}, None, {}),
        ({}, "stop", {"grounding": grounding}),
    ]
    for delta, reason, more in steps:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        yield _event({**head, "choices": [choice], **more})
    if with_usage:
        yield _event({**head, "choices": [], "usage": _count_tokens(reply)})
    yield "data: [DONE]\n\n"


def _head(reply: Reply, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": reply.model,
        "system_fingerprint": None,
    }


def _count_tokens(reply: Reply) -> dict[str, int]:
    asked = reply.prompt_tokens or 0
    given = sum(len(each.token_ids) for each in reply.found)
    return {
        "prompt_tokens": asked,
        "completion_tokens": given,
        "total_tokens": asked + given,
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
