"""The ASGI application: who may ask, how much, for how long; and what becomes of a task on its way to an answer."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from router_cli.errors import TeacherError, UsageError
from router_cli.progress import SILENT, Progress
from router_cli.schema import Prediction, Task
from router_cli.sections import ServeSettings
from router_cli.serving import shapes
from router_cli.serving.batching import Batcher, QueueFull
from router_cli.serving.metrics import Metrics
from router_cli.serving.shapes import Refusal
from router_cli.space import DecisionSpace

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

GONE = 499
"""The status that counts requests whose client went away (nginx's: nobody receives it)."""

BROKEN = 3
"""So many batches in a row of which the model decided nothing are a model that is broken."""

PROBE = Task(id="probe", text="Sort a list of integers")
"""What a model that seems broken is asked, to see whether it is: nobody else may ask one that is not ready."""

Unsure = tuple[Task, Prediction]
"""A task, and its row that is not sure enough."""


@dataclass(frozen=True)
class Office:
    """Who decides: `decide` all tasks, `settle` those that are `unsure`. Each is called by threads of its own: `decide`
    by `at_once`, `settle` by one.

    `most` are the tasks of a batch of each, `spent` the US dollars that settling has cost. `close` is called by the
    thread of `settle` when all is over.
    """

    space: DecisionSpace
    decide: Callable[[Sequence[Task]], Sequence[Prediction | BaseException]]
    most: int
    settle: Callable[[Sequence[Unsure]], Sequence[Prediction | BaseException]] = lambda given: []
    unsure: Callable[[Prediction], bool] = lambda row: False
    most_unsure: int = 1
    spent: Callable[[], float] = lambda: 0.0
    close: Callable[[], None] = lambda: None
    at_once: int = 1


class Service:
    """One server's state: its queue, its counters, and its answers to each path."""

    def __init__(self, office: Office, settings: ServeSettings, progress: Progress = SILENT) -> None:
        self._office, self._settings, self._progress = office, settings, progress
        self._token = None if settings.token is None else settings.token.get_secret_value().encode()
        self.metrics = Metrics(lambda: self._deciding.waiting + self._settling.waiting)
        self._deciding: Batcher[Task, Prediction] = Batcher(
            office.decide,
            office.most,
            settings.queue,
            settings.batch_wait_ms / 1000,
            size=lambda task: len(task.text),
            seen=self._seen,
            at_once=office.at_once,
        )
        self._settling: Batcher[Unsure, Prediction] = Batcher(office.settle, office.most_unsure, settings.queue)
        self._failed = 0  # batches in a row of which the model decided nothing
        self._since = int(time.time())
        self.cut = 0

    def app(self) -> Starlette:
        """The ASGI application. Its lifespan starts and ends the threads."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        def asked(path: str, answer: Answer, method: str, secret: bool = True, named: str | None = None) -> Route:
            return Route(path, self._endpoint(named or path, answer, secret), methods=[method])

        routes = [
            asked("/v1/route", self._route, "POST"),
            asked("/v1/chat/completions", self._chat, "POST"),
            asked("/v1/models", self._models, "GET"),
            asked("/v1/models/{name:path}", self._model, "GET", named="/v1/models"),
            asked("/metrics", self._metrics, "GET"),
            # An orchestrator has no token, and learns nothing here.
            asked("/healthz", self._health, "GET", secret=False),
            asked("/readyz", self._ready, "GET", secret=False),
        ]

        async def unknown(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
            words = f"{request.method} {request.url.path}: there is no such thing here"
            return _refused(Refusal(error.status_code, code, words, headers=error.headers))

        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: unknown})

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._deciding, self._settling:
            yield
            with contextlib.suppress(TimeoutError):  # what hangs there must not keep us
                async with asyncio.timeout(5):
                    await self._settling.workers[0](self._office.close)

    # -- paths ------------------------------------------------------------------------------------------------

    async def _route(self, request: Request) -> Response:
        tasks, many = shapes.read_tasks(shapes.read_body(await self._body(request)))
        return _json(shapes.routed(tasks, await self._decided(request, tasks), many, self._failure))

    async def _chat(self, request: Request) -> Response:
        chat = shapes.read_chat(shapes.read_body(await self._body(request)), self._office.space)
        self._known(chat.model)
        [row] = await self._decided(request, [chat.task])
        assert isinstance(row, Prediction)  # the only one's error is raised
        answer = shapes.completion(chat, row)
        if not chat.stream:
            return _json(answer)
        return _plain(shapes.streamed(chat, answer), "text/event-stream", {"cache-control": "no-cache"})

    async def _models(self, request: Request) -> Response:
        return _json(shapes.models(self._settings.name, self._since))

    async def _model(self, request: Request) -> Response:
        self._known(request.path_params["name"])
        return _json(shapes.models(self._settings.name, self._since)["data"][0])

    async def _metrics(self, request: Request) -> Response:
        return _plain(*self.metrics.page())

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """Not ready where a batch takes longer than anybody waits for it (the thread hangs), or the model is broken."""
        if self._deciding.busy > self._settings.time_limit:
            raise Refusal(503, "stuck", f"the same batch for {self._deciding.busy:.0f} s")
        if self._failed >= BROKEN:
            with contextlib.suppress(QueueFull):
                await self._deciding.put([PROBE])
        if self._failed >= BROKEN:
            raise Refusal(503, "broken", f"the model failed on all tasks of the last {self._failed} batches")
        return _json({"status": "ready"})

    def _seen(self, results: Sequence[Prediction | BaseException], seconds: float) -> None:
        self.metrics.batch(len(results), seconds)
        if any(isinstance(one, Prediction) for one in results):
            self._failed = 0
        elif not any(_upstream(one) for one in results):
            self._failed += 1

    # -- what a request goes through --------------------------------------------------------------------------

    def _endpoint(self, path: str, answer: Answer, secret: bool) -> Callable[[Request], Awaitable[Response]]:
        """`answer` with everything around it: the token, the time limit, errors as documents, and the counters."""

        async def endpoint(request: Request) -> Response:
            from starlette.requests import ClientDisconnect

            started, status, code = time.monotonic(), GONE, "gone"
            counted = path.startswith("/v1/")  # probes and scrapes would hide what is asked
            if counted:
                self.metrics.came()
            try:
                if secret:
                    self._admit(request)
                async with asyncio.timeout(self._settings.time_limit):
                    response = await answer(request)
                status, code = response.status_code, ""
            except (ClientDisconnect, _Gone):
                response = _plain(b"", "text/plain", status=GONE)  # for the log alone
            except asyncio.CancelledError:  # the server ends and waits no longer
                self.cut += 1
                words = "the server ends before this is decided"
                response, status, code = _refused(Refusal(503, "shutting_down", words)), 503, "shutting_down"
            except Exception as error:
                refusal = self._refusal(error)
                response, status, code = _refused(refusal), refusal.status, refusal.code
            finally:
                if counted:
                    self.metrics.went(path, status, time.monotonic() - started, code)
            return response

        return endpoint

    def _refusal(self, error: BaseException) -> Refusal:
        """What a client is told of `error`."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, QueueFull):
            words = f"{self._settings.queue} tasks are waiting already"
            return Refusal(429, "queue_full", words, headers={"retry-after": str(error.seconds)})
        if isinstance(error, TimeoutError):
            return Refusal(504, "time_limit", f"not decided within {self._settings.time_limit:g} s")
        if _upstream(error):
            return Refusal(502, "upstream", str(error))
        self._progress.warn(f"unexpected {type(error).__name__}: {error}")
        return Refusal(500, "internal", f"unexpected {type(error).__name__}")

    def _failure(self, error: BaseException) -> dict[str, Any]:
        """The same for one task of many, of which others were decided."""
        refusal = self._refusal(error)
        self.metrics.failed(refusal.code)
        return refusal.document()

    def _admit(self, request: Request) -> None:
        if self._token is None:
            # A page whose name its owner points at 127.0.0.1 is no other site to its reader's browser, which then asks
            # nobody before it sends anything. The name stays the page's own.
            if not _of_this_machine(request.headers.get("host", ""), self._settings.host):
                words = "without a token, only 127.0.0.1 and localhost are answered for, not another name in Host"
                raise Refusal(421, "wrong_host", words)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # In constant time: how long a comparison takes must not tell how much of a guess is right.
        if not hmac.compare_digest(given.strip().encode(), self._token) or scheme.lower() != "bearer":
            words = "wrong or missing token: send it as the API key (Authorization: Bearer ...)"
            raise Refusal(401, "invalid_api_key", words, headers={"www-authenticate": "Bearer"})

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A browser asks before it sends this type to another site: no page can make its reader pay a teacher.
            raise Refusal(415, "not_json", "send the body as Content-Type: application/json")
        most, body = self._settings.max_body, bytearray()
        too_large = Refusal(413, "too_large", f"the body has more than {most:,} bytes", headers={"connection": "close"})
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", "0")) > most:
                raise too_large
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
        return bytes(body)

    def _known(self, model: str) -> None:
        if model != self._settings.name:
            words = f"there is no model {model!r} here; it is called {self._settings.name!r}"
            raise Refusal(404, "model_not_found", words, "model")

    async def _decided(self, request: Request, tasks: Sequence[Task]) -> list[Prediction | BaseException]:
        """The tasks' rows, errors among them; where there is no row, the first error is raised."""
        if len(tasks) > self._settings.queue:
            raise Refusal(413, "too_many_tasks", f"{len(tasks)} tasks at once; {self._settings.queue} have a place")
        rows = await _unless_gone(request, self._through(tasks))
        decided = [row for row in rows if isinstance(row, Prediction)]
        for row in decided:
            self.metrics.decided(row)
        if not decided:
            raise next(row for row in rows if isinstance(row, BaseException))
        return rows

    async def _through(self, tasks: Sequence[Task]) -> list[Prediction | BaseException]:
        rows = await self._deciding.put(tasks)
        unsure = [
            (place, row) for place, row in enumerate(rows) if isinstance(row, Prediction) and self._office.unsure(row)
        ]
        if unsure:
            settled: Sequence[Prediction | BaseException]
            try:
                settled = await self._settling.put([(tasks[place], row) for place, row in unsure])
            except QueueFull as full:  # the sure ones are decided all the same
                settled = [full] * len(unsure)
            finally:
                self.metrics.paid(self._office.spent())
            for (place, _), row in zip(unsure, settled, strict=True):
                rows[place] = row
        return rows


class _Gone(Exception):
    """The client went away before its answer."""


Answer = Callable[["Request"], Coroutine[Any, Any, "Response"]]


def _upstream(error: object) -> bool:
    """Whether it is the word of the model server or the teacher behind us, and not a failure of our own model. What the
    fallback says of a server that gives no probabilities is a UsageError."""
    return isinstance(error, TeacherError | UsageError)


def _of_this_machine(host: str, bound: str) -> bool:
    """Whether a `Host` header names the loopback interface, or what the server was told to listen at; HTTP/1.0 has
    none."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if not host or name in ("localhost", bound.lower()):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False


async def _unless_gone(
    request: Request, answer: Coroutine[Any, Any, list[Prediction | BaseException]]
) -> list[Prediction | BaseException]:
    """What `answer` gives; it is given up, and _Gone raised, as soon as the client closes its connection.

    Only once the body is read: what is received after it can be nothing but the connection's end.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        for one in (working, watching):
            one.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return _plain(shapes.dumped(document), "application/json", headers, status)


def _plain(body: bytes, kind: str, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    from starlette.responses import Response

    # The header itself: given as `media_type`, a text's gets a charset that the type may have already.
    return Response(body, status, {**(headers or {}), "content-type": kind})


def _refused(refusal: Refusal) -> Response:
    return _json(refusal.document(), refusal.status, refusal.headers)
