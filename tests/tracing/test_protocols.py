"""The receivers from outside: OpenTelemetry's SDK, and payloads written from the specifications."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
from tracing_server import Server

from meshlight.proto import jaeger_pb2, zipkin_pb2


def trace(server: Server, identity: str) -> Any:
    """A trace as Jaeger's UI gets it."""
    answer = server.get("query", f"/api/traces/{identity}")
    assert answer.status == 200, answer.body
    (found,) = answer.json["data"]
    return found


def tags(span: Any) -> dict[str, Any]:
    return {tag["key"]: tag["value"] for tag in span["tags"]}


def exported(sdk: Path, protocol: str, endpoint: str, service: str) -> str:
    """A small trace by the official SDK; returns its id."""
    # -S: without the environment's own packages.
    script = str(Path(__file__).with_name("sdk_sender.py"))
    sender = [sys.executable, "-S", script, protocol, endpoint, service]
    environment = os.environ | {"PYTHONPATH": str(sdk)}
    sent = subprocess.run(sender, env=environment, capture_output=True, text=True, timeout=120)
    assert sent.returncode == 0 and not sent.stderr, sent.stderr
    return sent.stdout.strip()


def check_exported(server: Server, identity: str, service: str) -> None:
    found = trace(server, identity)
    assert {p["serviceName"] for p in found["processes"].values()} == {service}
    root, child = found["spans"]
    assert (root["operationName"], child["operationName"]) == ("GET /cart", "SELECT")
    assert child["references"][0] == {"refType": "CHILD_OF", "traceID": identity, "spanID": root["spanID"]}
    assert child["references"][1]["refType"] == "FOLLOWS_FROM"
    assert tags(root) | {"list": None} == {
        "http.response.status_code": 500, "ratio": 0.5, "ok": False, "list": None, "span.kind": "server",
        "error": True, "otel.status_code": "ERROR", "otel.status_description": "out of stock",
        "otel.scope.name": "shop", "otel.scope.version": "1.2", "scope.tag": "s",
    }  # fmt: skip
    types = {tag["key"]: tag["type"] for tag in root["tags"]}
    assert (types["ok"], types["ratio"], types["http.response.status_code"]) == ("bool", "float64", "int64")
    (log,) = root["logs"]
    assert {f["key"]: f["value"] for f in log["fields"]} == {"event": "retry", "attempt": 2}
    assert abs(root["startTime"] / 1e6 - time.time()) < 120


def test_the_sdk_over_grpc_with_gzip(server: Server, sdk: Path) -> None:
    endpoint = f"127.0.0.1:{server.ports['otlp-grpc']}"
    check_exported(server, exported(sdk, "grpc", endpoint, "grpc-shop"), "grpc-shop")


def test_the_sdk_over_http_with_gzip(server: Server, sdk: Path) -> None:
    endpoint = server.url("otlp-http", "/v1/traces")
    check_exported(server, exported(sdk, "http", endpoint, "http-shop"), "http-shop")


def otlp_json(identity: str, **fields: Any) -> dict[str, Any]:
    now = time.time_ns()
    span = {
        "traceId": identity, "spanId": "00000000000000a1", "name": "op", "kind": 2,
        "startTimeUnixNano": str(now), "endTimeUnixNano": str(now + 5_000_000),
    }  # fmt: skip
    service = {"key": "service.name", "value": {"stringValue": "json-shop"}}
    return {
        "resourceSpans": [{"resource": {"attributes": [service]}, "scopeSpans": [{"spans": [span | fields]}]}]
    }


def test_otlp_json_keeps_what_is_right_and_says_what_is_not(server: Server) -> None:
    identity = uuid4().hex
    body = otlp_json(identity)
    body["resourceSpans"][0]["scopeSpans"][0]["spans"].append(
        {"traceId": "00", "spanId": "01", "name": "wrong"}
    )
    answer = server.post("otlp-http", "/v1/traces", json.dumps(body).encode(), Content_Type="application/json")
    assert answer.status == 200
    assert answer.json["partialSuccess"]["rejectedSpans"] == "1"
    assert "traceId" in answer.json["partialSuccess"]["errorMessage"]
    assert [s["operationName"] for s in trace(server, identity)["spans"]] == ["op"]


