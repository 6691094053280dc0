"""Label and field selectors, as the query parameters of a list write them.

Grammar and meaning follow the Kubernetes API conventions ("Labels and Selectors").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from meshlight.kube.resource_types import ResourceType
from meshlight.kube.resources import Object

Predicate = Callable[[Object], bool]

_TERM = re.compile(
    r"\s*(?:(?P<absent>!)\s*(?P<key0>[^\s,!=()]+)"
    r"|(?P<key1>[^\s,!=()]+)\s+(?P<word>in|notin)\s*\((?P<values>[^)]*)\)"
    r"|(?P<key2>[^\s,!=()]+)\s*(?P<operator>==|!=|=)\s*(?P<value>[^,]*)"
    r"|(?P<key3>[^\s,!=()]+))\s*(?:,|$)"
)


def labels(selector: str) -> Callable[[Mapping[str, str]], bool]:
    """Compile a label selector (`a=b,c!=d,e in (f,g),!h`). Raises ValueError."""
    tests: list[Callable[[Mapping[str, str]], bool]] = []
    position = 0
    while position < len(selector):
        term = _TERM.match(selector, position)
        if term is None or term.end() == position:
            raise ValueError(f"unable to parse requirement: {selector[position:]!r}")
        position = term.end()
        tests.append(_term(term))
    return lambda found: all(test(found) for test in tests)


def _term(term: re.Match[str]) -> Callable[[Mapping[str, str]], bool]:
    if key := term["key0"]:
        return lambda found: key not in found
    if key := term["key1"]:
        values = {v.strip() for v in term["values"].split(",")}
        if term["word"] == "in":
            return lambda found: found.get(key) in values
        return lambda found: found.get(key) not in values
    if key := term["key2"]:
        value = term["value"].strip()
        if term["operator"] == "!=":
            return lambda found: found.get(key) != value
        return lambda found: found.get(key) == value
    key = term["key3"]
    return lambda found: key in found


_INVOLVED = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
_SELECTABLE: dict[tuple[str, str], frozenset[str]] = {
    # (group, plural): the fields that Kubernetes indexes beside metadata.name and metadata.namespace
    ("", "pods"): frozenset(
        ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName",
         "spec.hostNetwork", "status.phase", "status.podIP", "status.nominatedNodeName")),
    ("", "events"): frozenset(
        (*(f"involvedObject.{field}" for field in _INVOLVED), "reason", "reportingComponent", "source",
         "type")),
    ("events.k8s.io", "events"): frozenset(
        (*(f"regarding.{field}" for field in _INVOLVED), "reason", "reportingController", "type")),
    ("", "nodes"): frozenset(("spec.unschedulable",)),
    ("", "namespaces"): frozenset(("status.phase",)),
    ("", "secrets"): frozenset(("type",)),
    ("", "services"): frozenset(("spec.clusterIP", "spec.type")),
    ("", "replicationcontrollers"): frozenset(("status.replicas",)),
    ("apps", "replicasets"): frozenset(("status.replicas",)),
    ("batch", "jobs"): frozenset(("status.successful",)),
}  # fmt: skip
_PLACES = {"source": "source.component", "status.successful": "status.succeeded"}
_ABSENT = {"spec.unschedulable": "false", "spec.hostNetwork": "false", "status.replicas": "0"}


def matcher(label_selector: str, field_selector: str, served: ResourceType) -> Predicate:
    """A predicate of objects of a type for both selectors. Raises ValueError."""
    by_label, by_field = labels(label_selector), fields(field_selector, served)
    if not field_selector:
        return lambda obj: by_label(obj["metadata"].get("labels") or {})
    return lambda obj: by_label(obj["metadata"].get("labels") or {}) and by_field(obj)


def _check(field: str, served: ResourceType) -> None:
    r = served.resource
    known = _SELECTABLE.get((r.group, r.plural), frozenset()) | set(served.selectable_fields)
    if field not in ("metadata.name", "metadata.namespace") and field not in known:
        raise ValueError(
            f'Unable to find "{r.api_version}, Resource={r.plural}" that match field selector: '
            f"field label not supported: {field}"
        )


def fields(selector: str, served: ResourceType) -> Predicate:
    """Compile a field selector (`metadata.name=x,status.phase!=Running`). Raises ValueError."""
    wanted: list[tuple[list[str], str, bool, str]] = []
    for part in filter(None, selector.split(",")):
        match = re.fullmatch(r"([^!=]+)(==|!=|=)(.*)", part)
        if match is None:
            raise ValueError(f"invalid selector: {part!r}; can't understand {selector!r}")
        field = match[1].strip()
        _check(field, served)
        place = _PLACES.get(field, field).split(".")
        wanted.append((place, match[3], match[2] != "!=", _ABSENT.get(field, "")))

    def matches(obj: Object) -> bool:
        return all((_at(obj, path, absent) == value) == equal for path, value, equal, absent in wanted)

    return matches


def _at(obj: Any, path: list[str], absent: str) -> str:
    for part in path:
        obj = obj.get(part) if isinstance(obj, dict) else None
    if obj is None:
        return absent
    return str(obj).lower() if isinstance(obj, bool) else str(obj)


def match_labels(selector: Mapping[str, Any] | None, found: Mapping[str, str]) -> bool:
    """Whether labels match a LabelSelector object (`matchLabels`, `matchExpressions`).

    An absent selector matches nothing, an empty one everything.
    """
    if selector is None:
        return False
    if any(found.get(k) != v for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    for expression in selector.get("matchExpressions") or []:
        value, values = found.get(expression["key"]), expression.get("values") or []
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[expression["operator"]]
        if not holds:
            return False
    return True
