"""What the API does to an object on its way in: type, identity, defaults, validation, generation.

Pure but for the clock and the names it draws. The rules of single kinds are `defaults`' and `validation`'s.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

from meshlight.kube import decoding, defaults, structural, validation
from meshlight.kube.resource_types import ResourceType
from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError, bad_request, invalid

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
    if not isinstance(obj, dict) or not isinstance(obj.get("metadata") or {}, dict):
        raise bad_request("the body is not a Kubernetes object")
    r = served.resource
    for field, expected in (("apiVersion", r.api_version), ("kind", r.kind)):
        if obj.setdefault(field, expected) != expected:
            raise bad_request(f"{obj[field]} in {field} does not match the path, which takes {expected}")
    if obj.get("metadata") is None:
        obj["metadata"] = {}
    metadata = obj["metadata"]
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
    metadata.update(uid=uid, creationTimestamp=now())


def decode(served: ResourceType, obj: Object) -> list[str]:
    """Make a body an object of its type; returns the paths of undeclared fields, which are dropped.

    Raises StatusError 400 for a value of a wrong type.
    """
    if served.schema is not None:
        return decoding.prune(obj, served.structure, obj["kind"])
    r = served.resource
    return decoding.decode(obj, served.structure, kind=r.kind, version=r.version)


def apply_defaults(served: ResourceType, obj: Object, *, created: bool = False) -> None:
    """Fill in what the object leaves out."""
    structural.apply_defaults(obj, served.structure)
    if served.schema is None:
        defaults.apply(obj)
        if created:
            defaults.at_creation(obj)


def validate(served: ResourceType, obj: Object, old: Object | None = None, subresource: str = "") -> None:
    """Refuse an invalid object, or an invalid change of `old`, with Kubernetes' own words (422)."""
    if subresource in _SPEC_PARTS:
        causes = validation.builtin(obj, served.structure)
    elif served.schema is not None:
        causes = validation.custom(obj, served.structure, old)
        if subresource == "status":
            causes = [c for c in causes if c.field.startswith("status")]
    elif subresource == "status":
        return
    else:
        causes = validation.builtin(obj, served.structure, old)
    if causes:
        name = obj["metadata"].get("name") or ""
        raise invalid(served.resource.group, served.resource.kind, name, causes)


_SPEC_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    # subresource of pods: {field of the spec that it writes: members of its elements, all if empty}
    "ephemeralcontainers": {"ephemeralContainers": ()},
    "resize": {"containers": ("resources", "resizePolicy"), "initContainers": ("resources", "resizePolicy")},
}


def _partly(old: Object, obj: Object, parts: dict[str, tuple[str, ...]]) -> Object:
    """`old` with the parts of the spec that a subresource writes."""
    spec, wanted = dict(old["spec"]), obj.get("spec") or {}
    for name, members in parts.items():
        if not members and name in wanted:
            spec[name] = wanted[name]
        elif members and name in spec:
            given = {c.get("name"): c for c in wanted.get(name) or ()}
            spec[name] = [
                {**c, **{m: given[c["name"]][m] for m in members if m in given.get(c["name"], {})}}
                for c in spec[name]
            ]
    return {**old, "metadata": dict(old["metadata"]), "spec": spec}


def update(served: ResourceType, old: Object, obj: Object, subresource: str) -> Object:
    """What is stored when `obj` replaces `old`, the object whole or its `status` alone.

    Identity stays. Raises StatusError on an attempt to change it.
    """
    if subresource == "status":
        updated = {**old, "metadata": dict(old["metadata"])}
        updated.pop("status", None)
        if "status" in obj:
            updated["status"] = obj["status"]
        return updated
    if subresource in _SPEC_PARTS:
        return _partly(old, obj, _SPEC_PARTS[subresource])
    metadata = obj["metadata"]
    if metadata.get("uid") not in (None, "", old["metadata"]["uid"]):
        given, actual = metadata["uid"], old["metadata"]["uid"]
        raise precondition_failed(served, old, f"UID in precondition: {given}, UID in object meta: {actual}")
    for field in _SYSTEM_FIELDS:
        metadata.pop(field, None)
        if field in old["metadata"]:
            metadata[field] = old["metadata"][field]
    if subresource != "finalize":
        if served.has_status:
            obj.pop("status", None)
            if "status" in old:
                obj["status"] = old["status"]
        if served.schema is None:
            defaults.carry_over(old, obj)
    return obj


def precondition_failed(served: ResourceType, obj: Object, detail: str) -> StatusError:
    """409: the object is not the one that the request is about."""
    r, name = served.resource, obj["metadata"]["name"]
    qualified = f"{r.plural}.{r.group}" if r.group else r.plural
    message = f'Operation cannot be fulfilled on {qualified} "{name}": Precondition failed: {detail}'
    return StatusError(409, "Conflict", message, {"name": name, "group": r.group, "kind": r.plural})


_COUNTED = frozenset(
    ("Deployment", "ReplicaSet", "DaemonSet", "StatefulSet", "Job", "CronJob", "PodDisruptionBudget",
     "NetworkPolicy", "Ingress", "IngressClass", "EndpointSlice", "CustomResourceDefinition", "PriorityClass",
     "ReplicationController", "ValidatingWebhookConfiguration", "MutatingWebhookConfiguration",
     "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
)  # fmt: skip


def set_generation(served: ResourceType, old: Object | None, obj: Object) -> None:
    """Count the versions of what is wanted: 1, and one more when anything but metadata and status changes.

    Kinds whose wanted state nobody observes have no generation, as in Kubernetes.
    """
    metadata = obj["metadata"]
    if served.schema is None and served.resource.kind not in _COUNTED:
        return
    if old is None:
        metadata["generation"] = 1
        return
    ignored = ("metadata", "status") if served.schema is None or served.has_status else ("metadata",)
    generation = old["metadata"].get("generation", 1)
    if {k: v for k, v in obj.items() if k not in ignored} != {k: v for k, v in old.items() if k not in ignored}:
        generation += 1
    metadata["generation"] = generation
