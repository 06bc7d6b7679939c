"""What the service says over HTTP, against a backend that runs no graph."""

import asyncio
import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
testclient = pytest.importorskip("starlette.testclient")

from gap_runtime import Bundle, Grounder
from gap_runtime.errors import ConfigError, EngineError
from gap_runtime.service.app import Service
from gap_runtime.service.models import Models
from gap_runtime.service.settings import ServiceSettings

TOKEN = "0123456789abcdef"
PHRASES = ["the red mug", "the mug"]


def encode(picture, kind="png"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (20, 40, 3), dtype=np.uint8))
PNG = encode(PICTURE)
TEXT = base64.b64encode(PNG).decode()


@pytest.fixture
def grounder(make_bundle, answer_with):
    answer_with(11)
    return Grounder(Bundle.open(make_bundle()))


@pytest.fixture
def serve(grounder):
    """A function that starts a service with settings and gives a client of it."""
    opened = []

    def start(**changes):
        settings = ServiceSettings(**changes)
        service = Service(Models([grounder], settings), settings)
        client = testclient.TestClient(
            service.app, base_url="http://localhost", raise_server_exceptions=True
        )
        client.__enter__()
        client.service = service
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)


def ask(client, **changes):
    return client.post("/v1/ground", json={"image": TEXT, "phrase": PHRASES, **changes})


def test_json_and_forms_give_what_the_grounder_gives(serve, grounder):
    client = serve()
    found = [each.dump() for each in grounder.ground(PICTURE, PHRASES, ratio=0.75)]
    asked = {"ratio": 0.75, "model": "bundle"}
    answers = [
        ask(client, **asked),
        ask(client, **asked, image=f"data:image/png;base64,{TEXT}"),
        client.post(
            "/v1/ground", files={"image": ("a.png", PNG)}, data={"phrase": PHRASES, **asked}
        ),
        ask(client, keep=4),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        data = answer.json()
        assert (data["model"], data["width"], data["height"]) == ("bundle", 40, 20)
        assert set(data["milliseconds"]) == {"queue", "picture"}
        name, _, took = answer.headers["server-timing"].partition(";dur=")
        inside = sum(each["milliseconds"]["total"] for each in data["results"])
        assert name == "service"
        assert float(took) > inside + data["milliseconds"]["queue"]
        for each, wanted in zip(data["results"], found, strict=True):
            assert set(each.pop("milliseconds")) == set(wanted["milliseconds"])
            assert each == {k: v for k, v in wanted.items() if k != "milliseconds"}


def test_a_second_phrase_does_not_look_at_the_picture_again(serve):
    client = serve()
    first, second = (ask(client, phrase=phrase).json()["results"][0] for phrase in PHRASES)
    assert first["milliseconds"]["vision"] > 0
    assert second["milliseconds"]["vision"] == 0
    assert "gap_kept_pictures 2.0" in client.get("/metrics").text


def test_cells_are_places_of_visual_tokens(serve):
    cells = ask(serve(), cells=True).json()["cells"]
    # 4 x 4 patches of a square of 40; the first row lies in the padding above, as the last does.
    assert cells["4"] == [0, 0, 10, 10]
    assert cells["11"] == [30, 10, 40, 20]
    assert set(cells) == {str(k) for k in range(4, 12)}


def test_a_least_score_takes_boxes_away(serve):
    (found,) = ask(serve(), phrase="the mug", least_score=0.9).json()["results"]
    assert found["boxes"] == []
    assert found["problems"][0].startswith("score 0.")


BAD = {
    "no object": ([], "JSON list"),
    "no picture": ({"phrase": "x"}, "'image' has to be"),
    "no phrase": ({"image": TEXT}, "'phrase' has to be"),
    "empty phrase": ({"image": TEXT, "phrase": " "}, "'phrase' has to be"),
    "no list": ({"image": TEXT, "phrase": {"a": 1}}, "'phrase' has to be"),
    "no base64": ({"image": "?", "phrase": "x"}, "no base64"),
    "a picture of nothing": ({"image": "data:image/png;base64,", "phrase": "x"}, "is empty"),
    "plain data": ({"image": "data:text/plain,hello", "phrase": "x"}, "not in base64"),
    "no picture in it": ({"image": "AAAA", "phrase": "x"}, "not a picture"),
    "half a picture": ({"image": TEXT[:400], "phrase": "x"}, "the picture is broken"),
    "unknown key": ({"image": TEXT, "phrase": "x", "rato": 1}, "did you mean ratio?"),
    "unknown ratio": ({"image": TEXT, "phrase": "x", "ratio": 0.3}, "no ratio 0.3"),
    "text for a ratio": ({"image": TEXT, "phrase": "x", "ratio": "0.5"}, "'ratio' has to be"),
    "huge ratio": ({"image": TEXT, "phrase": "x", "ratio": 1e308}, "'ratio' has to be"),
    "both": ({"image": TEXT, "phrase": "x", "ratio": 0.5, "keep": 8}, "give one"),
    "no count": ({"image": TEXT, "phrase": "x", "keep": 1.5}, "'keep' has to be"),
    "no score": ({"image": TEXT, "phrase": "x", "least_score": 2}, "'least_score'"),
    "unknown model": ({"image": TEXT, "phrase": "x", "model": "b"}, "unknown model 'b'"),
    "model of a kind": ({"image": TEXT, "phrase": "x", "model": 7}, "'model' has to be"),
    "cells of a kind": ({"image": TEXT, "phrase": "x", "cells": "yes"}, "'cells' has to be"),
    "many phrases": ({"image": TEXT, "phrase": ["x"] * 33}, "33 phrases, at most 32"),
    "long phrase": ({"image": TEXT, "phrase": "x" * 1001}, "1001 characters, at most 1000"),
    "too many tokens": ({"image": TEXT, "phrase": "red " * 9}, "use a shorter phrase"),
    "special token": ({"image": TEXT, "phrase": "a </s> b"}, "special token"),
    "an address": ({"image": "https://a.b/c.png", "phrase": "x"}, "send the picture itself"),
    "half a character": ({"image": TEXT, "phrase": "\ud800"}, "half a character"),
    "file address": ({"image": "file:///etc/passwd", "phrase": "x"}, "no base64"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_line(serve, name):
    body, said = BAD[name]
    kind = {"content-type": "application/json"}
    answer = serve().post("/v1/ground", content=json.dumps(body), headers=kind)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["kind"] in {"input", "config"}
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b"[" * 100_000, "application/json", 400, "not valid JSON"),
        (b"\xff\xfe", "application/json", 400, "not valid JSON"),
        (b"x", "text/plain", 415, "expected multipart/form-data or application/json"),
        (b"x", "multipart/form-data", 400, "the form cannot be read"),
        (b"x", "multipart/form-data; boundary=b", 400, ""),
        (b"--b\r\n\r\nx", "multipart/form-data; boundary=b", 400, ""),
        (b"", "multipart/form-data; boundary=b", 400, ""),
        (b"", "application/json", 400, "not valid JSON"),
    ],
)
def test_bodies_that_are_none_are_told(serve, body, kind, status, said):
    answer = serve().post("/v1/ground", content=body, headers={"content-type": kind})
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_a_form_without_a_picture_is_told(serve):
    client = serve()
    files = [("image", ("a.png", PNG)), ("image", ("b.png", PNG))]
    for answer in (
        client.post("/v1/ground", files=files, data={"phrase": "x"}),
        client.post("/v1/ground", files={"picture": ("a.png", PNG)}, data={"phrase": "x"}),
        client.post("/v1/ground", files={"image": ("a.png", b"")}, data={"phrase": "x"}),
        client.post("/v1/ground", files={"image": ("a.png", PNG)}, data={"ratio": "half"}),
    ):
        assert answer.status_code == 400, answer.text


