"""What cluster DNS answers: a pure index of Services, endpoints and further records, one question at a time.

Names and records follow Kubernetes' DNS specification (v1.1.0): `SVC.NS.svc.ZONE`, endpoints of headless
Services, `_PORT._PROTOCOL.SVC.NS.svc.ZONE`, `A-B-C-D.NS.pod.ZONE`, and reverse names of addresses. Further
records come from DNSEndpoint objects, as external-dns has them: any name, outside the cluster's zone too.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, replace
from typing import Literal

from meshlight.kube.resources import Object

SERVICE_NAME = "kubernetes.io/service-name"
Type = Literal["A", "AAAA", "SRV", "PTR", "CNAME", "TXT", "NS", "SOA", "ANY", "OTHER"]
RecordType = Literal["A", "AAAA", "SRV", "PTR", "CNAME", "TXT"]
_MOST_ALIASES = 8
_KINDS: dict[str, RecordType] = {t: t for t in ("A", "AAAA", "SRV", "PTR", "CNAME", "TXT")}


@dataclass(frozen=True, slots=True)
class Record:
    """One resource record: an address, a name, or (for SRV) a port and a name. `ttl` 0: the server's own."""

    name: str
    type: RecordType
    value: str
    port: int = 0
    ttl: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """`known` tells NODATA (the name exists) from NXDOMAIN; `ours` whether the name is ours at all.

    `alias`: a foreign name to which the records lead; whoever can should add its records.
    """

    records: tuple[Record, ...] = ()
    additional: tuple[Record, ...] = ()
    known: bool = True
    ours: bool = True
    alias: str = ""


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

    @property
    def headless(self) -> bool:
        return self.obj is not None and self.obj["spec"].get("clusterIP") == "None"


def address_record(name: str, address: str) -> Record:
    """The A or AAAA record of an address."""
    return Record(name, "AAAA" if ":" in address else "A", address)


def _addresses(name: str, kind: Type, addresses: list[str]) -> Answer:
    """Addresses of the family that is asked for."""
    records = (address_record(name, address) for address in addresses)
    return Answer(tuple(r for r in records if kind in (r.type, "ANY")))


