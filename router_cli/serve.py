"""`router serve`: the decisions of `router infer` over HTTP, for as long as nobody ends it."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from router_cli import fallback
from router_cli.api import decide_each
from router_cli.backends import Backend, make_backend
from router_cli.backends.device import hand_back, keep_few_kernels
from router_cli.errors import UsageError
from router_cli.fallback import Fallback, make_fallback
from router_cli.labelling.estimate import Confirm
from router_cli.progress import SILENT, Progress
from router_cli.schema import Prediction, Task
from router_cli.serving.app import Office, Service, Unsure
from router_cli.settings import Settings
from router_cli.tasks import OWN_TASKS, read_tasks

Decide = Callable[[Sequence[Task]], list[Prediction | BaseException]]

if TYPE_CHECKING:
    import uvicorn

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than clients keep theirs, or one would write to a closed one."""

BACKLOG = 2048
"""Connections that the system holds until they are accepted, where it allows as many."""


@dataclass(frozen=True)
class ServeResult:
    """What a server did until it was ended: requests answered, refused, given up by their clients (`gone`) and cut off
    by the end; decisions given, how many of them by a fallback or by nobody, and the US dollars that its answers cost
    (None: unknown)."""

    answered: int
    refused: int
    gone: int
    cut: int
    decisions: int
    fallbacks: int
    fallback_dollars: float | None
    seconds: float


def serve(settings: Settings, progress: Progress = SILENT, confirm: Confirm | None = None) -> ServeResult:
    """Answer at `serve.host` and `serve.port` until SIGTERM or Ctrl-C; what is in flight then is answered.

    `confirm` is asked before a fallback is to be paid. Raises UsageError for options that do not go together, an
    address that others can reach without a token, or one that is taken; ModelError for the model.
    """
    falls_back = fallback.check(settings)
    if falls_back and settings.infer.backend == "heuristic":
        raise UsageError("--backend heuristic gives no probability to be compared: leave --fallback off")
    keep_few_kernels()
    # The address is taken before a model is loaded for minutes, but nobody can connect until it is.
    with _bound(settings) as listening, ExitStack() as stack:
        unsure = None
        if falls_back:
            priced = list(islice(read_tasks([OWN_TASKS]), fallback.PRICED))
            unsure = make_fallback(settings, priced, None, progress, confirm)
        backend = make_backend(settings, progress)
        stack.callback(backend.close)
        if settings.infer.backend == "local":
            # What is computed but once is not for the first client to wait for.
            backend.decide(["Sort a list of integers"])
        service = Service(office(backend, unsure, settings), settings.serve, progress)
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        started = time.monotonic()
        with _logging_to(progress), _signals_survived():
            listening.listen(BACKLOG)  # whoever reads the next line may connect at once
            progress.notice(f"{backend.model_name} at {url}, model {settings.serve.name}; Ctrl-C ends it")
            server_of(service, settings).run(sockets=[listening])
    counts = service.metrics
    return ServeResult(
        counts.answered,
        counts.refused,
        counts.gone,
        service.cut,
        counts.given,
        counts.fallbacks,
        unsure.usage.cost_usd if unsure else 0.0,
        time.monotonic() - started,
    )


def server_of(service: Service, settings: Settings) -> uvicorn.Server:
    """The HTTP server around a service; it says nothing, and adds nothing to what the service answers."""
    import uvicorn

    config = uvicorn.Config(
        service.app(),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=settings.serve.drain,
    )
    return uvicorn.Server(config)


def office(backend: Backend, unsure: Fallback | None, settings: Settings) -> Office:
    """Who decides for a server: the backend, and `unsure` where it is not sure enough."""
    decide = _tidied(partial(decide_each, backend))
    # A server behind makes batches of its own: each task goes to it alone, so that none waits for another's answer.
    most, at_once = (1, settings.label.concurrency) if backend.name == "remote" else (settings.infer.batch_size, 1)
    if unsure is None:
        return Office(backend.space, decide, most, at_once=at_once)

    def below(row: Prediction) -> bool:
        return row.probability is None or row.probability < unsure.threshold

    return Office(
        backend.space,
        decide,
        most,
        settle=partial(_settle, unsure),
        unsure=below,
        most_unsure=settings.label.concurrency,
        spent=lambda: unsure.usage.cost_usd or 0.0,
        close=lambda: unsure.__exit__(None, None, None),
        at_once=at_once,
    )


HAND_BACK_SECONDS = 10.0
"""How often a server gives freed memory back; doing so takes some tens of milliseconds."""


def _tidied(decide: Decide) -> Decide:
    """`decide`, and every `HAND_BACK_SECONDS` what it has freed goes back to the system."""
    last = time.monotonic()

    def tidied(tasks: Sequence[Task]) -> list[Prediction | BaseException]:
        nonlocal last
        found = decide(tasks)
        if time.monotonic() - last >= HAND_BACK_SECONDS:
            hand_back()
            last = time.monotonic()
        return found

    return tidied


def _settle(unsure: Fallback, given: Sequence[Unsure]) -> list[Prediction | BaseException]:
    return list(unsure.outcomes([task for task, _ in given], [row for _, row in given]))


@contextmanager
def _bound(settings: Settings) -> Iterator[socket.socket]:
    """A socket at the address, not yet listening. Raises UsageError where it cannot be had, or not without a token."""
    wanted = settings.serve
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(wanted.host, wanted.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--host {wanted.host}: is no address of this machine ({error.strerror})") from None
    if wanted.token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UsageError(
            f"--host {wanted.host}: others could reach it: set a token in ROUTER_SERVE__TOKEN, which clients send as "
            "their API key, or listen at 127.0.0.1"
        )
    with socket.socket(family) as listening:
        if os.name == "posix":  # elsewhere it would share the port with another program
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            words = f"{wanted.host}:{wanted.port} cannot be listened at ({(error.strerror or str(error)).lower()})"
            raise UsageError(f"{words}: choose another --port (0 takes a free one) or --host") from None
        yield listening


@contextmanager
def _signals_survived() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the server, not the program: uvicorn raises them again when it is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, lambda *what: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class _ToProgress(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.ERROR)  # below it: every stranger's broken request
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.warn(record.getMessage())


@contextmanager
def _logging_to(progress: Progress) -> Iterator[None]:
    """Hand uvicorn's errors on: without any handler Python writes them to the terminal itself."""
    logger, handler = logging.getLogger("uvicorn.error"), _ToProgress(progress)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
