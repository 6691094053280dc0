"""Servers on loopback that say who they are and what they were asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Backend(ThreadingHTTPServer):
    """Answers with its name and the request; `x-answer` asks for a status, `x-fail-first` for one refusal."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.seen: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Backend)
        first = self.path not in server.seen
        server.seen.append(self.path)
        status = int(self.headers.get("x-answer", "200"))
        if self.headers.get("x-fail-first") and first:
            status = int(self.headers["x-fail-first"])
        if self.headers.get("x-sleep"):
            threading.Event().wait(float(self.headers["x-sleep"]))
        headers = {k.lower(): ",".join(self.headers.get_all(k) or []) for k in self.headers}
        body = {"backend": server.name, "path": self.path, "method": self.command, "headers": headers}
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.send_header("x-from", server.name)
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_PUT = do_DELETE = do_OPTIONS = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(*names: str) -> Iterator[dict[str, Backend]]:
    """Backends of these names."""
    servers = {name: Backend(name) for name in names}
    for server in servers.values():
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers.values():
            server.shutdown()
            server.server_close()