class Records:
    """The cluster's names."""

    def __init__(self, zone: str = "cluster.local") -> None:
        self.zone = zone
        self._services: dict[tuple[str, str], _Service] = {}
        self._namespaces: set[str] = set()
        self._reverse: dict[str, dict[tuple[str, ...], str]] = {}
        self._reverse_of: dict[tuple[str, ...], list[str]] = {}
        self._further: dict[str, dict[tuple[str, str], tuple[Record, ...]]] = {}
        self._further_of: dict[tuple[str, str], set[str]] = {}

    def namespace(self, name: str, exists: bool) -> None:
        """A namespace appeared or went."""
        (self._namespaces.add if exists else self._namespaces.discard)(name)

    def service(self, obj: Object, exists: bool) -> None:
        """A Service appeared, changed or went."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        entry = self._services.setdefault(key, _Service())
        entry.obj = obj if exists else None
        target = f"{key[1]}.{key[0]}.svc.{self.zone}"
        self._set_reverse(key, {a: target for a in _cluster_addresses(entry.obj)})
        for item in entry.slices.values():
            self._index_slice(key, entry, item)
        self._tidy(key)

    def slice(self, obj: Object, exists: bool) -> None:
        """An EndpointSlice appeared, changed or went."""
        owner = (obj["metadata"].get("labels") or {}).get(SERVICE_NAME)
        if not owner or obj.get("addressType") == "FQDN":
            return
        key = (obj["metadata"]["namespace"], owner)
        entry = self._services.setdefault(key, _Service())
        if exists:
            entry.slices[obj["metadata"]["name"]] = obj
            self._index_slice(key, entry, obj)
        else:
            entry.slices.pop(obj["metadata"]["name"], None)
            self._set_reverse((*key, obj["metadata"]["name"]), {})
        self._tidy(key)

    def _index_slice(self, key: tuple[str, str], entry: _Service, item: Object) -> None:
        """Endpoints of headless Services have reverse names too."""
        base = f"{key[1]}.{key[0]}.svc.{self.zone}"
        found = {e.address: f"{e.label}.{base}" for e in _of_slice(item) if e.ready} if entry.headless else {}
        self._set_reverse((*key, item["metadata"]["name"]), found)

    def _set_reverse(self, source: tuple[str, ...], names: dict[str, str]) -> None:
        for address in self._reverse_of.pop(source, ()):
            holders = self._reverse[address]
            del holders[source]
            if not holders:
                del self._reverse[address]
        for address, name in names.items():
            self._reverse.setdefault(address, {})[source] = name
        if names:
            self._reverse_of[source] = list(names)

    def further(self, obj: Object, exists: bool) -> None:
        """A DNSEndpoint appeared, changed or went."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        for name in self._further_of.pop(key, ()):
            del self._further[name][key]
            if not self._further[name]:
                del self._further[name]
        if not exists:
            return
        found: dict[str, list[Record]] = {}
        for record in endpoint_records(obj):
            found.setdefault(record.name, []).append(record)
        for name, records in found.items():
            self._further.setdefault(name, {})[key] = tuple(records)
        self._further_of[key] = set(found)

    def _tidy(self, key: tuple[str, str]) -> None:
        entry = self._services[key]
        if entry.obj is None and not entry.slices:
            del self._services[key]

    def resolve(self, name: str, kind: Type) -> Answer:
        """Answer one question; `name` is fully qualified, in lower case, without the last dot."""
        answer = self._resolve(name, kind)
        records = list(answer.records)
        while kind not in ("CNAME", "ANY") and records and records[-1].type == "CNAME":
            if len(records) > _MOST_ALIASES:
                return replace(answer, records=tuple(records))
            target = records[-1].value
            following = self._resolve(target, kind)
            if not following.ours:
                return replace(answer, records=tuple(records), alias=target)
            if not following.records:
                break
            records += following.records
        return replace(answer, records=tuple(records))

    def _resolve(self, name: str, kind: Type) -> Answer:
        if (further := self._resolve_further(name, kind)) is not None:
            return further
        if name.endswith((".in-addr.arpa", ".ip6.arpa")):
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

    def _resolve_further(self, name: str, kind: Type) -> Answer | None:
        """Records of DNSEndpoints: of the name itself, or of the nearest wildcard above it (RFC 4592)."""
        if not self._further:
            return None
        found = self._further.get(name)
        rest = name
        while found is None and "." in rest:
            rest = rest.partition(".")[2]
            found = self._further.get("*." + rest)
            if found is None and rest in self._further:
                return None  # the name above exists and has no wildcard below it
        if found is None:
            return None
        records = [replace(r, name=name) for _, several in sorted(found.items()) for r in several]
        aliases = tuple(r for r in records if r.type == "CNAME")
        chosen = tuple(r for r in records if kind in (r.type, "ANY"))
        return Answer(chosen or aliases[:1])

    def _resolve_reverse(self, name: str, kind: Type) -> Answer:
        address = _reversed_address(name)
        if address is None:
            return NXDOMAIN if name.endswith((".10.in-addr.arpa", ".d.f.ip6.arpa")) else FOREIGN
        targets = sorted(set(self._reverse.get(address, {}).values()))
        if not targets:
            private = ipaddress.ip_address(address).is_private
            return NXDOMAIN if private and address.startswith(("10.", "fd6d:6c10:")) else FOREIGN
        if kind not in ("PTR", "ANY"):
            return NODATA
        return Answer(tuple(Record(name, "PTR", target) for target in targets))

    def _resolve_pod(self, name: str, labels: list[str], kind: Type) -> Answer:
        if not labels or labels[-1] not in self._namespaces or len(labels) > 2:
            return NXDOMAIN
        if len(labels) == 1:
            return NODATA
        for separator in (".", ":"):
            try:
                address = str(ipaddress.ip_address(labels[0].replace("-", separator)))
            except ValueError:
                continue
            return _addresses(name, kind, [address])
        return NXDOMAIN

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
        if not entry.headless:
            return NXDOMAIN if rest else _addresses(name, kind, _cluster_addresses(entry.obj))
        if len(rest) > 1:
            return NXDOMAIN
        found = [e for e in _endpoints(entry) if e.ready and (not rest or e.label == rest[0])]
        if not found:
            return NXDOMAIN if rest else NODATA
        return _addresses(name, kind, [e.address for e in found])

    def _resolve_port(self, name: str, entry: _Service, port: str, protocol: str, kind: Type) -> Answer:
        assert entry.obj is not None
        meta, spec = entry.obj["metadata"], entry.obj["spec"]
        base = f"{meta['name']}.{meta['namespace']}.svc.{self.zone}"
        if not entry.headless:
            numbers = [
                p["port"]
                for p in spec.get("ports") or []
                if p.get("name") == port and p.get("protocol", "TCP").lower() == protocol
            ]
            if not numbers:
                return NXDOMAIN
            if kind not in ("SRV", "ANY"):
                return NODATA
            extra = tuple(address_record(base, a) for a in _cluster_addresses(entry.obj))
            return Answer(tuple(Record(name, "SRV", base, n) for n in numbers), extra)
        records: dict[Record, None] = {}
        additional: dict[Record, None] = {}
        for item in entry.slices.values():
            numbers = [
                p["port"]
                for p in item.get("ports") or []
                if p.get("name") == port and p.get("protocol", "TCP").lower() == protocol
            ]
            for endpoint in (e for e in _of_slice(item) if e.ready and numbers):
                target = f"{endpoint.label}.{base}"
                records |= {Record(name, "SRV", target, n): None for n in numbers}
                additional[address_record(target, endpoint.address)] = None
        if not records:
            return NXDOMAIN
        return Answer(tuple(records), tuple(additional)) if kind in ("SRV", "ANY") else NODATA


