"""A headless Chromium, spoken to through its debugging pipe: what a page does when it is opened.

Run as a program it takes a picture:

    python tests/tools/browser.py PAGE.html OUT.png WIDTH [light|dark|print]
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser():
    """Path of a browser, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@dataclass
class Visit:
    """What happened when a page was opened: messages of the console, addresses asked for."""

    console: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    failed: list = field(default_factory=list)


class Browser:
    """One page of a browser. Use it in `with`."""

    def __init__(self, program=None):
        self._home = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        to_browser, from_browser = os.pipe(), os.pipe()
        read_end, write_end = to_browser[0], from_browser[1]

        def connect():
            # The protocol's ends are 3 and 4; moved high first, so that none is overwritten.
            os.dup2(read_end, 103)
            os.dup2(write_end, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        self._process = subprocess.Popen(
            [
                program or find_browser(),
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--remote-debugging-pipe", f"--user-data-dir={self._home.name}"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--no-first-run", "--hide-scrollbars", "about:blank"),
            ],
            preexec_fn=connect,  # noqa: PLW1509 - one thread
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_end)
        os.close(write_end)
        self._write, self._read = to_browser[1], from_browser[0]
        os.set_blocking(self._read, False)
        self._buffer, self._events, self._last, self._session = b"", [], 0, None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each for each in targets if each["type"] == "page")
        found = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            os.close(self._write)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        self._home.cleanup()

    def call(self, method, **parameters):
        """Send a command and wait for its result; events that come meanwhile are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._receive()
            if got.get("id") == self._last:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']}")
                return got["result"]
            self._events.append(got)

    def _receive(self, seconds=30):
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            try:
                block = os.read(self._read, 1 << 20)
                if not block:
                    raise RuntimeError("the browser has ended")
                self._buffer += block
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError("the browser does not answer") from None
                time.sleep(0.01)
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def emulate(self, width, scheme="light", medium="screen"):
        """A window of that width, light or dark, or paper."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            media=medium,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def visit(self, path):
        """Open a file, or an address, and wait until it is shown."""
        self._events.clear()
        is_address = str(path).startswith("http://")
        self.call("Page.navigate", url=path if is_address else Path(path).resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self._events):
            self._events.append(self._receive())
        # One more turn of the page's own loop, for what loading has set off.
        self.evaluate("new Promise(done => setTimeout(() => done(1), 100))")
        return self.look_back()

    def look_back(self):
        """What has happened since the page was opened."""
        visit = Visit()
        for event in self._events:
            name, facts = event.get("method"), event.get("params", {})
            if name in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}:
                visit.console.append(json.dumps(facts))
            elif name == "Network.requestWillBeSent":
                visit.requests.append(facts["request"]["url"])
            elif name == "Network.loadingFailed":
                visit.failed.append(json.dumps(facts))
        return visit

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        return found["result"].get("value")

    def choose_file(self, selector, path):
        """Put a file into a field of the page, as a person does in the browser's own window."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        field = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=field, files=[str(path)])

    def press(self, key, *, control=False):
        """Press a key by its name, as `Enter` or `End`, where the focus is."""
        codes = {"Enter": 13, "End": 35, "Home": 36, "Tab": 9, " ": 32}
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        text = {"text": "\r"} if key == "Enter" and not control else {}
        modifiers = 2 if control else 0
        self.call(
            "Input.dispatchKeyEvent",
            **{"type": "keyDown", "modifiers": modifiers, **pressed, **text},
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **pressed)

    def write(self, text):
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        """The whole page as a PNG file."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(found["data"]))


def main():
    page, out, width, *scheme = sys.argv[1:]
    look = scheme[0] if scheme else "light"
    with Browser() as browser:
        browser.emulate(
            int(width),
            scheme="dark" if look == "dark" else "light",
            medium="print" if look == "print" else "screen",
        )
        browser.visit(page)
        browser.screenshot(out)


if __name__ == "__main__":
    main()
