"""EndpointSlices of one Service as a set: endpoints spread over slices of at most 100, changed in place.

`distribute` is pure. Names follow from the owner and a number, so that writing twice, or after a restart
that forgot the first time, makes nothing twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.resources import ENDPOINT_SLICES, Object

MAX_ENDPOINTS = 100
"""Endpoints of one slice, as Kubernetes' controllers fill them."""
SERVICE_NAME = "kubernetes.io/service-name"
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
HEADLESS = "service.kubernetes.io/headless"
_WRITTEN = ("endpoints", "ports")

Ports = tuple[tuple[str, str, int, str], ...]
"""(name, protocol, number, appProtocol) of each port of a slice."""


@dataclass(frozen=True, slots=True)
class Group:
    """Endpoints that share family and ports, and hence slices."""

    family: str
    ports: Ports


@dataclass(frozen=True, slots=True)
class Owner:
    """Who makes the slices of a Service: the object that owns them and the controller's name."""

    service: Object
    reference: Object
    controller: str

    def name(self, number: int) -> str:
        """The name of one slice."""
        text = f"{self.reference['uid']}/{self.controller}/{number}"
        digest = hashlib.sha256(text.encode()).digest()
        suffix = "".join("bcdfghjklmnpqrstvwxz2456789"[byte % 27] for byte in digest[:5])
        return f"{self.service['metadata']['name']}-{suffix}"

    def labels(self) -> dict[str, str]:
        """Labels of its slices."""
        metadata = self.service["metadata"]
        kept = {k: v for k, v in (metadata.get("labels") or {}).items() if k != HEADLESS}
        if self.service["spec"].get("clusterIP") == "None":
            kept[HEADLESS] = ""
        return {**kept, SERVICE_NAME: metadata["name"], MANAGED_BY: self.controller}


def port_objects(ports: Ports) -> list[Object]:
    """Ports as a slice has them."""
    made = []
    for name, protocol, number, application in ports:
        port: Object = {"name": name, "port": number, "protocol": protocol}
        if application:
            port["appProtocol"] = application
        made.append(port)
    return made


def _group(item: Object) -> Group:
    ports = tuple(
        (p.get("name") or "", p.get("protocol", "TCP"), p.get("port") or 0, p.get("appProtocol") or "")
        for p in item.get("ports") or []
    )
    return Group(item.get("addressType", "IPv4"), tuple(sorted(ports)))


def _identity(endpoint: Object) -> str:
    return str(endpoint["addresses"][0])


def distribute(
    owner: Owner, known: Iterable[Object], wanted: Mapping[Group, list[Object]]
) -> tuple[list[Object], list[Object]]:
    """The slices that should be, and those known ones that should go.

    An endpoint stays in the slice that has it; new ones fill the fullest slice with room.
    """
    metadata = owner.service["metadata"]
    by_group: dict[Group, list[Object]] = {}
    for item in known:
        by_group.setdefault(_group(item), []).append(item)
    names = {item["metadata"]["name"] for items in by_group.values() for item in items}
    made, number = [], 0
    for group, endpoints in sorted(wanted.items(), key=lambda entry: repr(entry[0])):
        left = {_identity(e): e for e in endpoints}
        filled: list[tuple[str, list[Object]]] = []
        for item in sorted(by_group.pop(group, []), key=lambda i: str(i["metadata"]["name"])):
            kept = [left.pop(_identity(e)) for e in item.get("endpoints") or [] if _identity(e) in left]
            filled.append((item["metadata"]["name"], kept))
        for _, kept in sorted(filled, key=lambda entry: -len(entry[1])):
            while left and len(kept) < MAX_ENDPOINTS:
                kept.append(left.pop(next(iter(left))))
        while left or not (filled or endpoints):
            while owner.name(number) in names:
                number += 1
            names.add(name := owner.name(number))
            filled.append((name, [left.pop(key) for key in list(left)[:MAX_ENDPOINTS]]))
        spare = not endpoints  # a family without endpoints keeps one empty slice
        for name, kept in filled:
            if not kept and not spare:
                by_group.setdefault(group, []).append({"metadata": {"name": name}})
                continue
            spare = False
            made.append(
                {
                    "apiVersion": ENDPOINT_SLICES.api_version,
                    "kind": ENDPOINT_SLICES.kind,
                    "metadata": {
                        "name": name,
                        "namespace": metadata["namespace"],
                        "labels": owner.labels(),
                        "ownerReferences": [owner.reference],
                    },
                    "addressType": group.family,
                    "endpoints": kept,
                    "ports": port_objects(group.ports),
                }
            )
    return made, [item for items in by_group.values() for item in items]


class SliceWriter:
    """Writes slices to the API when they differ from what the cache has."""

    def __init__(self, client: Client, slices: Cache) -> None:
        self._client, self._slices = client, slices
        self._by_service: dict[tuple[str, str], set[str]] = {}
        slices.on_change(self._changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        names = self._by_service.setdefault(self.service_of(new or old or {}), set())
        (names.discard if new is None else names.add)(metadata["name"])

    @staticmethod
    def service_of(item: Object) -> tuple[str, str]:
        """The Service that a slice belongs to."""
        metadata = item["metadata"]
        return metadata["namespace"], (metadata.get("labels") or {}).get(SERVICE_NAME, "")

    def of(self, key: tuple[str, str], controller: str) -> list[Object]:
        """A Service's slices that a controller made."""
        found = (self._slices.get(name, key[0]) for name in self._by_service.get(key, ()))
        return [
            item
            for item in found
            if item is not None and (item["metadata"].get("labels") or {}).get(MANAGED_BY) == controller
        ]

    async def write(self, owner: Owner, wanted: Mapping[Group, list[Object]]) -> None:
        """Bring the owner's slices to what is wanted. Raises ApiError."""
        metadata = owner.service["metadata"]
        known = self.of((metadata["namespace"], metadata["name"]), owner.controller)
        made, gone = distribute(owner, known, wanted)
        for item in made:
            await self._put(item)
        for item in gone:
            await self._client.delete(ENDPOINT_SLICES, item["metadata"]["name"], metadata["namespace"])

    async def remove(self, key: tuple[str, str], controller: str) -> None:
        """Delete every slice that a controller made for a Service."""
        for item in self.of(key, controller):
            await self._client.delete(ENDPOINT_SLICES, item["metadata"]["name"], key[0])

    async def _put(self, wanted: Object) -> None:
        meta = wanted["metadata"]
        known = self._slices.get(meta["name"], meta["namespace"])
        if known is not None:
            same = all((known.get(part) or []) == wanted[part] for part in _WRITTEN)
            if same and known["metadata"].get("labels") == meta["labels"]:
                return
        patch = {part: wanted[part] for part in _WRITTEN} | {"metadata": {"labels": meta["labels"]}}
        try:
            if known is None:
                await self._client.create(ENDPOINT_SLICES, wanted)
            else:
                await self._client.patch(ENDPOINT_SLICES, meta["name"], patch, meta["namespace"])
        except ApiError as error:  # the cache lags behind what is there
            if known is None and error.reason == "AlreadyExists":
                await self._client.patch(ENDPOINT_SLICES, meta["name"], patch, meta["namespace"])
            elif known is not None and error.code == 404:
                await self._client.create(ENDPOINT_SLICES, wanted)
            else:
                raise
