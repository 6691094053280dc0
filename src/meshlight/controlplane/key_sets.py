"""JSON Web Key Sets that RequestAuthentications name by `jwksUri`: fetched here, not by the proxies.

As in Istio: every key set is fetched when it is first needed and again every 20 minutes; one that cannot be
fetched is tried again after a growing pause, and the last one that could be stays in force.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from meshlight.controlplane.logs import Scope

REFRESH_SECONDS = 20 * 60.0
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 60.0
LARGEST = 1 << 20
TIMEOUT_SECONDS = 5.0

Fetch = Callable[[str], Awaitable[str]]
log = Scope("jwks")


def unusable() -> str:
    """A key set with a public key whose private key is gone: no token verifies with it."""
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()))
    return json.dumps({"keys": [{**public, "alg": "ES256", "kid": "unusable"}]})


def checked(text: str) -> str:
    """A key set's text; raises ValueError when it is none."""
    keys = json.loads(text).get("keys") if text.lstrip().startswith("{") else None
    if (
        not isinstance(keys, list)
        or not keys
        or not all(isinstance(key, dict) and "kty" in key for key in keys)
    ):
        raise ValueError("not a JSON Web Key Set with at least one key")
    return text


async def fetch(uri: str) -> str:
    """GET the key set; raises aiohttp.ClientError, TimeoutError or ValueError."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(uri) as answer:
        answer.raise_for_status()
        content = await answer.content.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"larger than {LARGEST} bytes")
        return checked(content.decode())


class KeySets:
    """Keeps the key sets that are wanted; `changed` hears of each that is new or different."""

    def __init__(self, changed: Callable[[str, str], None], fetch: Fetch = fetch) -> None:
        self._changed, self._fetch = changed, fetch
        self._wanted: set[str] = set()
        self._update = asyncio.Event()

    def want(self, uris: set[str]) -> None:
        """Say which are needed from now on."""
        if uris != self._wanted:
            self._wanted = set(uris)
            self._update.set()

    async def run(self) -> None:
        """Fetch until cancelled."""
        following: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                for uri in [uri for uri in following if uri not in self._wanted]:
                    following.pop(uri).cancel()
                for uri in self._wanted - following.keys():
                    following[uri] = group.create_task(self._follow(uri))
                await self._update.wait()
                self._update.clear()

    async def _follow(self, uri: str) -> None:
        known, retry = "", FIRST_RETRY_SECONDS
        while True:
            try:
                text = await self._fetch(uri)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                log.warn("key set not fetched", uri=uri, error=str(error) or type(error).__name__, retry=retry)
                await asyncio.sleep(retry)
                retry = min(retry * 2, LONGEST_RETRY_SECONDS)
                continue
            retry = FIRST_RETRY_SECONDS
            if text != known:
                known = text
                self._changed(uri, text)
            await asyncio.sleep(REFRESH_SECONDS)
