"""What cluster DNS answers: a pure index of Services and EndpointSlices, and one question at a time.

Names and records follow Kubernetes' DNS specification (v1.1.0): `SVC.NS.svc.ZONE`, endpoints of headless
Services, `_PORT._PROTOCOL.SVC.NS.svc.ZONE`, `A-B-C-D.NS.pod.ZONE`, and reverse names of addresses.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from meshlight.kube.resources import Object

SERVICE_NAME = "kubernetes.io/service-name"
Type = Literal["A", "AAAA", "SRV", "PTR", "CNAME", "TXT", "NS", "SOA", "ANY", "OTHER"]


@dataclass(frozen=True, slots=True)
class Record:
    """One resource record: an address, a name, or (for SRV) a port and a name."""

    name: str
    type: Literal["A", "SRV", "PTR", "CNAME", "TXT"]
    value: str
    port: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """`known` tells NODATA (the name exists) from NXDOMAIN; `ours` whether the zone is ours at all."""

    records: tuple[Record, ...] = ()
    additional: tuple[Record, ...] = ()
    known: bool = True
    ours: bool = True


NXDOMAIN = Answer(known=False)
NODATA = Answer()
FOREIGN = Answer(known=False, ours=False)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address behind a Service and the first label of its own name."""

    address: str
    label: str
    ready: bool


@dataclass(slots=True)
class _Service:
    obj: Object | None = None
    slices: dict[str, Object] = field(default_factory=dict)


