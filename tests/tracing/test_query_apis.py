"""The query APIs from outside, all over one small shop: Jaeger's, version 3, Zipkin's, gRPC, pages, metrics."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote, urlencode
from uuid import uuid4

import grpc
import pytest
from tracing_server import Server

from meshlight.proto import jaeger_pb2 as jaeger
from meshlight.tracing.model import Link, Resource, Scope, Span
from meshlight.tracing.otlp import decode_traces, encode_spans
from meshlight.tracing.rows import span as span_of

TRACES = [uuid4().bytes for _ in range(6)]
NOW = time.time_ns() // 1000 * 1000


def shop(index: int) -> list[Span]:
    """front → cart → db; the last two fail and are slow."""
    at = NOW - (10 - index) * 10**9
    bad = index >= 4
    ms = 10**6
    front, cart, db = (
        Resource({"service.name": f"q-{name}", "host.name": name}) for name in ("front", "cart", "db")
    )
    trace = TRACES[index]
    long = 400 * ms if bad else 20 * ms
    return [
        Span(trace, b"\1" * 8, b"", "GET /", at, at + long + 10 * ms, 2, resource=front, scope=Scope("web")),
        Span(trace, b"\2" * 8, b"\1" * 8, "call cart", at + ms, at + long + 9 * ms, 3, resource=front),
        Span(
            trace, b"\3" * 8, b"\2" * 8, "POST /cart", at + 2 * ms, at + long + 8 * ms, 2, 2 if bad else 0,
            "broken" if bad else "", attributes={"http.response.status_code": 500 if bad else 200, "n": index},
            resource=cart, links=[Link(TRACES[0], b"\1" * 8)],
        ),
        Span(
            trace, b"\4" * 8, b"\3" * 8, "select", at + 3 * ms, at + long, 3,
            attributes={"sql": "SELECT Ünïcode"}, resource=db,
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def filled(server: Server) -> Server:
    for index in range(len(TRACES)):
        body = encode_spans(shop(index))
        answer = server.post("otlp-http", "/v1/traces", body, Content_Type="application/x-protobuf")
        assert (answer.status, answer.body) == (200, b"")
    return server


def found(server: Server, **parameters: Any) -> list[int]:
    """Which of TRACES a search finds, in the order of the answer."""
    answer = server.get("query", f"/api/traces?{urlencode(parameters, doseq=True)}")
    assert answer.status == 200, answer.body
    return [TRACES.index(bytes.fromhex(trace["traceID"])) for trace in answer.json["data"]]


def test_every_parameter_of_a_search(filled: Server) -> None:
    every = [5, 4, 3, 2, 1, 0]
    assert found(filled, service="q-front") == every
    assert found(filled, service="q-front", limit=2) == every[:2]
    assert found(
        filled, service="q-cart", operation="POST /cart", tags='{"http.response.status_code":"500"}'
    ) == [5, 4]
    assert found(filled, service="q-cart", tag="error:true") == [5, 4]
    assert found(filled, service="q-cart", tag=["n:3", "http.response.status_code:200"]) == [3]
    assert found(filled, tags='{"error":"true"}', minDuration="100ms", service="") == [5, 4]
    assert found(filled, service="q-front", maxDuration="50ms") == every[2:]
    times = {"start": (NOW - 7 * 10**9) // 1000, "end": (NOW - 5 * 10**9) // 1000}
    assert found(filled, service="q-cart", **times) == [4, 3]
    assert found(filled, service="q-cart", lookback="1h", text="ünïcode") == []
    assert found(filled, service="q-db", text="ünïcode") == every
    assert found(filled, service="q-front", traceID=[TRACES[2].hex(), TRACES[1].hex()]) == [2, 1]
    assert found(filled, service="nobody") == []


def test_wrong_parameters_are_named(filled: Server) -> None:
    for query, word in (
        ("minDuration=fast", "minDuration"), ("limit=many", "limit"), ("tag=novalue", "tag"),
        ("tags=%7B", "tags"),
        ("start=x", "start"), ("traceID=zz", "trace id"), ("minDuration=2s&maxDuration=1s", "maxDuration"),
    ):  # fmt: skip
        answer = filled.get("query", f"/api/traces?service=q-front&{query}")
        assert answer.status == 400 and word in answer.json["errors"][0]["msg"], (query, answer.body)
    assert filled.get("query", f"/api/traces/{'0' * 31}9").status == 404


def test_services_operations_and_dependencies(filled: Server) -> None:
    assert {"q-front", "q-cart", "q-db"} <= set(filled.get("query", "/api/services").json["data"])
    assert filled.get("query", "/api/services/q-front/operations").json["data"] == ["GET /", "call cart"]
    operations = filled.get("query", "/api/operations?service=q-front&spanKind=server").json["data"]
    assert operations == [{"name": "GET /", "spanKind": "server"}]
    links = filled.get("query", f"/api/dependencies?endTs={time.time_ns() // 10**6}&lookback=3600000").json[
        "data"
    ]
    mine = [link for link in links if link["parent"].startswith("q-")]
    assert mine == [
        {"parent": "q-cart", "child": "q-db", "callCount": 6},
        {"parent": "q-front", "child": "q-cart", "callCount": 6},
    ]  # fmt: skip


def test_what_goes_in_comes_back_equal_by_every_api(filled: Server) -> None:
    wanted = sorted(shop(1), key=lambda s: s.span_id)
    hexadecimal = TRACES[1].hex()
    with grpc.insecure_channel(f"127.0.0.1:{filled.ports['query-grpc']}") as channel:
        request = jaeger.GetTraceRequestV3(trace_id=hexadecimal, raw_traces=True).SerializeToString()
        call = channel.unary_stream("/jaeger.api_v3.QueryService/GetTrace")
        v3 = [span_of(r) for chunk in call(request, timeout=30) for r in decode_traces(chunk).rows]
        query: Any = jaeger.FindTracesRequest()
        query.query.service_name, query.query.raw_traces = "q-cart", True
        query.query.tags["n"] = "1"
        chunks = channel.unary_stream("/jaeger.api_v2.QueryService/FindTraces")(
            query.SerializeToString(), timeout=30
        )
        v2 = [s for chunk in chunks for s in jaeger.SpansResponseChunk.FromString(chunk).spans]
        names = channel.unary_unary("/jaeger.api_v2.QueryService/GetServices")(b"", timeout=30)
        with pytest.raises(grpc.RpcError) as missing:
            list(call(jaeger.GetTraceRequestV3(trace_id="77").SerializeToString(), timeout=30))
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND
    assert sorted(v3, key=lambda s: s.span_id) == wanted
    assert {s.span_id: s.operation_name for s in v2} == {s.span_id: s.name for s in wanted}
    assert "q-db" in jaeger.GetServicesResponse.FromString(names).services
    http = filled.get("query", f"/api/v3/traces/{hexadecimal}?raw_traces=true").json["result"]
    from meshlight.tracing import otlp_json

    again = [span_of(r) for r in otlp_json.decode_traces(json.dumps(http).encode()).rows]
    assert sorted(again, key=lambda s: s.span_id) == wanted
    zipkin = filled.get("zipkin", f"/api/v2/trace/{hexadecimal}").json
    assert {(s["id"], s["name"], s["duration"]) for s in zipkin} == {
        (s.span_id.hex(), s.name, s.duration // 1000) for s in wanted
    }


def test_version_3_search_and_summaries(filled: Server) -> None:
    times = {
        "query.start_time_min": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 7200)),
        "query.start_time_max": time.strftime("%Y-%m-%dT%H:%M:%S.5Z", time.gmtime(time.time() + 5)),
    }
    parameters = urlencode({"query.service_name": "q-cart", "query.attributes": '{"error":"true"}', **times})
    groups = filled.get("query", f"/api/v3/traces?{parameters}").json["result"]["resourceSpans"]
    ids = {s["traceId"] for g in groups for scope in g["scopeSpans"] for s in scope["spans"]}
    assert ids == {TRACES[4].hex(), TRACES[5].hex()}
    summaries = filled.get("query", f"/api/v3/trace-summaries?{parameters}").json["result"]["summaries"]
    assert [(s["rootOperationName"], s["spanCount"], s["errorSpanCount"]) for s in summaries] == [
        ("GET /", 4, 1)
    ] * 2
    assert filled.get("query", "/api/v3/traces?query.service_name=x").status == 400


def test_zipkins_search(filled: Server) -> None:
    query = quote("http.response.status_code=500 and sql", safe="=")
    assert filled.get("zipkin", f"/api/v2/traces?serviceName=q-cart&annotationQuery={query}").json == []
    query = quote("http.response.status_code=500", safe="=")
    traces = filled.get("zipkin", f"/api/v2/traces?serviceName=q-cart&annotationQuery={query}").json
    assert [trace[0]["traceId"] for trace in traces] == [TRACES[5].hex(), TRACES[4].hex()]
    assert "POST /cart" in filled.get("zipkin", "/api/v2/spans?serviceName=q-cart").json
    links = filled.get("zipkin", f"/api/v2/dependencies?endTs={time.time_ns() // 10**6}").json
    assert {"parent": "q-cart", "child": "q-db", "callCount": 6} in links


def test_the_monitor_tab(filled: Server) -> None:
    base = f"service=q-cart&endTs={time.time_ns() // 10**6}&lookback=7200000&step=60000&ratePer=7200000"
    calls = filled.get("query", f"/api/metrics/calls?{base}").json
    assert calls["name"] == "service_call_rate"
    last = calls["metrics"][0]["metricPoints"][-1]["gaugeValue"]["doubleValue"]
    assert last == pytest.approx(6 / 7200)
    errors = filled.get("query", f"/api/metrics/errors?{base}&groupByOperation=true").json["metrics"][0]
    assert {"name": "operation", "value": "POST /cart"} in errors["labels"]
    assert errors["metricPoints"][-1]["gaugeValue"]["doubleValue"] == pytest.approx(2 / 6)
    latency = filled.get("query", f"/api/metrics/latencies?{base}&quantile=0.95").json["metrics"][0]
    assert latency["metricPoints"][-1]["gaugeValue"]["doubleValue"] == pytest.approx(406, rel=0.05)
    assert filled.get("query", f"/api/metrics/latencies?{base}").status == 400
    assert filled.get("query", "/api/metrics/minstep").json["data"] == 1


def test_critical_path_and_comparison(filled: Server) -> None:
    path = filled.get("query", f"/api/critical-path/{TRACES[0].hex()}").json["data"]
    assert sum(section["duration"] for section in path) == pytest.approx(30_000)
    assert max(path, key=lambda s: s["duration"])["operation"] == "select"
    rows = filled.get("query", f"/api/compare?a={TRACES[0].hex()}&b={TRACES[5].hex()}").json["data"][
        "operations"
    ]
    verdicts = {row["operation"]: row["verdict"] for row in rows}
    assert verdicts["POST /cart"] == "failing" and verdicts["select"] == "slower"
    assert rows[0]["operation"] == "POST /cart"


def test_archive_and_transform(filled: Server) -> None:
    assert filled.post("query", f"/api/archive/{TRACES[3].hex()}", b"").status == 200
    assert filled.post("query", f"/api/archive/{uuid4().hex}", b"").status == 404
    body = json.dumps(filled.get("query", f"/api/v3/traces/{TRACES[2].hex()}").json["result"]).encode()
    (trace,) = filled.post("query", "/api/transform", body).json["data"]
    assert trace["traceID"] == TRACES[2].hex() and len(trace["spans"]) == 4


def test_pages_escape_what_spans_say(filled: Server) -> None:
    identity = uuid4().bytes
    evil = Span(
        identity,
        b"\7" * 8,
        b"",
        "<script>alert(1)</script>",
        NOW,
        NOW + 5,
        resource=Resource({"service.name": "<b>"}),
    )
    filled.post("otlp-http", "/v1/traces", encode_spans([evil]), Content_Type="application/x-protobuf")
    for path in (
        "/",
        "/search?service=q-front",
        f"/trace/{identity.hex()}",
        f"/trace/{TRACES[5].hex()}?fold=1",
        "/dependencies",
    ):
        answer = filled.get("query", path)
        assert answer.status == 200 and b"<script" not in answer.body and b"<b>" not in answer.body
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert b"q-cart" in filled.get("query", f"/trace/{TRACES[5].hex()}").body
    assert filled.get("query", "/trace/123456").status == 404


def test_metrics_and_health(filled: Server) -> None:
    for port in ("query", "admin"):
        text = filled.get(port, "/metrics").body.decode()
        assert 'otelcol_receiver_accepted_spans_total{receiver="otlp",transport="http"}' in text
        assert 'meshlight_tracing_records{collection="spans"}' in text
    for port, path in (("admin", "/"), ("health", "/"), ("zipkin", "/health")):
        assert filled.get(port, path).json["status"] == "Server available"


def flow(index: int, **attributes: Any) -> dict[str, Any]:
    pairs = [
        {
            "key": k.replace("__", "."),
            "value": {"intValue": str(v)} if isinstance(v, int) else {"stringValue": v},
        }
        for k, v in attributes.items()
    ]
    return {
        "timeUnixNano": str(NOW + index),
        "eventName": "mesh.flow",
        "traceId": TRACES[0].hex(),
        "attributes": pairs,
    }


def test_flow_records_are_found_and_joined_to_their_trace(filled: Server) -> None:
    a, b, c = ({"{side}__workload": name, "{side}__namespace": f"f{n}"} for n, name in enumerate("abc", 1))

    def between(source: dict[str, str], destination: dict[str, str]) -> dict[str, str]:
        ends = ((source, "source"), (destination, "destination"))
        return {k.format(side=side): v for end, side in ends for k, v in end.items()}

    records = [
        flow(0, **between(a, b), policy__verdict="allow", http__response__status_code=200),
        flow(1, **between(b, c), policy__verdict="deny", policy__name="f3/no"),
    ]
    body = json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}).encode()
    assert filled.post("otlp-http", "/v1/logs", body, Content_Type="application/json").status == 200

    def flows(query: str) -> list[str]:
        data = filled.get("query", f"/api/flows?{query}").json["data"]
        return [f"{r['attributes']['source.workload']}{r['attributes']['destination.workload']}" for r in data]

    assert flows("namespace=f2") == ["bc", "ab"]
    assert flows("namespace=f2&workload=a") == ["ab"]
    assert flows("from=b.f2") == ["bc"] and flows("to=b.f2") == ["ab"]
    assert flows("verdict=deny&namespace=f3") == ["bc"] and flows("code=200&namespace=f1") == ["ab"]
    assert flows(f"namespace=f2&start={NOW // 1000 + 60_000_000}") == []
    assert filled.get("query", "/api/flows?colour=red").status == 400
    assert b"f3/no" in filled.get("query", f"/trace/{TRACES[0].hex()}").body
