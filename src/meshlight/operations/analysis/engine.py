"""Runs the analyzers over the mesh of an API, with the objects of files laid over it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from meshlight.kube import validation
from meshlight.kube.resources import DEPLOYMENTS, Object, Resource
from meshlight.kube.schema import Schema
from meshlight.operations.analysis import annotation_rules, security, traffic
from meshlight.operations.analysis import messages as m
from meshlight.operations.analysis.messages import Kind, Message
from meshlight.operations.mesh_snapshot import Snapshot

Analyzer = Callable[[Snapshot], Iterator[Message]]
ANALYZERS: tuple[Analyzer, ...] = (*security.ANALYZERS, *traffic.ANALYZERS, *annotation_rules.ANALYZERS)

# Istio's own Gateway shares its kind with the Gateway API's, hence the other name here.
ALSO = (
    DEPLOYMENTS,
    Resource("networking.istio.io", "v1", "virtualservices", "VirtualService"),
    Resource("networking.istio.io", "v1", "destinationrules", "DestinationRule"),
    Resource("networking.istio.io", "v1", "gateways", "IstioGateway"),
    Resource("security.istio.io", "v1", "requestauthentications", "RequestAuthentication"),
    Resource("telemetry.istio.io", "v1", "telemetries", "Telemetry"),
    Resource("gateway.networking.k8s.io", "v1", "gatewayclasses", "GatewayClass", namespaced=False),
)


@dataclass(frozen=True, slots=True)
class Suppression:
    """`CODE=KIND NAME.NAMESPACE`, stars allowed: messages that are not to be told."""

    code: str
    resource: str

    def covers(self, message: Message) -> bool:
        """Whether a message is not to be told."""
        name = f"{message.object_kind} {message.name}" + (f".{message.namespace}" if message.namespace else "")
        return message.kind.code == self.code and fnmatch.fnmatchcase(name, self.resource)


def analyze(
    snapshot: Snapshot,
    files: Iterable[Object] = (),
    namespace: str = "",
    suppressions: Iterable[Suppression] = (),
    kinds: Iterable[Kind] = m.ALL,
) -> list[Message]:
    """All messages, worst first; of one namespace where it is given, and about files' objects always.

    The files' objects are in the snapshot already; here their form is checked as the API would.
    """
    files, silent, told = list(files), list(suppressions), {kind.code for kind in kinds}
    found = [message for obj in files for message in form(obj)]
    for analyzer in ANALYZERS:
        try:
            found += analyzer(snapshot)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"analyzer {analyzer.__name__} failed on objects of an unexpected form: {error!r}"
            found.append(Message(m.INTERNAL_ERROR, "Analyzer", "", analyzer.__name__, text))
    kept = [
        message
        for message in dict.fromkeys(found)
        if message.kind.code in told
        and (not namespace or message.reference or message.namespace in ("", namespace))
        and not any(suppression.covers(message) for suppression in silent)
        and not _suppressed_by_object(snapshot, message)
    ]
    return sorted(kept, key=lambda k: (-k.kind.level, k.kind.code, k.namespace, k.name, k.text))


def _suppressed_by_object(snapshot: Snapshot, message: Message) -> bool:
    obj = snapshot.get(message.object_kind, message.namespace, message.name) or {"metadata": {}}
    said = (obj["metadata"].get("annotations") or {}).get("galley.istio.io/analyze-suppress", "")
    codes = [code.strip() for code in said.split(",")]
    return "*" in codes or message.kind.code in codes


def form(obj: Object) -> Iterator[Message]:
    """What the API would refuse or warn of."""
    plain = {name: value for name, value in obj.items() if name != "__reference__"}
    for cause in validation.custom(plain, Schema()):
        yield Message.about(m.SCHEMA_ERROR, obj, f"{cause.field}: {cause.message}")
    for warning in validation.warnings(plain):
        yield Message.about(m.SCHEMA_WARNING, obj, warning)