class Records:
    """The cluster's names."""

    def __init__(self, zone: str = "cluster.local") -> None:
        self.zone = zone
        self._services: dict[tuple[str, str], _Service] = {}
        self._namespaces: set[str] = set()
        self._reverse: dict[str, tuple[str, str]] = {}

    def namespace(self, name: str, exists: bool) -> None:
        """A namespace appeared or went."""
        (self._namespaces.add if exists else self._namespaces.discard)(name)

    def service(self, obj: Object, exists: bool) -> None:
        """A Service appeared, changed or went."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        entry = self._services.setdefault(key, _Service())
        for address in _cluster_addresses(entry.obj):
            self._reverse.pop(address, None)
        entry.obj = obj if exists else None
        for address in _cluster_addresses(entry.obj):
            self._reverse[address] = key
        self._tidy(key)

    def slice(self, obj: Object, exists: bool) -> None:
        """An EndpointSlice appeared, changed or went."""
        owner = (obj["metadata"].get("labels") or {}).get(SERVICE_NAME)
        if not owner or obj.get("addressType", "IPv4") != "IPv4":
            return
        key = (obj["metadata"]["namespace"], owner)
        entry = self._services.setdefault(key, _Service())
        if exists:
            entry.slices[obj["metadata"]["name"]] = obj
        else:
            entry.slices.pop(obj["metadata"]["name"], None)
        self._tidy(key)

    def _tidy(self, key: tuple[str, str]) -> None:
        entry = self._services[key]
        if entry.obj is None and not entry.slices:
            del self._services[key]

    def resolve(self, name: str, kind: Type) -> Answer:
        """Answer one question; `name` is fully qualified, in lower case, without the last dot."""
        if name.endswith(".in-addr.arpa"):
            return self._resolve_reverse(name, kind)
        if name == self.zone:
            return NODATA
        suffix = "." + self.zone
        if not name.endswith(suffix):
            return FOREIGN
        labels = name[: -len(suffix)].split(".")
        match labels[-1]:
            case "svc":
                return self._resolve_service(name, labels[:-1], kind)
            case "pod":
                return self._resolve_pod(name, labels[:-1], kind)
            case "dns-version" if len(labels) == 1:
                records = (Record(name, "TXT", "1.1.0"),) if kind in ("TXT", "ANY") else ()
                return Answer(records)
        return NXDOMAIN

    def _resolve_reverse(self, name: str, kind: Type) -> Answer:
        labels = name.removesuffix(".in-addr.arpa").split(".")
        address = ".".join(reversed(labels))
        key = self._reverse.get(address)
        if key is None:
            return NXDOMAIN if address.startswith("10.") else FOREIGN
        namespace, service = key
        target = f"{service}.{namespace}.svc.{self.zone}"
        return Answer((Record(name, "PTR", target),)) if kind in ("PTR", "ANY") else NODATA

    def _resolve_pod(self, name: str, labels: list[str], kind: Type) -> Answer:
        if not labels or labels[-1] not in self._namespaces or len(labels) > 2:
            return NXDOMAIN
        if len(labels) == 1:
            return NODATA
        try:
            address = str(ipaddress.IPv4Address(labels[0].replace("-", ".")))
        except ValueError:
            return NXDOMAIN
        return Answer((Record(name, "A", address),)) if kind in ("A", "ANY") else NODATA

    def _resolve_service(self, name: str, labels: list[str], kind: Type) -> Answer:
        if not labels:
            return NODATA
        if len(labels) == 1:
            return NODATA if labels[0] in self._namespaces else NXDOMAIN
        service, namespace = labels[-2], labels[-1]
        entry = self._services.get((namespace, service))
        if entry is None or entry.obj is None:
            return NXDOMAIN
        spec, rest = entry.obj["spec"], labels[:-2]
        if spec.get("type") == "ExternalName":
            return (
                Answer((Record(name, "CNAME", spec["externalName"].rstrip(".").lower()),))
                if not rest
                else NXDOMAIN
            )
        if len(rest) == 2 and rest[0].startswith("_") and rest[1].startswith("_"):
            return self._resolve_port(name, entry, rest[0][1:], rest[1][1:], kind)
        if spec.get("clusterIP") != "None":
            if rest:
                return NXDOMAIN
            addresses = _cluster_addresses(entry.obj)
            return Answer(tuple(Record(name, "A", a) for a in addresses)) if kind in ("A", "ANY") else NODATA
        if len(rest) > 1:
            return NXDOMAIN
        found = [e for e in _endpoints(entry) if e.ready and (not rest or e.label == rest[0])]
        if not found:
            return NXDOMAIN if rest else NODATA
        return Answer(tuple(Record(name, "A", e.address) for e in found)) if kind in ("A", "ANY") else NODATA

    def _resolve_port(self, name: str, entry: _Service, port: str, protocol: str, kind: Type) -> Answer:
        assert entry.obj is not None
        meta, spec = entry.obj["metadata"], entry.obj["spec"]
        base = f"{meta['name']}.{meta['namespace']}.svc.{self.zone}"
        if spec.get("clusterIP") != "None":
            numbers = [
                p["port"]
                for p in spec.get("ports") or []
                if p.get("name") == port and p.get("protocol", "TCP").lower() == protocol
            ]
            if not numbers:
                return NXDOMAIN
            if kind not in ("SRV", "ANY"):
                return NODATA
            extra = tuple(Record(base, "A", a) for a in _cluster_addresses(entry.obj))
            return Answer(tuple(Record(name, "SRV", base, n) for n in numbers), extra)
        records, additional = [], []
        for item in entry.slices.values():
            numbers = [
                p["port"]
                for p in item.get("ports") or []
                if p.get("name") == port and p.get("protocol", "TCP").lower() == protocol
            ]
            for endpoint in (e for e in _of_slice(item) if e.ready):
                target = f"{endpoint.label}.{base}"
                records += [Record(name, "SRV", target, n) for n in numbers]
                additional.append(Record(target, "A", endpoint.address))
        if not records:
            return NXDOMAIN
        return Answer(tuple(records), tuple(additional)) if kind in ("SRV", "ANY") else NODATA


def _cluster_addresses(service: Object | None) -> list[str]:
    if service is None or service["spec"].get("type") == "ExternalName":
        return []
    spec = service["spec"]
    return [a for a in spec.get("clusterIPs") or [spec.get("clusterIP")] if a and a != "None" and ":" not in a]


def _of_slice(item: Object) -> list[Endpoint]:
    found = []
    for endpoint in item.get("endpoints") or []:
        ready = (endpoint.get("conditions") or {}).get("ready", True) is not False
        for address in endpoint["addresses"]:
            found.append(Endpoint(address, endpoint.get("hostname") or address.replace(".", "-"), ready))
    return found


def _endpoints(entry: _Service) -> list[Endpoint]:
    return [endpoint for item in entry.slices.values() for endpoint in _of_slice(item)]
