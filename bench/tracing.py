"""Measure the tracing server: spans accepted durably, bytes a span, memory, and latencies of queries.

    python bench/tracing.py [--seconds 20] [--fill 1000000]
    python bench/tracing.py --otlp http://HOST:4318 --query http://HOST:16686     another server too, as ratios

Spans are Istio-shaped: twelve tags, traces of six spans, random ids. Needs nothing that is not in the wheel.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from meshlight.tracing.model import Resource, Scope
from meshlight.tracing.otlp import encode_rows
from meshlight.tracing.rows import Form, Row, key_value, origin

SERVICES = [f"svc{i}.demo" for i in range(20)]
PER_TRACE = 6
SPANS = 1_000


class Requests:
    """OTLP requests of SPANS spans: templates whose ids, times and request ids are made new each time."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._templates = [self._template(random.Random(seed * 100 + i)) for i in range(24)]

    def _template(self, chance: random.Random) -> Any:
        rows, traces, spans, requests, times = [], [], [], [], []
        origins = [origin(Resource({"service.name": s}), Scope()) for s in SERVICES]
        at = 0
        for _ in range(SPANS // PER_TRACE + 1):
            trace, request = chance.randbytes(16), str(uuid.UUID(bytes=chance.randbytes(16)))
            known: list[bytes] = []
            at += chance.randrange(20_000, 200_000)
            for k in range(PER_TRACE):
                if len(rows) == SPANS:
                    break
                identity = chance.randbytes(8)
                s = chance.randrange(20)
                begin = 1_000_000_000_000_000_000 + len(rows)
                failed = chance.random() > 0.98
                attributes = {
                    "component": "proxy",
                    "node_id": f"waypoint~10.244.1.{s}~wp-{s}.demo~demo.svc.cluster.local",
                    "http.method": chance.choice(["GET", "POST"]),
                    "http.url": f"http://{SERVICES[s]}:8080/api/v1/items/{int(chance.expovariate(1 / 300))}",
                    "http.protocol": "HTTP/1.1",
                    "http.status_code": "503" if failed else "200",
                    "guid:x-request-id": request,
                    "request_size": str(chance.choice([0, 17, 120])),
                    "response_size": str(int(chance.expovariate(1 / 400))),
                    "user_agent": chance.choice(["python/3.11", "curl/8", "Mozilla/5.0 (X11)"]),
                    "upstream_cluster": f"inbound-vip|8080|http|{SERVICES[s]}.svc.cluster.local",
                    "response_flags": "UF" if failed else "-",
                }
                parent = chance.choice(known) if known else b"\0" * 8
                # The end is a marker of its own, so that both times of a span are found in the bytes.
                name = f"{SERVICES[s]}:8080/*".encode()
                pairs = [key_value(k, v) for k, v in attributes.items()]
                form = Form(chance.choice([2, 3]))
                rows.append(
                    Row(trace, identity, parent, begin, begin + (1 << 40), name, form, origins[s], pairs)
                )
                times.append(
                    (begin, at + k * chance.randrange(50_000, 900_000), int(chance.lognormvariate(8, 1)) * 1000)
                )
                known.append(identity)
                spans.append(identity)
            traces.append(trace)
            requests.append(request.encode())
        # As encode_rows orders them, so that every place lies behind the one before.
        order = sorted(range(SPANS), key=lambda i: (rows[i].origin.resource, rows[i].origin.scope))
        body = encode_rows(rows)
        number = {value: n for values in (traces, spans, requests) for n, value in enumerate(values)}
        places: dict[str, list[tuple[int, int]]] = {"trace": [], "span": [], "request": []}
        starts, ends, at = [], [], 0
        for i in order:
            row = rows[i]
            request = next(p for p in row.attributes if b"x-request-id" in p)[-36:]
            parent = [("span", row.parent)] if any(row.parent) else []
            for kind, value in (("trace", row.trace_id), ("span", row.span_id), *parent):
                at = body.index(value, at)
                places[kind].append((at, number[value]))
            starts.append(body.index(row.start.to_bytes(8, "little"), at))
            ends.append(body.index(row.end.to_bytes(8, "little"), at))
            at = body.index(request, at)
            places["request"].append((at, number[request]))
        when = np.array([(times[i][1], times[i][2]) for i in order], np.int64)
        found = (np.array(places[kind]).T for kind in ("trace", "span", "request"))
        array = np.frombuffer(body, np.uint8)
        return array, *found, np.array(starts), np.array(ends), when[:, 0], when[:, 1]

    def next(self) -> bytes:
        """A request that has not been before."""
        array, traces, spans, requests, starts, ends, offsets, durations = self._templates[
            int(self._random.integers(len(self._templates)))
        ]
        body = array.copy()
        for (places, which), width in ((traces, 16), (spans, 8)):
            fresh = self._random.integers(0, 256, (int(which.max()) + 1, width), np.uint8)
            body[places[:, None] + np.arange(width)] = fresh[which]
        places, which = requests
        digits = np.frombuffer(b"0123456789abcdef", np.uint8)
        fresh = digits[self._random.integers(0, 16, (int(which.max()) + 1, 36))]
        fresh[:, [8, 13, 18, 23]] = ord("-")
        body[places[:, None] + np.arange(36)] = fresh[which]
        begin = time.time_ns() // 1000 * 1000 + offsets // 1000 * 1000
        for at, values in ((starts, begin), (ends, begin + durations)):
            body[at[:, None] + np.arange(8)] = values.astype("<i8").view(np.uint8).reshape(-1, 8)
        return body.tobytes()


class Server:
    """The server under measurement: our own process, or another's endpoints."""

    def __init__(self, otlp: str, query: str, pid: int = 0, folder: Path | None = None) -> None:
        self.otlp, self.query, self.pid, self.folder = otlp, query, pid, folder

    def memory(self) -> int:
        """Resident MiB without mapped files (the page cache's), and the peak of all."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return int(fields["RssAnon"].split()[0]) // 1024

    def cpu(self) -> float:
        """CPU seconds used."""
        parts = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")

    def disk(self) -> int:
        """Bytes of parts."""
        return sum(p.stat().st_size for p in self.folder.rglob("*.part")) if self.folder else 0


async def load(server: Server, spans: int, seconds: float, connections: int = 4) -> tuple[int, float]:
    """Send until `spans` are accepted or `seconds` are over; returns spans and seconds."""
    accepted = 0
    began = time.perf_counter()

    async def one(number: int, session: aiohttp.ClientSession) -> None:
        nonlocal accepted
        requests = Requests(number + int(began))
        headers = {"Content-Type": "application/x-protobuf"}
        while accepted < spans and time.perf_counter() - began < seconds:
            body = requests.next()
            while True:
                async with session.post(server.otlp + "/v1/traces", data=body, headers=headers) as answer:
                    await answer.read()
                    if answer.status == 200:
                        accepted += SPANS
                        break
                    if answer.status not in (429, 503):
                        raise RuntimeError(f"{server.otlp} answers {answer.status}")
                await asyncio.sleep(0.05)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(n, session) for n in range(connections)))
    return accepted, time.perf_counter() - began


async def latencies(server: Server, rounds: int, pause: float = 0) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile in ms of each kind of query."""
    found: dict[str, list[float]] = {}
    async with aiohttp.ClientSession() as session:

        async def ask(name: str, path: str) -> Any:
            began = time.perf_counter()
            async with session.get(server.query + path) as answer:
                body = await answer.read()
            found.setdefault(name, []).append((time.perf_counter() - began) * 1000)
            return json.loads(body)["data"]

        for number in range(rounds):
            service = SERVICES[number % 20]
            tags = json.dumps({"http.status_code": "503"})
            await ask("search service", f"/api/traces?service={service}&limit=20&lookback=1h")
            traces = await ask(
                "search service+tag+duration",
                f"/api/traces?service={service}&limit=20&lookback=1h&minDuration=5ms&tags={tags}",
            )
            await ask(
                "search a value that is nowhere", f'/api/traces?service={service}&tags={{"user":"{number}"}}'
            )
            if traces:
                await ask("get by id", f"/api/traces/{traces[-1]['traceID']}")
            await ask("dependencies", "/api/dependencies?lookback=3600000")
            await asyncio.sleep(pause)
    return {
        name: (float(np.quantile(times, 0.5)), float(np.quantile(times, 0.99))) for name, times in found.items()
    }


async def measure(server: Server, arguments: argparse.Namespace) -> dict[str, float]:
    """All numbers of a server, printed as they come."""
    numbers: dict[str, float] = {}
    cpu = server.cpu() if server.pid else 0.0
    beside = asyncio.create_task(latencies(server, 10_000, 0.25))
    accepted, seconds = await load(server, 1 << 62, arguments.seconds)
    beside.cancel()
    numbers["spans/s, queries running"] = accepted / seconds
    if server.pid:
        numbers["spans/s a core"] = accepted / (server.cpu() - cpu)
        numbers["resident MiB under load"] = server.memory()
    if arguments.fill > accepted:
        more, _ = await load(server, arguments.fill - accepted, 3600)
        accepted += more
    await asyncio.sleep(3)
    if server.pid:
        numbers["bytes a span"] = server.disk() / accepted
    for name, (median, worst) in (await latencies(server, arguments.rounds)).items():
        numbers[f"{name} p50 ms"], numbers[f"{name} p99 ms"] = median, worst
    numbers["spans"] = accepted
    if server.pid:
        numbers["resident MiB after queries"] = server.memory()
    return numbers


def start(folder: Path) -> tuple[subprocess.Popen[bytes], Server]:
    """Our own server on ports of its own."""
    ports = {"otlp-http": 24318, "query": 26686, "admin": 24269}
    others = ("otlp-grpc", "zipkin", "jaeger-grpc", "jaeger-http", "sampling", "query-grpc", "health")
    flags = [f"--port={n}={p}" for n, p in (ports | dict.fromkeys(others, 0)).items()]
    command = [
        sys.executable,
        "-m",
        "meshlight.tracing",
        "--host",
        "127.0.0.1",
        "--storage",
        str(folder),
        *flags,
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    began = time.perf_counter()
    while time.perf_counter() - began < 60:
        try:
            import urllib.request

            urllib.request.urlopen("http://127.0.0.1:24269/").read()
            break
        except OSError:
            time.sleep(0.02)
    print(f"{'time to first answer, s':42} {time.perf_counter() - began:10.2f}")
    return process, Server("http://127.0.0.1:24318", "http://127.0.0.1:26686", process.pid, folder)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument(
        "--fill", type=int, default=1_000_000, help="spans in the store before queries are timed"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--otlp", help="another server's OTLP over HTTP, to compare with")
    parser.add_argument("--query", help="its query port")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-tracing"))
    process, own = start(folder)
    try:
        numbers = asyncio.run(measure(own, arguments))
        peer = (
            asyncio.run(measure(Server(arguments.otlp, arguments.query), arguments)) if arguments.otlp else {}
        )
    finally:
        process.terminate()
        process.wait()
    process, own = start(folder)  # with a full store
    process.terminate()
    process.wait()
    shutil.rmtree(folder)
    for name, value in numbers.items():
        ratio = f"   other {peer[name]:.1f}, ratio {value / peer[name]:.2f}" if peer.get(name) else ""
        print(f"{name:42} {value:10.1f}{ratio}")


if __name__ == "__main__":
    main()
