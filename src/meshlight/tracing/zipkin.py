"""Zipkin: v2 JSON and protobuf and v1 JSON to rows, and spans back to v2 JSON.

What OpenTelemetry has no field for is kept in attributes under Jaeger's and OpenTelemetry's names
(`peer.service`, `net.peer.ip` …) or, where it must come back the same, under `zipkin.*`.
A span without a local endpoint belongs to `unknown`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

import orjson
from google.protobuf.message import DecodeError

from meshlight.proto import zipkin_pb2
from meshlight.tracing.decoding import MAX_ATTRIBUTE, MAX_TIME, Decoded, Malformed
from meshlight.tracing.model import NO_SPAN, Attributes, Event, Resource, Scope, Span
from meshlight.tracing.otlp import cut
from meshlight.tracing.rows import Form, Origin, Row, extra_of, key_value, origin, status_of

Json = dict[str, Any]
KINDS = {"CLIENT": 3, "SERVER": 2, "PRODUCER": 4, "CONSUMER": 5}
_BY_NUMBER = {number: name for name, number in KINDS.items()}
SHARED = "zipkin.shared"
DEBUG = "zipkin.debug"
_UNKNOWN = "unknown"


def decode_json(body: bytes) -> Decoded:
    """Spans of a v2 JSON list. Raises Malformed."""
    decoded = Decoded()
    origins: dict[Any, Origin] = {}
    for index, found in enumerate(_list(body)):
        where = f"span {index}"
        decoded.rows.append(_guard(where, lambda f=found: _row(f, origins)))  # type: ignore[misc]
    return decoded


def _list(body: bytes) -> list[Json]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"the body is no JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Malformed("the body must be a JSON list of spans")
    return found


def _guard(where: str, read: Callable[[], Row]) -> Row:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise Malformed(f"{where}: {missing}") from None


def _hex(text: Any, name: str, sizes: tuple[int, ...]) -> bytes:
    if not isinstance(text, str) or not text or len(text) > 32:
        raise ValueError(f"{name} must be 16 or 32 lower-case hexadecimal digits")
    width = 32 if 32 in sizes and (len(text) > 16 or 16 not in sizes) else 16
    try:
        made = bytes.fromhex(text.zfill(width))
    except ValueError:
        raise ValueError(f"{name} {text!r} is not hexadecimal") from None
    if len(made) * 2 not in sizes:
        raise ValueError(f"{name} {text!r} is too long")
    return made


def _trace(text: Any) -> bytes:
    found = _hex(text, "traceId", (16, 32)).rjust(16, b"\0")
    if not any(found):
        raise ValueError("traceId must not be all zero")
    return found


def _row(found: Json, origins: dict[Any, Origin]) -> Row:
    span_id = _hex(found["id"], "id", (16,))
    if span_id == NO_SPAN:
        raise ValueError("id must not be all zero")
    parent = _hex(found["parentId"], "parentId", (16,)) if found.get("parentId") else NO_SPAN
    kind = found.get("kind") or ""
    if kind and kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    events = found.get("annotations") or []
    start = _micros(found.get("timestamp"), "timestamp")
    if not start and events:
        start = min(_micros(e.get("timestamp"), "annotation timestamp") for e in events)
    tags = found.get("tags") or {}
    if not isinstance(tags, dict):
        raise ValueError("tags must be an object")
    pairs = [key_value(str(k), v if isinstance(v, str) else _plain(v)) for k, v in tags.items()]
    pairs += _peer(found.get("remoteEndpoint"))
    if found.get("shared"):
        pairs.append(key_value(SHARED, True))
    if found.get("debug"):
        pairs.append(key_value(DEBUG, True))
    if max(map(len, pairs), default=0) > MAX_ATTRIBUTE:
        pairs = cut(pairs)
    local = found.get("localEndpoint") or {}
    key = tuple(local.items())
    if (of := origins.get(key)) is None:
        of = origins[key] = _origin(local)
    duration = _micros(found.get("duration"), "duration")
    return Row(
        _trace(found["traceId"]),
        span_id,
        parent,
        start,
        start + duration,
        str(found.get("name") or "").encode("utf-8", "replace"),
        Form(KINDS.get(kind, 0), _status(tags)),
        of,
        pairs,
        _events(events) if events else b"",
    )


def _plain(value: Any) -> str:
    return orjson.dumps(value).decode() if value is not None else ""


def _micros(value: Any, name: str) -> int:
    """Nanoseconds of a number of microseconds; 0 when absent."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{name} must be a number of microseconds")
    nanoseconds = int(value) * 1000
    if not 0 <= nanoseconds <= MAX_TIME // 2:
        raise ValueError(f"{name} {value} is out of range")
    return nanoseconds


