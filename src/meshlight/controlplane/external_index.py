"""ServiceEntries and WorkloadEntries in the index: whom they select, whose names they claim, what they publish.

The companion of `Index` for what Kubernetes does not run. A host claimed by several ServiceEntries of a
namespace, or by a Service, has one owner: the Service, else the oldest entry. Work is proportional to what
a change touches. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

from meshlight.controlplane import external
from meshlight.controlplane.external import Member, ServiceEntry, WorkloadEntry
from meshlight.controlplane.facts import ObjectKey, Pod, Service, address_text
from meshlight.controlplane.groups import Groups
from meshlight.controlplane.policy_index import PolicyIndex, Selection
from meshlight.controlplane.publication import Failure, Publication, attempt
from meshlight.controlplane.resources import ADDRESS_TYPE
from meshlight.controlplane.settings import Mesh
from meshlight.controlplane.waypoints import Touched, WaypointIndex
from meshlight.controlplane.workload import PortPairs
from meshlight.kube.resources import Object
from meshlight.proto import workload_pb2 as wds


class ExternalIndex:
    """Every ServiceEntry and WorkloadEntry, and what is published of them."""

    def __init__(
        self, mesh: Mesh, policies: PolicyIndex, waypoints: WaypointIndex, publication: Publication
    ) -> None:
        self._mesh, self._policies, self._waypoints, self._publication = mesh, policies, waypoints, publication
        self._entries: dict[ObjectKey, ServiceEntry] = {}
        self._entries_by_namespace: Groups[str] = Groups()
        self._selecting: Groups[str] = Groups()
        self._claims: Groups[str] = Groups()
        self._workloads: dict[ObjectKey, WorkloadEntry] = {}
        self._workloads_by_namespace: Groups[str] = Groups()
        self._services: dict[ObjectKey, Service] = {}
        self._services_by_namespace: Groups[str] = Groups()
        self._service_hosts: set[str] = set()
        self._distributions: dict[str, str] = {}
        self._published: dict[ObjectKey, set[str]] = {}
        self._touched_entries: set[ObjectKey] = set()
        self._touched_workloads: set[ObjectKey] = set()

    # Observation: note what may differ.

    def set_service_entry(self, key: ObjectKey, obj: Object | None) -> list[Selection]:
        """Take a ServiceEntry; answers with selections of pods whose memberships may differ."""
        new = None if obj is None else external.service_entry(obj)
        labels = None if new is None else dict(new.labels)
        rebound = self._waypoints.set_entry(key, labels)
        old = self._entries.get(key)
        if new == old:
            if rebound:
                self._touched_entries.add(key)
            return []
        self._touched_entries.add(key)
        selections = [Selection(key.namespace, e.selector) for e in (old, new) if e is not None and e.selector]
        for host in {host for entry in (old, new) if entry is not None for host in entry.hosts}:
            selections += self._touch_claimants(host)
        if old is not None:
            del self._entries[key]
            self._entries_by_namespace.discard(key.namespace, key)
            self._selecting.discard(key.namespace, key)
            for host in old.hosts:
                self._claims.discard(host, key)
        if new is not None:
            self._entries[key] = new
            self._entries_by_namespace.add(key.namespace, key)
            if new.selector:
                self._selecting.add(key.namespace, key)
            for host in new.hosts:
                self._claims.add(host, key)
        for selection in selections:
            self._touch_workloads(selection.namespace or "", selection.labels)
        return selections

    def set_workload_entry(self, key: ObjectKey, obj: Object | None) -> None:
        """Take a WorkloadEntry."""
        new = None if obj is None else external.workload_entry(obj)
        if new == self._workloads.get(key):
            return
        if new is None:
            del self._workloads[key]
            self._workloads_by_namespace.discard(key.namespace, key)
        else:
            self._workloads[key] = new
            self._workloads_by_namespace.add(key.namespace, key)
        self._touched_workloads.add(key)

    def _touch_claimants(self, host: str) -> list[Selection]:
        """Compile anew who claims a host, one of whom may lose or win it, and whom they select."""
        self._touched_entries |= self._claims[host]
        entries = (self._entries[key] for key in self._claims[host])
        return [Selection(entry.key.namespace, entry.selector) for entry in entries if entry.selector]

    def set_service(self, key: ObjectKey, new: Service | None) -> list[Selection]:
        """Take a Service: it may select WorkloadEntries, and owns its host name.

        Answers with selections of pods whose memberships of ServiceEntries may differ.
        """
        old = self._services.get(key)
        host = self._mesh.hostname(key.name, key.namespace)
        for service in (old, new):
            if service is not None and service.selector:
                self._touch_workloads(key.namespace, service.selector)
        selections = self._touch_claimants(host) if (old is None) != (new is None) else []
        if new is None:
            self._services.pop(key, None)
            self._services_by_namespace.discard(key.namespace, key)
            self._service_hosts.discard(host)
        else:
            self._services[key] = new
            self._services_by_namespace.add(key.namespace, key)
            self._service_hosts.add(host)
        for selection in selections:
            self._touch_workloads(selection.namespace or "", selection.labels)
        return selections

    def set_namespace(self, name: str, distribution: str) -> None:
        """Take a namespace's default traffic distribution."""
        if distribution != self._distributions.get(name, ""):
            self._distributions[name] = distribution
            self._touched_entries |= self._entries_by_namespace[name]

    def touch_namespace(self, name: str) -> None:
        """Compile anew what a namespace has."""
        self._touched_entries |= self._entries_by_namespace[name]
        self._touched_workloads |= self._workloads_by_namespace[name]

    def touch_unknown(self) -> None:
        """Compile anew what is in namespaces that the policies have not heard of."""
        for space in self._namespaces():
            if not self._policies.knows(space):
                self.touch_namespace(space)

    def touch(self, touched: Touched) -> None:
        """Compile anew entries that wish for a waypoint."""
        self._touched_entries |= touched.entries & self._entries.keys()

    def touch_selected(self, selection: Selection) -> None:
        """Compile anew the workloads that a policy's selection picks."""
        spaces = self._namespaces() if selection.namespace is None else [selection.namespace]
        for space in spaces:
            if selection.labels:
                self._touch_workloads(space, selection.labels)
                self._touched_entries |= {
                    key
                    for key in self._entries_by_namespace[space]
                    if external.carries(self._entries[key].labels, selection.labels)
                }
            else:
                self.touch_namespace(space)

    def _namespaces(self) -> list[str]:
        return list(dict.fromkeys((*self._entries_by_namespace.names(), *self._workloads_by_namespace.names())))

    def _touch_workloads(self, namespace: str, selector: external.Labels) -> None:
        for key in self._workloads_by_namespace[namespace]:
            if external.carries(self._workloads[key].member.labels, selector):
                self._touched_workloads.add(key)

    def reconfigure(self, mesh: Mesh) -> None:
        """Take other mesh-wide settings."""
        self._mesh = mesh
        self._touched_entries |= self._entries.keys()
        self._touched_workloads |= self._workloads.keys()

    def pending(self) -> bool:
        """Whether a commit may change something."""
        return bool(self._touched_entries or self._touched_workloads)

    # Reading.

    def service_count(self) -> int:
        """How many ServiceEntries are known."""
        return len(self._entries)

    def entry(self, key: ObjectKey) -> ServiceEntry | None:
        """A ServiceEntry's facts."""
        return self._entries.get(key)

    def memberships_of_pod(self, pod: Pod) -> dict[str, PortPairs]:
        """The ServiceEntries that select a pod, with their ports on it, by resource name."""
        return self._memberships(
            pod.key.namespace,
            lambda entry: external.carries(pod.labels, entry.selector or ()),
            external.pod_ports(pod),
        )

    def _memberships(
        self, namespace: str, selected: Callable[[ServiceEntry], bool], named: dict[str, int]
    ) -> dict[str, PortPairs]:
        found = {}
        for key in sorted(self._selecting[namespace]):
            entry = self._entries[key]
            if selected(entry):
                for host in entry.hosts:
                    if self._owns(entry, host):
                        found[f"{namespace}/{host}"] = external.ports_of_entry(entry, named)
        return found

    def _owns(self, entry: ServiceEntry, host: str) -> bool:
        """Whether an entry is the one that speaks for a host in its namespace."""
        if not entry.shown or self._is_service(entry.key.namespace, host):
            return False
        rivals = (self._entries[key] for key in self._claims[host] if key.namespace == entry.key.namespace)
        return min((r for r in rivals if r.shown), key=_age) == entry

    def _is_service(self, namespace: str, host: str) -> bool:
        name = host.partition(".")[0]
        return host in self._service_hosts and self._mesh.hostname(name, namespace) == host

    def _canonical(self, entry: ServiceEntry, host: str) -> bool:
        """Whether an entry is what clients of other namespaces mean by a host."""
        if host in self._service_hosts or entry.namespace_only:
            return False
        rivals = [self._entries[key] for key in self._claims[host]]
        return min((r for r in rivals if r.shown and not r.namespace_only), key=_age) == entry

    # Compilation.

    def commit(self) -> list[Failure]:
        """Publish what was touched; answers with what could not be compiled."""
        # An entry that loses or wins a host changes the memberships of those it selects.
        for key in self._touched_entries:
            entry = self._entries.get(key)
            if entry is not None and entry.selector:
                self._touch_workloads(key.namespace, entry.selector)
        ordered = sorted(self._touched_entries, key=lambda k: k in self._entries)
        failures = attempt(ordered, self._publish_entry)
        failures += attempt(self._touched_workloads, self._publish_workload_entry)
        self._touched_entries.clear()
        self._touched_workloads.clear()
        return failures

    def _publish_entry(self, key: ObjectKey) -> None:
        entry, published = self._entries.get(key), set()
        if entry is not None and entry.shown:
            hosts = [host for host in entry.hosts if self._owns(entry, host)]
            for host in hosts:
                name = f"{key.namespace}/{host}"
                self._publication.service(name, self._service_message(entry, host))
                published.add(name)
            if hosts:
                published |= self._publish_endpoints(entry, hosts)
        for name in self._published.pop(key, set()) - published:
            if not self._claimed_by_another(key, name):
                self._publication.withdraw(ADDRESS_TYPE, name)
        if published:
            self._published[key] = published

    def _claimed_by_another(self, key: ObjectKey, name: str) -> bool:
        """Whether a published name is someone else's by now, and must stay."""
        namespace, _, host = name.partition("/")
        if self._is_service(namespace, host):
            return True
        rivals = [self._entries[k] for k in self._claims[host] if k != key and k.namespace == namespace]
        return any(self._owns(rival, host) for rival in rivals)

    def _service_message(self, entry: ServiceEntry, host: str) -> wds.Service:
        distribution = self._distributions.get(entry.key.namespace, "")
        canonical = self._canonical(entry, host)
        message = external.from_service_entry(self._mesh, entry, host, distribution, canonical)
        if waypoint := self._waypoints.of_entry(entry.key):
            message.waypoint.CopyFrom(self._waypoints.address(waypoint))
        return message

    def _publish_endpoints(self, entry: ServiceEntry, hosts: list[str]) -> set[str]:
        """The workloads an entry brings: its endpoints, or, by DNS without any, its hosts themselves."""
        labels = dict(entry.labels)
        policies = self._policies.attached(entry.key.namespace, labels)
        members: list[tuple[Member, list[str]]] = [(member, hosts) for member in entry.endpoints]
        if not members and entry.resolution in external.DNS and entry.selector is None:
            members = [(Member(b"", host, (), (), "", "", 0, ""), [host]) for host in hosts]
        published = set()
        for member, served in members:
            pairs = external.ports_of_entry(entry, dict(member.ports))
            services = {f"{entry.key.namespace}/{host}": pairs for host in served}
            text = member.hostname or address_text(member.address)
            uid = external.entry_uid(self._mesh, entry.key, text)
            message = external.from_member(
                self._mesh, uid, entry.key, entry.key.name, member, services, policies
            )
            self._publication.workload(message)
            published.add(uid)
        return published

    def _publish_workload_entry(self, key: ObjectKey) -> None:
        entry, uid = self._workloads.get(key), external.workload_entry_uid(self._mesh, key)
        if entry is None:
            self._publication.withdraw(ADDRESS_TYPE, uid)
            return
        labels = dict(entry.member.labels)
        services = self._memberships(
            key.namespace,
            lambda candidate: external.carries(labels, candidate.selector or ()),
            dict(entry.member.ports),
        )
        for service_key in sorted(self._services_by_namespace[key.namespace]):
            service = self._services[service_key]
            if external.carries(labels, service.selector):
                name = f"{key.namespace}/{self._mesh.hostname(service_key.name, key.namespace)}"
                services[name] = external.ports_of_service(service, entry.member)
        policies = self._policies.attached(key.namespace, labels)
        message = external.from_member(self._mesh, uid, key, entry.name, entry.member, services, policies)
        message.tunnel_protocol = wds.HBONE if entry.hbone else wds.NONE
        message.native_tunnel = entry.native_tunnel
        message.status = wds.HEALTHY if entry.healthy else wds.UNHEALTHY
        self._publication.workload(message)


def _age(entry: ServiceEntry) -> tuple[str, ObjectKey]:
    return entry.created, entry.key
