"""Why a connection passes or does not: the decisions on its way, each with the objects that made it.

Walks what the data path does: is the source captured, what does the destination mean, does a waypoint stand
before it, which tunnel is spoken, which PeerAuthentication and which AuthorizationPolicies judge. Judged by
the same compiled policies as the node proxy's. Pure, over a snapshot of the mesh.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from meshlight.controlplane import evaluation
from meshlight.controlplane import peer_authentication as peer
from meshlight.controlplane.evaluation import Connection, Decision, Outcome, Peer
from meshlight.controlplane.facts import ObjectKey, address_text
from meshlight.kube.ambient import DATAPLANE_MODE, obstacle
from meshlight.operations import parties
from meshlight.operations.mesh_snapshot import Snapshot
from meshlight.operations.parties import Destination, Source
from meshlight.proto import workload_pb2 as wds

ALLOWED, DENIED, UNREACHABLE = "allowed", "denied", "unreachable"


@dataclass(frozen=True, slots=True)
class Step:
    """One decision: `verdict` is ok, denied, unreachable or note; `objects` are `Kind/NAMESPACE/NAME`."""

    stage: str
    verdict: str
    text: str
    objects: tuple[str, ...] = ()


@dataclass(slots=True)
class Route:
    """The way to one workload."""

    destination: str
    steps: list[Step] = field(default_factory=list)
    verdict: str = ALLOWED

    def add(self, stage: str, verdict: str, text: str, *objects: str) -> None:
        """Note a decision; the first that refuses is the verdict."""
        self.steps.append(Step(stage, verdict, text, objects))
        if verdict in (DENIED, UNREACHABLE) and self.verdict == ALLOWED:
            self.verdict = verdict


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every way a connection may take, and the verdict over all: the best of them, named so if they differ."""

    source: str
    destination: str
    routes: tuple[Route, ...]

    @property
    def verdict(self) -> str:
        """What most deserves to be known: allowed only where every way is."""
        verdicts = {route.verdict for route in self.routes}
        return next(iter(verdicts)) if len(verdicts) == 1 else DENIED if DENIED in verdicts else UNREACHABLE


def explain(snapshot: Snapshot, source: Source, destination: Destination) -> Explanation:
    """Explain a connection from a source to a destination."""
    routes = list(_routes(snapshot, source, destination))
    return Explanation(source.text, destination.text, tuple(routes))


def _routes(snapshot: Snapshot, source: Source, destination: Destination) -> Iterator[Route]:
    if destination.service is None:
        for workload in destination.workloads:
            route = Route(_label(workload, destination.port))
            captured = _capture(snapshot, route, source.workload, "source")
            route.add("destination", "ok", f"{_named(workload)} is addressed directly", _object(workload))
            _reach(snapshot, route, source, captured, workload, destination.port)
            yield route
        return
    service = destination.service
    ports = [p for p in service.ports if destination.port in (0, p.service_port)]
    if not ports:
        route = Route(f"{service.hostname}:{destination.port}")
        _capture(snapshot, route, source.workload, "source")
        offered = ", ".join(str(p.service_port) for p in service.ports) or "none"
        text = f"{service.hostname} has no port {destination.port}; its ports are {offered}"
        route.add("destination", UNREACHABLE, text, _service_object(snapshot, service))
        yield route
        return
    for port in ports:
        yield from _through_service(snapshot, source, service, port.service_port)


