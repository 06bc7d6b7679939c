"""The service as an ASGI application: what each address gives, and what an error looks like."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import logging
import threading
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from importlib import resources
from typing import Final, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from gap_runtime.errors import ConfigError, EngineError, GapError, InputError
from gap_runtime.records.plain import parse_json
from gap_runtime.service.chat import make_completion, read_chat, stream_completion
from gap_runtime.service.metrics import CONTENT_TYPE, Metrics
from gap_runtime.service.models import Models, Reply
from gap_runtime.service.openapi import describe_service
from gap_runtime.service.pictures import fetch_picture
from gap_runtime.service.questions import Question, read_form_question, read_json_question
from gap_runtime.service.settings import ServiceSettings
from gap_runtime.service.worker import BusyError, GoneError, LateError, Worker

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
_LOG: Final = logging.getLogger(__name__)
_CLOSED: Final = 499
"""A client that has gone reads no status; proxies call it so."""
_COUNT_SECONDS: Final = 1.0
_FETCHERS: Final = 4
"""Pictures that are fetched at once."""
_PAGE_RULES: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class _FormParser(MultiPartParser):
    """Keeps files in memory, where the body is already: pictures are written nowhere."""

    spool_max_size = 2**40


class TooLargeError(GapError):
    """A body that is larger than is read."""


class MediaTypeError(GapError):
    """A body of a kind that is not read."""


class TokenError(GapError):
    """A request without the token that is wanted."""


_STATUS: Final[tuple[tuple[type[GapError], int], ...]] = (
    (BusyError, 429),
    (LateError, 504),
    (GoneError, _CLOSED),
    (TooLargeError, 413),
    (MediaTypeError, 415),
    (TokenError, 401),
    (ConfigError, 400),
    (EngineError, 500),
)


class Service:
    """Models behind HTTP."""

    def __init__(
        self,
        models: Models,
        settings: ServiceSettings,
        *,
        on_failure: Callable[[GapError], None] | None = None,
    ) -> None:
        """Make the application, `self.app`.

        Args:
            models: Are asked by one worker. Pictures are fetched by others before.
            settings: Limits.
            on_failure: Told why the models cannot be loaded.
        """
        self._models, self._settings = models, settings
        self._on_failure = on_failure
        self.worker = Worker(settings.queue)
        self.fetcher = Worker(settings.queue, threads=_FETCHERS)
        self.metrics = Metrics(settings.queue, lambda: self.worker.waiting)
        self._is_ready = False
        self._next_count = 0.0
        self.app = Starlette(
            routes=[
                self._route("/", self._show_page, "GET", is_open=True),
                self._route("/healthz", self._say_healthy, "GET", is_open=True),
                self._route("/readyz", self._say_ready, "GET", is_open=True),
                self._route("/openapi.json", self._describe, "GET", is_open=True),
                self._route("/metrics", self._show_metrics, "GET"),
                self._route("/v1/models", self._list_models, "GET"),
                self._route("/v1/ground", self._ground, "POST"),
                self._route("/v1/chat/completions", self._complete, "POST"),
            ],
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.known_names))
            ],
            exception_handlers={HTTPException: _answer_http_error},
            lifespan=self._live,
        )

    def stop(self, count_left: Callable[[], float]) -> bool:
        """Begin nothing more; whether what runs came to its end within the seconds that are left.

        Args:
            count_left: Gives them.
        """
        return all(each.stop(count_left()) for each in (self.worker, self.fetcher))

    @contextlib.asynccontextmanager
    async def _live(self, _: Starlette) -> AsyncIterator[None]:
        """Load the models as soon as requests can come; they wait for it."""
        warming = asyncio.ensure_future(self._warm_up())
        warming.add_done_callback(self._tell_failure)
        try:
            yield
        finally:
            warming.cancel()

    async def _warm_up(self) -> None:
        await self.worker.run(lambda _: self._models.warm_up())
        # What is loaded stays: the search for cycles of dead objects need not walk it each time.
        gc.collect()
        gc.freeze()
        self._is_ready = True

    def _tell_failure(self, warming: asyncio.Future[None]) -> None:
        """End the service where its models cannot be loaded, for whatever reason."""
        error = None if warming.cancelled() else warming.exception()
        if error is None or self._on_failure is None:
            return
        if not isinstance(error, GapError):
            error = EngineError(f"the models cannot be loaded ({type(error).__name__}: {error})")
        self._on_failure(error)

    def _route(
        self, path: str, endpoint: Endpoint, method: str, *, is_open: bool = False
    ) -> Route:
        """An address whose errors are JSON and which is counted; others need the token."""

        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            request.state.ends = began + self._settings.seconds
            try:
                if not is_open:
                    self._require_token(request)
                response = await endpoint(request)
            except GapError as error:
                response = _answer_error(error)
            except ClientDisconnect:
                response = _answer_error(GoneError("the client has gone"))
            except Exception as error:  # noqa: BLE001 - a client is answered whatever goes wrong
                response = _answer_unknown(error)
            seconds = time.perf_counter() - began
            self.metrics.count_request(path, response.status_code, seconds)
            response.headers["server-timing"] = f"service;dur={seconds * 1e3:.3f}"
            return response

        return Route(path, answer, methods=[method])

    def _require_token(self, request: Request) -> None:
        if self._settings.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._settings.token.encode())
        if scheme.lower() != "bearer" or not right:
            raise TokenError("send the token of this service: Authorization: Bearer TOKEN")

    async def _show_page(self, _: Request) -> Response:
        headers = {"content-security-policy": _PAGE_RULES, "x-content-type-options": "nosniff"}
        return HTMLResponse(read_page(), headers=headers)

    async def _say_healthy(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _say_ready(self, _: Request) -> Response:
        if not self._is_ready:
            return JSONResponse({"status": "loading"}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def _describe(self, _: Request) -> Response:
        return JSONResponse(describe_service(self._settings))

    async def _show_metrics(self, _: Request) -> Response:
        return Response(self.metrics.dump(), media_type=CONTENT_TYPE)

    async def _list_models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._models.describe()})

    async def _ground(self, request: Request) -> Response:
        question = await self._read_question(request)
        reply, waited = await self._ask(request, question)
        return JSONResponse(reply.dump(waited))

    async def _complete(self, request: Request) -> Response:
        data = parse_json(await self._read_body(request), "the body", InputError)
        asked = read_chat(data, self._models, self._settings)
        reply, waited = await self._ask(request, asked.question)
        if not asked.stream:
            return JSONResponse(make_completion(reply, waited))
        events = stream_completion(reply, waited, with_usage=asked.with_usage)
        headers = {"cache-control": "no-cache"}
        return Response("".join(events), media_type="text/event-stream", headers=headers)

    async def _read_question(self, request: Request) -> Question:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            body = await self._read_body(request)
            return read_form_question(await _parse_form(request, body), self._settings)
        if kind == "application/json":
            return read_json_question(
                parse_json(await self._read_body(request), "the body", InputError), self._settings
            )
        raise MediaTypeError(
            f"a body of type {kind or 'unknown'!r:.60}; expected multipart/form-data or "
            "application/json"
        )

    async def _read_body(self, request: Request) -> bytes:
        """The whole body, within the limits of size and time."""
        with anyio.move_on_after(_count_left(request)):
            return await self._collect_body(request)
        raise LateError("the body did not arrive in time")

    async def _collect_body(self, request: Request) -> bytes:
        limit = self._settings.body_bytes
        too_large = TooLargeError(f"the body is larger than {self._settings.body_mb:g} MB")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _note_kept(self) -> None:
        """Count kept pictures, not more often than anybody looks: there may be thousands."""
        if time.monotonic() >= self._next_count:
            self.metrics.set_kept(*self._models.count_kept())
            self._next_count = time.monotonic() + _COUNT_SECONDS

    async def _ask(self, request: Request, question: Question) -> tuple[Reply, dict[str, float]]:
        """The reply, and milliseconds that the question waited: to be fetched, for its turn."""
        self._models.require_ratio(question)
        waited: dict[str, float] = {}
        image = question.image
        if isinstance(image, str):
            # Nobody waits for another's camera, and nothing is fetched for a queue that is full.
            self.worker.require_room()
            began = time.perf_counter()
            fetched = await self._wait_for(
                request, self.fetcher, partial(fetch_picture, image, self._settings)
            )
            waited["fetch"] = (time.perf_counter() - began) * 1e3
            question = replace(question, image=fetched)
        asked = time.perf_counter()

        def work(given_up: threading.Event) -> Reply:
            waited["queue"] = (time.perf_counter() - asked) * 1e3
            reply = self._models.answer(question, given_up)
            self.metrics.count_groundings(reply.found, waited["queue"])
            self._note_kept()
            return reply

        return await self._wait_for(request, self.worker, work), waited

    async def _wait_for(
        self, request: Request, worker: Worker, work: Callable[[threading.Event], T]
    ) -> T:
        """What a worker makes of a request, while its client is there and its time is not up."""
        gone = partial(_wait_until_gone, request)
        return await worker.run(work, seconds=_count_left(request), gone=gone)


@lru_cache(maxsize=1)
def read_page() -> str:
    """The page at `/`."""
    return resources.files("gap_runtime.service").joinpath("page.html").read_text("utf-8")


def _count_left(request: Request) -> float:
    """Seconds that a request may still take."""
    ends: float = request.state.ends
    return max(0.0, ends - time.perf_counter())


async def _wait_until_gone(request: Request) -> None:
    """Come back when the client has closed the connection; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parse_form(request: Request, body: bytes) -> Mapping[str, list[str | bytes]]:
    """The values of every field; of files their bytes."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = _FormParser(
            request.headers, stream(), max_files=4, max_fields=100, max_part_size=len(body) + 1
        )
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        said = getattr(error, "message", str(error))
        raise InputError(f"the form cannot be read ({said})") from error
    fields: dict[str, list[str | bytes]] = {}
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        for name, value in form.multi_items():
            read = value if isinstance(value, str) else await value.read()
            fields.setdefault(name, []).append(read)
    return fields


def _answer_error(error: GapError) -> Response:
    """An error as JSON, with its status. `type` is what OpenAI's clients look at."""
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    if status == 500:
        _LOG.error("%s", error)
    headers = {}
    if isinstance(error, BusyError):
        headers["retry-after"] = str(error.retry_after)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return _make_error(error.kind, str(error), status, headers)


def _answer_unknown(error: Exception) -> Response:
    """What nobody thought of: one line in the log says where, and the client gets no more."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
    _LOG.error("a bug: %s: %s, at %s; please report it", type(error).__name__, error, where)
    return _make_error("internal", "something went wrong here; the log says what", 500, {})


def _answer_http_error(_: Request, error: Exception) -> Response:
    """An address or method that there is not."""
    assert isinstance(error, HTTPException)
    kinds = {404: "not-found", 405: "method"}
    said = {
        404: "there is nothing at this address; see /openapi.json",
        405: "not with this method",
    }
    return _make_error(
        kinds.get(error.status_code, "http"),
        said.get(error.status_code, error.detail),
        error.status_code,
        dict(error.headers or {}),
    )


def _make_error(kind: str, message: str, status: int, headers: Mapping[str, str]) -> Response:
    said = {"kind": kind, "message": message, "type": kind, "code": status}
    return JSONResponse({"error": said}, status_code=status, headers=dict(headers))
