"""The API server is killed while clients write: what it acknowledged is there, and revisions go on."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from apiserver import ApiServer

ROUNDS, WRITERS = 5, 16
MAPS = "/api/v1/namespaces/default/configmaps"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    made = ApiServer(tmp_path)
    made.start()
    yield made
    made.stop()


def session(server: ApiServer) -> aiohttp.ClientSession:
    """Connections with the administrator's certificate."""
    pki = server.state / "pki"
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    base = f"https://127.0.0.1:{server.port}"
    patience = aiohttp.ClientTimeout(total=60, sock_read=3, sock_connect=3)
    return aiohttp.ClientSession(base, connector=aiohttp.TCPConnector(ssl=context, limit=0), timeout=patience)


async def test_what_was_acknowledged_survives_kill_9(server: ApiServer) -> None:
    alive: dict[str, str] = {}  # name: the resourceVersion that was acknowledged
    uncertain: set[str] = set()
    highest, number, goal = 0, 0, 0
    enough = asyncio.Event()

    async def write(client: aiohttp.ClientSession) -> None:
        nonlocal highest, number
        while True:
            number += 1
            name = f"c-{number}"
            uncertain.add(name)
            try:
                async with client.post(MAPS, json={"metadata": {"name": name}}) as answer:
                    body = await answer.json()
                    assert answer.status == 201, body
                alive[name] = body["metadata"]["resourceVersion"]
                highest = max(highest, int(alive[name]))
                uncertain.discard(name)
                if len(alive) >= goal:
                    enough.set()
                if random.random() < 0.2:
                    gone = random.choice(list(alive))
                    uncertain.add(gone)
                    del alive[gone]
                    async with client.delete(f"{MAPS}/{gone}") as answer:
                        assert answer.status in (200, 404)
                    uncertain.discard(gone)
            except (aiohttp.ClientError, ConnectionError):
                return

    for _ in range(ROUNDS):
        enough.clear()
        goal = len(alive) + 100
        async with session(server) as client:
            writers = [asyncio.create_task(write(client)) for _ in range(WRITERS)]
            await enough.wait()
            server.kill()
            for writer in writers:  # what is under way when the server dies has no answer
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)
        server.start()
        async with session(server) as client, client.get(MAPS) as answer:
            listed = await answer.json()
        found = {i["metadata"]["name"]: i["metadata"]["resourceVersion"] for i in listed["items"]}
        found.pop("kube-root-ca.crt", None)
        assert alive.items() <= found.items(), "an acknowledged write is lost or changed"
        assert found.keys() <= alive.keys() | uncertain, "a deleted object is back"
        assert int(listed["metadata"]["resourceVersion"]) >= highest, "revisions went back"
        alive, uncertain = dict(found), set()


async def test_a_watch_resumes_across_a_crash_without_a_gap(server: ApiServer) -> None:
    async with session(server) as client:
        async with client.get(MAPS) as answer:
            version = (await answer.json())["metadata"]["resourceVersion"]
        for name in "abc":
            await (await client.post(MAPS, json={"metadata": {"name": name}})).read()
    server.kill()
    server.start()
    async with session(server) as client:
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "20"}
        seen = []
        async with client.get(MAPS, params=query) as stream:
            async for line in stream.content:
                seen.append(line.partition(b'"name":"')[2].partition(b'"')[0].decode())
                if len(seen) == 3:
                    break
    assert seen == ["a", "b", "c"]
