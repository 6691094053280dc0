"""Enforces NetworkPolicies on a node: follows the API, and keeps the kernel's table in step.

Pods and namespaces are followed only while there is a policy. A pod is isolated before its first process
runs: `protect` returns when the kernel has its rules.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools

from meshlight.controllers.workqueue import log
from meshlight.kube.client import Client
from meshlight.kube.resources import NAMESPACES, NETWORK_POLICIES, PODS, Object, Resource
from meshlight.node import netns
from meshlight.node.netns import NetworkError
from meshlight.node.network_policy import PolicyTable
from meshlight.node.policy_rules import TABLE, Wanted, change, cleanup, skeleton

_DEBOUNCE = 0.01
_RETRY, _RETRY_MOST = 0.1, 10.0


class KernelPolicies:
    """The table in the node's namespace; `state` is None while what it holds is not known."""

    def __init__(self) -> None:
        self.state: Wanted | None = None
        self._absent = True
        self._turn = asyncio.Lock()

    async def reach(self, table: PolicyTable) -> None:
        """Bring it to what the table wants. Raises NetworkError; what it holds is not known then."""
        async with self._turn:
            before, self.state = self.state, None
            if not table.needed:
                if not self._absent or before is None:
                    remove = f"add table {TABLE}\ndelete table {TABLE}\n"
                    await netns.within(None, functools.partial(netns.nft, remove))
                self._absent = True
                table.members(everything=True)
                self.state = Wanted()
                return
            fresh = before is None or self._absent
            wanted = table.wanted()
            added, removed = table.members(everything=fresh)
            # Sets that are new to the kernel are given all they have.
            known = Wanted() if fresh or before is None else before
            text = change(known, wanted, added, removed)
            if fresh:
                text = skeleton() + text
            if text:
                await netns.within(None, functools.partial(netns.nft, text))
            self._absent = False
            if remains := cleanup(known, wanted):
                await netns.within(None, functools.partial(netns.nft, remains))
            self.state = wanted


class Policies:
    """The policies of one node."""

    def __init__(self, client: Client, node: str) -> None:
        self._client = client
        self._table = PolicyTable(node)
        self._kernel = KernelPolicies()
        self._changed, self._synced, self._needed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._placed: dict[str, tuple[str, ...]] = {}
        self._complete = asyncio.Event()
        """Set while every pod and namespace that peers are chosen from is known."""

    async def run(self) -> None:
        """Enforce until cancelled. Raises ApiError when the API refuses us."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_policies())
            tasks.create_task(self._follow_peers())
            tasks.create_task(self._write())

    async def protect(self, pod: Object, addresses: tuple[str, ...]) -> None:
        """Return when the pod, at these addresses, is isolated as its policies say. Raises NetworkError."""
        await self._synced.wait()
        if not self._table.isolated(pod["metadata"]["namespace"]):
            return
        await self._complete.wait()
        self._placed[pod["metadata"]["uid"]] = addresses
        self._take_pod(pod, False)
        await self._kernel.reach(self._table)

    def _take_pod(self, pod: Object, deleted: bool) -> None:
        """A pod as the API has it, with the addresses that the node knows before the API does."""
        uid, status = pod["metadata"]["uid"], pod.get("status") or {}
        if deleted or status.get("podIP"):
            self._placed.pop(uid, None)
        elif addresses := self._placed.get(uid):
            status = {**status, "podIPs": [{"ip": address} for address in addresses]}
        self._table.pod({**pod, "status": status}, deleted)

    async def _follow_policies(self) -> None:
        async with contextlib.aclosing(self._client.watch(NETWORK_POLICIES)) as events:
            async for event in events:
                if event.type == "SYNCED":
                    self._synced.set()
                else:
                    self._table.policy(event.object, event.type == "DELETED")
                if self._table.needed:
                    self._needed.set()
                self._changed.set()

    async def _follow_peers(self) -> None:
        """From the first policy on; those who follow stay, because policies seldom come alone."""
        await self._needed.wait()
        synced: set[str] = set()

        async def follow(kind: Resource) -> None:
            take = self._table.namespace if kind is NAMESPACES else self._take_pod
            async with contextlib.aclosing(self._client.watch(kind)) as events:
                async for event in events:
                    if event.type == "SYNCED":
                        synced.add(kind.plural)
                        if len(synced) == 2:
                            self._complete.set()
                    else:
                        take(event.object, event.type == "DELETED")
                    self._changed.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow(NAMESPACES))
            tasks.create_task(follow(PODS))

    async def _write(self) -> None:
        delay = _RETRY
        while True:
            await self._changed.wait()
            await asyncio.sleep(_DEBOUNCE)
            self._changed.clear()
            # Half of the picture would cut off who may come; an earlier agent's table holds until then.
            if not self._synced.is_set() or (self._table.needed and not self._complete.is_set()):
                continue
            try:
                await self._kernel.reach(self._table)
                delay = _RETRY
            except NetworkError as error:
                log("error", "policies not written, trying again", error=str(error), seconds=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RETRY_MOST)
                self._changed.set()
