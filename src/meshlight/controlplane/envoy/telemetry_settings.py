"""What is to be told about traffic: the mesh configuration, with Telemetry objects laid over it. Pure.

Of Telemetry objects the mesh-wide one (root namespace) is laid down first, then the namespace's, then those
that target the proxy; each says only what it wants different.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from meshlight.controlplane.envoy.policies import Target, targets_of
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import Mesh
from meshlight.kube.resources import Object

_METRICS = {
    "REQUEST_COUNT": "requests", "REQUEST_DURATION": "request_duration_milliseconds",
    "REQUEST_SIZE": "request_bytes", "RESPONSE_SIZE": "response_bytes",
    "TCP_OPENED_CONNECTIONS": "tcp_connections_opened", "TCP_CLOSED_CONNECTIONS": "tcp_connections_closed",
    "TCP_SENT_BYTES": "tcp_sent_bytes", "TCP_RECEIVED_BYTES": "tcp_received_bytes",
}  # fmt: skip
_ALL = tuple(_METRICS.values())
_SIMPLE = re.compile(r"'([^']*)'|\"([^\"]*)\"|request\.headers\[['\"]([\w-]+)['\"]\]")
_ATTRIBUTES = {
    "request.host": "%REQ(:AUTHORITY)%", "request.method": "%REQ(:METHOD)%", "request.path": "%REQ(:PATH)%",
    "request.url_path": "%REQ_WITHOUT_QUERY(:PATH)%", "request.protocol": "%PROTOCOL%",
    "request.scheme": "%REQ(:SCHEME)%", "response.code": "%RESPONSE_CODE%",
    "response.flags": "%RESPONSE_FLAGS%",
    "request.useragent": "%REQ(USER-AGENT)%", "destination.port": "%DOWNSTREAM_LOCAL_PORT%",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CustomTag:
    """A tag of spans: a literal, an environment variable or a request header."""

    name: str
    kind: str
    value: str
    default: str = ""


@dataclass(frozen=True, slots=True)
class Reporter:
    """Who tells: its name in metrics and flow records, and its own workload where it is the source."""

    name: str
    role: str
    proxy: str
    namespace: str
    cluster: str
    security: str
    own: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """What is to be told. `changed_tags` is (metric or empty for all, label, format; empty removes it)."""

    zipkin: str = ""
    sampling: float = 1.0
    disable_spans: bool = False
    custom_tags: tuple[CustomTag, ...] = ()
    access_log: bool = True
    access_log_filter: str = ""
    disabled_metrics: frozenset[str] = frozenset()
    changed_tags: tuple[tuple[str, str, str], ...] = ()

    def tags(self, metric: str) -> dict[str, str]:
        """The labels of a metric that differ from Istio's."""
        return {label: value for name, label, value in self.changed_tags if name in ("", metric)}


@dataclass(frozen=True, slots=True)
class Telemetry:
    """A Telemetry object."""

    key: ObjectKey
    targets: frozenset[Target]
    selects: bool
    text: Mapping[str, Any]


def of_mesh(mesh: Mesh) -> TelemetrySettings:
    """What the mesh configuration says."""
    tracing = mesh.tracing
    return TelemetrySettings(
        zipkin=tracing.zipkin if tracing.enabled else "",
        sampling=tracing.sampling,
        access_log=mesh.access_log,
    )


class TelemetryIndex:
    """Every Telemetry object."""

    def __init__(self) -> None:
        self._objects: dict[ObjectKey, Telemetry] = {}

    def set(self, mesh: Mesh, key: ObjectKey, obj: Object | None) -> None:
        """Take a Telemetry, or its deletion."""
        self._objects.pop(key, None)
        if obj is not None:
            spec = obj.get("spec") or {}
            targets = targets_of(obj, mesh.root_namespace)
            self._objects[key] = Telemetry(key, targets, bool(spec.get("selector")), spec)

    def of_proxy(self, mesh: Mesh, namespace: str, targets: Iterable[Target]) -> TelemetrySettings:
        """What holds for a proxy."""
        settings, wanted = of_mesh(mesh), set(targets)
        layers: tuple[list[Telemetry], ...] = ([], [], [])
        for key in sorted(self._objects):
            found = self._objects[key]
            if found.selects:
                continue
            if found.targets:
                if not found.targets.isdisjoint(wanted):
                    layers[2].append(found)
            elif key.namespace == mesh.root_namespace:
                layers[0].append(found)
            elif key.namespace == namespace:
                layers[1].append(found)
        for layer in layers:
            for found in layer[:1]:
                settings = laid_over(settings, found.text)
        return settings


def laid_over(settings: TelemetrySettings, spec: Mapping[str, Any]) -> TelemetrySettings:
    """Settings with what a Telemetry says in their place."""
    changes: dict[str, Any] = {}
    for tracing in spec.get("tracing") or []:
        if tracing.get("randomSamplingPercentage") is not None:
            changes["sampling"] = float(tracing["randomSamplingPercentage"])
        if tracing.get("disableSpanReporting") is not None:
            changes["disable_spans"] = bool(tracing["disableSpanReporting"])
        if tracing.get("customTags"):
            changes["custom_tags"] = tuple(
                tag
                for name, value in sorted(tracing["customTags"].items())
                if (tag := _custom_tag(name, value))
            )
    for logging in spec.get("accessLogging") or []:
        changes["access_log"] = not logging.get("disabled", False)
        changes["access_log_filter"] = (logging.get("filter") or {}).get("expression", "")
    disabled, tags = set(settings.disabled_metrics), list(settings.changed_tags)
    for metrics in spec.get("metrics") or []:
        for override in metrics.get("overrides") or []:
            match = override.get("match") or {}
            chosen = match.get("metric") or ""
            named = _METRICS.get(chosen, "") if chosen not in ("", "ALL_METRICS") else ""
            if override.get("disabled"):
                disabled.update([named] if named else _ALL)
            elif override.get("disabled") is False:
                disabled.difference_update([named] if named else _ALL)
            for label, change in (override.get("tagOverrides") or {}).items():
                removed = change.get("operation") == "REMOVE"
                tags.append((named, label, "" if removed else expression(change.get("value", ""))))
    changes["disabled_metrics"], changes["changed_tags"] = frozenset(disabled), tuple(tags)
    return dataclasses.replace(settings, **changes)


def expression(text: str) -> str:
    """The format of an attribute expression: literals, request headers and the usual attributes."""
    text = text.strip()
    if match := _SIMPLE.fullmatch(text):
        literal = match[1] if match[1] is not None else match[2]
        return literal.replace("%", "%%") if literal is not None else f"%REQ({match[3]})%"
    return _ATTRIBUTES.get(text, "unknown")


def _custom_tag(name: str, value: Mapping[str, Any]) -> CustomTag | None:
    if "literal" in value:
        return CustomTag(name, "literal", value["literal"].get("value", ""))
    if "environment" in value:
        return CustomTag(
            name, "environment", value["environment"]["name"], value["environment"].get("defaultValue", "")
        )
    if "header" in value:
        return CustomTag(name, "header", value["header"]["name"], value["header"].get("defaultValue", ""))
    return None
