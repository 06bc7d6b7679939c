"""The OpenAPI description of a service: what it reads and what it gives."""

from __future__ import annotations

from typing import Any

from gap_runtime.service.settings import ServiceSettings

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_MOMENTS = {"type": "object", "additionalProperties": _NUMBER}


def describe_service(settings: ServiceSettings) -> dict[str, Any]:
    """The description, with the limits of this service."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gap-runtime",
            "version": "1",
            "description": "Says where phrases are in pictures.",
        },
        "paths": {
            "/v1/ground": {"post": _describe_ground(settings)},
            "/v1/chat/completions": {"post": _describe_chat()},
            "/v1/models": {"get": _describe_read("The models and their ratios", "Models", 401)},
            "/healthz": {"get": _describe_read("The process lives", "State")},
            "/readyz": {"get": _describe_read("The models are loaded", "State", 503)},
            "/metrics": {"get": _describe_metrics()},
        },
        "components": {
            "schemas": _describe_schemas(settings),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        **({"security": [{"token": []}]} if settings.token else {}),
    }


def _refer(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _refer(name)}}


def _fail(*codes: int) -> dict[str, Any]:
    what = {
        400: "Something in the request cannot be used; the message says what",
        401: "The token is missing or wrong",
        413: "The body is too large",
        415: "The body is of another type",
        429: "Too many requests wait; come back after so many seconds",
        500: "The backend failed",
        503: "Not ready",
        504: "It took too long",
    }
    answers: dict[str, Any] = {
        str(code): {"description": what[code], "content": _json("Error")} for code in codes
    }
    if 429 in codes:
        answers["429"]["headers"] = {"Retry-After": {"schema": _COUNT}}
    return answers


def _describe_read(what: str, schema: str, *codes: int) -> dict[str, Any]:
    answers = _fail(*codes)
    if schema == "State":
        answers = {code: {**each, "content": _json("State")} for code, each in answers.items()}
    return {
        "summary": what,
        "responses": {"200": {"description": what, "content": _json(schema)}, **answers},
    }


def _describe_metrics() -> dict[str, Any]:
    return {
        "summary": "Counters in Prometheus's form",
        "responses": {
            "200": {"description": "Counters", "content": {"text/plain": {"schema": _TEXT}}},
            **_fail(401),
        },
    }


def _describe_ground(settings: ServiceSettings) -> dict[str, Any]:
    phrase = _describe_phrase(settings)
    form = {
        "type": "object",
        "required": ["image", "phrase"],
        "properties": {
            "image": {"type": "string", "contentMediaType": "application/octet-stream"},
            "phrase": {"type": "array", "items": phrase, "minItems": 1},
            "ratio": _NUMBER,
            "keep": _COUNT,
            "least_score": {"type": "number", "minimum": 0, "maximum": 1},
            "model": _TEXT,
            "cells": {"type": "boolean"},
        },
        "additionalProperties": False,
    }
    return {
        "summary": "Where are these phrases in this picture?",
        "requestBody": {
            "required": True,
            "content": {**_json("Question"), "multipart/form-data": {"schema": form}},
        },
        "responses": {
            "200": {"description": "A result for each phrase", "content": _json("Reply")},
            **_fail(400, 401, 413, 415, 429, 500, 504),
        },
    }


def _describe_chat() -> dict[str, Any]:
    events = {"text/event-stream": {"schema": _TEXT}}
    return {
        "summary": "The same in OpenAI's form of chat",
        "requestBody": {"required": True, "content": _json("Chat")},
        "responses": {
            "200": {
                "description": "The model's answer",
                "content": {**_json("Completion"), **events},
            },
            **_fail(400, 401, 413, 429, 500, 504),
        },
    }


def _describe_phrase(settings: ServiceSettings) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": settings.phrase_length}


def _describe_schemas(settings: ServiceSettings) -> dict[str, Any]:
    phrase = _describe_phrase(settings)
    box = {"type": "array", "items": _NUMBER, "minItems": 4, "maxItems": 4}
    return {
        "Question": _make_object(
            required={
                "image": {
                    **_TEXT,
                    "minLength": 1,
                    "description": "The picture in base64, or as a data URL",
                },
                "phrase": {
                    "oneOf": [
                        phrase,
                        {
                            "type": "array",
                            "items": phrase,
                            "minItems": 1,
                            "maxItems": settings.phrases,
                        },
                    ]
                },
            },
            optional={
                "ratio": {"type": ["number", "null"]},
                "keep": {"type": ["integer", "null"]},
                "least_score": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
                "model": {"type": ["string", "null"]},
                "cells": {
                    "type": ["boolean", "null"],
                    "description": "Whether the places of visual tokens are wanted too",
                },
            },
        ),
        "Result": _make_object(
            required={
                "phrase": _TEXT,
                "answer": _TEXT,
                "boxes": {
                    "type": "array",
                    "items": box,
                    "description": "x0 y0 x1 y1 in pixels, origin top left",
                },
                "score": {"type": "number", "minimum": 0, "maximum": 1},
                "problems": {"type": "array", "items": _TEXT},
                "ratio": _NUMBER,
                "kept": _COUNT,
                "patches": _COUNT,
                "kept_index": {"type": "array", "items": _COUNT},
                "milliseconds": _MOMENTS,
                "calls": _COUNT,
                "drafted": _COUNT,
                "accepted": _COUNT,
            },
        ),
        "Reply": _make_object(
            required={
                "model": _TEXT,
                "width": _COUNT,
                "height": _COUNT,
                "results": {"type": "array", "items": _refer("Result")},
                "milliseconds": _MOMENTS,
            },
            optional={"cells": {"type": "object", "additionalProperties": box}},
        ),
        "Chat": {
            "type": "object",
            "required": ["messages"],
            "properties": {
                "model": {"type": ["string", "null"]},
                "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
                "stream": {"type": ["boolean", "null"]},
                "n": {"type": ["integer", "null"]},
                "ratio": {"type": ["number", "null"]},
            },
        },
        "Completion": {
            "type": "object",
            "required": ["id", "object", "created", "model", "choices", "usage", "grounding"],
            "properties": {"grounding": _refer("Result")},
        },
        "Models": _make_object(
            required={"object": _TEXT, "data": {"type": "array", "items": {"type": "object"}}}
        ),
        "State": _make_object(required={"status": _TEXT}),
        "Error": _make_object(
            required={
                "error": _make_object(
                    required={
                        "kind": _TEXT,
                        "message": _TEXT,
                        "type": _TEXT,
                        "code": {"type": "integer"},
                    }
                )
            }
        ),
    }


def _make_object(
    *, required: dict[str, Any], optional: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
        "additionalProperties": False,
    }
