"""The service in a process of its own: OpenAI's client, polite stops, the page in a browser."""

import base64
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import psutil
import pytest
from tools import browser
from tools.places import ROOT

from benchmarks.service import make_bodies, press, read_memory, start
from gap_runtime import Bundle, Grounder
from gap_runtime.cli.main import main

SAMPLE = ROOT / "refshapes" / "samples" / "test-006.png"
PHRASE = "the top yellow circle"


class Served:
    """A running service."""

    def __init__(self, *arguments):
        # Each in one thread: the machine has other work.
        self.process, self.url = start(*arguments, environment={"GAP_RUNTIME_THREADS": "1"})
        deadline = time.monotonic() + 60
        while self.get("/readyz")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def count(self, name):
        """A number of /metrics, by what its line begins with; 0 where there is none yet."""
        text = self.get("/metrics")[1].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(self, **data):
        body = {"image": base64.b64encode(SAMPLE.read_bytes()).decode(), "phrase": PHRASE, **data}
        request = urllib.request.Request(
            f"{self.url}/v1/ground",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def stop(self, sign):
        """Its exit code and what it said."""
        self.process.send_signal(sign)
        said = self.process.communicate(timeout=30)[1]
        return self.process.returncode, said


@contextlib.contextmanager
def served(*arguments):
    service = Served(*arguments)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.communicate()


@pytest.fixture(scope="module")
def service(refshapes_bundle, tmp_path_factory):
    """One service of two bundles, for all tests that do not stop it."""
    other = tmp_path_factory.mktemp("served") / "other"
    shutil.copytree(refshapes_bundle, other)
    with served(str(refshapes_bundle), str(other)) as running:
        yield running


def test_it_answers_as_the_grounder_does(service, refshapes_bundle):
    with Grounder(Bundle.open(refshapes_bundle), "onnxruntime:cpu") as grounder:
        wanted = grounder.ground(SAMPLE, PHRASE, ratio=0.5)
    for model in ("gap", "other"):
        (found,) = service.ask(ratio=0.5, model=model)["results"]
        assert [tuple(box) for box in found["boxes"]] == [tuple(box) for box in wanted.boxes]
        assert found["kept_index"] == list(wanted.kept_index)
        assert found["score"] == pytest.approx(wanted.score, abs=1e-5)


def test_the_openai_client_works_unchanged(service):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["gap", "other"]
    picture = f"data:image/png;base64,{base64.b64encode(SAMPLE.read_bytes()).decode()}"
    content = [
        {"type": "text", "text": f"Where is {PHRASE}?"},
        {"type": "image_url", "image_url": {"url": picture}},
    ]
    asked = {"model": "gap", "messages": [{"role": "user", "content": content}]}
    answer = client.chat.completions.create(**asked, temperature=0, max_tokens=64)
    (found,) = service.ask()["results"]
    assert answer.choices[0].message.content == found["answer"]
    assert answer.model_extra["grounding"]["boxes"] == found["boxes"]
    assert answer.usage.completion_tokens > 4
    with client.chat.completions.create(**asked, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == found["answer"]
    with pytest.raises(openai.BadRequestError, match="unknown model"):
        client.chat.completions.create(**{**asked, "model": "gpt"})


def test_the_example_asks_it(service):
    pytest.importorskip("openai")
    command = [sys.executable, str(ROOT / "examples" / "ask_service.py"), str(SAMPLE), PHRASE]
    done = subprocess.run(
        [*command, "--url", service.url], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (found,) = service.ask()["results"]
    assert done.stdout.startswith(f"{found['answer']}\n{found['boxes']} score ")


def test_clients_that_break_off_leave_it_running(service):
    host, port = service.url.removeprefix("http://").split(":")
    body = json.dumps({"image": "A" * 10_000, "phrase": "x"}).encode()
    head = (
        f"POST /v1/ground HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    for sent in (b"", b"GET", b"\x00\xff\r\n\r\n", head, head + body[:500], head + body):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(sent)
    assert service.get("/healthz")[0] == 200
    assert service.ask()["results"][0]["boxes"]
    assert service.process.poll() is None


def test_a_client_that_leaves_is_not_answered(service):
    host, port = service.url.removeprefix("http://").split(":")
    image = base64.b64encode(SAMPLE.read_bytes()).decode()
    body = json.dumps({"image": image, "phrase": [PHRASE] * 32}).encode()
    head = f"POST /v1/ground HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    left = 'gap_requests_total{endpoint="/v1/ground",status="499"}'
    before, phrases = service.count(left), service.count("gap_phrases_total")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: service.count("gap_queue") == 1)
    wait_for(lambda: service.count(left) == before + 1)
    wait_for(lambda: service.count("gap_queue") == 0)
    assert service.count("gap_phrases_total") == phrases


def break_some(bodies):
    """Every seventh is no request, and every ninth one about no picture."""
    for number, body in enumerate(bodies):
        if number % 7 == 3:
            yield body[:100]
        elif number % 9 == 5:
            yield json.dumps({**json.loads(body), "image": "AAAA"}).encode()
        else:
            yield body


@pytest.mark.parametrize("requests", [90, pytest.param(2000, marks=pytest.mark.matrix)])
def test_memory_and_open_files_are_level_over_many_requests(service, requests):
    """Pictures are kept, so that the same ones come again and again."""
    bodies = list(break_some(islice(make_bodies(), 30)))
    process = psutil.Process(service.process.pid)
    press(service.url, bodies, 8)
    memory, files, threads = read_memory(service.process), process.num_fds(), process.num_threads()
    statuses, _, _ = press(service.url, bodies * (requests // len(bodies)), 8)
    broken = sum(1 for number in range(len(bodies)) if number % 7 == 3 or number % 9 == 5)
    share = requests // len(bodies)
    assert statuses == {"200": share * (len(bodies) - broken), "400": share * broken}
    wait_for(lambda: process.num_fds() <= files)
    assert process.num_threads() <= threads
    assert read_memory(service.process) - memory < 4


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_finishes_what_runs(refshapes_bundle, sign):
    """A request of many phrases is under way when the service is told to stop."""
    with served(str(refshapes_bundle)) as service, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.ask, phrase=[PHRASE] * 32)
        wait_for(lambda: b"gap_queue 1.0" in service.get("/metrics")[1])
        assert service.stop(sign) == (0, "")
        assert len(asked.result()["results"]) == 32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "x"], "--port"),
        (["--seconds", "0"], "seconds 0: has to be more than 0"),
        (["--token-file", "nowhere"], "nowhere: no such file"),
        (["--host", "192.0.2.1"], "cannot listen there"),
        (["--ratio", "0.3"], "no ratio 0.3"),
    ],
)
def test_what_cannot_be_served_is_told_first(refshapes_bundle, arguments, said, capsys):
    assert main(["serve", str(refshapes_bundle), *arguments]) == 2
    assert said in capsys.readouterr().err


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the page did not get there"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def window():
    """A page of a real Chromium."""
    if browser.find_browser() is None:
        pytest.skip("no Chromium here")
    with browser.Browser() as page:
        yield page


