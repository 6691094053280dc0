"""From a request's body to durable spans: the one way in, whatever the protocol and transport.

Answers are outcomes, which each transport spells in its own codes.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass

from meshlight.tracing.decoding import Decoded, Decoder, Malformed, decoders
from meshlight.tracing.measures import Measures
from meshlight.tracing.storage import TraceStore
from meshlight.tracing.store.collection import Busy, Unwritable
from meshlight.tracing.store.log import Payload

MAX_BODY = 32 << 20
"""Bytes of a request, unpacked."""


class TooLarge(Exception):
    """A body beyond MAX_BODY."""


class Refused(Exception):
    """Nothing was kept; the sender should try again after `retry_after` seconds. `full`: the disk is."""

    def __init__(self, message: str, retry_after: int, full: bool) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.full = full


@dataclass(slots=True)
class Intake:
    """Decodes, stores and counts."""

    store: TraceStore
    measures: Measures

    async def take(self, protocol: str, transport: str, body: bytes) -> Decoded:
        """Keep the records of a body. Raises Malformed, TooLarge, Refused."""
        if len(body) > MAX_BODY:
            raise TooLarge(f"the body has {len(body)} bytes; {MAX_BODY} are the limit: send smaller batches")
        decoder = decoders()[protocol]
        receiver = protocol.partition("-")[0]
        try:
            decoded = await self._decode(decoder, body)
        except Malformed:
            self.measures.malformed.labels(receiver).inc()
            raise
        if decoded.rejected:
            self.measures.rejected.labels(receiver).inc(decoded.rejected)
        logs = "logs" in protocol
        try:
            add = self.store.add_flows if logs else self.store.add_spans
            await add(decoded.rows, Payload(protocol, body))
        except (Busy, Unwritable) as error:
            self.measures.refused.labels(receiver, transport).inc(len(decoded.rows))
            raise Refused(str(error), error.retry_after, isinstance(error, Unwritable)) from None
        (self.measures.logs if logs else self.measures.accepted).labels(receiver, transport).inc(
            len(decoded.rows)
        )
        return decoded

    async def _decode(self, decoder: Decoder, body: bytes) -> Decoded:
        # A large body would hold the event loop for too long: a thread shares the interpreter fairly.
        if len(body) > 1 << 20:
            return await asyncio.to_thread(decoder, body)
        return decoder(body)


def unpacked(body: bytes, encoding: str) -> bytes:
    """A body without its Content-Encoding. Raises Malformed, TooLarge."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Malformed(f"Content-Encoding {encoding!r} is unknown: send gzip, deflate or none")
    unpacker = zlib.decompressobj(wbits=47)
    try:
        plain = unpacker.decompress(body, MAX_BODY + 1)
    except zlib.error as error:
        raise Malformed(f"the body is not {encoding}: {error}") from None
    if len(plain) > MAX_BODY:
        raise TooLarge(f"the unpacked body has more than {MAX_BODY} bytes: send smaller batches")
    if not unpacker.eof:
        raise Malformed(f"the {encoding} body ends too early")
    return plain
