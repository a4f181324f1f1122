"""A teacher for tests: a real HTTP server on the loopback interface, of the OpenAI chat-completions shape.

It answers every task with a valid decision, unless told otherwise: `FakeTeacher(Reply(status=429), Reply("{}"))`
serves those replies first, and `behave=` is a function from each call to a reply (None: the valid decision). The ledger
`calls` keeps every request with what became of it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        return next(m["content"] for m in self.messages if m["role"] == "user").removeprefix("Task: ")

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


class FakeTeacher:
    """The server, running between `with` and the block's end; `url` is its base URL."""

    def __init__(self, *replies: Reply, behave: Callable[[Call], Reply | None] | None = None, delay: float = 0.0):
        self.calls: list[Call] = []
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

    def _take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[Call, Reply]:
        with self._lock:
            call = Call(len(self.calls), time.monotonic(), path, headers, body)
            self.calls.append(call)
            reply = self._replies.pop(0) if self._replies else None
        if reply is None and self._behave is not None:
            reply = self._behave(call)
        reply = reply or Reply()
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
