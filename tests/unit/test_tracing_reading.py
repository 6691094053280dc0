"""What is made of traces when they are read: adjusters, critical path, folding, comparison, keeping, codecs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import orjson
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tracing_spans import START, made, rows, spans

from meshlight.tracing import (
    adjusters,
    analysis,
    jaeger_json,
    jaeger_proto,
    jaeger_tags,
    otlp,
    otlp_json,
    zipkin,
)
from meshlight.tracing.decoding import Malformed, decoders
from meshlight.tracing.model import Link, Span
from meshlight.tracing.rows import span
from meshlight.tracing.store.columns import from_rows
from meshlight.tracing.store.search import Recent
from meshlight.tracing.tail_keeping import thin


def times(trace: list[Span]) -> dict[int, tuple[float, float]]:
    return {int.from_bytes(s.span_id, "big"): ((s.start - START) / 1e6, (s.end - START) / 1e6) for s in trace}


def test_a_span_sent_twice_is_shown_once() -> None:
    one, again = made(1, 1), made(1, 1)
    assert len(adjusters.adjust([one, again, made(1, 2, 1)])) == 2
    assert len(adjusters.adjust([one, made(1, 1, ms=2)])) == 2


def test_shared_halves_are_told_apart_and_children_are_the_servers() -> None:
    trace = [
        made(1, 1, service="a", kind=3, ms=10), made(1, 1, service="b", kind=2, at=1, ms=8),
        made(1, 2, 1, service="b", at=2, ms=1),
    ]  # fmt: skip
    client, server, child = adjusters.adjust(trace)
    assert server.parent_id == client.span_id != server.span_id
    assert child.parent_id == server.span_id


def test_a_host_whose_clock_is_behind_is_moved_into_its_caller_with_all_that_is_its_own() -> None:
    trace = [
        made(1, 1, service="a", at=1000, ms=100),
        made(1, 2, 1, service="b", at=0, ms=80),
        made(1, 3, 2, service="b", at=10, ms=20),
    ]
    adjusted = adjusters.adjust(trace)
    assert times(adjusted) == {1: (1000, 1100), 2: (1010, 1090), 3: (1020, 1040)}
    assert [bool(s.warnings) for s in adjusted] == [False, True, True]


def test_work_that_outlives_its_caller_on_the_same_host_is_left_alone() -> None:
    trace = [made(1, 1, at=0, ms=10), made(1, 2, 1, at=5, ms=50), made(1, 3, 9, at=1)]
    adjusted = adjusters.adjust(trace)
    assert times(adjusted)[2] == (5, 55)
    assert "is not in this trace" in adjusted[1].warnings[0]


@settings(max_examples=80, deadline=None, phases=[Phase.generate])
@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(0, 8), st.integers(0, 50), st.integers(0, 50)), min_size=1
    )
)
def test_adjusting_and_the_critical_path_hold_for_any_shape_even_cycles(
    shape: list[tuple[int, int, int, int]],
) -> None:
    trace = [made(1, i, p, service=str(i % 3), at=a, ms=d) for i, p, a, d in shape]
    adjusted = adjusters.adjust(trace)
    assert len(adjusted) <= len(trace)
    sections = analysis.critical_path(adjusted)
    assert all(a.end <= b.start for a, b in pairwise(sections))
    roots = adjusters.children(adjusted).get(b"", [])
    if roots:
        assert sum(s.end - s.start for s in sections) == max(r.duration for r in roots)


def test_the_critical_path_goes_through_the_child_that_finished_last() -> None:
    trace = [
        made(1, 1, at=0, ms=100, name="root"), made(1, 2, 1, at=10, ms=30, name="first"),
        made(1, 3, 1, at=15, ms=10, name="beside"), made(1, 4, 1, at=50, ms=40, name="last"),
        made(1, 5, 4, at=60, ms=20, name="below"),
    ]  # fmt: skip
    path = [
        (s.span.name, (s.start - START) // 10**6, (s.end - START) // 10**6)
        for s in analysis.critical_path(trace)
    ]
    assert path == [
        ("root", 0, 10), ("first", 10, 40), ("root", 40, 50), ("last", 50, 60), ("below", 60, 80),
        ("last", 80, 90), ("root", 90, 100),
    ]  # fmt: skip


def test_mesh_hops_fold_into_the_call_that_they_carried() -> None:
    hop = {"component": "proxy", "node_id": "waypoint~10.0.0.1~w.demo~demo.svc.cluster.local"}
    trace = [
        made(1, 1, name="client"), made(1, 2, 1, name="hop", attributes=hop),
        made(1, 3, 2, name="hop", attributes=hop),
        made(1, 4, 3, name="server"), made(1, 5, 4, name="last hop", attributes=hop),
    ]  # fmt: skip
    folded = analysis.fold_mesh_hops(trace)
    assert [s.name for s in folded] == ["client", "server", "last hop"]
    assert folded[1].parent_id == trace[0].span_id


def test_comparison_blames_the_operation_that_changed() -> None:
    def group(slow: float, fails: bool) -> list[list[Span]]:
        return [
            [
                made(n, 1, name="front", ms=20 + slow), made(n, 2, 1, name="cart", at=1, ms=15 + slow),
                made(n, 3, 2, name="select", at=2, ms=5 + slow, status_code=2 if fails and n % 2 else 0),
                made(n, 4, 1, name="other", at=1, ms=1),
            ]
            for n in range(1, 41)
        ]  # fmt: skip

    slower = analysis.compare(group(0, False), group(50, False))
    assert [(r["operation"], r["verdict"]) for r in slower][:1] == [("select", "slower")]
    assert {r["operation"]: r["verdict"] for r in slower}["other"] == "same"
    failing = analysis.compare(group(0, False), group(0, True))
    assert [(r["operation"], r["verdict"]) for r in failing][:1] == [("select", "failing")]
    assert analysis.compare(group(0, False), group(0, False))[0]["verdict"] == "same"


def test_thinning_keeps_errors_the_slowest_and_whole_traces() -> None:
    of = []
    for n in range(1, 401):
        bad, slow = n == 7, n == 9
        of += [
            made(n << 55 | n, 1, ms=900 if slow else 10),
            made(n << 55 | n, 2, 1, status_code=2 if bad else 0),
        ]
    kept = thin([from_rows(rows(*of))], 0.1)
    numbers = [int.from_bytes(t, "big") & 0xFFFF for t in Recent(kept).trace_ids(np.arange(len(kept)))]
    assert {7, 9} <= set(numbers)
    assert all(numbers.count(n) == 2 for n in set(numbers))
    assert 2 < len(set(numbers)) < 200


@settings(max_examples=50, deadline=None, phases=[Phase.generate])
@given(spans())
def test_a_span_comes_back_equal_through_otlp_in_both_encodings(of: Span) -> None:
    assert [span(r) for r in otlp.decode_traces(otlp.encode_spans([of])).rows] == [of]
    if of.attributes == {k: v for k, v in of.attributes.items() if v is not None}:
        written = orjson.dumps(otlp_json.write_spans([of]))
        assert [span(r) for r in otlp_json.decode_traces(written).rows] == [of]


def test_jaegers_spellings_come_back_equal() -> None:
    of = made(
        1, 2, 1, kind=3, status_code=2, status_message="no", flags=1,
        attributes={"a": 1, "b": 1.5, "c": True, "d": b"x"},
        links=[Link(b"\2" * 16, b"\3" * 8, attributes={jaeger_tags.REFERENCE: "follows_from"})],
    )  # fmt: skip
    again = [span(r) for r in jaeger_json.decode(orjson.dumps(jaeger_json.write_trace([of]))).rows]
    assert again == [of]
    message = jaeger_proto.write_span(of)
    assert jaeger_proto.read_span(message, jaeger_proto.process_attributes(message.process)) == of
    only_follows = made(1, 3)
    jaeger_tags.set_references(only_follows, [("FOLLOWS_FROM", only_follows.trace_id, b"\1" * 8)])
    assert only_follows.parent_id == b"\1" * 8
    assert jaeger_tags.references(only_follows) == [("FOLLOWS_FROM", only_follows.trace_id, b"\1" * 8)]


SEEDS = [
    otlp.encode_spans([made(1, 1, attributes={"a": "b", "n": 3}, events=[])]),
    b'[{"traceId":"1","id":"2","kind":"CLIENT","timestamp":1,"tags":{"a":"b"},'
    b'"annotations":[{"timestamp":1,"value":"x"}]}]',
    b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"01","spanId":"02","attributes":[{"key":"a"}]}]}]}]}',
    b'{"data":[{"spans":[{"traceID":"1","spanID":"2","startTime":1,"duration":1,"tags":[]}]}]}',
    b"\x0c\x00\x01\x0b\x00\x01\x00\x00\x00\x01a\x00\x0f\x00\x02\x0c\x00\x00\x00\x00\x00",
]


@settings(max_examples=400, deadline=None, phases=[Phase.generate])
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=3)), max_size=4))
def test_decoders_answer_any_bytes_with_rows_or_a_clear_refusal(
    seed: bytes, edits: list[tuple[int, bytes]]
) -> None:
    body = bytearray(seed)
    for at, content in edits:
        body[at % len(body) : at % len(body) + len(content)] = content
    for name, decode in decoders().items():
        try:
            decoded = decode(bytes(body))
        except Malformed as refusal:
            assert str(refusal), name
        else:
            for row in decoded.rows:
                assert len(row.trace_id) == 16 and len(row.span_id) == len(row.parent) == 8
                if "logs" not in name:
                    jaeger_json.write_trace([span(row)])
                    zipkin.write_span(span(row))