def test_zipkin_json(server: Server) -> None:
    identity = uuid4().hex[:16]
    start = time.time_ns() // 1000
    client = {
        "traceId": identity, "id": "00000000000000b1", "kind": "CLIENT", "name": "get", "timestamp": start,
        "duration": 9000, "localEndpoint": {"serviceName": "front", "ipv4": "10.0.0.1"},
        "remoteEndpoint": {"serviceName": "back", "port": 80}, "tags": {"http.path": "/x", "error": "timeout"},
        "annotations": [{"timestamp": start + 10, "value": "wire send"}],
    }  # fmt: skip
    server_half = {
        "traceId": identity, "id": "00000000000000b1", "kind": "SERVER", "name": "get",
        "timestamp": start + 1000,
        "duration": 7000, "localEndpoint": {"serviceName": "back"}, "shared": True,
    }  # fmt: skip
    below = {
        "traceId": identity, "id": "00000000000000b2", "parentId": "00000000000000b1", "name": "sql",
        "timestamp": start + 2000, "duration": 100, "localEndpoint": {"serviceName": "back"},
    }  # fmt: skip
    body = gzip.compress(json.dumps([client, server_half, below]).encode())
    answer = server.post(
        "zipkin", "/api/v2/spans", body, Content_Type="application/json", Content_Encoding="gzip"
    )
    assert (answer.status, answer.body) == (202, b"")
    found = trace(server, identity)
    assert found["traceID"] == "0" * 16 + identity
    by_name = {
        (found["processes"][s["processID"]]["serviceName"], s["operationName"]): s for s in found["spans"]
    }
    front, back, sql = by_name["front", "get"], by_name["back", "get"], by_name["back", "sql"]
    # The halves of the shared span are told apart, and what the server did is the server's.
    assert front["spanID"] == "00000000000000b1" != back["spanID"]
    assert back["references"][0]["spanID"] == front["spanID"]
    assert sql["references"][0]["spanID"] == back["spanID"]
    assert tags(front)["error"] is True or tags(front)["error"] == "timeout"
    assert tags(front)["peer.service"] == "back"
    (again,) = server.get("zipkin", f"/api/v2/traceMany?traceIds={identity}").json
    assert sorted(again, key=lambda s: (s["id"], s.get("shared", False))) == [client, server_half, below]


def test_zipkin_protobuf(server: Server) -> None:
    identity = uuid4().bytes
    message = zipkin_pb2.ListOfSpans()
    span = message.spans.add(
        trace_id=identity,
        id=b"\0" * 7 + b"\x07",
        kind=2,
        name="get /",
        timestamp=time.time_ns() // 1000,
        duration=5,
    )
    span.local_endpoint.service_name = "proto-shop"
    span.local_endpoint.ipv4 = bytes([10, 1, 2, 3])
    span.tags["http.method"] = "GET"
    body = message.SerializeToString()
    assert server.post("zipkin", "/api/v2/spans", body, Content_Type="application/x-protobuf").status == 202
    found = trace(server, identity.hex())
    (process,) = found["processes"].values()
    assert process == {
        "serviceName": "proto-shop",
        "tags": [{"key": "ip", "type": "string", "value": "10.1.2.3"}],
    }
    assert tags(found["spans"][0]) == {"http.method": "GET", "span.kind": "server"}


def test_zipkin_v1(server: Server) -> None:
    identity = uuid4().hex
    at = time.time_ns() // 1000
    web, db = {"serviceName": "web"}, {"serviceName": "db"}
    times = (("cs", 0, web), ("sr", 10, db), ("ss", 80, db), ("cr", 90, web))
    annotations = [{"timestamp": at + after, "value": value, "endpoint": of} for value, after, of in times]
    tag = {"key": "sql", "value": "select 1", "endpoint": db}
    span = {
        "traceId": identity,
        "id": "c1",
        "name": "query",
        "annotations": annotations,
        "binaryAnnotations": [tag],
    }
    body = json.dumps([span]).encode()
    assert server.post("zipkin", "/api/v1/spans", body, Content_Type="application/json").status == 202
    found = trace(server, identity)
    assert [(found["processes"][s["processID"]]["serviceName"], s["duration"]) for s in found["spans"]] == [
        ("web", 90), ("db", 70),
    ]  # fmt: skip


def test_the_seeds_check_answers_as_zipkin_does(server: Server) -> None:
    answer = server.get("zipkin", "/api/v2/spans", "HEAD")
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert server.get("zipkin", "/api/v2/spans").status == 405


def test_jaeger_grpc(server: Server) -> None:
    identity = uuid4().bytes
    request: Any = jaeger_pb2.PostSpansRequest()
    request.batch.process.service_name = "jaeger-shop"
    span = request.batch.spans.add(trace_id=identity, span_id=b"\1" * 8, operation_name="op")
    span.start_time.seconds = int(time.time())
    span.duration.nanos = 1_500_000
    span.tags.add(key="binary", v_type=4, v_binary=b"\x01\x02")
    span.tags.add(key="span.kind", v_str="client")
    span.references.add(trace_id=identity, span_id=b"\2" * 8, ref_type=1)
    log = span.logs.add()
    log.timestamp.seconds = span.start_time.seconds
    log.fields.add(key="message", v_str="hello")
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['jaeger-grpc']}") as channel:
        channel.unary_unary("/jaeger.api_v2.CollectorService/PostSpans")(
            request.SerializeToString(), timeout=30
        )
    (found,) = trace(server, identity.hex())["spans"]
    assert found["duration"] == 1500
    assert {"key": "binary", "type": "binary", "value": "AQI="} in found["tags"]
    assert found["references"] == [{"refType": "FOLLOWS_FROM", "traceID": identity.hex(), "spanID": "02" * 8}]
    assert found["logs"][0]["fields"] == [{"key": "message", "type": "string", "value": "hello"}]


