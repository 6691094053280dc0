"""`istioctl ztunnel-config`: what the node proxies hold, as tables with istioctl's columns.

Reading is through the API's port-forward to the proxies' admin pages; everything shown is computed purely.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from meshlight.kube.client import Client
from meshlight.kube.port_forward import fetch
from meshlight.kube.resources import PODS, Object
from meshlight.operations.errors import OperationError
from meshlight.operations.ztunnel_dump import Dump, istio_form

ADMIN_PORT = 15000
LABEL = "app=ztunnel"

Row = tuple[str, ...]


class ZtunnelError(OperationError):
    """There is no node proxy to ask; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Filters:
    """What to show; empty shows all. Compared without regard to case, as istioctl does."""

    namespace: str = ""
    name: str = ""
    address: str = ""
    node: str = ""
    direction: str = "all"
    raw: bool = False


async def proxies(client: Client, namespace: str, pod: str = "", node: str = "") -> list[str]:
    """Names of the node proxies' pods; `pod` is `[pod/]NAME[.NAMESPACE]`. Raises ZtunnelError."""
    if pod:
        return [pod.rpartition("/")[2].partition(".")[0]]
    found = (await client.list(PODS, namespace, label_selector=LABEL)).items
    chosen = [p["metadata"]["name"] for p in found if _running(p) and node in ("", p["spec"].get("nodeName"))]
    if not chosen:
        where = f" on node {node}" if node else ""
        raise ZtunnelError(
            f"no running ztunnel in {namespace}{where}: `kubectl get pods -n {namespace}` says more"
        )
    return sorted(chosen)


