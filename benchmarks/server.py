"""A quick teacher for benchmarks, in a process of its own: `python -m benchmarks.server --latency 0.5`.

It speaks just enough HTTP for a chat completion, costs some 0.1 ms of CPU a request, prints its base URL when it is
ready, and ends when its standard input does. `--rpm` limits it by a token bucket that holds `--burst` seconds' worth;
with `--tell` every response says so in x-ratelimit-* headers, with `--retry-after` a 429 says how long to wait.
GET /stats tells what was answered and turned away, and when; POST /reset forgets it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from typing import Any

DECISION = '{"topology":"single","roles":["builder"],"manager_role":null,"entry_role":"builder","max_steps":1}'


class Limit:
    """A token bucket; `rpm` None lets everything through."""

    def __init__(self, rpm: float | None, burst: float) -> None:
        self.rate = rpm / 60 if rpm else None
        self.size = max(1.0, (self.rate or 0) * burst)
        self.level, self.at = self.size, time.monotonic()

    def take(self) -> bool:
        if self.rate is None:
            return True
        now = time.monotonic()
        self.level = min(self.size, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


class Server:
    """What all connections share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.reset()

    def reset(self) -> None:
        self.limit = Limit(self.options.rpm, self.options.burst)
        self.stats: dict[str, Any] = {"answered": 0, "rejected": 0, "first": None, "last": None, "inflight": 0}
        self.stats |= {"peak": 0, "slots": []}

    def chat(self, reply: Any) -> None:
        """Answer one chat completion after the latency, or turn it away at once."""
        stats, limit = self.stats, self.limit
        now = time.monotonic()
        stats["first"] = stats["first"] or now
        headers = ""
        passed = limit.take()
        if self.options.tell and limit.rate is not None:
            full = (limit.size - limit.level) / limit.rate
            headers = (
                f"x-ratelimit-limit-requests: {self.options.rpm:g}\r\n"
                f"x-ratelimit-remaining-requests: {int(limit.level)}\r\n"
                f"x-ratelimit-reset-requests: {full * 1000:.0f}ms\r\n"
            )
        if not passed:
            stats["rejected"] += 1
            if self.options.retry_after:
                headers += f"Retry-After: {math.ceil((1 - limit.level) / limit.rate)}\r\n"
            reply(429, '{"error":{"message":"Rate limit reached","code":"rate_limit_exceeded"}}', headers)
            return
        stats["inflight"] += 1
        stats["peak"] = max(stats["peak"], stats["inflight"])
        asyncio.get_running_loop().call_later(self.options.latency, self.finish, reply, headers)

    def finish(self, reply: Any, headers: str) -> None:
        stats = self.stats
        stats["inflight"] -= 1
        stats["answered"] += 1
        stats["last"] = time.monotonic()
        message = {"role": "assistant", "content": DECISION}
        body = {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "gpt-4o-2024-08-06",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 700, "completion_tokens": 40, "total_tokens": 740},
        }
        reply(200, json.dumps(body), headers)


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests are not pipelined."""

    def __init__(self, server: Server) -> None:
        self.server, self.buffer = server, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            if head.startswith(b"get /stats"):
                self.reply(200, json.dumps(self.server.stats))
            elif head.startswith(b"post /reset"):
                self.server.reset()
                self.reply(200, "{}")
            else:
                self.server.chat(self.reply)

    def reply(self, status: int, body: str, headers: str = "") -> None:
        if not self.transport.is_closing():
            head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}{headers}\r\n{body}".encode())


async def serve(options: argparse.Namespace) -> None:
    server = Server(options)
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--rpm", type=float)
    parser.add_argument("--burst", type=float, default=1.0)
    parser.add_argument("--tell", action="store_true")
    parser.add_argument("--retry-after", action="store_true")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
