"""Server-side tables: what `kubectl get` prints, as `meta/v1 Table`.

Built-in kinds have their columns here; custom resources those of their `additionalPrinterColumns`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from meshlight.kube.catalog import ResourceType
from meshlight.kube.resources import Object

NONE = "<none>"
UNKNOWN = "<unknown>"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name, how to get the cell from an object, and whether only `-o wide` shows it."""

    name: str
    cell: Callable[[Object, datetime], Any]
    wide: bool = False
    type: str = "string"

    def definition(self) -> Object:
        """The `TableColumnDefinition`."""
        return {
            "name": self.name,
            "type": self.type,
            "format": "name" if self.name == "Name" else "",
            "description": self.name,
            "priority": 1 if self.wide else 0,
        }


def human_duration(seconds: float) -> str:
    """An age as `kubectl` prints it (k8s.io/apimachinery `duration.HumanDuration`)."""
    s = int(seconds)
    if s < -1:
        return "<invalid>"
    s = max(s, 0)
    if s < 120:
        return f"{s}s"
    minutes, hours, days = s // 60, s // 3600, s // 86400
    if minutes < 10:
        return f"{minutes}m{s % 60}s" if s % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    if days < 365 * 2:
        return f"{days}d"
    years = days // 365
    if years < 8:
        return f"{years}y{days % 365}d" if days % 365 else f"{years}y"
    return f"{years}y"


def age(timestamp: str | None, now: datetime) -> str:
    """The age of an RFC 3339 time."""
    if not timestamp:
        return UNKNOWN
    then = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    return human_duration((now - then).total_seconds())


def render(
    served: ResourceType,
    items: list[Object],
    resource_version: str,
    include_object: str,
    now: datetime | None = None,
) -> Object:
    """A Table of the objects. `include_object` is `None`, `Metadata` or `Object`."""
    now = now or datetime.now(UTC)
    columns = columns_of(served)
    rows = []
    for item in items:
        row: Object = {"cells": [column.cell(item, now) for column in columns]}
        if include_object == "Object":
            row["object"] = item
        elif include_object != "None":
            row["object"] = {
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": item["metadata"],
            }
        rows.append(row)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": resource_version},
        "columnDefinitions": [c.definition() for c in columns],
        "rows": rows,
    }


def columns_of(served: ResourceType) -> list[Column]:
    """The columns of a type, NAME first."""
    builtin = _COLUMNS.get((served.resource.group, served.resource.kind))
    if builtin is not None:
        return [_NAME, *builtin]
    if served.printer_columns:
        return [_NAME, *(_custom(c) for c in served.printer_columns)]
    return [_NAME, _AGE]


def _custom(declared: Object) -> Column:
    kind, path = declared.get("type", "string"), declared["jsonPath"]

    def cell(obj: Object, now: datetime) -> Any:
        values = json_path(obj, path)
        if not values:
            return ""
        if kind == "date":
            return age(str(values[0]), now)
        if kind == "string":
            first = values[0]
            if isinstance(first, list):
                return "[" + ",".join(f'"{v}"' for v in first) + "]"
            return ",".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
        return values[0]

    return Column(
        declared["name"],
        cell,
        wide=declared.get("priority", 0) > 0,
        type="string" if kind == "date" else kind,
    )


_STEP = re.compile(
    r"""\.?(?:\[\?\(@\.(?P<field>[^=!]+)==["'](?P<equal>[^"']*)["']\)\]
    |\[(?P<index>\d+|\*)\]|(?P<name>(?:\\.|[^.\[\]\\])+))""",
    re.VERBOSE,
)


def json_path(obj: Any, path: str) -> list[Any]:
    """Values at a JSONPath of the kind printer columns use (names, indexes, `[*]`, equality filters)."""
    values = [obj]
    for step in _STEP.finditer(path.strip("{}")):
        following: list[Any] = []
        for value in values:
            if name := step["name"]:
                name = name.replace("\\", "")
                if isinstance(value, dict) and value.get(name) is not None:
                    following.append(value[name])
            elif isinstance(value, list):
                if field := step["field"]:
                    following += [v for v in value if str(v.get(field)) == step["equal"]]
                elif step["index"] == "*":
                    following += value
                else:
                    following += value[int(step["index"]) : int(step["index"]) + 1]
        values = following
    return values


