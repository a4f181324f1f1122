"""A model hub on this machine: the few answers of the Hub's API that its client asks for, from a real HTTP server."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class FakeHub:
    """Serves the folder of one model as `org/tiny`; half way into model.safetensors it hangs up `cuts` times."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.cuts = 0
        self.ranges: list[str] = []
        self.sent: list[str] = []
        self.url = ""

    def api(self, path: str) -> Any:
        if "/tree/" in path:
            return [self._described(name) for name in self.files]
        siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
        return {"id": "org/tiny", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}

    def _described(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": etag(self.files[name])}


def etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub at `hub.url` while open."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._file(self.path.split("?")[0].rpartition("/")[2], b"")

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/api/models/org/tiny"):
                body = json.dumps(hub.api(path)).encode()
                self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
                self.wfile.write(body)
            elif path.startswith("/org/tiny/resolve/"):
                name = path.rpartition("/")[2]
                self._file(name, hub.files.get(name, b""))
            else:
                self._head(404, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

        def _file(self, name: str, body: bytes) -> None:
            if name not in hub.files:
                self._head(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT, "Content-Length": "0"})
                return
            whole, start, status = hub.files[name], 0, 200
            headers = {"ETag": f'"{etag(whole)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if body:
                hub.sent.append(name)
            if body and (asked := self.headers.get("Range")):
                hub.ranges.append(asked)
                start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
            self._head(status, {**headers, "Content-Length": str(len(whole) - start)})
            end = len(body)
            if body and name == "model.safetensors" and hub.cuts:
                hub.cuts -= 1
                end = max(start, end // 2)
                self.close_connection = True
            self.wfile.write(body[start:end])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