def _through_service(snapshot: Snapshot, source: Source, service: Any, port: int) -> Iterator[Route]:
    key = f"{service.namespace}/{service.hostname}"
    any_health = service.load_balancing.health_policy == wds.LoadBalancing.ALLOW_ALL
    serving = []
    for member in sorted(parties.members(snapshot, service), key=lambda w: str(w.name)):
        targets = [p.target_port for p in member.services[key].ports if p.service_port == port]
        if targets and (any_health or member.status == wds.HEALTHY):
            serving.append((member, targets[0]))
    if not serving:
        route = Route(f"{service.hostname}:{port}")
        captured = _capture(snapshot, route, source.workload, "source")
        known = len(parties.members(snapshot, service))
        if service.load_balancing.mode == wds.LoadBalancing.PASSTHROUGH:
            text = (
                f"{service.hostname} is passed through to the address the program asked for, outside the mesh"
            )
            route.add("destination", "ok", text, _service_object(snapshot, service))
            if captured:
                route.add("tunnel", "note", "plaintext: the mesh knows no workload there")
        else:
            text = f"{service.hostname}:{port} has no healthy endpoint ({known} known)"
            route.add("destination", UNREACHABLE, text, _service_object(snapshot, service))
        yield route
        return
    for member, target in serving:
        route = Route(_label(member, target))
        captured = _capture(snapshot, route, source.workload, "source")
        text = f"{service.hostname}:{port} leads to {_named(member)}:{target} (of {len(serving)} endpoints)"
        route.add("destination", "ok", text, _service_object(snapshot, service), _object(member))
        via = _waypoint(snapshot, route, service, captured)
        if via is None:
            _reach(snapshot, route, source, captured, member, target)
        else:
            _reach(snapshot, route, source, captured, via, port, "at the waypoint")
            behind = Source(_named(via), _address(via), via)
            _reach(snapshot, route, behind, True, member, target, "behind the waypoint")
        yield route


def _capture(snapshot: Snapshot, route: Route, workload: Any, side: str) -> bool:
    """Whether ztunnel carries a workload's connections, and why not."""
    if workload is None:
        route.add(side, "note", "the address belongs to nothing that the mesh knows: its traffic is plaintext")
        return False
    where = _named(workload)
    if workload.tunnel_protocol == wds.HBONE:
        identity = f"spiffe://{workload.trust_domain}/ns/{workload.namespace}/sa/{workload.service_account}"
        route.add(
            side,
            "ok",
            f"{where} is captured by ztunnel on {workload.node or 'its node'} as {identity}",
            _object(workload),
        )
        return True
    route.add(side, "note", f"{where} is not captured: {_uncaptured(snapshot, workload)}", _object(workload))
    return False


def _uncaptured(snapshot: Snapshot, workload: Any) -> str:
    pod = snapshot.get("Pod", workload.namespace, workload.name)
    if pod is None:
        return "it is no pod and does not speak HBONE"
    if why := obstacle(pod):
        return why
    labels = pod["metadata"].get("labels") or {}
    if DATAPLANE_MODE in labels:
        if labels[DATAPLANE_MODE] != "ambient":
            return f"its label {DATAPLANE_MODE} is {labels[DATAPLANE_MODE]!r}"
    else:
        namespace = snapshot.get("Namespace", "", workload.namespace) or {"metadata": {}}
        mode = (namespace["metadata"].get("labels") or {}).get(DATAPLANE_MODE)
        if mode != "ambient":
            said = f"is {mode!r}" if mode else "is not set"
            return f"label {DATAPLANE_MODE} of namespace {workload.namespace} {said}, and the pod has none"
    return "it is labelled for the mesh, but its node has not enrolled it (yet): see the pod's Events"


def _waypoint(snapshot: Snapshot, route: Route, service: Any, captured: bool) -> Any:
    """A pod of the waypoint before a service, None where there is none to go through."""
    if not service.HasField("waypoint"):
        return None
    hostname = service.waypoint.hostname
    gateway = f"Gateway/{hostname.namespace}/{hostname.hostname.partition('.')[0]}"
    if not captured:
        route.add(
            "waypoint", "note", f"{hostname.hostname} is not on the way: the source is not captured", gateway
        )
        return None
    own = snapshot.service(f"{hostname.namespace}/{hostname.hostname}")
    instances = [w for w in parties.members(snapshot, own) if w.status == wds.HEALTHY] if own else []
    if not instances:
        route.add(
            "waypoint",
            UNREACHABLE,
            f"{hostname.hostname} stands before it and has no healthy instance",
            gateway,
        )
        return None
    route.add("waypoint", "ok", f"{hostname.hostname} stands before it and judges HTTP", gateway)
    for key, spec in _bound(snapshot, service, hostname):
        action, rules = spec.get("action") or "ALLOW", spec.get("rules") or []
        asked = " or ".join(_asked(rule or {}) for rule in rules)
        verb = {"ALLOW": "allows only", "DENY": "denies", "CUSTOM": "asks its provider about"}.get(
            action, "notes"
        )
        text = f"{action} {key} {verb} requests {asked if rules else 'of no kind'}"
        verdict = DENIED if action == "ALLOW" and not rules else "note"
        route.add("HTTP at the waypoint", verdict, text, f"AuthorizationPolicy/{key}")
    return min(instances, key=lambda w: str(w.name))