def _at(*path: str, default: Any = NONE) -> Callable[[Object, datetime], Any]:
    def cell(obj: Object, _: datetime) -> Any:
        value: Any = obj
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return default if value in (None, "") else value

    return cell


_NAME = Column("Name", _at("metadata", "name"))
_AGE = Column("Age", lambda o, now: age(o["metadata"].get("creationTimestamp"), now))


def pod_status(pod: Object) -> tuple[str, str, str]:
    """READY, STATUS and the restart count of a Pod, as kubectl's printer derives them."""
    status = pod.get("status") or {}
    reason = status.get("reason") or status.get("phase") or "Unknown"
    containers = status.get("containerStatuses") or []
    ready = sum(bool(c.get("ready")) for c in containers)
    restarts = sum(int(c.get("restartCount", 0)) for c in containers)
    running = False
    for container in reversed(containers):
        state = container.get("state") or {}
        if (waiting := state.get("waiting")) and waiting.get("reason"):
            reason = waiting["reason"]
        elif ended := state.get("terminated"):
            reason = ended.get("reason") or f"ExitCode:{ended.get('exitCode')}"
        elif container.get("ready") and "running" in state:
            running = True
    if reason == "Completed" and running:
        reason = "Running"
    if pod["metadata"].get("deletionTimestamp"):
        reason = "Terminating"
    total = len((pod.get("spec") or {}).get("containers") or [])
    return f"{ready}/{total}", reason, str(restarts)


def _node_status(node: Object, _: datetime) -> str:
    conditions = {c["type"]: c["status"] for c in (node.get("status") or {}).get("conditions") or []}
    words = ["Ready" if conditions.get("Ready") == "True" else "NotReady"]
    if "Ready" not in conditions:
        words = ["Unknown"]
    if (node.get("spec") or {}).get("unschedulable"):
        words.append("SchedulingDisabled")
    return ",".join(words)


def _node_address(kind: str) -> Callable[[Object, datetime], Any]:
    def cell(obj: Object, _: datetime) -> Any:
        for address in (obj.get("status") or {}).get("addresses") or []:
            if address["type"] == kind:
                return address["address"]
        return NONE

    return cell


def _roles(node: Object, _: datetime) -> str:
    prefix = "node-role.kubernetes.io/"
    labels = node["metadata"].get("labels") or {}
    return ",".join(sorted(k[len(prefix) :] for k in labels if k.startswith(prefix))) or NONE


def _ports(service: Object, _: datetime) -> str:
    shown = []
    for port in (service.get("spec") or {}).get("ports") or []:
        node_port = f":{port['nodePort']}" if port.get("nodePort") else ""
        shown.append(f"{port['port']}{node_port}/{port.get('protocol', 'TCP')}")
    return ",".join(shown) or NONE


def _selector(*path: str) -> Callable[[Object, datetime], str]:
    def cell(obj: Object, now: datetime) -> str:
        found = _at(*path, default={})(obj, now)
        return ",".join(f"{k}={v}" for k, v in found.items()) or NONE

    return cell


def _endpoints(obj: Object, _: datetime) -> str:
    found = [
        f"{address['ip']}:{port['port']}"
        for subset in obj.get("subsets") or []
        for address in subset.get("addresses") or []
        for port in subset.get("ports") or [{"port": ""}]
    ]
    return ",".join(found[:3]) + (f" + {len(found) - 3} more..." if len(found) > 3 else "") or NONE


def _replicas(obj: Object, _: datetime) -> str:
    ready = (obj.get("status") or {}).get("readyReplicas") or 0
    return f"{ready}/{(obj.get('spec') or {}).get('replicas', 1)}"


def _last_seen(event: Object, now: datetime) -> str:
    seen = event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp")
    return age(seen, now)


def _involved(event: Object, _: datetime) -> str:
    involved = event.get("involvedObject") or {}
    return f"{str(involved.get('kind', '')).lower()}/{involved.get('name', '')}"


def _count(field: str) -> Callable[[Object, datetime], int]:
    return lambda obj, _: len(obj.get(field) or {})


