"""Logs of the tracing server: one JSON object a line on stderr."""

from __future__ import annotations

import datetime
import sys

import orjson


def report(message: str, level: str = "warn", **fields: object) -> None:
    """Write an event; the message is constant, what varies is in the fields."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    line = {"level": level, "ts": now, "msg": message, **fields}
    print(orjson.dumps(line, default=str).decode(), file=sys.stderr, flush=True)
