"""The index: object changes in, changed resources out, at a cost proportional to the change.

`observe` takes one object change and only notes which workloads, services and policies it may
touch; `commit` compiles those, once each however often they were touched, and answers with what
really differs. Pure: no clock, no network, and the same changes give the same resources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet

from meshlight.controlplane import facts, workload
from meshlight.controlplane.external_index import ExternalIndex
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.groups import Groups
from meshlight.controlplane.peer_authentication import is_converted
from meshlight.controlplane.policy import TrustDomains
from meshlight.controlplane.policy_index import Effect, PolicyIndex, Selection
from meshlight.controlplane.publication import Failure, Publication, attempt
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Changes
from meshlight.controlplane.settings import Mesh
from meshlight.controlplane.waypoints import GATEWAY_NAME, Touched, WaypointIndex
from meshlight.kube.resources import Object
from meshlight.proto import workload_pb2 as wds


class Index:
    """Workloads, services and policies of the mesh, and the resources made of them."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.policies = PolicyIndex(
            mesh.root_namespace, TrustDomains(mesh.trust_domain, mesh.trust_domain_aliases)
        )
        self.waypoints = WaypointIndex(mesh)
        self.failures: list[Failure] = []
        self._publication = Publication()
        self.collections = self._publication.collections
        self.external = ExternalIndex(mesh, self.policies, self.waypoints, self._publication)
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
            "ServiceEntry": self._service_entry,
            "WorkloadEntry": self.external.set_workload_entry,
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
        self.external.reconfigure(mesh)

    def takes(self, kind: str) -> bool:
        """Whether objects of a kind matter here."""
        return kind in self._observers

    def service_count(self) -> int:
        """How many Services and ServiceEntries are known."""
        return len(self._services) + self.external.service_count()

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

    def pods(self) -> Iterator[facts.Pod]:
        """Every Pod's facts."""
        yield from self._pods.values()

    def node(self, name: str) -> facts.Node | None:
        """A Node's facts."""
        return self._nodes.get(name)

    def pending(self) -> bool:
        """Whether a commit may change something."""
        touched = (self._touched_pods, self._touched_services, self._touched_slices, self._touched_policies)
        return any(touched) or self.external.pending()

    def commit(self) -> Changes:
        """Compile what was touched; returns what differs from what was published before."""
        compiled: tuple[tuple[set[ObjectKey], Callable[[ObjectKey], None]], ...] = (
            (self._touched_services, self._publish_service),
            (self._touched_pods, self._publish_pod),
            (self._touched_slices, self._publish_bare_endpoints),
            (self._touched_policies, self._publish_policy),
        )
        for keys, compiling in compiled:
            self.failures += attempt(keys, compiling)
            if keys is self._touched_services:
                self.failures += self.external.commit()
        for touched in (
            self._touched_pods,
            self._touched_services,
            self._touched_slices,
            self._touched_policies,
        ):
            touched.clear()
        return self._publication.take()

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
        self._apply(self.policies.set_namespace(key.name, exists=obj is not None))
        labels = None if obj is None else obj["metadata"].get("labels") or {}
        if self.waypoints.set_namespace(key.name, labels):
            self._rebind(Touched({key.name}))
        self.external.set_namespace(key.name, "" if obj is None else facts.namespace(obj))
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
            self.external.touch_namespace(namespace)
        self.external.touch(touched)

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
        self._touch_pods(self.external.set_service(key, new))
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
            self.external.touch_selected(selection)
        if effect.unknown_namespaces:
            for space in self._pods_by_namespace.names():
                if not self.policies.knows(space):
                    self._touched_pods |= self._pods_by_namespace[space]
            self.external.touch_unknown()

    def _service_entry(self, key: ObjectKey, obj: Object | None) -> None:
        self._touch_pods(self.external.set_service_entry(key, obj))

    def _touch_pods(self, selections: Iterable[Selection]) -> None:
        for selection in selections:
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

    def _publish_service(self, key: ObjectKey) -> None:
        service, name = self._services.get(key), workload.service_name(self.mesh, key)
        if service is None:
            self._publication.withdraw(ADDRESS_TYPE, name)
            return
        message = workload.from_service(self.mesh, service, self._namespaces.get(key.namespace, ""))
        if waypoint := self.waypoints.of_service(key):
            message.waypoint.CopyFrom(self.waypoints.address(waypoint))
        self._publication.service(name, message)

    def _publish_policy(self, key: ObjectKey) -> None:
        authorization = self.policies.authorization(key)
        if authorization is None:
            self._publication.withdraw(AUTHORIZATION_TYPE, str(key))
        else:
            self._publication.policy(authorization)

    def _publish_pod(self, key: ObjectKey) -> None:
        pod = self._pods.get(key)
        if pod is None:
            self._publication.withdraw(ADDRESS_TYPE, workload.pod_uid(self.mesh, key))
            return
        labels = dict(pod.labels)
        attached = self.policies.attached(key.namespace, labels)
        instance = self.waypoints.instance_of(key.namespace, labels)
        if GATEWAY_NAME in labels and instance is None:
            # A gateway at the edge takes what comes from outside: mutual TLS cannot be asked of it.
            attached = [name for name in attached if not is_converted(name)]
        slices = (self._slices[s] for s in self._slices_by_pod[key])
        memberships = self._memberships(slices) | self.external.memberships_of_pod(pod)
        message = workload.from_pod(self.mesh, pod, self._nodes.get(pod.node), memberships, attached)
        if waypoint := self.waypoints.of_pod(key, labels):
            message.waypoint.CopyFrom(self.waypoints.address(waypoint))
        if instance is not None:
            message.application_tunnel.protocol = wds.ApplicationTunnel.PROXY
            message.application_tunnel.port = instance.tunnel_port
        self._publication.workload(message)

    def _publish_bare_endpoints(self, key: ObjectKey) -> None:
        """Members of a slice that are no pods: addresses such as the API server's."""
        slice_ = self._slices.get(key)
        published = set()
        if slice_ is not None and (services := self._memberships([slice_])):
            for endpoint in slice_.endpoints:
                if endpoint.pod is None and (
                    message := workload.from_endpoint(self.mesh, slice_, endpoint, services)
                ):
                    published.add(message.uid)
                    self._publication.workload(message)
        for uid in self._bare.pop(key, set()) - published:
            self._publication.withdraw(ADDRESS_TYPE, uid)
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