def _containers(field: str) -> Callable[[Object, datetime], str]:
    def cell(obj: Object, _: datetime) -> str:
        spec = (((obj.get("spec") or {}).get("template") or {}).get("spec")) or {}
        return ",".join(c.get(field, "") for c in spec.get("containers") or [])

    return cell


_TEMPLATE_WIDE = [
    Column("Containers", _containers("name"), wide=True),
    Column("Images", _containers("image"), wide=True),
    Column("Selector", _selector("spec", "selector", "matchLabels"), wide=True),
]

_COLUMNS: dict[tuple[str, str], list[Column]] = {
    ("", "Namespace"): [Column("Status", _at("status", "phase")), _AGE],
    ("", "Pod"): [
        Column("Ready", lambda o, _: pod_status(o)[0]),
        Column("Status", lambda o, _: pod_status(o)[1]),
        Column("Restarts", lambda o, _: pod_status(o)[2]),
        _AGE,
        Column("IP", _at("status", "podIP"), wide=True),
        Column("Node", _at("spec", "nodeName"), wide=True),
        Column("Nominated Node", _at("status", "nominatedNodeName"), wide=True),
        Column("Readiness Gates", lambda o, _: NONE, wide=True),
    ],
    ("", "Node"): [
        Column("Status", _node_status),
        Column("Roles", _roles),
        _AGE,
        Column("Version", _at("status", "nodeInfo", "kubeletVersion", default="")),
        Column("Internal-IP", _node_address("InternalIP"), wide=True),
        Column("External-IP", _node_address("ExternalIP"), wide=True),
        Column("OS-Image", _at("status", "nodeInfo", "osImage"), wide=True),
        Column("Kernel-Version", _at("status", "nodeInfo", "kernelVersion"), wide=True),
        Column("Container-Runtime", _at("status", "nodeInfo", "containerRuntimeVersion"), wide=True),
    ],
    ("", "Service"): [
        Column("Type", _at("spec", "type")),
        Column("Cluster-IP", _at("spec", "clusterIP")),
        Column("External-IP", lambda o, _: NONE),
        Column("Port(s)", _ports),
        _AGE,
        Column("Selector", _selector("spec", "selector"), wide=True),
    ],
    ("", "ConfigMap"): [Column("Data", _count("data"), type="integer"), _AGE],
    ("", "Secret"): [
        Column("Type", _at("type")),
        Column("Data", _count("data"), type="integer"),
        _AGE,
    ],
    ("", "ServiceAccount"): [Column("Secrets", _count("secrets"), type="integer"), _AGE],
    ("", "Endpoints"): [Column("Endpoints", _endpoints), _AGE],
    ("", "Event"): [
        Column("Last Seen", _last_seen),
        Column("Type", _at("type")),
        Column("Reason", _at("reason")),
        Column("Object", _involved),
        Column("Message", _at("message", default="")),
    ],
    ("apps", "Deployment"): [
        Column("Ready", _replicas),
        Column("Up-to-date", _at("status", "updatedReplicas", default=0), type="integer"),
        Column("Available", _at("status", "availableReplicas", default=0), type="integer"),
        _AGE,
        *_TEMPLATE_WIDE,
    ],
    ("apps", "ReplicaSet"): [
        Column("Desired", _at("spec", "replicas", default=0), type="integer"),
        Column("Current", _at("status", "replicas", default=0), type="integer"),
        Column("Ready", _at("status", "readyReplicas", default=0), type="integer"),
        _AGE,
        *_TEMPLATE_WIDE,
    ],
    ("apps", "DaemonSet"): [
        Column("Desired", _at("status", "desiredNumberScheduled", default=0), type="integer"),
        Column("Current", _at("status", "currentNumberScheduled", default=0), type="integer"),
        Column("Ready", _at("status", "numberReady", default=0), type="integer"),
        Column("Up-to-date", _at("status", "updatedNumberScheduled", default=0), type="integer"),
        Column("Available", _at("status", "numberAvailable", default=0), type="integer"),
        Column("Node Selector", _selector("spec", "template", "spec", "nodeSelector")),
        _AGE,
        *_TEMPLATE_WIDE,
    ],
    ("apiextensions.k8s.io", "CustomResourceDefinition"): [
        Column("Created At", _at("metadata", "creationTimestamp")),
    ],
}