def test_limits_of_bodies_and_pictures(serve):
    client = serve(body_mb=0.01, megapixels=0.0007)
    answer = client.post("/v1/ground", content=b"x" * 20_000)
    assert answer.status_code == 415
    answer = ask(client, image="A" * 20_000)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (413, "too-large")

    def pieces():
        yield b"{" + b" " * 9_000
        yield b" " * 9_000

    answer = client.post(
        "/v1/ground", content=pieces(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    answer = ask(client)
    assert answer.status_code == 400
    assert "40x20 pixels, at most 700" in answer.json()["error"]["message"]


def test_a_token_is_wanted_where_one_is_set(serve):
    client = serve(token=TOKEN)
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {TOKEN}"}):
        for path in ("/v1/models", "/metrics"):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    # What holds no data is open: the page asks for the token itself.
    assert {client.get(path).status_code for path in ("/", "/healthz", "/openapi.json")} == {200}


def test_addresses_and_methods_that_there_are_not(serve):
    client = serve()
    assert client.get("/v2").json()["error"]["kind"] == "not-found"
    answer = client.get("/v1/ground")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["kind"] == "method"


def test_another_name_of_this_host_is_refused(serve):
    client = serve()
    # A page elsewhere whose name was made to lead here, which the browser would let read answers.
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400
    assert (
        serve(host_names=("box.local",))
        .get("/v1/models", headers={"host": "box.local:8765"})
        .status_code
        == 200
    )


def test_a_full_queue_says_when_to_come_back(serve):
    client = serve()
    client.service.worker.waiting += 16
    answer = ask(client)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    client.service.worker.waiting -= 16
    assert ask(client).status_code == 200
    assert (
        'gap_requests_total{endpoint="/v1/ground",status="429"} 1.0' in client.get("/metrics").text
    )


def test_a_request_that_takes_too_long_is_given_up(serve, monkeypatch):
    client = serve(seconds=0.1)
    given_up = []

    def answer(_, event):
        given_up.append(event.wait(5))
        raise EngineError("nobody hears this")

    monkeypatch.setattr(client.service._models, "answer", answer)
    assert ask(client).status_code == 504
    client.service.worker.stop(5)
    assert given_up == [True]


HEAD = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/ground",
    "raw_path": b"/v1/ground",
    "root_path": "",
    "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
}
BODY = json.dumps({"image": TEXT, "phrase": PHRASES}).encode()


def call(client, *steps):
    """Status and data of a request whose messages come when the steps before them have ended.

    A step is what is waited for in a thread, and the message behind it.
    """
    waiting = list(steps)
    sent = []

    async def receive():
        if not waiting:
            # It stays and says nothing more.
            await asyncio.Event().wait()
        wait, message = waiting.pop(0)
        await asyncio.to_thread(wait)
        return message

    async def send(message):
        sent.append(message)

    asyncio.run(client.service.app({**HEAD, "headers": list(HEAD["headers"])}, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def piece(body, *, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


def now():
    """Nothing is waited for."""


LEFT = {"type": "http.disconnect"}


def test_a_client_that_leaves_is_given_up(serve, monkeypatch):
    client = serve()
    begun, given_up = threading.Event(), []

    def answer(_, event):
        begun.set()
        given_up.append(event.wait(5))

    with monkeypatch.context() as patch:
        patch.setattr(client.service._models, "answer", answer)
        status, data = call(client, (now, piece(BODY)), (lambda: begun.wait(5), LEFT))
        assert (status, data["error"]["kind"]) == (499, "gone")
    # What ran was told, and the next one has its turn.
    assert ask(client).status_code == 200
    assert given_up == [True]
    assert 'endpoint="/v1/ground",status="499"} 1.0' in client.get("/metrics").text


def test_a_client_that_leaves_before_its_turn_is_not_answered(serve, monkeypatch):
    client = serve()
    held, begun = threading.Event(), []
    client.service.worker._pool.submit(held.wait, 5)
    monkeypatch.setattr(client.service._models, "answer", lambda *_: begun.append(1))
    assert call(client, (now, piece(BODY)), (now, LEFT))[0] == 499
    held.set()
    assert client.service.worker.stop(5)
    assert begun == []


def test_a_client_that_leaves_amid_its_body_is_told_nothing_worse(serve):
    client = serve()
    assert call(client, (now, piece(BODY[:50], more=True)), (now, LEFT))[0] == 499


def test_the_time_of_a_request_counts_once(serve, monkeypatch):
    """A body that takes most of it leaves little for the answer."""
    client = serve(seconds=0.6)
    monkeypatch.setattr(client.service._models, "answer", lambda _, event: event.wait(5))
    began = time.monotonic()
    half = len(BODY) // 2
    steps = (now, piece(BODY[:half], more=True)), (lambda: time.sleep(0.4), piece(BODY[half:]))
    assert call(client, *steps)[0] == 504
    assert 0.5 < time.monotonic() - began < 0.95


def test_a_picture_is_fetched_beside_the_worker(serve, monkeypatch):
    """While a camera is slow, others are answered."""
    client = serve(allowed_urls=("http://camera.local/",))
    asked, held = threading.Event(), threading.Event()

    def fetch(url, _, given_up):
        assert (url, given_up.is_set()) == ("http://camera.local/a.png", False)
        asked.set()
        assert held.wait(5)
        return PNG

    monkeypatch.setattr("gap_runtime.service.app.fetch_picture", fetch)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(ask(client, image="http://camera.local/a.png"))
    )
    thread.start()
    assert asked.wait(5)
    usual = ask(client)
    assert (usual.status_code, answers) == (200, [])
    assert "gap_queue 0.0" in client.get("/metrics").text
    held.set()
    thread.join()
    fetched = answers[0].json()
    assert set(fetched["milliseconds"]) == {"fetch", "queue", "picture"}
    boxes = [[each["boxes"] for each in data["results"]] for data in (fetched, usual.json())]
    assert boxes[0] == boxes[1]


def test_nothing_is_fetched_for_a_full_queue(serve, monkeypatch):
    client = serve(allowed_urls=("http://camera.local/",))
    monkeypatch.setattr("gap_runtime.service.app.fetch_picture", None)
    client.service.worker.waiting += 16
    assert ask(client, image="http://camera.local/a.png").status_code == 429
    client.service.worker.waiting -= 16


def test_only_chat_counts_the_tokens_of_a_prompt(serve, grounder, monkeypatch):
    client = serve()
    # Behind the loading, which asks too.
    assert ask(client).status_code == 200
    encoded = []
    encode = grounder.encoder.encode
    monkeypatch.setattr(
        grounder.encoder, "encode", lambda phrase: encoded.append(phrase) or encode(phrase)
    )
    assert ask(client).status_code == 200
    assert encoded == PHRASES


def test_a_backend_that_fails_does_not_stop_the_service(serve, monkeypatch):
    client = serve()

    def fail(*_):
        raise EngineError("the graph could not be run")

    with monkeypatch.context() as patch:
        patch.setattr(client.service._models, "answer", fail)
        answer = ask(client)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (500, "engine")
    assert ask(client).status_code == 200


def test_a_bug_is_a_line_and_no_traceback(serve, monkeypatch, caplog):
    client = serve()

    def fail(*_):
        raise ZeroDivisionError("who thought of that")

    with monkeypatch.context() as patch:
        patch.setattr(client.service._models, "answer", fail)
        answer = ask(client)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (500, "internal")
    assert "who thought" not in answer.text
    (record,) = [each for each in caplog.records if each.name.startswith("gap_runtime")]
    assert record.exc_info is None
    assert "a bug: ZeroDivisionError: who thought of that, at " in record.getMessage()
    assert ask(client).status_code == 200


def test_models_are_listed_with_their_ratios(serve):
    (model,) = serve().get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["positions"]) == ("bundle", "model", "gap")
    assert [each["kept"] for each in model["ratios"]] == [8, 4]


def test_two_bundles_of_one_name_are_refused(grounder):
    with pytest.raises(ConfigError, match="two bundles are called bundle"):
        Models([grounder, grounder], ServiceSettings())


def test_readiness_follows_the_models(serve, grounder, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(Models, "warm_up", lambda _: held.wait(10))
    client = serve()
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    held.set()
    # Its answer comes behind the loading.
    assert ask(client).status_code == 200
    assert client.get("/readyz").json() == {"status": "ready"}
    assert grounder.bundle.folder.name == "bundle"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (EngineError("no graph"), "no graph"),
        (MemoryError("full"), "the models cannot be loaded (MemoryError: full)"),
    ],
)
def test_models_that_cannot_be_loaded_are_told(grounder, monkeypatch, error, said):
    def fail(_):
        raise error

    monkeypatch.setattr(Models, "warm_up", fail)
    told = []
    settings = ServiceSettings()
    service = Service(Models([grounder], settings), settings, on_failure=told.append)
    with testclient.TestClient(service.app, base_url="http://localhost") as client:
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            assert client.get("/readyz").status_code == 503
    assert [str(each) for each in told] == [said]


def chat(client, content, **more):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    return client.post("/v1/chat/completions", json={"messages": messages, **more})


def parts(text, url=None):
    address = f"data:image/png;base64,{TEXT}" if url is None else url
    return [
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "text", "text": text},
    ]


