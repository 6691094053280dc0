"""The data path under fire: every byte is checked at both ends, whatever happens around the streams.

All traffic runs in one event loop over sockets that were made inside the pods. A transfer says in a
header how much each way and from where in a known block; each end sends its part, half-closes, and
checks what it got.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable

from dataplane import STRICT, Mesh, Ztunnel
from lab import Pod, echo, load, read, wait_until

from meshlight.node import netns

MIB = 1 << 20
_ONCE = hashlib.shake_256(b"torture").digest(MIB)
BLOCK = _ONCE + _ONCE
HEADER = struct.Struct("!QQIff")


def payload(seed: int, position: int, count: int) -> bytes:
    """Bytes `position .. position+count` of the stream of a seed; at most 1 MiB at a time."""
    start = (seed + position) % MIB
    return BLOCK[start : start + count]


class Wrong(Exception):
    """A stream was not what it should be."""


async def write(writer: asyncio.StreamWriter, seed: int, count: int, pause: float) -> None:
    position = 0
    while position < count:
        piece = min(1 << 18, count - position)
        writer.write(payload(seed, position, piece))
        await writer.drain()
        position += piece
        if pause:
            await asyncio.sleep(pause)
    writer.write_eof()


async def check(reader: asyncio.StreamReader, seed: int, count: int, pause: float) -> None:
    position = 0
    while data := await reader.read(1 << 17):
        if data != payload(seed, position, len(data)):
            raise Wrong(f"other bytes at {position} of {count}")
        position += len(data)
        if pause:
            await asyncio.sleep(pause)
    if position != count:
        raise Wrong(f"ended after {position} of {count}")


class Service:
    """Answers transfers in a pod."""

    def __init__(self, pod: Pod, port: int = 9000) -> None:
        self.pod, self.port = pod, port
        self.errors: list[str] = []
        self.listener = pod.inside(lambda: socket.create_server(("", port), backlog=4096))

    async def start(self) -> Service:
        await asyncio.start_server(self._serve, sock=self.listener, limit=1 << 17, backlog=4096)
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            header = await reader.readexactly(HEADER.size)
            up, down, seed, read_pause, write_pause = HEADER.unpack(header)
            await asyncio.gather(
                check(reader, seed, up, read_pause), write(writer, seed + 1, down, write_pause)
            )
        except asyncio.IncompleteReadError:
            pass
        except (OSError, Wrong) as error:
            self.errors.append(repr(error))
            writer.transport.abort()
        finally:
            writer.close()


async def connect(
    pod: Pod, service: Service, *, bound: float = 60, window: int = 0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    def make() -> socket.socket:
        made = socket.socket()
        if window:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        made.setblocking(False)
        return made

    stream = pod.inside(make)
    loop = asyncio.get_running_loop()
    await asyncio.wait_for(loop.sock_connect(stream, (service.pod.address, service.port)), bound)
    return await asyncio.open_connection(sock=stream, limit=1 << 17)


async def transfer(
    pod: Pod, service: Service, up: int, down: int, *, pauses: tuple[float, float, float, float] = (0, 0, 0, 0)
) -> None:
    """One checked exchange; pauses of the client's reading and writing, then the server's."""
    seed = random.randrange(MIB)
    reader, writer = await connect(pod, service)
    try:
        writer.write(HEADER.pack(up, down, seed, pauses[2], pauses[3]))
        await asyncio.gather(write(writer, seed, up, pauses[1]), check(reader, seed + 1, down, pauses[0]))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def size(largest: int = 64 * MIB) -> int:
    """A random size: often none, often small, now and then the largest."""
    kind = random.random()
    if kind < 0.1:
        return 0
    if kind > 0.99:
        return largest
    return int(2 ** random.uniform(0, (largest.bit_length() - 1) * (1 if kind > 0.9 else 0.8)))


async def many(work: Callable[[], Awaitable[None]], *, count: int, at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with gate:
            await work()

    await asyncio.gather(*(one() for _ in range(count)))


def scene(**environment: str) -> tuple[Mesh, Pod, Pod]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    random.seed(4)
    mesh = Mesh(environment)
    client, server = mesh.pod(0, "client", account="client"), mesh.pod(1, "server", account="server")
    mesh.settle()
    return mesh, client, server


def sizes() -> None:
    """Random sizes, both directions at once, slow readers and writers among them."""
    _, client, server = scene()

    async def body() -> None:
        there, back = await Service(server).start(), await Service(client).start()

        async def one() -> None:
            pauses = [0.0, 0.0, 0.0, 0.0]
            largest = 64 * MIB
            if random.random() < 0.3:
                pauses[random.randrange(4)] = 0.002
                largest = 8 * MIB
            pod, service = random.choice([(client, there), (server, back)])
            await transfer(pod, service, size(largest), size(largest), pauses=tuple(pauses))  # type: ignore[arg-type]

        await many(one, count=400, at_once=48)
        await transfer(client, there, 64 * MIB, 64 * MIB)
        assert not there.errors and not back.errors, (there.errors, back.errors)

    asyncio.run(body())


def crowds() -> None:
    """A thousand connections at the same moment; thousands that stay idle, and still work afterwards."""
    mesh, client, server = scene()

    async def body() -> None:
        service = await Service(server).start()
        before = mesh.proxies[0].rss() + mesh.proxies[1].rss()
        idle = []
        for _ in range(20):
            idle += await asyncio.gather(*(connect(client, service) for _ in range(100)))
        opened = "istio_tcp_connections_opened_total"
        wait_until(lambda: mesh.proxies[1].metric(opened, reporter="destination") >= 2000, "idle connections")
        grown = (mesh.proxies[0].rss() + mesh.proxies[1].rss() - before) / 2000
        assert grown < 64 << 10, f"{grown / 1024:.1f} KiB for each idle connection"
        await many(lambda: transfer(client, service, 3000, 5000), count=1000, at_once=1000)
        for reader, writer in idle:
            writer.write(HEADER.pack(100, 200, 7, 0, 0))
            writer.write(payload(7, 0, 100))
            writer.write_eof()
            await check(reader, 8, 200, 0)
            writer.close()
        assert not service.errors, service.errors[:3]

    asyncio.run(body())


def stalls() -> None:
    """Readers that do not read hold up nobody else, cost bounded memory, and get everything in the end."""
    mesh, client, server = scene()

    async def body() -> None:
        service = await Service(server).start()
        lazy = await Service(server, 9001).start()
        await transfer(client, service, MIB, MIB)
        before = [proxy.rss() for proxy in mesh.proxies]
        stalled = []

        async def stall(count: int, amount: int) -> None:
            for _ in range(count):
                seed = random.randrange(MIB)
                reader, writer = await connect(client, lazy, window=8 << 10)
                # Nobody reads these answers for now.
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(HEADER.pack(0, amount, seed, 0, 0))
                stalled.append((reader, writer, seed, amount))

        await stall(30, 6 * MIB)
        await _quiet(mesh)
        # These share their connection, and are not held up.
        for _ in range(20):
            await asyncio.wait_for(transfer(client, service, MIB, 2 * MIB), 20)
        await stall(970, MIB)
        await _quiet(mesh)
        grown = [(proxy.rss() - was) / MIB for proxy, was in zip(mesh.proxies, before, strict=True)]
        assert sum(grown) < 300, f"{grown} MiB more for {len(stalled)} stalled connections"
        await asyncio.wait_for(transfer(client, service, 2 * MIB, 2 * MIB), 20)

        async def finish(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seed: int, amount: int
        ) -> None:
            reader._transport.resume_reading()  # type: ignore[attr-defined]
            writer.write_eof()
            await check(reader, seed + 1, amount, 0)
            writer.close()

        for one in stalled[:25]:
            await finish(*one)
        for _, writer, *_ in stalled[25:]:
            writer.transport.abort()
        await _quiet(mesh)
        await transfer(client, service, 2 * MIB, 2 * MIB)
        assert not service.errors, service.errors

    asyncio.run(body())


async def _quiet(mesh: Mesh) -> None:
    """Until no more bytes move."""
    moved = [-1.0]

    def still() -> bool:
        moved.append(mesh.proxies[1].metric("istio_tcp_sent_bytes_total", reporter="destination"))
        time.sleep(0.3)
        return moved[-2] == moved[-1]

    await asyncio.to_thread(wait_until, still, "the streams to stall", 60)


def changes() -> None:
    """Certificates are replaced and policies change under streams, long and short: nothing is lost."""
    mesh, client, server = scene(SECRET_TTL="4s")
    allow = {
        "name": "from-client",
        "namespace": "shop",
        "scope": "namespace",
        "rules": [[[{"principals": ["cluster.local/ns/shop/sa/client"]}]]],
    }
    unrelated = {**allow, "name": "unrelated", "rules": [[[{"destinationPorts": [1]}]]]}
    stop = threading.Event()

    def flip() -> None:
        for policies in [[], [allow], [STRICT, allow], [allow, unrelated], [STRICT]] * 100:
            if stop.wait(0.15):
                return
            mesh.policies = policies
            mesh.publish()

    async def body() -> None:
        service = await Service(server).start()
        thread = threading.Thread(target=flip)
        thread.start()
        slow = [
            asyncio.create_task(transfer(client, service, 6 * MIB, 6 * MIB, pauses=(0.25, 0.35, 0.2, 0.3)))
            for _ in range(8)
        ]
        while not all(task.done() for task in slow):
            await transfer(client, service, size(MIB), size(MIB))
        await asyncio.gather(*slow)
        stop.set()
        thread.join()
        assert not service.errors, service.errors[:3]

    asyncio.run(body())
    for proxy in mesh.proxies:
        assert proxy.log.read_text().count("certificate issued") >= 3
    assert mesh.proxies[1].metric("istio_tcp_connections_failed_total") == 0


def cut_links() -> None:
    """A link that carries nothing for a moment delays and loses nothing."""
    mesh, client, server = scene()
    node = mesh.nodes[1]

    def cut() -> None:
        rules = "table ip cut { chain forward { type filter hook forward priority -10; policy drop; }; }"
        node.inside(lambda: netns.nft(rules))

    def mend() -> None:
        node.inside(lambda: netns.nft("delete table ip cut"))

    async def body() -> None:
        service = await Service(server).start()
        transfers = [
            asyncio.create_task(transfer(client, service, 8 * MIB, 8 * MIB, pauses=(0.02, 0.02, 0, 0)))
            for _ in range(10)
        ]
        for _ in range(3):
            await asyncio.sleep(0.2)
            await asyncio.to_thread(cut)
            await asyncio.sleep(0.4)
            await asyncio.to_thread(mend)
        await asyncio.gather(*transfers)
        assert not service.errors, service.errors

    asyncio.run(body())


def killed_peers() -> None:
    """A proxy that dies takes its streams with it, by reset, never by an early end; the next serves."""
    mesh, client, server = scene()

    async def body() -> None:
        service = await Service(server).start()
        for index in (1, 0):
            tasks = [
                asyncio.create_task(transfer(client, service, 64 * MIB, 64 * MIB, pauses=(0.01, 0.01, 0, 0)))
                for _ in range(8)
            ]
            await asyncio.sleep(0.5)
            mesh.proxies[index].kill()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, OSError) for result in results), results
            assert not [error for error in service.errors if "Wrong" in error], service.errors
            mesh.proxies[index] = await asyncio.to_thread(mesh.start, index)
            await asyncio.to_thread(_until_serving, mesh.proxies[index])
            await transfer(client, service, MIB, MIB)
            service.errors.clear()
        await many(lambda: transfer(client, service, size(MIB), size(MIB)), count=100, at_once=20)
        assert not service.errors, service.errors

    asyncio.run(body())


def handover() -> None:
    """A proxy is replaced under load, on either node: what is open goes on, what is new goes to the next."""
    mesh, client, server = scene(TERMINATION_GRACE_PERIOD_SECONDS="60")

    async def body() -> None:
        service = await Service(server).start()
        server.serve(80)
        held = [await asyncio.to_thread(client.connect, server.address, 80) for _ in range(5)]
        for stream in held:
            await asyncio.to_thread(read, stream)
        slow = asyncio.create_task(transfer(client, service, 4 * MIB, 4 * MIB, pauses=(0.2, 0.2, 0.2, 0.2)))
        old = []
        with load(lambda: client.ask(server.address, 80)) as failures:
            for index in (0, 1):
                newer = await asyncio.to_thread(mesh.start, index)
                await asyncio.to_thread(_until_serving, newer)
                mesh.proxies[index].terminate()
                old.append(mesh.proxies[index])
                mesh.proxies[index] = newer
                await many(lambda: transfer(client, service, size(MIB), size(MIB)), count=100, at_once=20)
        assert not failures, failures[:3]
        for stream in held:
            await asyncio.to_thread(echo, stream, "through both")
        await slow
        assert not service.errors, service.errors
        for proxy in old:
            assert proxy.process.poll() is None, "it stays for what it carries"
            assert '"successor":true' in proxy.log.read_text()
        for stream in held:
            stream.close()
        for proxy in old:
            assert await asyncio.to_thread(proxy.process.wait, 20) == 0, "and no longer"
        # Without a successor nobody else would answer: it serves to the end, which comes soon.
        last = mesh.proxies[0]
        held = [await asyncio.to_thread(client.connect, server.address, 80)]
        last.terminate()
        await asyncio.to_thread(wait_until, lambda: "draining" in last.log.read_text(), "the signal")
        await transfer(client, service, MIB, MIB)
        held[0].close()
        assert await asyncio.to_thread(last.process.wait, 20) == 0

    asyncio.run(body())


def _until_serving(proxy: Ztunnel) -> None:
    wait_until(lambda: proxy.metric("workload_manager_active_proxy_count") == 1, "the pod to be served")
