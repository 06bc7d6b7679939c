"""Replies of the hub with one thing changed: the client says a line, or what came is whole."""

import json
import os
import shutil
from contextlib import contextmanager
from unittest import mock

from makers.hub import TOKEN, Handler, Hub, Repository

from fuzz import mutations
from fuzz.outcome import WrongResultError, run_line
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.cli.main import main
from gap_runtime.errors import GapError

NAME = "org/any"
HEADERS = ("ETag", "X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size", "Location", "Content-Range")
STATUSES = (200, 204, 206, 301, 400, 401, 403, 404, 409, 416, 418, 429, 500, 502, 503)


class Damaged(Handler):
    """Changes one of the replies: that of the number that is drawn."""

    def handle_quietly(self):
        try:
            self.handle_any()
        except Exception:  # a client that was misled asks for anything
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_quietly

    def reply(self, status=200, data=None, headers=None):
        drawn = self.hub.drawn
        headers = dict(headers or {})
        if drawn is not None and len(self.hub.asked) == drawn["number"]:
            rng = drawn["rng"]
            way = rng.choice(("status", "data", "data", "data", "header", "cut"))
            self.hub.drawn = {**drawn, "way": f"{way} of {self.command} {self.path}"}
            if way == "status":
                status = rng.choice(STATUSES)
            elif way == "header":
                name = rng.choice(sorted(headers) or HEADERS)
                headers[name] = rng.choice(
                    ("", "0", "-1", "x" * 9000, "../..", "http://127.0.0.1:9")
                )
            elif way == "cut":
                return self.cut(status, data, headers)
            elif isinstance(data, bytes):
                data = mutations.change_bytes(data, rng)
            else:
                data = self.change(data or {}, rng)
        return super().reply(status, data, headers)

    def change(self, data, rng):
        """JSON with one place changed."""
        if data:
            data, _ = mutations.change_plain(data, rng)
        return mutations.write_plain(data, rng)

    def cut(self, status, data, headers):
        """A line that breaks."""
        body = data if isinstance(data, bytes) else json.dumps(data or {}).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.send_header("Content-Length", str(len(body) + 9))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2])
        self.close_connection = True


@contextmanager
def reached(hub, home):
    """The stand-in is the hub, whose client tries again at once."""
    from huggingface_hub import constants

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    places = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    with (
        mock.patch.multiple(constants, **places),
        mock.patch("time.sleep", return_value=None),
        mock.patch.dict(os.environ, {"HF_TOKEN": TOKEN}),
    ):
        yield


def require_whole(folder):
    try:
        Bundle.open(folder, verify_all=True)
    except GapError as error:
        raise WrongResultError(f"pulled, but {error}") from error


def replies(case):
    """Pulls and pushes of a small bundle, one reply changed in each."""
    home = case.folder.parent / "hub"
    home.mkdir()
    hub = Hub(Damaged)
    hub.drawn = None
    push = ("push", case.folder, NAME, "--license", "mit", "--no-check")
    with reached(hub, home):
        run_line(main, push)
        commits = dict(hub.repositories[NAME].commits)
        begun = len(hub.asked)
        run_line(main, ("pull", NAME, "--out", home / "whole"))
        counts = {"pull": len(hub.asked) - begun, "push": begun}

    def restore():
        hub.drawn, hub.asked[:] = None, []
        repository = hub.repositories[NAME] = Repository()
        repository.commits |= commits
        repository.branches["main"] = list(commits)[-1]
        for name in ("cache", "out"):
            shutil.rmtree(home / name, ignore_errors=True)

    def make(rng):
        job = rng.choice(("pull", "pull", "push"))
        number = rng.randrange(counts[job]) + 1

        def run():
            restore()
            hub.drawn = {"number": number, "rng": rng}
            out = home / "out"
            beside = set(home.iterdir())
            with reached(hub, home):
                found = run_line(main, ("pull", NAME, "--out", out) if job == "pull" else push)
            if job == "pull":
                require_whole(out)
                if lost := set(home.iterdir()) - beside - {out, home / "cache"}:
                    raise WrongResultError(f"written elsewhere: {lost}")
            return found

        return f"{job}, reply {number} of {counts[job]}", run

    return make