def test_chat_gives_the_models_answer(serve, grounder):
    answer = chat(serve(), parts("the red mug"), model="bundle", temperature=0.7, ratio=0.75)
    data = answer.json()
    found = grounder.ground(PICTURE, "the red mug", ratio=0.75)
    assert data["choices"][0]["message"]["content"] == found.answer
    assert data["grounding"]["boxes"] == [list(box) for box in found.boxes]
    # USER: 4 visual tokens, Where is the red mug ? ASSISTANT:
    assert data["usage"] == {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 13}


def test_chat_streams_events(serve):
    answer = chat(serve(), parts("the mug"), stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert said == "[0.25,0.25,0.75,0.50]"
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("the mug", "no message holds a picture"),
        (parts(" "), "holds no text"),
        ([{"type": "audio"}], "has to be a text or an image_url"),
        ([{"type": "image_url", "image_url": {}}], "the picture's 'url'"),
        (7, "'content' has to be"),
        (parts("the mug", "https://a.b/c.png"), "send the picture itself"),
    ],
)
def test_chat_that_cannot_be_answered_is_told(serve, content, said):
    answer = chat(serve(), content)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"messages": []},
        {"messages": [7]},
        {"messages": [{"role": "king"}]},
        {"messages": [{"role": []}]},
        {"messages": [{"role": "user", "content": parts("x")}], "n": []},
        {"messages": [{"role": "user", "content": parts("x")}], "n": True},
        {"messages": [{"role": "user", "content": parts("x")}], "n": 2},
        {"messages": [{"role": "user", "content": parts("x")}], "stream_options": 7},
    ],
)
def test_chat_of_another_form_is_told(serve, body):
    assert serve().post("/v1/chat/completions", json=body).status_code == 400


def test_the_page_needs_nothing_from_elsewhere(serve):
    answer = serve().get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text
    assert "https://" not in answer.text
