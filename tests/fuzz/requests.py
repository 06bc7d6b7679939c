"""What clients send: bodies of the service's two questions, forms, and lines of the pipe."""

import base64
import io
import json
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from PIL import Image

from fuzz import mutations
from fuzz.bundles import PHRASE
from fuzz.inputs import encode_picture
from fuzz.outcome import WrongResultError, judge_line
from gap_runtime import Bundle, Grounder
from gap_runtime.cli.main import main
from gap_runtime.errors import InputError

ANSWERS = {200, 400, 413, 415, 429}
"""Statuses that a body alone may lead to; 500 would be a bug, 499 and 504 a wait."""


class Client:
    """The service in this process, with a bundle that was opened."""

    def __init__(self, grounder):
        from starlette.testclient import TestClient

        from gap_runtime.service.app import Service
        from gap_runtime.service.models import Models
        from gap_runtime.service.settings import ServiceSettings

        # What goes wrong there is in the answer's status.
        for name in ("gap_runtime.service", "python_multipart"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.models = Models([grounder], ServiceSettings())
        service = Service(self.models, ServiceSettings())
        self.client = TestClient(service.app, base_url="http://localhost")
        # The loop and the worker live as long as the process.
        self.client.__enter__()

    def post(self, path, body, kind):
        """What was answered: the body's data, or a refusal."""
        reply = self.client.post(path, content=body, headers={"content-type": kind})
        if reply.status_code not in ANSWERS:
            raise WrongResultError(f"status {reply.status_code}: {reply.text[:500]}")
        if reply.headers["content-type"].startswith("text/event-stream"):
            for event in reply.text.split("\n\n"):
                said = event.removeprefix("data: ")
                if said not in {"", "[DONE]"}:
                    read_strictly(said)
            return None
        data = read_strictly(reply.text)
        if reply.status_code != 200:
            raise InputError(require_line(data["error"]["message"]))
        return data


def read_strictly(text):
    """JSON as its standard has it: no NaN, no infinity."""

    def refuse(word):
        raise WrongResultError(f"{word} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise WrongResultError(f"no JSON: {text[:500]!r}") from error


def require_line(text):
    outcome, said = judge_line(text)
    if outcome != "refused":
        raise WrongResultError(f"no line: {said}")
    return text


def check_boxes(results, size):
    """Boxes have an area and lie in their picture."""
    for found in results:
        for x0, y0, x1, y1 in found["boxes"]:
            if not (0 <= x0 < x1 <= size[0] + 0.01 and 0 <= y0 < y1 <= size[1] + 0.01):
                raise WrongResultError(f"a box outside its picture of {size}: {found}")


def open_grounder(case):
    return Grounder(Bundle.open(case.source), keep_pictures=8)


def encode(data):
    return base64.b64encode(data).decode()


def ground_body(case, model):
    return {
        "image": encode(case.picture.read_bytes()),
        "phrase": [PHRASE],
        "ratio": 0.5,
        "keep": None,
        "model": model,
        "least_score": 0.1,
        "cells": True,
    }


def chat_body(case, model):
    url = f"data:image/png;base64,{encode(case.picture.read_bytes())}"
    return {
        "model": model,
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": PHRASE},
                    {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                ],
            },
        ],
        "n": 1,
        "ratio": 0.5,
        "stream": False,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }


def change_picture(text, rng):
    """Another picture in a body's base64, whole or damaged."""
    head, comma, _ = text.rpartition(",")
    _, data = encode_picture(rng)
    data = mutations.change_bytes(data, rng) if rng.random() < 0.7 else data
    return head + comma + encode(data)


def bodies(path, make_body, find_image):
    """A kind of cases: the JSON of one address with one place changed."""

    def begin(case):
        client = Client(open_grounder(case))
        plain = make_body(case, client.models.names[0])
        size = Image.open(case.picture).size

        def make(rng):
            data, place = mutations.change_plain(plain, rng)
            is_same = not place.startswith("image") and "image_url" not in place
            if rng.random() < 0.2:
                data, place, is_same = json.loads(json.dumps(plain)), "picture", False
                holder, key = find_image(data)
                holder[key] = change_picture(holder[key], rng)
            body = mutations.write_plain(data, rng)

            def run():
                found = client.post(path, body, "application/json")
                if is_same and isinstance(found, dict):
                    check_boxes(found.get("results") or [found["grounding"]], size)

            return place, run

        return make

    begin.__doc__ = f"Bodies for {path}."
    return begin


