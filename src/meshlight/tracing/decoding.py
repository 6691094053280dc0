"""The table of decoders, and what they share: a body in, rows out, wrong input a clear error.

Pure. The names are also written into the log (`store/log.py`), so they never change meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meshlight.tracing.rows import Row
from meshlight.tracing.store.log import Payload

MAX_ATTRIBUTE = 64 << 10
"""Bytes of an attribute that are kept; the rest is cut, with a tag that says so."""
MAX_TIME = (1 << 63) - 1


class Malformed(ValueError):
    """A body that is not what its protocol says; the message names the place. Answered with 400."""


@dataclass(slots=True)
class Decoded:
    """Rows of a request. `rejected` counts records that could not be kept, `message` says why."""

    rows: list[Row] = field(default_factory=list)
    rejected: int = 0
    message: str = ""

    def reject(self, reason: str) -> None:
        """Leave one record out."""
        self.rejected += 1
        self.message = self.message or reason


Decoder = Callable[[bytes], Decoded]


def decoders() -> dict[str, Decoder]:
    """Every decoder by the name under which payloads are logged."""
    from meshlight.tracing import jaeger_json, jaeger_proto, jaeger_thrift, otlp, otlp_json, zipkin

    return {
        "otlp": otlp.decode_traces,
        "otlp-json": otlp_json.decode_traces,
        "otlp-logs": otlp.decode_logs,
        "otlp-logs-json": otlp_json.decode_logs,
        "zipkin-json": zipkin.decode_json,
        "zipkin-v1": zipkin.decode_v1,
        "zipkin-proto": zipkin.decode_proto,
        "jaeger-proto": jaeger_proto.decode_batch,
        "jaeger-thrift": jaeger_thrift.decode_batch,
        "jaeger-json": jaeger_json.decode,
    }


def decode(payload: Payload) -> Sequence[Row]:
    """Rows of a logged payload. Raises ValueError when no decoder has its name."""
    try:
        decoder = decoders()[payload.protocol]
    except KeyError:
        raise ValueError(f"no decoder is called {payload.protocol!r}: a newer version wrote this log") from None
    return decoder(payload.body).rows