def _status(tags: Json) -> bytes:
    """Zipkin's `error` tag: its presence means failure, its text says why."""
    if "error" not in tags or tags["error"] == "false":
        return b""
    reason = str(tags["error"])[:1024]
    return status_of(2, "" if reason in ("", "true") else reason)


def _events(found: list[Json]) -> bytes:
    events = [
        Event(_micros(e.get("timestamp"), "annotation timestamp"), str(e.get("value") or "")[:16384])
        for e in found
    ]
    return extra_of(Span(b"", b"", b"", "", 0, 0, events=events))


def _origin(local: Json) -> Origin:
    attributes: Attributes = {"service.name": str(local.get("serviceName") or _UNKNOWN)}
    for name in ("ipv4", "ipv6"):
        if local.get(name):
            attributes["ip" if name == "ipv4" else "ipv6"] = str(local[name])
    if local.get("port"):
        attributes["port"] = int(local["port"])
    return origin(Resource(attributes), Scope())


def _peer(remote: Json | None) -> list[bytes]:
    if not remote:
        return []
    pairs = []
    if remote.get("serviceName"):
        pairs.append(key_value("peer.service", str(remote["serviceName"])))
    if remote.get("ipv4"):
        pairs.append(key_value("peer.ipv4", str(remote["ipv4"])))
    if remote.get("ipv6"):
        pairs.append(key_value("peer.ipv6", str(remote["ipv6"])))
    if remote.get("port"):
        pairs.append(key_value("peer.port", int(remote["port"])))
    return pairs


def decode_proto(body: bytes) -> Decoded:
    """Spans of a ListOfSpans. Raises Malformed."""
    try:
        message: Any = zipkin_pb2.ListOfSpans.FromString(body)
    except DecodeError as error:
        raise Malformed(f"the body is no zipkin.proto3.ListOfSpans: {error}") from None
    origins: dict[Any, Origin] = {}
    decoded = Decoded()
    for index, found in enumerate(message.spans):
        if found.kind > 4:
            raise Malformed(f"span {index}: kind {found.kind} is unknown")
        plain: Json = {
            "traceId": found.trace_id.hex(),
            "id": found.id.hex(),
            "parentId": found.parent_id.hex(),
            "kind": ("", "CLIENT", "SERVER", "PRODUCER", "CONSUMER")[found.kind],
            "name": found.name,
            "timestamp": found.timestamp,
            "duration": found.duration,
            "tags": dict(found.tags),
            "annotations": [{"timestamp": a.timestamp, "value": a.value} for a in found.annotations],
            "shared": found.shared,
            "debug": found.debug,
        }
        for ours, theirs in (
            ("localEndpoint", found.local_endpoint),
            ("remoteEndpoint", found.remote_endpoint),
        ):
            plain[ours] = _guarded_endpoint(theirs, index)
        if len(found.trace_id) not in (8, 16) or len(found.id) != 8 or len(found.parent_id) not in (0, 8):
            raise Malformed(f"span {index}: trace_id must be 8 or 16 bytes, id and parent_id 8")
        decoded.rows.append(_guard(f"span {index}", lambda p=plain: _row(p, origins)))  # type: ignore[misc]
    return decoded


def _guarded_endpoint(found: Any, index: int) -> Json:
    endpoint: Json = {}
    if found.service_name:
        endpoint["serviceName"] = found.service_name
    for name in ("ipv4", "ipv6"):
        if packed := getattr(found, name):
            try:
                endpoint[name] = str(ipaddress.ip_address(packed))
            except ValueError:
                raise Malformed(f"span {index}: {name} of {len(packed)} bytes is no address") from None
    if found.port:
        endpoint["port"] = found.port
    return endpoint


_CORE = {"cs": 3, "cr": 3, "sr": 2, "ss": 2, "ms": 4, "mr": 5}


