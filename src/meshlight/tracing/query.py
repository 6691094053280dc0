"""What the query APIs have in common: parameters, ids, lists of services and operations."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from meshlight.tracing.storage import TraceStore
from meshlight.tracing.store.search import KINDS, Query

DEFAULT_LOOKBACK = 2 * 86400 * 10**9
MAX_LIMIT = 1500


class BadQuery(ValueError):
    """A parameter that cannot be understood; the message names it. Answered with 400."""


@dataclass(frozen=True, slots=True)
class Traces:
    """A store, asked the way APIs ask. `now` gives ns since the epoch."""

    store: TraceStore
    now: Callable[[], int] = time.time_ns

    async def services(self) -> list[str]:
        """Names of services, sorted."""
        return sorted({service for service, _, _ in await self.store.operations()})

    async def operations(self, service: str, kind: int | None = None) -> list[tuple[str, int]]:
        """Operations of a service with their kinds, sorted."""
        found = await self.store.operations()
        return sorted({(name, k) for of, name, k in found if of == service and kind in (None, k)})


def parse_trace_id(text: str) -> bytes | None:
    """A trace id from 1 to 32 hexadecimal digits, padded; None when it is none."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,32}", text):
        return None
    return bytes.fromhex(text.zfill(32))


_UNITS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}


def parse_duration(text: str, name: str) -> int:
    """Ns of a duration as Go writes it (`1.2ms`, `1h5m`). Raises BadQuery."""
    found = re.findall(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", text)
    if not found or "".join(number + unit for number, unit in found) != text:
        raise BadQuery(f"{name} {text!r} is no duration: write it as 1.2ms, 500us or 3s")
    return int(sum(float(number) * _UNITS[unit] for number, unit in found))


def number(parameters: Mapping[str, str], name: str, default: int) -> int:
    """An integer parameter. Raises BadQuery."""
    text = parameters.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise BadQuery(f"{name} {text!r} is no integer") from None


def parse_tags(parameters: Any) -> tuple[tuple[str, str], ...]:
    """Tags of `tag=k:v` (repeated) and `tags={json}`. Raises BadQuery."""
    tags: dict[str, str] = {}
    for pair in parameters.getall("tag", []):
        key, colon, value = pair.partition(":")
        if not colon or not key:
            raise BadQuery(f"malformed 'tag' parameter, expecting key:value, received: {pair}")
        tags[key] = value
    for text in parameters.getall("tags", []):
        if not text:
            continue
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError:
            raise BadQuery(f"malformed 'tags' parameter, cannot unmarshal JSON: {text[:200]}") from None
        if not isinstance(found, dict) or not all(
            isinstance(v, (str, int, float, bool)) for v in found.values()
        ):
            raise BadQuery("malformed 'tags' parameter: expecting an object of strings")
        for key, value in found.items():
            tags[key] = value if isinstance(value, str) else orjson.dumps(value).decode()
    return tuple(sorted(tags.items()))


def lookback(text: str) -> int:
    """Ns of the UI's lookback (`1h`, `2d`). Raises BadQuery."""
    if matched := re.fullmatch(r"(\d+)([dw])", text):
        return int(matched[1]) * (86400 if matched[2] == "d" else 7 * 86400) * 10**9
    return parse_duration(text, "lookback")


def parse_query(parameters: Any, now: int) -> Query:
    """A search as Jaeger's UI and Grafana write it; times in µs. Raises BadQuery."""
    before = number(parameters, "end", now // 1000) * 1000
    after = number(parameters, "start", 0) * 1000
    if not after:
        span = parameters.get("lookback", "")
        after = before - (lookback(span) if span and span != "custom" else DEFAULT_LOOKBACK)
    limit = number(parameters, "limit", 20)
    if limit < 1:
        raise BadQuery("limit must be at least 1")
    shortest, longest = parameters.get("minDuration", ""), parameters.get("maxDuration", "")
    kind = parameters.get("spanKind", "")
    query = Query(
        service=parameters.get("service", ""),
        operation="" if parameters.get("operation") == "all" else parameters.get("operation", ""),
        kind=KINDS.get(kind) if kind else None,
        tags=parse_tags(parameters),
        after=after,
        before=before + 1000,
        shortest=parse_duration(shortest, "minDuration") if shortest else None,
        longest=parse_duration(longest, "maxDuration") if longest else None,
        text=parameters.get("text", ""),
        limit=min(limit, MAX_LIMIT),
    )
    if query.shortest and query.longest and query.shortest > query.longest:
        raise BadQuery("'maxDuration' should be greater than 'minDuration'")
    return query
