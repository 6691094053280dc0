"""The index: object changes in, changed resources out, at a cost proportional to the change.

`observe` takes one object change and only notes which workloads, services and policies it may
touch; `commit` compiles those, once each however often they were touched, and answers with what
really differs. Pure: no clock, no network, and the same changes give the same resources.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

from meshlight.controlplane import facts, workload
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.policy import TrustDomains
from meshlight.controlplane.policy_index import Effect, PolicyIndex, Selection
from meshlight.controlplane.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    Change,
    Changes,
    Collection,
    node_group,
    publish,
)
from meshlight.controlplane.settings import Mesh
from meshlight.controlplane.waypoints import Touched, WaypointIndex
from meshlight.kube.resources import Object
from meshlight.proto import workload_pb2 as wds

Name = TypeVar("Name", bound=Hashable)


class Groups(Generic[Name]):
    """Sets of object keys by a name; a group that becomes empty is forgotten."""

    def __init__(self) -> None:
        self._groups: dict[Name, set[ObjectKey]] = {}

    def __getitem__(self, name: Name) -> AbstractSet[ObjectKey]:
        return self._groups.get(name, frozenset())

    def names(self) -> list[Name]:
        """The groups that have members."""
        return list(self._groups)

    def add(self, name: Name, key: ObjectKey) -> None:
        """Put a key into a group."""
        self._groups.setdefault(name, set()).add(key)

    def discard(self, name: Name, key: ObjectKey) -> None:
        """Take a key out of a group, if it is there."""
        if (group := self._groups.get(name)) is not None:
            group.discard(key)
            if not group:
                del self._groups[name]


class Index:
    """Workloads, services and policies of the mesh, and the resources made of them."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.policies = PolicyIndex(
            mesh.root_namespace, TrustDomains(mesh.trust_domain, mesh.trust_domain_aliases)
        )
        self.waypoints = WaypointIndex(mesh)
        self.collections = {type_url: Collection() for type_url in (AUTHORIZATION_TYPE, ADDRESS_TYPE)}
        self._pods: dict[ObjectKey, facts.Pod] = {}
        self._pods_by_namespace: Groups[str] = Groups()
        self._pods_by_label: Groups[tuple[str, str, str]] = Groups()
        self._pods_by_node: Groups[str] = Groups()
        self._nodes: dict[str, facts.Node] = {}
        self._namespaces: dict[str, str] = {}
        self._services: dict[ObjectKey, facts.Service] = {}
        self._slices: dict[ObjectKey, facts.EndpointSlice] = {}
        self._services_by_namespace: Groups[str] = Groups()
        self._slices_by_service: Groups[ObjectKey] = Groups()
        self._slices_by_pod: Groups[ObjectKey] = Groups()
        self._bare: dict[ObjectKey, set[str]] = {}
        self._touched_pods: set[ObjectKey] = set()
        self._touched_services: set[ObjectKey] = set()
        self._touched_slices: set[ObjectKey] = set()
        self._touched_policies: set[ObjectKey] = set()
        self._observers: dict[str, Callable[[ObjectKey, Object | None], None]] = {
            "Pod": self._pod,
            "Node": self._node,
            "Namespace": self._namespace,
            "Service": self._service,
            "EndpointSlice": self._slice,
            "AuthorizationPolicy": lambda key, obj: self._apply(
                self.policies.set_authorization_policy(key, obj)
            ),
            "PeerAuthentication": lambda key, obj: self._apply(self.policies.set_peer_authentication(key, obj)),
            "Gateway": lambda key, obj: self._rebind(self.waypoints.set_gateway(key, obj)),
        }

    def observe(self, kind: str, key: ObjectKey, obj: Object | None) -> None:
        """Take an object's present state, None once it is deleted. `kind` as in its manifest."""
        self._observers[kind](key, obj)

    def reconfigure(self, mesh: Mesh) -> None:
        """Take other mesh-wide settings. AuthorizationPolicies are to be observed anew by the caller."""
        self.mesh = mesh
        self.policies.set_trust(TrustDomains(mesh.trust_domain, mesh.trust_domain_aliases))
        self._touched_pods |= self._pods.keys()
        self._touched_services |= self._services.keys()
        self._touched_slices |= self._slices.keys()

    def takes(self, kind: str) -> bool:
        """Whether objects of a kind matter here."""
        return kind in self._observers

    def service_count(self) -> int:
        """How many Services are known."""
        return len(self._services)

    def service(self, key: ObjectKey) -> facts.Service | None:
        """A Service's facts."""
        return self._services.get(key)

    def services_in(self, namespace: str) -> AbstractSet[ObjectKey]:
        """The Services of a namespace."""
        return self._services_by_namespace[namespace]

    def services_of_pod(self, key: ObjectKey) -> set[ObjectKey]:
        """The Services that a pod is a member of."""
        return {self._slices[s].service for s in self._slices_by_pod[key]}

    def slices_of(self, service: ObjectKey) -> list[facts.EndpointSlice]:
        """A Service's EndpointSlices, in a stable order."""
        return [self._slices[key] for key in sorted(self._slices_by_service[service])]

    def pod(self, key: ObjectKey) -> facts.Pod | None:
        """A Pod's facts."""
        return self._pods.get(key)

    def node(self, name: str) -> facts.Node | None:
        """A Node's facts."""
        return self._nodes.get(name)

    def pending(self) -> bool:
        """Whether a commit may change something."""
        return bool(
            self._touched_pods or self._touched_services or self._touched_slices or self._touched_policies
        )

    def commit(self) -> Changes:
        """Compile what was touched; returns what differs from what was published before."""
        changes = {type_url: Change() for type_url in self.collections}
        for key in self._touched_services:
            self._publish_service(key, changes)
        for key in self._touched_pods:
            self._publish_pod(key, changes)
        for key in self._touched_slices:
            self._publish_bare_endpoints(key, changes)
        for key in self._touched_policies:
            authorization = self.policies.authorization(key)
            if authorization is None:
                self._withdraw(AUTHORIZATION_TYPE, str(key), changes)
            else:
                resource = publish(AUTHORIZATION_TYPE, str(key), authorization)
                if self.collections[AUTHORIZATION_TYPE].put(resource):
                    changes[AUTHORIZATION_TYPE].updated[resource.name] = resource
        for touched in (
            self._touched_pods,
            self._touched_services,
            self._touched_slices,
            self._touched_policies,
        ):
            touched.clear()
        return {type_url: change for type_url, change in changes.items() if change}

    # Observation: note what may differ.

    def _pod(self, key: ObjectKey, obj: Object | None) -> None:
        new = None if obj is None else facts.pod(obj)
        old = self._pods.get(key)
        if new == old:
            return
        self.waypoints.set_pod(key, dict(new.labels) if new else None)
        self._touched_pods.add(key)
        if old is not None:
            del self._pods[key]
            self._pods_by_namespace.discard(key.namespace, key)
            self._pods_by_node.discard(old.node, key)
            for label, value in old.labels:
                self._pods_by_label.discard((key.namespace, label, value), key)
        if new is not None:
            self._pods[key] = new
            self._pods_by_namespace.add(key.namespace, key)
            self._pods_by_node.add(new.node, key)
            for label, value in new.labels:
                self._pods_by_label.add((key.namespace, label, value), key)

    def _node(self, key: ObjectKey, obj: Object | None) -> None:
        new = None if obj is None else facts.node(obj)
        if new == self._nodes.get(key.name):
            return
        if new is None:
            del self._nodes[key.name]
        else:
            self._nodes[key.name] = new
        self._touched_pods |= self._pods_by_node[key.name]

    def _namespace(self, key: ObjectKey, obj: Object | None) -> None:
        labels = None if obj is None else obj["metadata"].get("labels") or {}
        if self.waypoints.set_namespace(key.name, labels):
            self._rebind(Touched({key.name}))
        new = "" if obj is None else facts.namespace(obj)
        if new == self._namespaces.get(key.name, ""):
            return
        self._namespaces[key.name] = new
        self._touched_services |= self._services_by_namespace[key.name]

    def _rebind(self, touched: Touched) -> None:
        self._touched_services |= touched.services
        self._touched_pods |= touched.pods
        for namespace in touched.namespaces:
            self._touched_services |= self._services_by_namespace[namespace]
            self._touched_pods |= self._pods_by_namespace[namespace]

    def _service(self, key: ObjectKey, obj: Object | None) -> None:
        if self.waypoints.set_service(key, obj["metadata"].get("labels") if obj else None):
            self._touched_services.add(key)
        new = None if obj is None else facts.service(obj)
        old = self._services.get(key)
        if new == old:
            return
        if new is None:
            del self._services[key]
            self._services_by_namespace.discard(key.namespace, key)
        else:
            self._services[key] = new
            self._services_by_namespace.add(key.namespace, key)
        self._touched_services.add(key)
        if old is None or new is None or old.ports != new.ports:
            for slice_key in self._slices_by_service[key]:
                self._touch_members(self._slices[slice_key])

    def _slice(self, key: ObjectKey, obj: Object | None) -> None:
        new = None if obj is None else facts.endpoint_slice(obj)
        old = self._slices.get(key)
        if new == old:
            return
        before = {e.pod for e in old.endpoints if e.pod} if old else set()
        after = {e.pod for e in new.endpoints if e.pod} if new else set()
        if old is not None:
            del self._slices[key]
            self._slices_by_service.discard(old.service, key)
        if new is not None:
            self._slices[key] = new
            self._slices_by_service.add(new.service, key)
        for pod in before - after:
            self._slices_by_pod.discard(pod, key)
        for pod in after - before:
            self._slices_by_pod.add(pod, key)
        same_ports = (
            old is not None and new is not None and (old.ports, old.service) == (new.ports, new.service)
        )
        self._touched_pods |= (before ^ after) if same_ports else (before | after)
        self._touched_slices.add(key)

    def _touch_members(self, slice_: facts.EndpointSlice) -> None:
        self._touched_slices.add(slice_.key)
        self._touched_pods.update(e.pod for e in slice_.endpoints if e.pod)

    def _apply(self, effect: Effect) -> None:
        self._touched_policies |= effect.policies
        for selection in effect.selections:
            self._touched_pods.update(self._selected(selection))

    def _selected(self, selection: Selection) -> Iterator[ObjectKey]:
        spaces = self._pods_by_namespace.names() if selection.namespace is None else [selection.namespace]
        for space in spaces:
            if not selection.labels:
                yield from self._pods_by_namespace[space]
                continue
            carriers = [self._pods_by_label[space, name, value] for name, value in selection.labels]
            smallest, *rest = sorted(carriers, key=len)
            yield from (pod for pod in smallest if all(pod in carrier for carrier in rest))

    # Compilation: make what was touched, keep what differs.

    def _publish_service(self, key: ObjectKey, changes: dict[str, Change]) -> None:
        service, name = self._services.get(key), workload.service_name(self.mesh, key)
        if service is None:
            self._withdraw(ADDRESS_TYPE, name, changes)
            return
        message = workload.from_service(self.mesh, service, self._namespaces.get(key.namespace, ""))
        if waypoint := self.waypoints.of_service(key):
            message.waypoint.CopyFrom(self.waypoints.address(waypoint))
        aliases = [self._alias(address) for address in service.addresses]
        resource = publish(ADDRESS_TYPE, name, wds.Address(service=message), aliases)
        if self.collections[ADDRESS_TYPE].put(resource):
            changes[ADDRESS_TYPE].updated[name] = resource

    def _publish_pod(self, key: ObjectKey, changes: dict[str, Change]) -> None:
        pod = self._pods.get(key)
        if pod is None:
            self._withdraw(ADDRESS_TYPE, workload.pod_uid(self.mesh, key), changes)
            return
        attached = self.policies.attached(key.namespace, dict(pod.labels))
        slices = (self._slices[s] for s in self._slices_by_pod[key])
        message = workload.from_pod(
            self.mesh, pod, self._nodes.get(pod.node), self._memberships(slices), attached
        )
        labels = dict(pod.labels)
        if waypoint := self.waypoints.of_pod(key, labels):
            message.waypoint.CopyFrom(self.waypoints.address(waypoint))
        if instance := self.waypoints.instance_of(key.namespace, labels):
            message.application_tunnel.protocol = wds.ApplicationTunnel.PROXY
            message.application_tunnel.port = instance.tunnel_port
        self._publish_workload(message, changes)

    def _publish_bare_endpoints(self, key: ObjectKey, changes: dict[str, Change]) -> None:
        """Members of a slice that are no pods: addresses such as the API server's."""
        slice_ = self._slices.get(key)
        published = set()
        if slice_ is not None and (services := self._memberships([slice_])):
            for endpoint in slice_.endpoints:
                if endpoint.pod is None and (
                    message := workload.from_endpoint(self.mesh, slice_, endpoint, services)
                ):
                    published.add(message.uid)
                    self._publish_workload(message, changes)
        for uid in self._bare.pop(key, set()) - published:
            self._withdraw(ADDRESS_TYPE, uid, changes)
        if published:
            self._bare[key] = published

    def _memberships(self, slices: Iterable[facts.EndpointSlice]) -> dict[str, workload.PortPairs]:
        """Ports by service, joined over slices; a service may have several for one workload."""
        joined: dict[str, workload.PortPairs] = {}
        for slice_ in sorted(slices, key=lambda s: s.key):
            service = self._services.get(slice_.service)
            if service is None:
                continue
            name = workload.service_name(self.mesh, slice_.service)
            pairs = (*joined.get(name, ()), *workload.join_ports(service, slice_))
            joined[name] = tuple(dict.fromkeys(pairs))
        return joined

    def _publish_workload(self, message: wds.Workload, changes: dict[str, Change]) -> None:
        shared = message.network_mode == wds.HOST_NETWORK
        aliases = () if shared else tuple(self._alias(address) for address in message.addresses)
        groups = [*sorted(message.services), *([node_group(message.node)] if message.node else [])]
        resource = publish(ADDRESS_TYPE, message.uid, wds.Address(workload=message), aliases, groups)
        if self.collections[ADDRESS_TYPE].put(resource):
            changes[ADDRESS_TYPE].updated[message.uid] = resource

    def _withdraw(self, type_url: str, name: str, changes: dict[str, Change]) -> None:
        old = self.collections[type_url].remove(name)
        if old is not None:
            changes[type_url].removed[name] = old

    def _alias(self, address: bytes) -> str:
        return f"{self.mesh.network}/{facts.address_text(address)}"
