"""Columns and parts: what goes in comes out; damage is found; queries agree with a plain loop."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tracing_spans import START, made, rows, spans

from meshlight.tracing.model import Span, text
from meshlight.tracing.rows import Row, row, span
from meshlight.tracing.store import blocks, reading
from meshlight.tracing.store.blocks import Bloom, Damaged
from meshlight.tracing.store.columns import concatenate, from_rows
from meshlight.tracing.store.part import BlockCache, Part
from meshlight.tracing.store.part_writer import encode, pack_values, unpack_values
from meshlight.tracing.store.search import Query, Recent, Source, match


def part(of: list[Row], number: int = 1) -> Part:
    return Part(number, encode(from_rows(of).sorted()), BlockCache(1 << 20))


def contents(of: list[Row]) -> Counter[object]:
    return Counter((*r[:8], tuple(r.attributes), r.extra) for r in of)


@settings(max_examples=50, deadline=None, phases=[Phase.generate])
@given(st.lists(spans(), min_size=1, max_size=12))
def test_a_span_comes_back_equal_from_rows_tables_and_parts(of: list[Span]) -> None:
    given_rows = [row(s) for s in of]
    assert [span(r) for r in given_rows] == of
    whole = part(given_rows)
    assert contents(whole.rows(np.arange(len(of)))) == contents(given_rows)
    assert contents(whole.columns().rows(np.arange(len(of)))) == contents(given_rows)
    for wanted in {r.trace_id for r in given_rows}:
        found = whole.rows(whole.positions(wanted))
        assert contents(found) == contents([r for r in given_rows if r.trace_id == wanted])


@settings(max_examples=20, deadline=None, phases=[Phase.generate])
@given(st.lists(spans(), min_size=1, max_size=8), st.lists(spans(), min_size=1, max_size=8))
def test_merging_parts_keeps_everything(one: list[Span], other: list[Span]) -> None:
    both = [[row(s) for s in one], [row(s) for s in other]]
    merged = concatenate([part(both[0]).columns(), part(both[1]).columns()])
    again = Part(3, encode(merged.sorted()), BlockCache(1 << 20))
    assert contents(again.rows(np.arange(again.records))) == contents(both[0] + both[1])


def test_many_chunks_and_keys_repeated_within_a_span() -> None:
    generator = random.Random(3)
    of = []
    for i in range(40_000):
        pairs = {f"k{generator.randrange(40)}": generator.choice(["a", i, 0.5]) for _ in range(3)}
        of.append(row(made(i // 7 + 1, i % 7 + 1, max(0, i % 7 - 1), at=i, attributes=pairs)))
    of[5] = of[5]._replace(attributes=[of[5].attributes[0], *of[5].attributes])
    whole = part(of)
    picked = np.array([39_999, 5, 17_000, 16_383, 16_384, 5])
    ordered = whole.columns().rows(np.arange(40_000))
    assert contents(ordered) == contents(of)
    assert whole.rows(picked) == [ordered[i] for i in picked.tolist()]


def test_more_keys_than_columns() -> None:
    of = [row(made(i + 1, 1, attributes={f"key-{i}-{j}": "v" for j in range(4)})) for i in range(600)]
    whole = part(of)
    assert contents(whole.rows(np.arange(600))) == contents(of)
    assert len(whole.attribute(b"key-599-3", "v")) == 1
    assert len(whole.attribute(b"key-599-3", "w")) == 0


@given(st.lists(st.text("0123456789abcdef-", min_size=36, max_size=36), min_size=32, max_size=40))
def test_hexadecimal_values_are_packed_and_come_back(of: list[str]) -> None:
    encoded = [b"\x0a\x24" + value.encode() for value in of]
    assert unpack_values(pack_values(encoded)) == encoded


@given(st.lists(st.integers(0, (1 << 64) - 1)))
def test_integers_come_back(of: list[int]) -> None:
    numbers = np.array(of, np.uint64)
    assert blocks.unpack(blocks.pack(numbers)).astype(np.uint64).tolist() == of
    small = numbers & np.uint64((1 << 40) - 1)
    assert blocks.unpack(blocks.pack(small, delta=True)).astype(np.uint64).tolist() == small.tolist()
    signed = (numbers >> np.uint64(2)).astype(np.int64) - (1 << 61)
    assert blocks.unpack_signed(blocks.pack_signed(signed)).tolist() == signed.tolist()


@given(st.sets(st.integers(0, (1 << 32) - 1)))
def test_a_bloom_filter_never_denies_what_it_holds(of: set[int]) -> None:
    bloom = Bloom.of(np.array(sorted(of), np.uint64))
    assert all(value in bloom for value in of)


def test_a_flipped_byte_is_found_wherever_it_lies() -> None:
    content = encode(from_rows(rows(*(made(i + 1, 1, attributes={"a": str(i)}) for i in range(50)))).sorted())
    for at in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        with pytest.raises(Damaged):
            Part(1, bytes(flipped), BlockCache(1 << 20)).verify()
    for length in (0, 3, 40, len(content) - 1):
        with pytest.raises(Damaged):
            Part(1, content[:length], BlockCache(1 << 20)).verify()


QUERIES = [
    Query(),
    Query(service="b"),
    Query(service="nobody"),
    Query(operation="two", kind=2),
    Query(tags=(("code", "500"),)),
    Query(tags=(("code", "500"), ("zone", "x"))),
    Query(tags=(("error", "true"),), service="a"),
    Query(tags=(("span.kind", "server"),)),
    Query(failed=False, shortest=3_000_000),
    Query(after=START + 40_000_000, before=START + 90_000_000),
    Query(longest=2_000_000, operation="one"),
    Query(text="NEEDLE"),
    Query(text="zone=x"),
]


def plain_match(of: Span, query: Query) -> bool:
    everything = {**of.resource.attributes, **of.attributes}
    shown = {k: text(v) for k, v in everything.items()} | {"error": "true" if of.failed else "false"}
    shown |= {"span.kind": ("", "internal", "server", "client")[of.kind]}
    joined = " ".join([of.name, *(f"{k}={text(v)}" for k, v in everything.items())]).lower()
    return (
        query.service in ("", of.service)
        and query.operation in ("", of.name)
        and query.kind in (None, of.kind)
        and all(shown.get(k) == v for k, v in query.tags)
        and (query.after is None or of.start >= query.after)
        and (query.before is None or of.start < query.before)
        and (query.shortest is None or of.duration >= query.shortest)
        and (query.longest is None or of.duration <= query.longest)
        and query.failed in (None, of.failed)
        and query.text.lower() in joined
    )


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_queries_find_what_a_plain_loop_finds(query: Query) -> None:
    generator = random.Random(11)
    of = []
    for i in range(300):
        attributes = {"code": generator.choice([200, 500]), "n": "needle" if i % 50 == 0 else "hay"}
        one = made(
            i + 1, 1, service=generator.choice("ab"), at=generator.randrange(100), ms=generator.randrange(1, 6),
            name=generator.choice(["one", "two"]), kind=generator.choice([1, 2, 3]), attributes=attributes,
            status_code=generator.choice([0, 0, 2]),
        )  # fmt: skip
        one.resource.attributes["zone"] = generator.choice("xy")
        of.append(one)
    wanted = {s.trace_id for s in of if plain_match(s, query)}
    for source in (part(rows(*of)), Recent(from_rows(rows(*of)))):
        assert set(source.trace_ids(match(source, query))) == wanted


def test_the_newest_traces_come_first_across_sources() -> None:
    sources: list[Source] = [
        part(rows(*(made(n * 10 + i, 1, at=n * 100 + i * 7) for i in range(1, 9))), n) for n in range(5)
    ]
    found = reading.find(sources, Query(limit=10), set())
    every = sorted(((n * 100 + i * 7, n * 10 + i) for n in range(5) for i in range(1, 9)), reverse=True)
    assert found == [i.to_bytes(16, "big") for _, i in every[:10]]
    hidden = {found[0]}
    assert reading.find(sources, Query(limit=10), hidden)[0] == found[1]


def test_dependencies_are_counted_once_within_and_across_parts() -> None:
    inside = rows(made(1, 1, service="a"), made(1, 2, 1, service="b"), made(1, 3, 2, service="b"))
    split_1 = rows(made(2, 1, service="a"), made(2, 2, 1, service="b"))
    split_2 = rows(made(2, 3, 2, service="c"), made(3, 1, 99, service="c"))
    shared = rows(
        made(4, 1, service="a", kind=3), made(4, 1, service="d", kind=2), made(4, 2, 1, service="e", at=0.1)
    )
    sources: list[Source] = [part(inside, 1), part(split_1, 2), part(split_2, 3), Recent(from_rows(shared))]
    graph = reading.Dependencies()
    wanted = Counter({("a", "b"): 2, ("b", "c"): 1, ("a", "d"): 1, ("d", "e"): 1})
    for _ in range(2):
        assert graph.between(sources, 0, 1 << 62) == wanted
    merged = concatenate([s.columns() for s in sources])
    assert graph.between([Part(9, encode(merged.sorted()), BlockCache(1 << 20))], 0, 1 << 62) == wanted
    assert graph.between(sources, START + 10**12, 1 << 62) == Counter()
