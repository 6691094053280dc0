"""Acknowledged means kept: kill -9, full disks, damaged files, backups, memory mode, clusters of stores."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tracing_server import Server

from meshlight.tracing.model import Resource, Span
from meshlight.tracing.otlp import encode_spans


def batch(count: int, service: str, per_trace: int = 4) -> tuple[list[str], bytes]:
    """Trace ids and a request with some traces."""
    now = time.time_ns()
    ids, spans = [], []
    resource = Resource({"service.name": service})
    for _ in range(count):
        trace = uuid4().bytes
        ids.append(trace.hex())
        for i in range(1, per_trace + 1):
            parent = (i - 1).to_bytes(8, "big") if i > 1 else b""
            spans.append(
                Span(trace, i.to_bytes(8, "big"), parent, f"op{i}", now, now + i * 1000, resource=resource)
            )
    return ids, encode_spans(spans)


def send(server: Server, body: bytes) -> int:
    return server.post("otlp-http", "/v1/traces", body, Content_Type="application/x-protobuf").status


def present(server: Server, ids: list[str], per_trace: int = 4) -> int:
    """How many traces are there, whole."""
    whole = 0
    for at in range(0, len(ids), 100):
        query = "&".join(f"traceID={i}" for i in ids[at : at + 100])
        whole += sum(
            len(t["spans"]) == per_trace for t in server.get("query", f"/api/traces?{query}").json["data"]
        )
    return whole


def test_what_was_acknowledged_survives_kills_while_sending(own_server: Server) -> None:
    acknowledged: list[str] = []
    for _ in range(3):
        own_server.start()
        stop = threading.Event()

        def keep_sending(until: threading.Event = stop) -> None:
            while not until.is_set():
                ids, body = batch(50, "kill")
                try:
                    if send(own_server, body) == 200:
                        acknowledged.extend(ids)
                except OSError:
                    return

        senders = [threading.Thread(target=keep_sending) for _ in range(3)]
        before = len(acknowledged)
        for sender in senders:
            sender.start()
        while len(acknowledged) < before + 1000:
            time.sleep(0.01)
        own_server.kill()
        stop.set()
        for sender in senders:
            sender.join()
    own_server.start()
    assert present(own_server, acknowledged) == len(acknowledged) >= 3000


def test_a_torn_log_and_a_damaged_part_lose_only_themselves(own_server: Server, tmp_path: Path) -> None:
    own_server.start()
    first, body = batch(20, "first")
    assert send(own_server, body) == 200
    assert own_server.stop() == 0
    own_server.start()
    second, body = batch(20, "second")
    assert send(own_server, body) == 200
    own_server.kill()
    folder = tmp_path / "store" / "spans"
    (log,) = folder.glob("*.wal")
    with log.open("ab") as file:
        file.write(b"\x99" * 37)
    (part,) = folder.glob("*.part")
    content = bytearray(part.read_bytes())
    content[200] ^= 0xFF
    part.write_bytes(content)
    own_server.start()
    assert present(own_server, second) == 20
    assert present(own_server, first) == 0
    assert list((folder / "damaged").iterdir())
    assert (
        'meshlight_tracing_damaged_files{collection="spans"} 1.0'
        in own_server.get("admin", "/metrics").body.decode()
    )
    assert "damaged file" in own_server.log.read_text()


def test_backup_and_restore_while_running(own_server: Server, tmp_path: Path) -> None:
    own_server.start()
    ids, body = batch(30, "kept")
    assert send(own_server, body) == 200
    answer = own_server.post("admin", f"/backup?dir={tmp_path}/copy", b"")
    assert answer.status == 200 and answer.json["records"] == 120
    assert own_server.post("admin", f"/backup?dir={tmp_path}/copy", b"").status == 409
    other = Server(["--storage", str(tmp_path / "other")], tmp_path / "log2").start()
    try:
        assert other.post("admin", f"/restore?dir={tmp_path}/copy", b"").json["records"] == 120
        assert present(other, ids) == 30
    finally:
        other.stop()


def test_a_folder_belongs_to_one_server(own_server: Server, tmp_path: Path) -> None:
    own_server.start()
    with pytest.raises(AssertionError, match="in use by another tracing server"):
        Server(["--storage", str(tmp_path / "store")], tmp_path / "log2").start()


def test_in_memory_the_oldest_traces_go_first(tmp_path: Path) -> None:
    server = Server(["--memory", "--max-traces", "100"], tmp_path / "log").start()
    try:
        ids: list[str] = []
        for _ in range(30):
            more, body = batch(10, "memory")
            ids += more
            assert send(server, body) == 200
        assert present(server, ids[-100:]) == 100
        assert present(server, ids[:-100]) == 0
        found = server.get("query", "/api/traces?service=memory&limit=1000").json["data"]
        assert len(found) == 100
    finally:
        server.stop()


def test_a_cluster_of_stores_by_url(tmp_path: Path) -> None:
    stores = [Server(["--storage", str(tmp_path / f"s{n}")], tmp_path / f"log{n}").start() for n in range(2)]
    front = Server(["--storage", ",".join(s.url("query") for s in stores)], tmp_path / "log")
    try:
        front.start()
        ids, body = batch(40, "spread")
        assert send(front, body) == 200
        assert present(front, ids) == 40
        shares = [present(s, ids) for s in stores]
        assert sum(shares) == 40 and all(shares)
        assert len(front.get("query", "/api/traces?service=spread&limit=10").json["data"]) == 10
        assert front.get("query", "/api/services").json["data"] == ["spread"]
        base = f"service=spread&endTs={time.time_ns() // 10**6 + 1000}&lookback=60000&step=60000&ratePer=60000"
        metrics: Any = front.get("query", f"/api/metrics/calls?{base}&spanKind=internal").json
        assert metrics["metrics"] == []
        stores[1].kill()
        refused = front.post("otlp-http", "/v1/traces", body, Content_Type="application/x-protobuf")
        assert refused.status == 429 and refused.headers["Retry-After"]
        assert front.get("query", "/api/services").status == 503
    finally:
        for server in [front, *stores]:
            if server.process is not None and server.process.poll() is None:
                server.stop()


def test_a_trace_of_a_hundred_thousand_spans(server: Server) -> None:
    trace, now = uuid4().bytes, time.time_ns()
    resource = Resource({"service.name": "huge"})
    for base in range(0, 100_000, 20_000):
        ids = [(i + 1).to_bytes(8, "big") for i in range(base, base + 20_000)]
        parents = [i.to_bytes(8, "big") if i else b"" for i in range(base, base + 20_000)]
        spans = [
            Span(trace, identity, parent, "op", now + i, now + 200_000, resource=resource)
            for i, (identity, parent) in enumerate(zip(ids, parents, strict=True), base)
        ]
        assert send(server, encode_spans(spans)) == 200
    found = json.loads(server.get("query", f"/api/traces/{trace.hex()}").body)["data"][0]
    assert len(found["spans"]) == 100_000
    assert server.get("query", f"/trace/{trace.hex()}").status == 200