def thrift_batch(trace_low: int, service: str) -> bytes:
    """A Batch in Thrift's binary protocol, written field by field from jaeger.thrift."""

    def field(kind: int, number: int, content: bytes) -> bytes:
        return struct.pack(">bh", kind, number) + content

    def string(text: str) -> bytes:
        return struct.pack(">i", len(text)) + text.encode()

    def i64(number: int) -> bytes:
        return struct.pack(">q", number)

    tag = field(11, 1, string("http.code")) + field(8, 2, struct.pack(">i", 3)) + field(10, 6, i64(204)) + b"\0"
    span = (
        field(10, 1, i64(trace_low)) + field(10, 2, i64(0)) + field(10, 3, i64(77)) + field(10, 4, i64(0))
        + field(11, 5, string("thrift-op")) + field(8, 7, struct.pack(">i", 1))
        + field(10, 8, i64(time.time_ns() // 1000)) + field(10, 9, i64(250))
        + field(15, 10, struct.pack(">bi", 12, 1) + tag) + b"\0"
    )  # fmt: skip
    process = field(11, 1, string(service)) + b"\0"
    return field(12, 1, process) + field(15, 2, struct.pack(">bi", 12, 1) + span) + b"\0"


def test_jaeger_thrift_over_http(server: Server) -> None:
    low = uuid4().int & 0x7FFFFFFFFFFFFFFF
    body = thrift_batch(low, "thrift-shop")
    path = "/api/traces?format=jaeger.thrift"
    assert server.post("jaeger-http", path, body, Content_Type="application/x-thrift").status == 202
    (found,) = trace(server, f"{low:016x}")["spans"]
    assert (found["operationName"], found["duration"], tags(found)["http.code"]) == ("thrift-op", 250, 204)
    wrong = server.post("jaeger-http", path, body[:-20], Content_Type="application/x-thrift")
    assert wrong.status == 400 and b"ends within" in wrong.body


def test_remote_sampling(server: Server) -> None:
    answer = server.get("sampling", "/sampling?service=any")
    assert answer.json == {"strategyType": "PROBABILISTIC", "probabilisticSampling": {"samplingRate": 1.0}}
    assert server.get("sampling", "/sampling").status == 400
    request = jaeger_pb2.SamplingStrategyParameters(service_name="any").SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['jaeger-grpc']}") as channel:
        call = channel.unary_unary("/jaeger.api_v2.SamplingManager/GetSamplingStrategy")
        found: Any = jaeger_pb2.SamplingStrategyResponse.FromString(call(request, timeout=30))
    assert found.probabilistic.sampling_rate == 1.0


WRONG = [
    ("otlp-http", "/v1/traces", b"\xff\xff\xff", "application/x-protobuf", "", 400),
    ("otlp-http", "/v1/traces", b"{", "application/json", "", 400),
    ("otlp-http", "/v1/traces", b'{"resourceSpans": 3}', "application/json", "", 400),
    ("otlp-http", "/v1/traces", b"{}", "application/json", "gzip", 400),
    ("otlp-http", "/v1/traces", b"{}", "application/json", "br", 400),
    ("otlp-http", "/v1/traces", b"x", "application/xml", "", 415),
    ("zipkin", "/api/v2/spans", b"{}", "application/json", "", 400),
    ("zipkin", "/api/v2/spans", b'[{"traceId":"zz","id":"1"}]', "application/json", "", 400),
    ("zipkin", "/api/v2/spans", b'[{"traceId":"1","id":"0"}]', "application/json", "", 400),
    ("zipkin", "/api/v2/spans", b'[{"id":"1"}]', "application/json", "", 400),
    ("zipkin", "/api/v2/spans", b"\x0a\xff", "application/x-protobuf", "", 400),
    ("zipkin", "/api/v1/spans", b'[{"traceId":"1","id":"1","annotations":3}]', "application/json", "", 400),
    ("jaeger-http", "/api/traces", b"\x0c", "application/x-thrift", "", 400),
]


def test_what_is_wrong_is_refused_clearly_and_the_server_goes_on(server: Server) -> None:
    for port, path, body, kind, encoding, status in WRONG:
        headers = {"Content_Type": kind} | ({"Content_Encoding": encoding} if encoding else {})
        answer = server.post(port, path, body, **headers)
        assert answer.status == status, (port, path, body, answer.status, answer.body)
        assert answer.body, (port, path, body)
    bomb = gzip.compress(b"[" + b" " * (40 << 20) + b"]")
    answer = server.post(
        "zipkin", "/api/v2/spans", bomb, Content_Type="application/json", Content_Encoding="gzip"
    )
    assert answer.status == 413
    assert server.get("admin", "/").status == 200


def test_a_tag_of_a_megabyte_is_cut_and_says_so(server: Server) -> None:
    identity = uuid4().hex
    body = otlp_json(identity, attributes=[{"key": "huge", "value": {"stringValue": "x" * (1 << 20)}}])
    assert (
        server.post(
            "otlp-http", "/v1/traces", json.dumps(body).encode(), Content_Type="application/json"
        ).status
        == 200
    )
    found = tags(trace(server, identity)["spans"][0])
    assert found["meshlight.truncated"] == "huge" and 1000 < len(found["huge"]) < 1 << 17
