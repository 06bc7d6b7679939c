"""Settings, pictures by address, and the phrase in a prompt."""

import contextlib
import http.server
import os
import threading
import time
from pathlib import Path

import pytest

from gap_runtime.errors import ConfigError, InputError
from gap_runtime.service.chat import find_phrase
from gap_runtime.service.pictures import fetch_picture, require_allowed
from gap_runtime.service.settings import ServiceSettings, is_loopback, read_token

LLAVA = "USER: <image>\nWhere is {phrase}? ASSISTANT:"
MINIGPT = "[INST] <Img><image></Img> [refer] give me the location of {phrase} [/INST]"
QWEN = "<|user|>\n<image>Locate {phrase}, output its bbox coordinates.<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("text", "template", "phrase"),
    [
        ("the red mug", LLAVA, "the red mug"),
        ("Where is the red mug?", LLAVA, "the red mug"),
        (" Where is the red mug? ", LLAVA, "the red mug"),
        ("USER: <image>\nWhere is the red mug? ASSISTANT:", LLAVA, "the red mug"),
        ("USER: \nWhere is the red mug? ASSISTANT:", LLAVA, "the red mug"),
        ("<image>\nWhere is the red mug?", LLAVA, "the red mug"),
        ("the mug? no, the cup", LLAVA, "the mug? no, the cup"),
        ("[refer] give me the location of the red mug", MINIGPT, "the red mug"),
        ("give me the location of the red mug [/INST]", MINIGPT, "the red mug"),
        ("Locate the red mug, output its bbox coordinates.", QWEN, "the red mug"),
        ("the red mug", "<image>\n{phrase}", "the red mug"),
    ],
)
def test_the_phrase_is_found_in_the_prompt(text, template, phrase):
    assert find_phrase(text, template) == phrase


@pytest.mark.parametrize(
    "url",
    [
        "https://cameras.local/a.png",
        "https://cameras.local:443/live/a.png",
        "http://cameras.local/live/a.png",
        "https://cameras.local.evil/live/a.png",
        "https://cameras.local@evil/live/a.png",
        "https://evil@cameras.local/live/a.png",
        "https://cameras.local/live/../a.png",
        "https://cameras.local/live/%2e%2e/a.png",
        "https://cameras.local/live/..%2fa.png",
        "https://cameras.local:x/live/a.png",
        "https://[::1/live/a.png",
    ],
)
def test_only_addresses_that_begin_as_allowed_are_fetched(url):
    require_allowed("https://cameras.local/live/a.png", ["https://cameras.local/live/"])
    with pytest.raises(InputError):
        require_allowed(url, ["https://cameras.local/live/"])


class Camera(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/away":
            self.send_response(302)
            self.send_header("location", "/secret")
            self.end_headers()
        elif self.path == "/frame":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 900)
        elif self.path == "/half":
            self.send_response(200)
            self.send_header("content-length", "900")
            self.end_headers()
            self.wfile.write(b"x" * 400)
        elif self.path == "/drops":
            self.send_response(200)
            self.end_headers()
            # No byte is late, and there is no end.
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.01)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def camera():
    with http.server.HTTPServer(("127.0.0.1", 0), Camera) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_allowed_picture_is_fetched_within_its_limits(camera):
    settings = ServiceSettings(allowed_urls=(f"{camera}/",))
    stays = threading.Event()
    assert fetch_picture(f"{camera}/frame", settings, stays) == b"x" * 900
    for path, said in (("away", "302"), ("none", "404"), ("half", "broke off")):
        with pytest.raises(InputError, match=said):
            fetch_picture(f"{camera}/{path}", settings, stays)
    small = ServiceSettings(allowed_urls=(f"{camera}/",), body_mb=0.0005)
    with pytest.raises(InputError, match="larger than"):
        fetch_picture(f"{camera}/frame", small, stays)


def test_a_picture_that_never_ends_is_given_up(camera):
    settings = ServiceSettings(allowed_urls=(f"{camera}/",))
    gone = threading.Event()
    timer = threading.Timer(0.1, gone.set)
    timer.start()
    began = time.monotonic()
    fetch_picture(f"{camera}/drops", settings, gone)
    assert 0.05 < time.monotonic() - began < 5
    timer.join()


@pytest.mark.parametrize(
    "changes",
    [
        {"queue": 0},
        {"seconds": -1.0},
        {"body_mb": float("nan")},
        {"grace": float("inf")},
        {"megapixels": 1e300},
        {"port": 70_000},
        {"allowed_urls": ("cameras.local/",)},
        {"allowed_urls": ("https://cameras.local",)},
    ],
)
def test_settings_that_let_nothing_through_are_refused(changes):
    with pytest.raises(ConfigError):
        ServiceSettings(**changes)


def test_a_token_is_one_long_word(tmp_path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n", encoding="utf-8")
    assert read_token(path) == "0123456789abcdef"
    for text in ("short", "0123456789 abcdef", "0123456789abcdéf", ""):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="one word of at least 16"):
            read_token(path)
    with pytest.raises(InputError, match="no such file"):
        read_token(tmp_path / "nowhere")


def test_loopback_is_told_from_the_rest():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "192.168.1.7", "box")] == [False] * 3


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "large", "no text"])
def test_a_token_is_in_a_small_file(tmp_path, kind):
    """Whatever else is there is refused at once, without being read to its end."""
    path = tmp_path / "token"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path = Path("/dev/zero")
    else:
        path.write_bytes(b"x" * 20_000 if kind == "large" else b"\xff" * 32)
    with pytest.raises(InputError, match=str(path)):
        read_token(path)


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "http://x", "\udce9", "a/b", "é"])
def test_what_is_no_name_of_a_host_is_refused(name):
    for changes in ({"host": name}, {"host_names": ("box.local", name)}):
        with pytest.raises(ConfigError, match="no name of a host"):
            ServiceSettings(**changes)


@pytest.mark.parametrize("name", ["::1", "127.0.0.1", "box.local", "fe80::1%eth0", "my_box", "::"])
def test_names_and_addresses_of_hosts_are_taken(name):
    assert ServiceSettings(host=name, host_names=(name, "*.local")).host == name