def _asked(rule: dict[str, Any]) -> str:
    """What a rule asks of a request, in its own words: `with to.methods=PUT, from.namespaces=shop`."""
    parts = []
    for section, inner in (("from", "source"), ("to", "operation")):
        for entry in rule.get(section) or []:
            for name, values in ((entry or {}).get(inner) or {}).items():
                parts.append(f"{section}.{name}={'|'.join(map(str, values))}")
    for condition in rule.get("when") or []:
        wanted = condition.get("values") or [f"not {value}" for value in condition.get("notValues") or []]
        parts.append(f"{condition.get('key')}={'|'.join(map(str, wanted))}")
    return "with " + ", ".join(parts) if parts else "of every kind"


def _bound(snapshot: Snapshot, service: Any, hostname: Any) -> Iterator[tuple[ObjectKey, dict[str, Any]]]:
    """AuthorizationPolicies that the waypoint judges by, with their specs."""
    for key, obj in sorted(snapshot.objects.get("AuthorizationPolicy", {}).items()):
        spec = obj.get("spec") or {}
        for ref in [*(spec.get("targetRefs") or []), *([spec["targetRef"]] if spec.get("targetRef") else [])]:
            named = (ref.get("kind"), key.namespace, ref.get("name"))
            if named in (
                ("Service", service.namespace, service.name),
                ("ServiceEntry", service.namespace, service.name),
                ("Gateway", hostname.namespace, hostname.hostname.partition(".")[0]),
            ):
                yield key, spec
                break


def _reach(
    snapshot: Snapshot, route: Route, source: Source, captured: bool, workload: Any, port: int, where: str = ""
) -> None:
    """From a source, captured or not, to a port of a workload: tunnel, mutual TLS, policies."""
    stage = f" {where}" if where else ""
    speaks = workload.tunnel_protocol == wds.HBONE
    if captured and speaks:
        route.add(f"tunnel{stage}", "ok", f"HBONE: mutual TLS to {_named(workload)} on port 15008")
    elif captured:
        route.add(f"tunnel{stage}", "note", f"plaintext: {_named(workload)} is not captured", _object(workload))
    else:
        route.add(f"tunnel{stage}", "note", "plaintext: the source is not captured")
    if not speaks:
        why = f"no proxy stands before {_named(workload)}: no policy is enforced"
        route.add(f"policy{stage}", "note", why)
        return
    known = source.workload
    proven = Peer(known.trust_domain, known.namespace, known.service_account) if captured else None
    if port == 0:
        route.add(
            f"policy{stage}", "note", "without a port, policies that name ports cannot be judged: give :PORT"
        )
    _judge(snapshot, route, Connection(source.address, proven, _address(workload), port), workload, stage)


def _judge(snapshot: Snapshot, route: Route, connection: Connection, workload: Any, stage: str) -> None:
    labels = _labels(snapshot, workload)
    mode, because = snapshot.index.policies.mutual_tls(workload.namespace, labels, connection.port)
    said = (
        f"PeerAuthentication {because.key} says {mode.value}"
        if because
        else "no PeerAuthentication: PERMISSIVE"
    )
    if connection.peer is None:
        said += "; the source proves no identity"
    verdict = DENIED if mode is peer.Mode.STRICT and connection.peer is None else "ok"
    route.add(f"mutual TLS{stage}", verdict, said, *([f"PeerAuthentication/{because.key}"] if because else []))
    policies = evaluation.applicable(
        snapshot.policies(), workload.namespace, list(workload.authorization_policies)
    )
    own = [p for p in policies if not _converted(p.name)]
    decision = evaluation.decide(own, connection)
    _tell(snapshot, route, decision, stage)


