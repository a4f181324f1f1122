"""A Batch API for tests: a real HTTP server on the loopback interface with OpenAI's /v1/files and /v1/batches.

It follows the API's documentation: files are uploaded as multipart forms, a batch is created in the state `validating`
and refused there (`failed`, with the lines' errors) or goes on to `in_progress`, `finalizing` and `completed`; answers
stand in an output file, refused and expired requests in an error file, both in another order than the input's. Every
look at a batch moves it one state on, so no test waits for a clock.

`behave` is a function from each request's call to a reply, as for `FakeTeacher`; a reply with `drop` leaves the request
unanswered, so that the batch expires. `watch` is told of every step ("upload", "uploaded", "create", "created", "list",
"poll", "download") and may answer with a reply that is sent instead. `ledger` is what the provider bills.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.fake_teacher import Call, Reply, decision

PRICE_IN, PRICE_OUT = 2.5, 10.0
"""US dollars for a million tokens at the online rate (gpt-4o); a batch costs half."""

EXPIRED = Reply(drop=True)


@dataclass(frozen=True)
class Paid:
    """One request that the provider answered and bills."""

    batch: str
    custom_id: str
    task: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def cost(self) -> float:
        return (self.prompt_tokens * PRICE_IN + self.completion_tokens * PRICE_OUT) / 2e6


@dataclass
class Batch:
    """One batch; `shown` is what the API says of it."""

    shown: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)


class FakeBatches:
    """The server, running between `with` and the block's end; `url` is its base URL."""

    def __init__(
        self,
        *,
        behave: Callable[[Call], Reply | None] | None = None,
        watch: Callable[[str], Reply | None] | None = None,
        most_requests: int = 50_000,
        most_bytes: int = 200_000_000,
        enqueued: int | None = None,
        still: bool = False,
    ) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Batch] = {}
        self.ledger: list[Paid] = []
        self.steps: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.still = still  # batches stay in progress while this is True
        self._behave, self._watch = behave, watch
        self._most_requests, self._most_bytes, self._enqueued = most_requests, most_bytes, enqueued
        self._lock, self._numbers = threading.RLock(), itertools.count(1)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> FakeBatches:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def paid(self) -> Counter[str]:
        """Task text -> how many answers the provider bills."""
        return Counter(one.task for one in self.ledger)

    @property
    def cost(self) -> float:
        """The provider's whole bill in US dollars."""
        return sum(one.cost for one in self.ledger)

    def cancel(self, batch: str) -> None:
        """Cancel a batch from outside, as its owner can at the provider's site."""
        self.batches[batch].shown["status"] = "cancelling"

    # -- the API ----------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        """Do what a request asks for; steps happen one at a time."""
        url = urlsplit(path)
        with self._lock:
            self.headers.append(headers)
            match method, url.path.strip("/").split("/")[1:]:
                case "POST", ["files"]:
                    return self._step("upload", lambda: self._upload(headers, body)) or self._told("uploaded")
                case "DELETE", ["files", name]:
                    return self._step("delete", lambda: self.files.pop(name, None) and {"id": name, "deleted": True})
                case "GET", ["files", name, "content"]:
                    return self._step("download", lambda: self.files.get(name))
                case "POST", ["batches"]:
                    return self._step("create", lambda: self._create(json.loads(body)))
                case "GET", ["batches"]:
                    return self._step("list", lambda: self._list(parse_qs(url.query)))
                case "GET", ["batches", name]:
                    return self._step("poll", lambda: self._poll(name))
        return _error(404, f"Unknown request URL: {method} {url.path}")

    def _told(self, step: str) -> Any:
        self.steps.append(step)
        return self._watch(step) if self._watch else None

    def _step(self, step: str, act: Callable[[], Any]) -> Reply:
        instead = self._told(step)
        if instead is not None:
            return instead
        done = act()
        if isinstance(done, Reply):
            return done
        if done is None:
            return _error(404, "No such object")
        lost = self._told(f"{step}d".replace("uploadd", "uploaded")) if step in ("upload", "create") else None
        return lost or Reply(body=done if isinstance(done, bytes) else json.dumps(done).encode())

    def _upload(self, headers: dict[str, str], body: bytes) -> Any:
        form = BytesParser(policy=HTTP).parsebytes(
            b"Content-Type: " + headers["content-type"].encode() + b"\n\n" + body
        )
        parts = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        if parts["purpose"].get_content().strip() != "batch":
            return _error(400, "Invalid purpose")
        content = parts["file"].get_payload(decode=True)
        if not str(parts["file"].get_filename()).endswith(".jsonl"):
            return _error(400, "Invalid file format for Batch API. Must be .jsonl")
        if len(content) > self._most_bytes:
            return _error(400, "File is too large.")
        name = f"file-{next(self._numbers)}"
        self.files[name] = content
        return {"id": name, "object": "file", "bytes": len(content), "purpose": "batch", "status": "processed"}

    def _create(self, wanted: dict[str, Any]) -> Any:
        if wanted["endpoint"] != "/v1/chat/completions" or wanted["completion_window"] != "24h":
            return _error(400, "Invalid endpoint or completion_window")
        if any(len(str(value)) > 512 for value in (wanted.get("metadata") or {}).values()):
            return _error(400, "Metadata values are limited to 512 characters")
        name = f"batch_{next(self._numbers)}"
        shown = {
            "id": name,
            "object": "batch",
            "endpoint": wanted["endpoint"],
            "completion_window": "24h",
            "created_at": 1_700_000_000 + len(self.batches),
            "input_file_id": wanted["input_file_id"],
            "metadata": wanted.get("metadata"),
            "status": "validating",
            "errors": None,
            "output_file_id": None,
            "error_file_id": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        self.batches[name] = Batch(shown)
        return shown

    def _list(self, query: dict[str, list[str]]) -> dict[str, Any]:
        newest = [batch.shown for batch in reversed(self.batches.values())]
        if "after" in query:
            newest = newest[[one["id"] for one in newest].index(query["after"][0]) + 1 :]
        page = newest[: int(query.get("limit", ["20"])[0])]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        return {"object": "list", "data": page, "has_more": len(page) < len(newest), **ends}

    # -- the life of a batch ----------------------------------------------------------------------------------

    def _poll(self, name: str) -> dict[str, Any] | None:
        batch = self.batches.get(name)
        if batch is None:
            return None
        shown = batch.shown
        match shown["status"]:
            case "validating":
                errors = self._validate(batch)
                shown["status"] = "failed" if errors else "in_progress"
                shown["errors"] = {"object": "list", "data": errors} if errors else None
                shown["request_counts"]["total"] = 0 if errors else len(batch.lines)
            case "in_progress" if not self.still:
                shown["status"] = "finalizing"
            case "cancelling":
                self._execute(batch, answered=len(batch.lines) // 2)
                shown["status"] = "cancelled"
            case "finalizing":
                expired = self._execute(batch, answered=len(batch.lines))
                shown["status"] = "expired" if expired else "completed"
        return shown

    def _validate(self, batch: Batch) -> list[dict[str, Any]]:
        content = self.files.get(batch.shown["input_file_id"])
        if not content:
            return [_flaw("empty_file", "The batch input file is missing or empty.")]
        seen: set[str] = set()
        models: set[str] = set()
        for number, raw in enumerate(content.splitlines(), start=1):
            try:
                line = json.loads(raw)
                custom_id, body = line["custom_id"], line["body"]
                models.add(body["model"])
                assert body["messages"] and line["method"] == "POST"
            except (ValueError, LookupError, AssertionError, TypeError):
                return [_flaw("invalid_json_line", "This line is not parseable as valid JSON.", number)]
            if line["url"] != batch.shown["endpoint"]:
                return [_flaw("mismatched_url", "The URL must be the batch's endpoint.", number)]
            if custom_id in seen:
                return [_flaw("duplicate_custom_id", f"The custom_id {custom_id!r} stands here twice.", number)]
            seen.add(custom_id)
            batch.lines.append(line)
        if len(models) > 1:
            return [_flaw("mismatched_model", "All requests must be for the same model.")]
        if len(batch.lines) > self._most_requests:
            return [_flaw("too_many_tasks", f"The batch has more than {self._most_requests} requests.")]
        busy = sum(len(one.lines) for one in self.batches.values() if one.shown["status"] in ("in_progress",))
        if self._enqueued is not None and busy + len(batch.lines) > self._enqueued:
            batch.lines.clear()
            said = (
                f"Enqueued token limit reached. Limit: {self._enqueued}. Please try again once some batches are done."
            )
            return [_flaw("token_limit_exceeded", said)]
        return []

    def _execute(self, batch: Batch, answered: int) -> bool:
        """Answer the first `answered` requests of a batch and write its files; whether requests expired."""
        good, bad, expired = [], [], False
        for place, line in enumerate(batch.lines):
            call = Call(place, 0.0, "/v1/chat/completions", {}, line["body"])
            reply = (self._behave(call) if self._behave else None) or Reply()
            result: dict[str, Any] = {"id": f"batch_req_{next(self._numbers)}", "custom_id": line["custom_id"]}
            if reply.drop or place >= answered:
                code = "batch_expired" if place < answered else "batch_cancelled"
                expired |= place < answered
                bad.append({**result, "response": None, "error": {"code": code, "message": "not executed in time"}})
                continue
            body = _body(call, reply, result["id"])
            response = {"status_code": reply.status, "request_id": f"req_{place}", "body": body}
            (good if reply.status == 200 else bad).append({**result, "response": response, "error": None})
            if reply.status == 200:
                usage = reply.usage or {"prompt_tokens": 0, "completion_tokens": 0}
                self.ledger.append(Paid(batch.shown["id"], line["custom_id"], call.task, **usage))
        shown = batch.shown
        shown["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        shown["output_file_id"] = self._file(good)
        shown["error_file_id"] = self._file(bad)
        return expired

    def _file(self, lines: list[dict[str, Any]]) -> str | None:
        if not lines:
            return None
        name = f"file-{next(self._numbers)}"
        self.files[name] = "".join(json.dumps(line) + "\n" for line in reversed(lines)).encode()
        return name


def _body(call: Call, reply: Reply, name: str) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": reply.error if reply.error is not None else {"message": "scripted fault"}}
    content = decision(call.task, call.roles) if reply.content is None and reply.refusal is None else reply.content
    message = {"role": "assistant", "content": content, "refusal": reply.refusal}
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    whole = {"id": name, "object": "chat.completion", "model": reply.model, "choices": [choice]}
    return whole if reply.usage is None else {**whole, "usage": reply.usage}


def _flaw(code: str, message: str, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": None}


def _error(status: int, message: str) -> Reply:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Reply(status=status, body=json.dumps({"error": error}).encode())


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error here."""


def _handler(server: FakeBatches) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def serve(self) -> None:
            body = b"".join(_received(self))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = server.answer(self.command, self.path, headers, body)
            if reply.drop:
                self.close_connection = True
                return
            content = reply.body if reply.body is not None else json.dumps({"error": reply.error or {}}).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = serve

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    return Handler


def _received(handler: BaseHTTPRequestHandler) -> Iterator[bytes]:
    """The request's body, which a client that streams from disk may send in chunks."""
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        yield handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        return
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        yield handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
