"""A server of `router serve` in a thread of the test, and a backend that decides when it is told to."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from router_cli.backends import Backend, Choice
from router_cli.errors import TeacherError
from router_cli.fallback import Fallback
from router_cli.schema import Topology
from router_cli.serve import office, server_of
from router_cli.serving.app import Service
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.teachers import heuristic
from tests.training import Recorder

PATIENCE = 300
"""Seconds after which a test that hangs is given up."""

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))


class Gated:
    """Decides by the rules, with made-up probabilities, as long as `open` is set; remembers its batches.

    `sure` is the share of the chosen topology. `broken` in a text is a model that fails, `refused` a server that does;
    `error` is what every text makes it raise.
    """

    name = "gated"
    model_name = "gated"
    space = SPACE

    def __init__(self, sure: Callable[[str], float] = lambda text: 0.7) -> None:
        self.open, self.batches, self._sure = threading.Event(), list[list[str]](), sure
        self.open.set()
        self.error: Exception | None = None

    def decide(self, texts: Sequence[str]) -> list[Choice]:
        self.batches.append(list(texts))
        assert self.open.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        if any("broken" in text for text in texts):
            raise RuntimeError("out of memory")
        if any("refused" in text for text in texts):
            raise TeacherError("the server has no such model")
        return [self._choice(text) for text in texts]

    def close(self) -> None:
        self.open.set()

    def _choice(self, text: str) -> Choice:
        decision, _ = heuristic.decide(text, SPACE)
        rest = (1 - self._sure(text)) / 3
        shares: dict[Topology, float] = dict.fromkeys(SPACE.topologies, rest)
        return Choice(decision, {**shares, decision.topology: self._sure(text)}, 1.0)


def settings(**values: Any) -> Settings:
    """Settings of `serve.*`, or of another section as `infer__batch_size`."""
    chosen = {key.replace("__", ".") if "__" in key else f"serve.{key}": value for key, value in values.items()}
    return load({key: ("test", value) for key, value in chosen.items()}, environ={})


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    service: Service
    said: Recorder

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def waiting(self) -> int:
        return int(self.metric("router_queue_depth"))

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics, read with Prometheus's own parser; 0 where there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        page = self.service.metrics.page()[0].decode()
        samples = [one for family in text_string_to_metric_families(page) for one in family.samples]
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    def get(self, path: str, **headers: str) -> Answer:
        return ask(self.url + path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return ask(self.url + path, body, headers)

    def later(self, path: str, body: Any) -> Later:
        """The same in a thread of its own."""
        return Later(lambda: self.post(path, body))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def code(self) -> str | None:
        """The error's code."""
        found: str = self.json["error"]["code"]
        return found


class Later:
    """An answer that is waited for in a thread; `get` raises the OSError of a connection that broke."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        self._call, self._found = call, list[Answer | OSError]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._call())
        except OSError as error:
            self._found.append(error)

    def get(self) -> Answer:
        self._thread.join(PATIENCE)
        [found] = self._found
        if isinstance(found, OSError):
            raise found
        return found


def ask(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    """One request; `body` is sent as JSON, or as it is where it is bytes."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {
        "Content-Type": "application/json",
        **{key.replace("_", "-"): value for key, value in (headers or {}).items()},
    }
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, given), timeout=PATIENCE) as answer:
            return Answer(answer.status, dict(answer.headers.items()), answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers.items()), error.read().decode())


def until(true: Callable[[], bool]) -> None:
    """Wait until something is so: a minute of looking, by no clock, which runs on where a busy machine halts us."""
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to be so")


@contextmanager
def serving(backend: Backend, unsure: Fallback | None = None, **values: Any) -> Iterator[Served]:
    """A server with this backend, on a free port of the loopback interface."""
    chosen, said = settings(**values), Recorder()
    service = Service(office(backend, unsure, chosen), chosen.serve, said)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = server_of(service, chosen)
        thread = threading.Thread(target=lambda: server.run([listening]), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service, said)
        finally:
            backend.close()
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()