def _converted(name: str) -> bool:
    return name.startswith((peer.STATIC_STRICT, peer.CONVERTED_PREFIX))


def _tell(snapshot: Snapshot, route: Route, decision: Decision, stage: str) -> None:
    """Each policy that was looked at, then what they decide together."""
    for one in decision.examined:
        name = f"AuthorizationPolicy/{one.policy}"
        prefix = f"{one.action} {one.policy}"
        if one.rule is None:
            paths = (_rule_path(snapshot, one.policy, index) for index in range(len(one.misses)))
            told = (f"{path}: {', '.join(fields)}" for path, fields in zip(paths, one.misses, strict=True))
            missed = "; ".join((*told, *_lost(snapshot, one.policy))) or "it has no rules"
            text = f"{prefix} does not match ({missed})"
        else:
            text = f"{prefix} matches by {_rule_path(snapshot, one.policy, one.rule)}"
        if one.dry_run:
            text += "; a dry run, which decides nothing"
        route.add(f"policy{stage}", "note", text, name)
    objects = tuple(f"AuthorizationPolicy/{name}" for name in decision.decided_by)
    by = ", ".join(decision.decided_by)
    match decision.outcome:
        case Outcome.NO_POLICY:
            route.add(f"policy{stage}", "ok", "no ALLOW policy applies, and no DENY matches: allowed")
        case Outcome.ALLOWED_BY:
            route.add(f"policy{stage}", "ok", f"allowed by {by}", *objects)
        case Outcome.DENIED_BY:
            route.add(f"policy{stage}", DENIED, f"denied by {by}", *objects)
        case Outcome.NOT_ALLOWED:
            route.add(f"policy{stage}", DENIED, f"denied: no rule of any ALLOW policy matches ({by})", *objects)


def _lost(snapshot: Snapshot, policy: str) -> Iterator[str]:
    """What of a policy ztunnel cannot enforce."""
    compiled = snapshot.index.policies.outcome(ObjectKey(*policy.split("/", 1)))
    for finding in compiled.findings if compiled else ():
        yield f"{finding.path}: {finding.message}"


def _rule_path(snapshot: Snapshot, policy: str, rule: int) -> str:
    """The rule as its author numbers it: rules that L4 cannot enforce are not among the compiled ones."""
    compiled = snapshot.index.policies.outcome(ObjectKey(*policy.split("/", 1)))
    return f"spec.rules[{compiled.origins[rule] if compiled else rule}]"


def _labels(snapshot: Snapshot, workload: Any) -> dict[str, str]:
    for kind in ("Pod", "WorkloadEntry"):
        if obj := snapshot.get(kind, workload.namespace, workload.name):
            return {**(obj["metadata"].get("labels") or {}), **((obj.get("spec") or {}).get("labels") or {})}
    return {}


def _address(workload: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    packed = workload.addresses[0] if workload.addresses else bytes(4)
    return ipaddress.ip_address(address_text(packed))


def _named(workload: Any) -> str:
    return f"{workload.name}.{workload.namespace}" if workload.namespace else str(workload.name)


def _label(workload: Any, port: int) -> str:
    return f"{_named(workload)}:{port}" if port else _named(workload)


def _object(workload: Any) -> str:
    kind = (
        "Pod"
        if "//Pod/" in workload.uid
        else workload.uid.split("/")[2]
        if workload.uid.count("/") > 2
        else "Address"
    )
    return f"{kind}/{workload.namespace}/{workload.name}"


def _service_object(snapshot: Snapshot, service: Any) -> str:
    known = snapshot.get("Service", service.namespace, service.name)
    kubernetes = snapshot.mesh.hostname(service.name, service.namespace) == service.hostname
    return f"{'Service' if known and kubernetes else 'ServiceEntry'}/{service.namespace}/{service.name}"
