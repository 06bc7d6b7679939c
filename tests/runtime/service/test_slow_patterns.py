"""A bundle whose own expression is slow over an answer, while it is served."""

import base64
import io
import threading
import time

import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
testclient = pytest.importorskip("starlette.testclient")

from gap_runtime import Bundle, Grounder
from gap_runtime.grounding.prompt import PromptEncoder
from gap_runtime.service.app import Service
from gap_runtime.service.models import Models
from gap_runtime.service.settings import ServiceSettings

SLOW = r"(?:\w*)*$|\["


@pytest.fixture
def slow(monkeypatch):
    """What the model answers; while `is_set`, a text that the expression has no end with."""
    answers = threading.Event()
    monkeypatch.setattr(
        PromptEncoder, "decode", lambda *_: "a" * 8000 + "!" if answers.is_set() else "none"
    )
    return answers


@pytest.fixture
def serve(make_bundle, answer_with, edit_manifest):
    opened = []

    def start(**changes):
        answer_with(11)
        folder = make_bundle()
        box = Bundle.open(folder).manifest.dump()["box"]
        edit_manifest(folder, box={**box, "attempt": SLOW})
        settings = ServiceSettings(**changes)
        service = Service(Models([Grounder(Bundle.open(folder))], settings), settings)
        client = testclient.TestClient(service.app, base_url="http://localhost")
        client.__enter__()
        client.service = service
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)


def ask(client):
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "png")
    image = base64.b64encode(file.getvalue()).decode()
    return client.post("/v1/ground", json={"image": image, "phrase": "the mug"})


def test_a_slow_expression_is_one_line_and_the_next_request_is_answered(serve, slow):
    client = serve()
    assert ask(client).status_code == 200
    slow.set()
    answer = ask(client)
    assert answer.status_code == 500
    said = answer.json()["error"]
    assert said["message"].startswith(
        "the regular expression '(?:\\\\w*)*$|\\\\[' is not done with"
    )
    assert (said["kind"], said["code"]) == ("pattern", 500)
    slow.clear()
    assert ask(client).status_code == 200


def test_the_time_of_a_request_ends_it_before(serve, slow):
    """Meanwhile the service answers others, and the worker is free when the expression ends."""
    client = serve(seconds=0.4)
    assert ask(client).status_code == 200
    slow.set()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(client)))
    asking.start()
    looks = 0
    while asking.is_alive():
        assert client.get("/healthz").status_code == 200
        looks += 1
    assert answers[0].status_code == 504
    assert looks > 3
    # The expression has 2 s of the processor, and is tried still.
    assert client.service.worker.waiting == 1
    slow.clear()
    until = time.monotonic() + 20
    while (again := ask(client)).status_code == 504 and time.monotonic() < until:
        pass
    assert again.status_code == 200
