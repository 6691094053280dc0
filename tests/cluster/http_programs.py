"""HTTP programs that pods of the tests run: a server that says what it was asked, and callers without end."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import socketserver
import sys
import threading
import time


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        said = {"name": os.environ.get("NAME", ""), "path": self.path, "headers": headers, "size": len(body)}
        text = json.dumps({**said, "peer": self.client_address[0]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def shutdown_request(self, request: object) -> None:
        super().shutdown_request(request)  # type: ignore[arg-type]


def serve(port: int) -> None:
    """Answer every request with what it was."""
    _Server(("", port), _Handler).serve_forever()


class _Caller:
    """Asks without end on connections kept alive, one of them only; counts what did not succeed."""

    def __init__(self, host: str, port: int, *, keep: bool) -> None:
        self.host, self.port, self.keep = host, port, keep
        self.done = 0
        self.failures: list[str] = []
        self.through: dict[str, int] = {}

    def run(self) -> None:
        connection: http.client.HTTPConnection | None = None
        while True:
            reused = connection is not None
            try:
                connection = connection or http.client.HTTPConnection(self.host, self.port, timeout=30)
                connection.request("GET", "/load")
                answer = connection.getresponse()
                said = json.loads(answer.read())
                if answer.status != 200:
                    raise OSError(f"status {answer.status}")
                way = "waypoint" if "x-request-id" in said["headers"] else "direct"
                self.through[way] = self.through.get(way, 0) + 1
                self.done += 1
                if not self.keep or answer.getheader("connection") == "close":
                    connection.close()
                    connection = None
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
                # A server may close an idle connection as a request is under way: HTTP lets clients ask
                # again on another (RFC 9112, 9.3.1), and all do.
                if not reused:
                    self.failures.append(repr(error))
                connection = None
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(repr(error))
                connection = None
            time.sleep(0.01)


def load(host: str, port: int) -> None:
    """Callers that keep their connections and callers that do not; prints the counts once a second."""
    callers = [_Caller(host, port, keep=keep) for keep in (True, True, False)]
    for caller in callers:
        threading.Thread(target=caller.run, daemon=True).start()
    while True:
        time.sleep(0.2)
        failures = [failure for caller in callers for failure in caller.failures]
        through = {way: sum(c.through.get(way, 0) for c in callers) for way in ("direct", "waypoint")}
        done = sum(caller.done for caller in callers)
        print(json.dumps({"done": done, "failed": len(failures), "last": failures[-3:], **through}), flush=True)


if __name__ == "__main__":
    {"serve": lambda: serve(int(sys.argv[2])), "load": lambda: load(sys.argv[2], int(sys.argv[3]))}[
        sys.argv[1]
    ]()