def text_of(window, selector):
    return window.evaluate(f"document.querySelector({selector!r})?.innerText ?? ''")


def focus(window, selector):
    window.evaluate(f"document.querySelector({selector!r}).focus()")


def test_the_page_draws_boxes_and_shows_errors(service, window):
    window.emulate(1200)
    window.visit(service.url)
    wait_for(lambda: "gap beside other" in text_of(window, "#about"))
    focus(window, "#go")
    window.press("Enter")
    wait_for(lambda: text_of(window, "#problem") == "Choose a picture first.")
    window.choose_file("#file", SAMPLE)
    wait_for(lambda: window.evaluate("document.querySelectorAll('canvas').length") == 1)
    focus(window, "#go")
    window.press("Enter")
    wait_for(lambda: text_of(window, "#problem") == "Say what to look for.")
    focus(window, "#phrases")
    window.write(PHRASE)
    # From the keyboard: to the end of the slider and back, then to ask.
    focus(window, "#ratio")
    window.press("End")
    assert text_of(window, "#share") == "75 %"
    window.press("Home")
    assert text_of(window, "#share") == "0 %"
    assert text_of(window, "#counts") == "keeps 64 of 64"
    window.press("Enter", control=True)
    drawn = "document.querySelectorAll('article canvas').length"
    wait_for(lambda: window.evaluate(drawn) == 2)
    reply = service.ask(ratio=0)
    x0, y0, x1, y1 = reply["results"][0]["boxes"][0]
    cells = "[...document.querySelectorAll('td:nth-child(2)')].map((each) => each.innerText)"
    assert window.evaluate(cells) == [f"{x0:.1f} {y0:.1f} {x1:.1f} {y1:.1f}"] * 2
    # The outline is where the box is, and nothing is shaded where nothing was removed.
    place = f"const s = c.width / {reply['width']}, x = {(x0 + x1) / 2} * s, y = {y1 - 0.3} * s;"
    pixel = (
        "(() => { const c = document.querySelector('article canvas');"
        + place
        + "return [...c.getContext('2d').getImageData(x, y, 1, 1).data]; })()"
    )
    assert window.evaluate(pixel)[:3] == [255, 64, 129]
    focus(window, "#ratio")
    window.press("End")
    wait_for(lambda: "keeps 16 of 64" in text_of(window, "article"))
    focus(window, "#phrases")
    window.write(" </s>")
    window.press("Enter", control=True)
    wait_for(lambda: "special token" in text_of(window, "#problem"))
    # No script failed, and nothing was asked of anybody else.
    happened = window.look_back()
    assert [line for line in happened.console if "status of 400" not in line] == []
    assert all(url.startswith((service.url, "data:")) for url in happened.requests)


def test_the_page_fits_a_phone_in_the_dark(service, window):
    window.emulate(360, scheme="dark")
    window.visit(service.url)
    assert window.evaluate("document.documentElement.scrollWidth") <= 360
    ground = "getComputedStyle(document.body).backgroundColor"
    assert window.evaluate(ground) == "rgb(18, 21, 27)"
