"""TCPRoute and TLSRoute read into rules: only weights, and for TLS the names that clients ask for. Pure."""

from __future__ import annotations

from meshlight.controlplane.envoy.http_route import backend_reference, parents
from meshlight.controlplane.envoy.routing import Backend, Problem, Route, RouteKey, Rule
from meshlight.kube.resources import Object


def parse(obj: Object) -> Route:
    """A TCPRoute or TLSRoute."""
    spec, metadata = obj.get("spec") or {}, obj["metadata"]
    namespace = metadata.get("namespace", "")
    key = RouteKey(obj["kind"], namespace, metadata["name"])
    problems: list[Problem] = []
    rules = []
    for index, rule in enumerate(spec.get("rules") or []):
        backends = []
        for ref in rule.get("backendRefs") or []:
            reference = backend_reference(ref, namespace)
            if isinstance(reference, Problem):
                problems.append(reference)
                backends.append(Backend(None, ref.get("weight", 1)))
            else:
                backends.append(Backend(reference, ref.get("weight", 1)))
        rules.append(Rule(name=f"{key}/{rule.get('name') or index}", backends=tuple(backends)))
    return Route(
        key=key,
        created=metadata.get("creationTimestamp", ""),
        parents=parents(spec, namespace),
        hostnames=tuple(name.lower() for name in spec.get("hostnames") or ()),
        rules=tuple(rules),
        problems=tuple(problems),
        generation=metadata.get("generation", 1),
    )
