"""Denials that happened: read from the node proxies' access logs, and judged again by today's policies."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import orjson

from meshlight.kube.client import Client
from meshlight.kube.resources import PODS
from meshlight.operations import parties, why, ztunnel_config
from meshlight.operations.errors import OperationError
from meshlight.operations.mesh_snapshot import Snapshot

_TAIL = "5000"
_MARKS = ("explicitly denied by", "denied by", "not allowed", "allow policies exist")


@dataclass(frozen=True, slots=True)
class Denial:
    """One refused connection; parties as `NAME.NAMESPACE` where they are known, else as addresses."""

    time: str
    source: str
    destination: str
    identity: str
    error: str


def parse(line: str) -> Denial | None:
    """The denial that a line of an access log tells of; None for any other line."""
    start = line.find("{")
    try:
        entry = orjson.loads(line[start:]) if start >= 0 else None
    except orjson.JSONDecodeError:
        return None
    if not isinstance(entry, dict):
        return None
    error = str(entry.get("error") or "")
    # The source's proxy tells of it as well; the destination's knows the policy.
    if entry.get("direction") != "inbound" or not any(mark in error for mark in _MARKS):
        return None
    return Denial(
        time=str(entry.get("time", "")),
        source=_party(entry, "src"),
        destination=f"{_party(entry, 'dst')}:{_port(entry)}",
        identity=str(entry.get("src.identity") or ""),
        error=error,
    )


def _port(entry: dict[str, object]) -> str:
    """The port that the program asked for: inside the tunnel, where there is one."""
    return str(entry.get("dst.hbone_addr") or entry.get("dst.addr") or "").rpartition(":")[2]


def _party(entry: dict[str, object], side: str) -> str:
    name, namespace = entry.get(f"{side}.workload"), entry.get(f"{side}.namespace")
    if name and namespace:
        return f"{name}.{namespace}"
    return str(entry.get(f"{side}.addr", "")).rpartition(":")[0].strip("[]")


async def recent(client: Client, namespace: str, count: int) -> list[Denial]:
    """The last denials, newest last. Raises ZtunnelError, ApiError, ApiUnreachable."""
    names = await ztunnel_config.proxies(client, namespace)
    paths = [f"{PODS.path(namespace, name)}/log" for name in names]
    logs = await asyncio.gather(*(client.text(path, {"tailLines": _TAIL}) for path in paths))
    found = [denial for log in logs for line in log.splitlines() if (denial := parse(line))]
    return sorted(found, key=lambda d: d.time)[-count:]


def today(snapshot: Snapshot, denial: Denial) -> why.Explanation | None:
    """The same connection judged by the policies of now; None when its parties are gone."""
    try:
        begin = parties.source(snapshot, denial.source, "default")
        end = parties.destination(snapshot, _as_pod(denial.destination), "default")
    except OperationError:
        return None
    return why.explain(snapshot, begin, end)


def _as_pod(destination: str) -> str:
    """A log's workload is a pod, never the Service of that name."""
    host = destination.rpartition(":")[0]
    return destination if not any(c.isalpha() for c in host) or ":" in host else f"pod/{destination}"