ground_bodies = bodies("/v1/ground", ground_body, lambda data: (data, "image"))
chat_bodies = bodies(
    "/v1/chat/completions",
    chat_body,
    lambda data: (data["messages"][1]["content"][1]["image_url"], "url"),
)


def forms(case):
    """Forms with files, their bytes changed."""
    client = Client(open_grounder(case))
    border = "X"
    fields = {"phrase": PHRASE, "ratio": "0.5", "least_score": "0.1", "cells": "true"}
    parts = [
        f'--{border}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in fields.items()
    ]
    head = (
        f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    parts.append(head.encode() + case.picture.read_bytes() + b"\r\n")
    kinds = (
        *("multipart/form-data; boundary=X",) * 12,
        "multipart/form-data",
        "multipart/form-data; boundary=" + "é" * 9,
        "multipart/form-data; boundary=Y; charset=utf-7",
        "text/plain",
        "",
        "application/json; charset=utf-16",
    )

    def make(rng):
        chosen = [*parts]
        k = rng.randrange(len(parts))
        way = rng.choice(("bytes", "gone", "twice", "moved", "value", "whole"))
        if way == "bytes":
            chosen[k] = mutations.change_bytes(chosen[k], rng)
        elif way == "gone":
            del chosen[k]
        elif way == "twice":
            chosen.insert(k, chosen[k])
        elif way == "moved":
            rng.shuffle(chosen)
        elif way == "value":
            start = chosen[k].index(b"\r\n\r\n") + 4
            text = mutations.change_text(rng.choice(("0.5", "32", PHRASE)), rng)
            chosen[k] = chosen[k][:start] + text.encode("utf-8", "surrogatepass") + b"\r\n"
        body = b"".join(chosen) + f"--{border}--\r\n".encode()
        body = mutations.change_bytes(body, rng) if way == "whole" else body
        kind = rng.choice(kinds).encode("utf-8")
        return f"{way} {k} {kind!r}", lambda: client.post("/v1/ground", body, kind)

    return make


LINES = 12
"""Of which all but the last are changed; a grounder is opened for each case."""


def pipe(case):
    """JSON lines on the standard input of `ground`: each is answered or refused, in its turn."""
    good = {"image": str(case.picture), "phrase": PHRASE, "ratio": 0.5, "id": 7}
    plain = {**good, "phrase": [PHRASE, "the circle"], "keep": None, "id": {"a": [1, "b"]}}
    (right,) = run_pipe(case, json.dumps(good).encode())[0]

    def make(rng):
        lines, places = [], []
        for _ in range(LINES):
            data, place = mutations.change_plain(plain, rng)
            lines.append(mutations.write_plain(data, rng))
            places.append(place)

        def run():
            sent = [*b"\n".join(lines).split(b"\n"), json.dumps(good).encode()]
            found, errors = run_pipe(case, b"\n".join(sent))
            asked = sum(bool(each.strip()) for each in sent)
            if len(found) < asked:
                raise WrongResultError(f"{len(found)} answers to {asked} lines")
            if [found[-1][name] for name in ("answer", "boxes", "id")] != [
                right[name] for name in ("answer", "boxes", "id")
            ]:
                raise WrongResultError(f"the line behind them was answered by {found[-1]}")
            refused = sum("error" in each for each in found)
            if refused > errors:
                raise WrongResultError(f"{refused} refused, but {errors} errors on stderr")

        return " ".join(places), run

    return make


def run_pipe(case, data):
    """What `ground BUNDLE -` prints: its lines, and how many errors."""
    out, err = io.StringIO(), io.StringIO()
    standard_in = io.TextIOWrapper(io.BytesIO(data))
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "stdin", standard_in):
        code = main(["ground", str(case.source), "-"])
    said = err.getvalue().splitlines()
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if code not in {0, 2, 7} or any("Traceback" in line for line in said):
        raise WrongResultError(f"exit {code}, on stderr: {err.getvalue()[-1500:]!r}")
    for line in errors:
        require_line(line)
    return [read_strictly(line) for line in out.getvalue().splitlines()], len(errors)