def endpoint_records(obj: Object) -> list[Record]:
    """Records of a DNSEndpoint; what cannot be served is left out."""
    found = []
    for entry in (obj.get("spec") or {}).get("endpoints") or []:
        name = str(entry.get("dnsName") or "").rstrip(".").lower()
        ttl = int(entry.get("recordTTL") or 0)
        for target in entry.get("targets") or []:
            kind = _KINDS.get(entry.get("recordType") or "A")
            if not name or kind is None:
                continue
            value, port = str(target), 0
            if kind in ("A", "AAAA"):
                try:
                    address = ipaddress.ip_address(value)
                except ValueError:
                    continue
                kind, value = ("AAAA" if address.version == 6 else "A"), str(address)
            elif kind == "SRV":  # "priority weight port target"
                words = value.split()
                if len(words) != 4 or not words[2].isdigit():
                    continue
                port, value = int(words[2]), words[3]
            if kind in ("CNAME", "PTR", "SRV"):
                value = value.rstrip(".").lower()
            found.append(Record(name, kind, value, port, ttl))
    return found


def _reversed_address(name: str) -> str | None:
    """The address that a complete reverse name stands for."""
    labels = name.removesuffix(".in-addr.arpa").removesuffix(".ip6.arpa").split(".")[::-1]
    if name.endswith(".in-addr.arpa"):
        text = ".".join(labels)
    else:
        nibbles = "".join(labels)
        text = ":".join(nibbles[i : i + 4] for i in range(0, len(nibbles), 4)) if len(labels) == 32 else ""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def _cluster_addresses(service: Object | None) -> list[str]:
    if service is None or service["spec"].get("type") == "ExternalName":
        return []
    spec = service["spec"]
    return [a for a in spec.get("clusterIPs") or [spec.get("clusterIP")] if a and a != "None"]


def _of_slice(item: Object) -> list[Endpoint]:
    found = []
    for endpoint in item.get("endpoints") or []:
        ready = (endpoint.get("conditions") or {}).get("ready", True) is not False
        for address in endpoint["addresses"]:
            label = endpoint.get("hostname") or address.replace(".", "-").replace(":", "-")
            found.append(Endpoint(address, label, ready))
    return found


def _endpoints(entry: _Service) -> list[Endpoint]:
    return [endpoint for item in entry.slices.values() for endpoint in _of_slice(item)]