def _running(pod: Object) -> bool:
    return bool(
        (pod.get("status") or {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
    )


async def dumps(client: Client, namespace: str, pods: Iterable[str]) -> list[Dump]:
    """The dumps of several proxies, in order. Raises ForwardError, ApiError, ApiUnreachable."""
    pages = await asyncio.gather(*(fetch(client, namespace, pod, ADMIN_PORT, "/config_dump") for pod in pods))
    return [istio_form(orjson.loads(page)) for page in pages]


async def set_level(client: Client, namespace: str, pod: str, level: str) -> str:
    """Change a proxy's log level, or (empty) read it; returns the proxy's answer."""
    path = f"/logging?level={level}" if level else "/logging"
    return (await fetch(client, namespace, pod, ADMIN_PORT, path, method="POST")).decode()


def workloads(dump: Dump, filters: Filters) -> list[Dump]:
    """Workloads that pass, by namespace, name and node."""
    chosen = [w for w in dump["workloads"] if _workload_passes(w, filters)]
    return sorted(chosen, key=lambda w: (f"{w['namespace']}.{w['name']}", w.get("node") or ""))


def _workload_passes(workload: Dump, filters: Filters) -> bool:
    return (
        _same(filters.namespace, workload["namespace"])
        and _same(filters.name, workload["name"])
        and _same(filters.node, workload.get("node") or "")
        and (not filters.address or filters.address.lower() in (a.lower() for a in workload["workloadIps"]))
    )


def _same(wanted: str, found: str) -> bool:
    return not wanted or wanted.lower() == found.lower()


WORKLOAD_COLUMNS: Row = ("NAMESPACE", "POD NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL")
SERVICE_COLUMNS: Row = ("NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS")
POLICY_COLUMNS: Row = ("NAMESPACE", "POLICY NAME", "ACTION", "SCOPE")
CERTIFICATE_COLUMNS: Row = (
    "CERTIFICATE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE",
)  # fmt: skip
CONNECTION_COLUMNS: Row = ("WORKLOAD", "DIRECTION", "LOCAL", "REMOTE", "REMOTE TARGET", "PROTOCOL")


def workload_rows(dump: Dump, filters: Filters) -> list[Row]:
    """A row for each workload."""
    return [
        (
            w["namespace"],
            w["name"],
            ",".join(w["workloadIps"]) or w.get("hostname") or "",
            w.get("node") or "",
            _waypoint(w, dump["services"]),
            w["protocol"],
        )
        for w in workloads(dump, filters)
    ]


def _waypoint(holder: Dump, services: list[Dump]) -> str:
    gateway = holder.get("waypoint")
    if not gateway:
        return "None"
    destination = gateway.get("destination")
    for service in services:
        if destination in (f"{service['namespace']}/{service['hostname']}", *service["vips"]):
            return str(service["name"])
    return "NA"


def services(dump: Dump, filters: Filters) -> list[Dump]:
    """Services that pass, by namespace, name and host name."""
    chosen = [s for s in dump["services"] if _same(filters.namespace, s["namespace"])]
    return sorted(chosen, key=lambda s: (s["namespace"], s["name"], s["hostname"]))


def service_rows(dump: Dump, filters: Filters) -> list[Row]:
    """A row for each service; ENDPOINTS is healthy ones of all."""
    healthy = {w["uid"] for w in dump["workloads"] if w.get("status") == "Healthy"}
    rows: list[Row] = []
    for service in services(dump, filters):
        endpoints = service.get("endpoints") or {}
        members = [endpoint.get("workloadUid") for endpoint in endpoints.values()]
        rows.append(
            (
                service["namespace"],
                service["name"],
                ",".join(vip.partition("/")[2] for vip in service["vips"]),
                _waypoint(service, dump["services"]),
                f"{sum(member in healthy for member in members)}/{len(members)}",
            )
        )
    return rows


def policies(dump: Dump, filters: Filters) -> list[Dump]:
    """Policies that pass, by namespace and name."""
    chosen = [p for p in dump["policies"] if _same(filters.namespace, p["namespace"])]
    return sorted(chosen, key=lambda p: (p["namespace"], p["name"]))


def policy_rows(dump: Dump, filters: Filters) -> list[Row]:
    """A row for each policy."""
    return [(p["namespace"], p["name"], p["action"], p["scope"]) for p in policies(dump, filters)]


def certificate_rows(dump: Dump, now: datetime.datetime) -> list[Row]:
    """A row for each certificate of each identity: leaf, intermediates, roots."""
    rows: list[Row] = []
    for held in sorted(dump["certificates"], key=lambda c: c["identity"]):
        identity, state = held["identity"], str(held["state"])
        state = "Unavailable" if state.startswith("Unavailable") else state
        chain, roots = held.get("certChain") or [], held.get("rootCerts") or []
        if not chain:
            rows.append((identity, "NA", state, "false", "NA", "NA", "NA"))
        for index, certificate in enumerate(chain):
            last_is_root = not roots and len(chain) > 1 and index == len(chain) - 1
            kind = "Leaf" if index == 0 else "Root" if last_is_root else "Intermediate"
            rows.append(_certificate_row(identity, kind, state, certificate, now))
        rows += [_certificate_row(identity, "Root", state, certificate, now) for certificate in roots]
    return rows


def _certificate_row(identity: str, kind: str, state: str, held: Dump, now: datetime.datetime) -> Row:
    begin, end = _instant(held.get("validFrom")), _instant(held.get("expirationTime"))
    valid = end is not None and now < end and (begin is None or begin < now)
    number = str(held.get("serialNumber") or "")
    serial = f"{int(number):x}" if number.isdigit() else number or "NA"  # Istio's is decimal, ours is not
    not_after, not_before = held.get("expirationTime") or "NA", held.get("validFrom") or "NA"
    return identity, kind, state, str(valid).lower(), serial, not_after, not_before


def _instant(text: str | None) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat((text or "").replace("Z", "+00:00"))
    except ValueError:
        return None


def states(dump: Dump, filters: Filters) -> list[Dump]:
    """Captured workloads that pass, with their connections."""
    name, namespace = filters.name, filters.namespace
    if name and not namespace:
        name, _, namespace = name.partition(".")
    chosen = [
        state
        for state in dump["workloadState"].values()
        if _same(namespace, state["info"]["namespace"]) and _same(name, state["info"]["name"])
    ]
    return sorted(chosen, key=lambda s: (s["info"]["namespace"], s["info"]["name"]))


def connection_rows(dump: Dump, filters: Filters) -> list[Row]:
    """A row for each open connection, addresses named where something is known by them."""
    named = _names(dump) if not filters.raw else lambda address: address
    rows: list[Row] = []
    for state in states(dump, filters):
        workload = f"{state['info']['name']}.{state['info']['namespace']}"
        connections = state.get("connections") or {}
        if filters.direction != "outbound":
            for c in connections.get("inbound") or []:
                target = c.get("originalDst") or ""
                row = (named(c["actualDst"]), named(c["src"]), target, c["protocol"])
                rows.append((workload, "Inbound", *row))
        if filters.direction != "inbound":
            for c in connections.get("outbound") or []:
                row = (named(c["src"]), named(c["actualDst"]), named(c["originalDst"]), c["protocol"])
                rows.append((workload, "Outbound", *row))
    return rows


def _names(dump: Dump) -> Callable[[str], str]:
    known: dict[str, str] = {}
    for workload in dump["workloads"]:
        for address in workload["workloadIps"][:1]:
            known[address] = f"{workload['name']}.{workload['namespace']}"
    for service in dump["services"]:
        for vip in service["vips"][:1]:
            known[vip.partition("/")[2]] = service["hostname"]

    def name(address: str) -> str:
        host, _, port = address.rpartition(":")
        found = known.get(host.strip("[]"))
        return f"{found}:{port}" if found else address

    return name


def merged(found: list[Dump]) -> Dump:
    """Several proxies' dumps as one: what all know once, what each has by itself."""
    joined: dict[str, Any] = {**found[0], "certificates": [], "workloadState": {}}
    for dump in found:
        joined["certificates"] = [*joined["certificates"], *dump["certificates"]]
        joined["workloadState"] = {**joined["workloadState"], **dump["workloadState"]}
    return joined
