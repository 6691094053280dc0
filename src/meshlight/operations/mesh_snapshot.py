"""The mesh as istiod would see it, made here from the objects of an API: for explaining and for trying out.

The same index and compilers that istiod runs, fed once; no istiod is asked, so that it also works when
istiod does not, and with objects that nobody has applied yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from meshlight.controlplane import mesh_config
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from meshlight.controlplane.settings import Mesh
from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import (
    AUTHORIZATION_POLICIES,
    CONFIG_MAPS,
    ENDPOINT_SLICES,
    GATEWAYS,
    NAMESPACES,
    NODES,
    PEER_AUTHENTICATIONS,
    PODS,
    SERVICE_ENTRIES,
    SERVICES,
    WORKLOAD_ENTRIES,
    Object,
    Resource,
)
from meshlight.proto import authorization_pb2 as rbac

INDEXED = (
    NAMESPACES, NODES, GATEWAYS, SERVICES, SERVICE_ENTRIES, WORKLOAD_ENTRIES, ENDPOINT_SLICES, PODS,
    PEER_AUTHENTICATIONS, AUTHORIZATION_POLICIES,
)  # fmt: skip


@dataclass(slots=True)
class Snapshot:
    """The objects by kind and name, and the index made of them."""

    mesh: Mesh
    index: Index
    objects: dict[str, dict[ObjectKey, Object]] = field(default_factory=dict)

    @classmethod
    def of(cls, objects: Iterable[Object], mesh: Mesh = Mesh()) -> Snapshot:  # noqa: B008 - frozen
        """A snapshot of objects; a later one replaces an earlier one of its name."""
        snapshot = cls(mesh, Index(mesh))
        for obj in objects:
            snapshot.objects.setdefault(obj["kind"], {})[ObjectKey.of(obj)] = obj
        for resource in INDEXED:
            for key, obj in snapshot.objects.get(resource.kind, {}).items():
                snapshot.index.observe(resource.kind, key, obj)
        snapshot.index.commit()
        return snapshot

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """One object."""
        return self.objects.get(kind, {}).get(ObjectKey(namespace, name))

    def workload(self, uid: str) -> Any:
        """A workload's message; None when there is none of that name."""
        resource = self.index.collections[ADDRESS_TYPE].get(uid)
        message: Any = resource.message if resource else None
        return message.workload if message is not None and message.HasField("workload") else None

    def service(self, name: str) -> Any:
        """A service's message by `NAMESPACE/HOSTNAME`; None when there is none of that name."""
        resource = self.index.collections[ADDRESS_TYPE].get(name)
        message: Any = resource.message if resource else None
        return message.service if message is not None and message.HasField("service") else None

    def find(self, name: str) -> list[Any]:
        """Messages that a name or alias (`NETWORK/IP`, a service for its members) leads to."""
        found: list[Any] = [r.message for r in self.index.collections[ADDRESS_TYPE].find(name)]
        return [m.workload if m.HasField("workload") else m.service for m in found]

    def services(self) -> list[Any]:
        """Every service's message."""
        found: list[Any] = [resource.message for resource in self.index.collections[ADDRESS_TYPE]]
        return [message.service for message in found if message.HasField("service")]

    def policies(self) -> list[rbac.Authorization]:
        """Every policy as the node proxies have it, by name."""
        found: list[Any] = [r.message for r in self.index.collections[AUTHORIZATION_TYPE]]
        return sorted(found, key=lambda p: (p.namespace, p.name))


async def read(
    client: Client, root_namespace: str, also: Iterable[Resource] = (), extra: Iterable[Object] = ()
) -> Snapshot:
    """The mesh of an API, `extra` objects laid over it; kinds that it does not serve are taken as empty.

    Raises ApiError (not allowed) and ApiUnreachable.
    """
    resources = [*INDEXED, *also]
    found, config = await asyncio.gather(
        asyncio.gather(*(_listed(client, resource) for resource in resources)),
        _config(client, root_namespace),
    )
    mesh = mesh_config.parse(config).laid_over(Mesh(root_namespace=root_namespace))
    return Snapshot.of([*(obj for objects in found for obj in objects), *extra], mesh)


async def _listed(client: Client, resource: Resource) -> list[Object]:
    try:
        items = (await client.list(resource)).items
    except ApiError as error:
        if error.code == 404:
            return []
        raise
    return [{"apiVersion": resource.api_version, "kind": resource.kind, **obj} for obj in items]


async def _config(client: Client, root_namespace: str) -> Object | None:
    try:
        return await client.get(CONFIG_MAPS, mesh_config.NAME, root_namespace)
    except ApiError as error:
        if error.code == 404:
            return None
        raise
