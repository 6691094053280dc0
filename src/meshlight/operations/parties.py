"""The parties of a connection: who is meant by `deploy/web.shop`, `web.shop:80` or `10.244.1.5`.

Pure, over a snapshot of the mesh. Names are istioctl's: `[KIND/]NAME[.NAMESPACE]`, host names, addresses.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from meshlight.controlplane.facts import ObjectKey, address_text
from meshlight.controlplane.workload import pod_uid
from meshlight.operations.errors import OperationError
from meshlight.operations.mesh_snapshot import Snapshot
from meshlight.proto import workload_pb2 as wds

_KINDS = {
    "po": "Pod", "pod": "Pod", "pods": "Pod", "deploy": "Deployment", "deployment": "Deployment",
    "deployments": "Deployment", "ds": "DaemonSet", "daemonset": "DaemonSet", "sts": "StatefulSet",
    "statefulset": "StatefulSet", "rs": "ReplicaSet", "job": "Job", "cronjob": "CronJob", "svc": "Service",
    "service": "Service", "services": "Service", "se": "ServiceEntry", "serviceentry": "ServiceEntry",
    "we": "WorkloadEntry", "workloadentry": "WorkloadEntry",
}  # fmt: skip


class UnknownParty(OperationError):
    """Nothing of the mesh has that name, or too much does."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a connection comes from; `workload` is None for an address that the mesh does not know."""

    text: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    workload: Any


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a connection goes: a service's port, or a workload's; `port` 0 leaves it open."""

    text: str
    service: Any
    workloads: tuple[Any, ...]
    port: int


def source(snapshot: Snapshot, text: str, namespace: str) -> Source:
    """The source that a text names; of several pods of one workload the first. Raises UnknownParty."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        found = _workloads(snapshot, text, namespace)
        first = min(found, key=lambda w: w.name)
        if not first.addresses:
            raise UnknownParty(f"{text}: {first.name} has no address yet") from None
        return Source(text, ipaddress.ip_address(address_text(first.addresses[0])), first)
    known = [w for w in snapshot.find(f"{snapshot.mesh.network}/{address}") if isinstance(w, wds.Workload)]
    return Source(text, address, known[0] if known else None)


def destination(snapshot: Snapshot, text: str, namespace: str) -> Destination:
    """The destination that a text names, with its port if it has one. Raises UnknownParty."""
    name, port = _split_port(text)
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        kind, plain, space = _parse(name, namespace)
        if kind in ("", "Service", "ServiceEntry") and (
            service := _service(snapshot, kind, plain, space, name)
        ):
            return Destination(text, service, (), port)
        return Destination(text, None, tuple(sorted(_workloads(snapshot, name, namespace), key=_name)), port)
    found = snapshot.find(f"{snapshot.mesh.network}/{address}")
    services = [s for s in found if isinstance(s, wds.Service)]
    workloads = tuple(w for w in found if isinstance(w, wds.Workload))
    if not services and not workloads:
        unknown = wds.Workload(name=str(address), addresses=[address.packed])
        return Destination(text, None, (unknown,), port)
    return Destination(text, services[0] if services else None, workloads, port)


def _name(workload: Any) -> str:
    return str(workload.name)


def _split_port(text: str) -> tuple[str, int]:
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        return host, _port(rest.removeprefix(":"), text) if rest else 0
    host, colon, port = text.rpartition(":")
    if not colon or ":" in host:  # a bare IPv6 address
        return text, 0
    return host, _port(port, text)


def _port(port: str, text: str) -> int:
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UnknownParty(f"{text}: {port!r} is not a port number (1 to 65535)")
    return int(port)


def _parse(text: str, namespace: str) -> tuple[str, str, str]:
    """Kind (empty: any), name and namespace."""
    prefix, slash, rest = text.partition("/")
    kind = ""
    if slash:
        kind = _KINDS.get(prefix.lower(), "")
        if not kind:
            raise UnknownParty(f"{text}: {prefix!r} is none of {', '.join(sorted(set(_KINDS)))}")
    else:
        rest = text
    name, _, space = rest.partition(".")
    return kind, name, space.removesuffix(".svc.cluster.local").removesuffix(".svc") or namespace


def _service(snapshot: Snapshot, kind: str, name: str, namespace: str, text: str) -> Any:
    if kind != "ServiceEntry":
        hostname = snapshot.mesh.hostname(name, namespace)
        if found := snapshot.service(f"{namespace}/{hostname}"):
            return found
    same_host = [s for s in snapshot.services() if text in (s.hostname, f"{s.name}.{s.namespace}")]
    if kind == "ServiceEntry":
        same_host = [s for s in snapshot.services() if (s.name, s.namespace) == (name, namespace)]
    return min(same_host, key=lambda s: (not s.canonical, s.namespace), default=None)


def _workloads(snapshot: Snapshot, text: str, namespace: str) -> list[Any]:
    kind, name, space = _parse(text, namespace)
    found: list[Any] = []
    if kind in ("", "Pod") and (pod := snapshot.workload(pod_uid(snapshot.mesh, ObjectKey(space, name)))):
        found = [pod]
    if not found and kind not in ("Pod", "Service", "ServiceEntry"):
        uids = [
            pod_uid(snapshot.mesh, pod.key)
            for pod in snapshot.index.pods()
            if pod.key.namespace == space and pod.controller.name == name
        ]
        found = [w for uid in uids if (w := snapshot.workload(uid))]
        entry = f"{snapshot.mesh.cluster_id}/networking.istio.io/WorkloadEntry/{space}/{name}"
        if not found and (machine := snapshot.workload(entry)):
            found = [machine]
    if not found and kind == "":
        service = snapshot.service(f"{space}/{snapshot.mesh.hostname(name, space)}")
        if service is not None:
            found = members(snapshot, service)
    if not found:
        what = kind or "pod, workload or service"
        raise UnknownParty(
            f"{text}: no {what} {name!r} in namespace {space!r} is known to the mesh; name it as "
            "[KIND/]NAME[.NAMESPACE], a host name or an address"
        )
    return found


def members(snapshot: Snapshot, service: Any) -> list[Any]:
    """A service's workloads."""
    key = f"{service.namespace}/{service.hostname}"
    return [w for w in snapshot.find(key) if isinstance(w, wds.Workload) and key in w.services]