def decode_v1(body: bytes) -> Decoded:
    """Spans of a v1 JSON list. A span that both sides reported becomes one a side, sharing its id."""
    decoded = Decoded()
    origins: dict[Any, Origin] = {}
    for index, found in enumerate(_list(body)):
        try:
            halves = _halves(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Malformed(f"span {index}: {error}") from None
        for half in halves:
            decoded.rows.append(_guard(f"span {index}", lambda h=half: _row(h, origins)))  # type: ignore[misc]
    return decoded


def _halves(found: Json) -> list[Json]:
    times: dict[str, Json] = {}
    annotations = found.get("annotations") or []
    for annotation in annotations:
        if annotation.get("value") in _CORE:
            times.setdefault(annotation["value"], annotation)
    common = {k: found.get(k) for k in ("traceId", "id", "parentId", "name", "debug")}
    events = [
        {"timestamp": a["timestamp"], "value": a["value"]} for a in annotations if a.get("value") not in _CORE
    ]
    tags: dict[str, Any] = {}
    peer: Json | None = None
    endpoint: Json | None = None
    for binary in found.get("binaryAnnotations") or []:
        key, value = str(binary["key"]), binary.get("value")
        if key in ("ca", "sa") and value in (True, "true"):
            peer = binary.get("endpoint")
            continue
        endpoint = endpoint or binary.get("endpoint")
        if key == "lc":
            if value:
                tags[key] = value
            continue
        tags[key] = value
    made: list[Json] = []
    for kind, begin, finish in (
        ("CLIENT", "cs", "cr"),
        ("SERVER", "sr", "ss"),
        ("PRODUCER", "ms", "ms"),
        ("CONSUMER", "mr", "mr"),
    ):
        if begin not in times and finish not in times:
            continue
        first, last = times.get(begin) or times[finish], times.get(finish) or times[begin]
        span: Json = dict(common, kind=kind, timestamp=first["timestamp"], localEndpoint=first.get("endpoint"))
        if last["timestamp"] > first["timestamp"]:
            span["duration"] = last["timestamp"] - first["timestamp"]
        made.append(span)
    if not made:
        endpoint = endpoint or next((a.get("endpoint") for a in annotations), None)
        made.append(dict(common, timestamp=found.get("timestamp"), localEndpoint=endpoint))
    if len(made) == 2 and made[1]["kind"] == "SERVER":
        made[1]["shared"] = True
    made[-1 if len(made) > 1 else 0] |= {"tags": tags, "annotations": events, "remoteEndpoint": peer}
    if len(made) == 1:
        made[0]["timestamp"] = found.get("timestamp") or made[0]["timestamp"]
        made[0]["duration"] = found.get("duration") or made[0].get("duration")
    return made


def write_span(span: Span) -> Json:
    """A span as Zipkin's v2 JSON."""
    from meshlight.tracing.model import text

    trace = span.trace_id.hex()
    written: Json = {"traceId": trace[16:] if trace[:16] == "0" * 16 else trace, "id": span.span_id.hex()}
    if span.parent_id:
        written["parentId"] = span.parent_id.hex()
    if span.kind in _BY_NUMBER:
        written["kind"] = _BY_NUMBER[span.kind]
    written["name"] = span.name
    if span.start:
        written["timestamp"] = span.start // 1000
    if span.duration:
        written["duration"] = max(1, span.duration // 1000)
    resource = span.resource.attributes
    local: Json = {"serviceName": span.service}
    local |= {
        ours: text(resource[theirs])
        for ours, theirs in (("ipv4", "ip"), ("ipv6", "ipv6"))
        if theirs in resource
    }
    if "port" in resource:
        local["port"] = resource["port"]
    if span.service != _UNKNOWN or len(local) > 1:
        written["localEndpoint"] = local
    remote = {
        ours: span.attributes[theirs]
        for ours, theirs in (
            ("serviceName", "peer.service"),
            ("ipv4", "peer.ipv4"),
            ("ipv6", "peer.ipv6"),
            ("port", "peer.port"),
        )
        if theirs in span.attributes
    }
    if remote:
        written["remoteEndpoint"] = remote
    if span.events:
        written["annotations"] = [{"timestamp": e.time // 1000, "value": _annotation(e)} for e in span.events]
    hidden = {SHARED, DEBUG, "peer.service", "peer.ipv4", "peer.ipv6", "peer.port"}
    tags = {key: text(value) for key, value in span.attributes.items() if key not in hidden}
    if span.status_code == 2 and "error" not in tags:
        tags["error"] = span.status_message or "true"
    if tags:
        written["tags"] = tags
    if span.attributes.get(SHARED) is True:
        written["shared"] = True
    if span.attributes.get(DEBUG) is True:
        written["debug"] = True
    return written


def _annotation(event: Event) -> str:
    if not event.attributes:
        return event.name
    from meshlight.tracing.model import text

    return event.name + ": " + ", ".join(f"{k}={text(v)}" for k, v in event.attributes.items())
