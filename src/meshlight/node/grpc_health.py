"""The gRPC health protocol's `Check`, as a kubelet's `grpc` probe asks it: one call on a connection of its own.

`Call` is pure (bytes in, bytes out); the messages are small enough to be written by hand.
"""

from __future__ import annotations

import asyncio

import h2.config
import h2.connection
import h2.events

_PATH = "/grpc.health.v1.Health/Check"
_STATES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
_UNIMPLEMENTED, _NOT_FOUND = "12", "5"
_LIMIT = 1 << 16


class Call:
    """One unary call: `send` at first, then `receive` until `done`."""

    def __init__(self, authority: str, service: str) -> None:
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._authority, self._service = authority, service
        self._body = b""
        self._headers: dict[str, str] = {}
        self.done = False

    def send(self) -> bytes:
        """What opens the connection and asks."""
        self._http.initiate_connection()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", _PATH),
            (":authority", self._authority),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("user-agent", "kube-probe/1.32"),
        ]
        name = self._service.encode()
        message = b"\x0a" + _varint(len(name)) + name if name else b""
        self._http.send_headers(1, headers)
        self._http.send_data(1, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        return self._http.data_to_send()

    def receive(self, received: bytes) -> bytes:
        """Take bytes in; what is to be sent in return. Raises ValueError for what is not HTTP/2."""
        try:
            events = self._http.receive_data(received)
        except h2.exceptions.ProtocolError as error:
            raise ValueError(f"not HTTP/2: {error}") from error
        for event in events:
            if isinstance(event, h2.events.DataReceived):
                self._body = (self._body + (event.data or b""))[:_LIMIT]
                self._http.acknowledge_received_data(event.flow_controlled_length or 0, 1)
            elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                self._headers.update({str(k): str(v) for k, v in event.headers or []})
            elif isinstance(
                event, h2.events.StreamEnded | h2.events.StreamReset | h2.events.ConnectionTerminated
            ):
                self.done = True
        return self._http.data_to_send()

    def verdict(self) -> str:
        """Why the service is not well, in the kubelet's words; empty when it is."""
        status = self._headers.get("grpc-status")
        if status == _UNIMPLEMENTED:
            return "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)"
        if status == _NOT_FOUND:
            return f'error: health rpc probe failed: service "{self._service}" is unknown'
        if status not in (None, "0"):
            return f"error: health rpc probe failed: {self._headers.get('grpc-message') or status}"
        if status is None and not self._body:
            return "error: health rpc probe failed: no gRPC answer"
        message = self._body[5:]
        state = message[1] if len(message) > 1 and message[0] == 8 else 0
        return "" if state == 1 else f'service unhealthy (responded with "{_STATES.get(state, str(state))}")'


def _varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


async def check(host: str, port: int, service: str) -> str:
    """Ask; why the service is not well, or an empty string. Raises OSError, ValueError."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        call = Call(f"{host}:{port}", service)
        writer.write(call.send())
        while not call.done:
            received = await reader.read(65536)
            if not received:
                break
            writer.write(call.receive(received))
        return call.verdict()
    finally:
        writer.close()
