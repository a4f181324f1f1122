"""A teacher for tests: a real HTTP server on the loopback interface, of the OpenAI chat-completions shape.

It answers every task with a valid decision, unless told otherwise: `FakeTeacher(Reply(status=429), Reply("{}"))`
serves those replies first, and `behave=` is a function from each call to a reply (None: the valid decision); a `Storm`
is such a function. `calls` keeps every request with what became of it, `ledger` what a provider would bill for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Call:
    """One request as it came (header names in lower case), and its status (0: in flight, or dropped)."""

    number: int
    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    status: int = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.body["messages"]

    @property
    def task(self) -> str:
        """The text of the task asked about."""
        # Few-shot examples are asked before it, invalid answers are handed back after it.
        asked = [m["content"] for m in self.messages if m["role"] == "user" and m["content"].startswith("Task: ")]
        return asked[-1].removeprefix("Task: ")

    @property
    def turn(self) -> int:
        """How many invalid answers to the task are handed back with it."""
        return sum(m["role"] == "user" and m["content"].startswith("That decision is not") for m in self.messages)

    @property
    def roles(self) -> list[str]:
        found = re.search(r"roles: ([^.\n]*)", self.messages[0]["content"])
        return [role.strip() for role in found[1].split(",")] if found else ["builder"]


@dataclass(frozen=True)
class Reply:
    """What to answer. Without `content` and `error`, a status of 200 brings the valid decision."""

    content: Any = None
    status: int = 200
    error: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    refusal: str | None = None
    usage: Mapping[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 400, "completion_tokens": 40})
    model: str = "teacher-1-2026"
    body: bytes | None = None
    delay: float = 0.0
    drop: bool = False


def decision(task: str, roles: list[str]) -> str:
    """A valid decision as text, the same for the same task: a chain for every third task, else single."""
    if len(roles) > 1 and sum(task.encode()) % 3 == 0:
        value = {"topology": "chain", "roles": roles[:2], "max_steps": 2}
    else:
        value = {"topology": "single", "roles": roles[:1], "max_steps": 1}
    return json.dumps({**value, "manager_role": None, "entry_role": roles[0]})


@dataclass(frozen=True)
class Billed:
    """One answer that is charged for, in US dollars; `lost` where it never reached who asked."""

    task: str
    prompt_tokens: int
    completion_tokens: int
    cost: float
    lost: bool = False


@dataclass
class Storm:
    """A `behave` that answers badly in every way, in these shares of the requests; the rest is valid.

    Everything follows from the seed, the task and how often it was asked about, whatever their order. What
    an answer says follows from the seed, the task and the turn alone: asked again after a kill, it says the same.
    `hang` is for how many seconds a hung request is held (then the connection is dropped), `retry_after` what every
    second 429 asks to wait, as a number or as a date.
    """

    seed: int = 0
    busy: float = 0.30
    down: float = 0.10
    reset: float = 0.05
    hung: float = 0.05
    broken: float = 0.10
    invalid: float = 0.05
    cut: float = 0.02
    hang: float = 30.0
    retry_after: float = 0.02
    _asked: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, call: Call) -> Reply:
        with self._lock:
            self._asked[call.task] += 1
            number = self._asked[call.task]
        drawn = self._draw("request", call.task, number)
        for kind in ("busy", "down", "reset", "hung", "cut"):
            drawn -= getattr(self, kind)
            if drawn < 0:
                return getattr(self, f"_{kind}")(call, number)
        usage = self._usage(call)
        drawn = self._draw("answer", call.task, call.turn)
        if drawn < self.broken:
            return Reply('{"topology": "single", "roles": [', usage=usage)
        if drawn < self.broken + self.invalid:
            return Reply('{"topology": "ring", "roles": ["builder"]}', usage=usage)
        return Reply(usage=usage)

    def _draw(self, *parts: object) -> float:
        return int.from_bytes(hashlib.sha256(repr((self.seed, *parts)).encode()).digest()[:6]) / 2**48

    def _usage(self, call: Call) -> dict[str, int]:
        prompt = sum(len(message["content"]) for message in call.messages) // 4
        return {"prompt_tokens": prompt, "completion_tokens": 30 + int(30 * self._draw("length", call.task, call.turn))}

    def _busy(self, call: Call, number: int) -> Reply:
        headers = {}
        if self._draw("told", call.task, number) < 0.5:
            headers = {"retry-after-ms": f"{self.retry_after * 1000:g}"}
            if number % 2:
                headers = {"Retry-After": format_datetime(datetime.now(UTC), usegmt=True)}
        return Reply(status=429, headers=headers)

    def _down(self, call: Call, number: int) -> Reply:
        return Reply(status=(500, 502, 503)[number % 3], body=b"<html>upstream is down</html>")

    def _reset(self, call: Call, number: int) -> Reply:
        return Reply(drop=True, usage=self._usage(call))

    def _hung(self, call: Call, number: int) -> Reply:
        return Reply(drop=True, delay=self.hang, usage=self._usage(call))

    def _cut(self, call: Call, number: int) -> Reply:
        limit = call.body.get("max_tokens", 1024)
        return Reply(
            '{"topology": "sin', finish_reason="length", usage={**self._usage(call), "completion_tokens": limit}
        )


class FakeTeacher:
    """The server, running between `with` and the block's end; `url` is its base URL.

    `prices` are US dollars for a million prompt and answer tokens (gpt-4o's). `bill_lost`: it charges for what
    it dropped too: with False it charges for what it answered, with True as much as any provider could.
    """

    def __init__(
        self,
        *replies: Reply,
        behave: Callable[[Call], Reply | None] | None = None,
        delay: float = 0.0,
        prices: tuple[float, float] = (2.5, 10.0),
        bill_lost: bool = False,
    ):
        self.calls: list[Call] = []
        self.ledger: list[Billed] = []
        self._prices, self._bill_lost = prices, bill_lost
        self._replies, self._behave, self._delay = list(replies), behave, delay
        self._lock, self._release = threading.Lock(), threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> FakeTeacher:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answered(self) -> Counter[str]:
        """Task text -> how often it was answered with 200, which is what a provider bills."""
        with self._lock:
            return Counter(call.task for call in self.calls if call.status == 200)

    @property
    def cost(self) -> float:
        """The bill so far, in US dollars."""
        with self._lock:
            return sum(billed.cost for billed in self.ledger)

    def _bill(self, call: Call, reply: Reply) -> None:
        if reply.usage is None or (reply.drop and not self._bill_lost):
            return
        prompt, completion = reply.usage["prompt_tokens"], reply.usage["completion_tokens"]
        cost = (prompt * self._prices[0] + completion * self._prices[1]) / 1e6
        with self._lock:
            self.ledger.append(Billed(call.task, prompt, completion, cost, reply.drop))

    def _take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[Call, Reply]:
        with self._lock:
            call = Call(len(self.calls), time.monotonic(), path, headers, body)
            self.calls.append(call)
            reply = self._replies.pop(0) if self._replies else None
        if reply is None and self._behave is not None:
            reply = self._behave(call)
        reply = reply or Reply()
        if reply.status == 200 and reply.error is None:
            self._bill(call, reply)
        self._release.wait(self._delay + reply.delay)
        return call, reply


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error here."""


def _handler(teacher: FakeTeacher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Header and body go out in two writes; with Nagle's algorithm each answer would wait for 40 ms.
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            call, reply = teacher._take(self.path, headers, body)
            if reply.drop:
                self.close_connection = True
                return
            call.status = reply.status
            content = reply.body if reply.body is not None else json.dumps(self.answer(call, reply)).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def answer(self, call: Call, reply: Reply) -> Any:
            if reply.status != 200 or reply.error is not None:
                return {"error": reply.error if reply.error is not None else {"message": "scripted fault"}}
            content = reply.content
            if content is None and reply.refusal is None:
                content = decision(call.task, call.roles)
            message = {"role": "assistant", "content": content, "refusal": reply.refusal}
            choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
            whole = {"id": f"c{call.number}", "object": "chat.completion", "model": reply.model, "choices": [choice]}
            return whole if reply.usage is None else {**whole, "usage": reply.usage}

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    return Handler
