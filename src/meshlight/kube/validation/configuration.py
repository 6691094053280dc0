"""Rules of what holds settings: ConfigMaps, Secrets, roles, CustomResourceDefinitions and the like."""

from __future__ import annotations

from meshlight.kube import field_errors as faults
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause
from meshlight.kube.validation import names

MAX_BYTES = 1024 * 1024
"""Bytes that all values of a ConfigMap or Secret may have together."""

_SECRET_KEYS = {
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
}
_IMMUTABLE = "field is immutable when `immutable` is set"


def config_map(obj: Object) -> list[Cause]:
    """Faults of a ConfigMap."""
    causes: list[Cause] = []
    text, binary = obj.get("data") or {}, obj.get("binaryData") or {}
    for field, found in (("data", text), ("binaryData", binary)):
        causes += _keys(found, field)
    for key in text:
        if key in binary:
            causes.append(faults.invalid_value(f"data[{key}]", key, "duplicate of key present in binaryData"))
    size = sum(len(v.encode()) for v in text.values()) + sum(len(v) * 3 // 4 for v in binary.values())
    if size > MAX_BYTES:
        causes.append(faults.too_long("", MAX_BYTES))
    return causes


def _keys(found: Object, field: str) -> list[Cause]:
    return [
        faults.invalid_value(f"{field}[{key}]", key, message)
        for key in found
        if (message := names.config_key(key))
    ]


def secret(obj: Object) -> list[Cause]:
    """Faults of a Secret."""
    stored = obj.get("data") or {}
    causes = _keys(stored, "data")
    for key in _SECRET_KEYS.get(obj.get("type", ""), ()):
        if key not in stored:
            causes.append(faults.required(f"data[{key}]"))
    if sum(len(v) * 3 // 4 for v in stored.values()) > MAX_BYTES:
        causes.append(faults.too_long("data", MAX_BYTES))
    if obj.get("type") == "kubernetes.io/service-account-token":
        annotation = "kubernetes.io/service-account.name"
        if not (obj["metadata"].get("annotations") or {}).get(annotation):
            causes.append(faults.required(f"metadata.annotations[{annotation}]"))
    return causes


def config_map_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change of a ConfigMap."""
    return _frozen(old, new, ("data", "binaryData"))


def secret_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change of a Secret: its type stays."""
    causes = _frozen(old, new, ("data",))
    if old.get("type") != new.get("type"):
        causes.insert(0, faults.invalid_value("type", new.get("type"), "field is immutable"))
    return causes


def _frozen(old: Object, new: Object, fields: tuple[str, ...]) -> list[Cause]:
    if not old.get("immutable"):
        return []
    causes = [] if new.get("immutable") else [faults.forbidden("immutable", _IMMUTABLE)]
    return causes + [
        faults.forbidden(field, _IMMUTABLE)
        for field in fields
        if (old.get(field) or {}) != (new.get(field) or {})
    ]


def event(obj: Object) -> list[Cause]:
    """Faults of an Event: it lies beside the object it is about."""
    about = (obj.get("involvedObject") or {}).get("namespace") or ""
    own = obj["metadata"].get("namespace") or ""
    if about != own and not (not about and own == "default"):
        return [faults.invalid_value("involvedObject.namespace", about, "does not match event.namespace")]
    return []


def lease(obj: Object) -> list[Cause]:
    """Faults of a Lease."""
    spec = obj.get("spec") or {}
    causes = []
    if spec.get("leaseDurationSeconds", 1) <= 0:
        detail = "must be greater than 0"
        causes.append(faults.invalid_value("spec.leaseDurationSeconds", spec["leaseDurationSeconds"], detail))
    if spec.get("leaseTransitions", 0) < 0:
        detail = "must be greater than or equal to 0"
        causes.append(faults.invalid_value("spec.leaseTransitions", spec["leaseTransitions"], detail))
    return causes


def role(obj: Object) -> list[Cause]:
    """Faults of a Role or ClusterRole."""
    causes: list[Cause] = []
    for index, rule in enumerate(obj.get("rules") or ()):
        at = f"rules[{index}]"
        if not rule.get("verbs"):
            causes.append(faults.required(f"{at}.verbs", "verbs must contain at least one value"))
        if rule.get("nonResourceURLs"):
            if obj["kind"] == "Role":
                detail = "namespaced rules cannot apply to non-resource URLs"
                causes.append(faults.invalid_value(f"{at}.nonResourceURLs", rule["nonResourceURLs"], detail))
            continue
        if not rule.get("apiGroups"):
            detail = "resource rules must supply at least one api group"
            causes.append(faults.required(f"{at}.apiGroups", detail))
        if not rule.get("resources"):
            detail = "resource rules must supply at least one resource"
            causes.append(faults.required(f"{at}.resources", detail))
    return causes


def binding(obj: Object) -> list[Cause]:
    """Faults of a RoleBinding or ClusterRoleBinding."""
    causes: list[Cause] = []
    kinds = ["ClusterRole"] if obj["kind"] == "ClusterRoleBinding" else ["ClusterRole", "Role"]
    kind = (obj.get("roleRef") or {}).get("kind")
    if kind and kind not in kinds:
        causes.append(faults.not_supported("roleRef.kind", kind, kinds))
    for index, subject in enumerate(obj.get("subjects") or ()):
        if subject.get("kind") == "ServiceAccount" and not subject.get("namespace"):
            causes.append(faults.required(f"subjects[{index}].namespace"))
    return causes


def binding_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change of a binding: its role stays."""
    if old.get("roleRef") == new.get("roleRef"):
        return []
    return [faults.invalid_value("roleRef", new.get("roleRef"), "cannot change roleRef")]


def ingress(obj: Object) -> list[Cause]:
    """Faults of an Ingress."""
    spec = obj.get("spec") or {}
    causes: list[Cause] = []
    if not spec.get("rules") and not spec.get("defaultBackend"):
        detail = "either `defaultBackend` or `rules` must be specified"
        causes.append(faults.invalid_value("spec", spec.get("rules") or [], detail))
    for index, rule in enumerate(spec.get("rules") or ()):
        for number, path in enumerate((rule.get("http") or {}).get("paths") or ()):
            at = f"spec.rules[{index}].http.paths[{number}].path"
            if path.get("pathType") in ("Exact", "Prefix") and not (path.get("path") or "").startswith("/"):
                causes.append(faults.invalid_value(at, path.get("path") or "", "must be an absolute path"))
    return causes
