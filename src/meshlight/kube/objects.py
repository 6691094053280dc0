"""What the API does to an object on its way in: identity, generation, defaults, names.

Pure: the clock and the uid come from the caller's side of the interface as arguments.
"""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime
from typing import Any

from meshlight.kube.catalog import ResourceType
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause, StatusError, bad_request, invalid

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"
_SYSTEM_FIELDS = (
    "uid", "creationTimestamp", "generation", "resourceVersion", "deletionTimestamp",
    "deletionGracePeriodSeconds", "selfLink",
)  # fmt: skip


def now() -> str:
    """The time as `metav1.Time` has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_type(served: ResourceType, obj: Any, namespace: str | None) -> None:
    """Refuse a body that is not an object of this type and namespace; fill in what may be left out."""
    if not isinstance(obj, dict) or not isinstance(obj.get("metadata", {}), dict):
        raise bad_request("the body is not a Kubernetes object")
    r = served.resource
    for field, expected in (("apiVersion", r.api_version), ("kind", r.kind)):
        if obj.setdefault(field, expected) != expected:
            raise bad_request(f"{obj[field]} in {field} does not match the path, which takes {expected}")
    metadata = obj.setdefault("metadata", {})
    if r.namespaced and metadata.setdefault("namespace", namespace) != namespace:
        raise bad_request(
            "the namespace of the provided object does not match the namespace sent on the request"
        )
    if not r.namespaced:
        metadata.pop("namespace", None)


def new(obj: Object, uid: str) -> None:
    """Give a created object its identity; resolves generateName."""
    metadata = obj["metadata"]
    for field in _SYSTEM_FIELDS:
        metadata.pop(field, None)
    if not metadata.get("name") and metadata.get("generateName"):
        metadata["name"] = metadata["generateName"] + "".join(random.choices(_SUFFIX, k=5))
    metadata.update(uid=uid, creationTimestamp=now(), generation=1)


def validate(served: ResourceType, obj: Object) -> None:
    """Refuse an invalid object with Kubernetes' own words (422)."""
    name = obj["metadata"].get("name") or ""
    causes = []
    if not name:
        causes.append(
            Cause(
                "metadata.name",
                "FieldValueRequired",
                "Required value: name or generateName is required",
            )
        )
    elif len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        causes.append(
            Cause(
                "metadata.name",
                "FieldValueInvalid",
                f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case '
                "alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
            )
        )
    if served.schema:
        causes += structural(obj, served.schema)
    if served.resource.kind == "Pod" and not (obj.get("spec") or {}).get("containers"):
        causes.append(Cause("spec.containers", "FieldValueRequired", "Required value"))
    if causes:
        raise invalid(served.resource.group, served.resource.kind, name, causes)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list,
}  # fmt: skip


def structural(value: Any, schema: dict[str, Any], path: str = "") -> list[Cause]:
    """Faults of a value against a structural schema (types, enums, required fields, patterns)."""
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string") or kind is None:
        return []
    if value is None:
        return []
    fits = isinstance(value, _TYPES[kind]) and not (isinstance(value, bool) and kind != "boolean")
    if not fits:
        shown = type(value).__name__
        message = f'Invalid value: "{shown}": {path} in body must be of type {kind}: "{shown}"'
        return [Cause(path, "FieldValueTypeInvalid", message)]
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(f'"{v}"' for v in schema["enum"])
        message = f'Unsupported value: "{value}": supported values: {supported}'
        return [Cause(path, "FieldValueNotSupported", message)]
    if "pattern" in schema and not re.search(schema["pattern"], value):
        message = f"Invalid value: \"{value}\": {path} in body should match '{schema['pattern']}'"
        return [Cause(path, "FieldValueInvalid", message)]
    causes: list[Cause] = []
    if kind == "array":
        for index, element in enumerate(value):
            causes += structural(element, schema.get("items") or {}, f"{path}[{index}]")
    if kind == "object":
        for name in schema.get("required") or []:
            if name not in value:
                causes.append(Cause(_join(path, name), "FieldValueRequired", "Required value"))
        extra = schema.get("additionalProperties")
        for name, field in value.items():
            declared = (schema.get("properties") or {}).get(name)
            if declared is None and isinstance(extra, dict):
                declared = extra
            if declared:
                causes += structural(field, declared, _join(path, name))
    return causes


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Paths of fields that a structural schema does not declare."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    found: list[str] = []
    if isinstance(value, dict) and "properties" in schema:
        for name, field in value.items():
            if not path and name in ("apiVersion", "kind", "metadata"):
                continue
            declared = schema["properties"].get(name)
            if declared is None:
                found.append(_join(path, name))
            else:
                found += unknown_fields(field, declared, _join(path, name))
    elif isinstance(value, list):
        for index, element in enumerate(value):
            found += unknown_fields(element, schema.get("items") or {}, f"{path}[{index}]")
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def update(served: ResourceType, old: Object, obj: Object, subresource: str) -> Object:
    """What is stored when `obj` replaces `old`, the object whole or its `status` alone.

    Identity stays; the generation grows when anything but metadata and status changed.
    Raises StatusError on an attempt to change identity.
    """
    if subresource == "status":
        updated = {**old, "metadata": dict(old["metadata"])}
        updated.pop("status", None)
        if "status" in obj:
            updated["status"] = obj["status"]
        return updated
    metadata = obj["metadata"]
    if metadata.get("uid") not in (None, old["metadata"]["uid"]):
        raise StatusError(409, "Conflict", "Precondition failed: UID in precondition does not match")
    for field in _SYSTEM_FIELDS:
        metadata.pop(field, None)
        if field in old["metadata"]:
            metadata[field] = old["metadata"][field]
    if served.has_status and subresource != "finalize":
        obj.pop("status", None)
        if "status" in old:
            obj["status"] = old["status"]
    ignored = ("metadata", "status")
    if {k: v for k, v in obj.items() if k not in ignored} != {k: v for k, v in old.items() if k not in ignored}:
        metadata["generation"] = old["metadata"].get("generation", 1) + 1
    return obj


def apply_defaults(served: ResourceType, obj: Object) -> None:
    """Defaults of built-in kinds that readers rely on."""
    spec = obj.setdefault("spec", {}) if served.resource.kind in ("Namespace", "Pod", "Service") else {}
    match served.resource.kind:
        case "Namespace":
            spec.setdefault("finalizers", ["kubernetes"])
            obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"]["name"]
            obj.setdefault("status", {"phase": "Active"})
        case "Secret":
            obj.setdefault("type", "Opaque")
        case "Service":
            spec.setdefault("type", "ClusterIP")
            spec.setdefault("sessionAffinity", "None")
            for port in spec.get("ports") or []:
                port.setdefault("protocol", "TCP")
                port.setdefault("targetPort", port["port"])
        case "Pod":
            spec.setdefault("restartPolicy", "Always")
            spec.setdefault("serviceAccountName", "default")
            spec.setdefault("terminationGracePeriodSeconds", 30)
            obj.setdefault("status", {"phase": "Pending"})
