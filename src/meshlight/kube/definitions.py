"""Life of a CustomResourceDefinition: its names are accepted, its kind is served, its objects go before it.

Pure over the catalog; `rest` stores what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshlight.kube import objects
from meshlight.kube.catalog import Catalog
from meshlight.kube.resource_types import ResourceType
from meshlight.kube.resources import Object

RESOURCE = "apiextensions.k8s.io/customresourcedefinitions"
KIND = "CustomResourceDefinition"
CLEANUP = "customresourcecleanup.apiextensions.k8s.io"
"""The finalizer that keeps a definition until its objects are gone."""


def establish(catalog: Catalog, crd: Object, old: Object | None) -> None:
    """Note in the status what is served now, and serve it unless another kind has one of its names."""
    taken = _taken(catalog, crd)
    before = (old or {}).get("status") or {}
    spec, names = crd["spec"], crd["spec"]["names"]
    stored = [v["name"] for v in spec["versions"] if v.get("storage")]
    status = crd.setdefault("status", {})
    status["acceptedNames"] = before.get("acceptedNames") or {"plural": "", "kind": ""} if taken else names
    kept = [v for v in before.get("storedVersions") or () if v not in stored]
    status["storedVersions"] = kept + stored
    status["conditions"] = before.get("conditions") or []
    if taken:
        condition(crd, "NamesAccepted", "False", taken[0], taken[1])
        was = any(c["type"] == "Established" and c["status"] == "True" for c in status["conditions"])
        if not was:
            condition(crd, "Established", "False", "NotAccepted", "not all names are accepted")
        return
    condition(crd, "NamesAccepted", "True", "NoConflicts", "no conflicts found")
    condition(crd, "Established", "True", "InitialNamesAccepted", "the initial names have been accepted")
    if CLEANUP not in (finalizers := crd["metadata"].setdefault("finalizers", [])):
        if old is None:
            finalizers.append(CLEANUP)
        elif not finalizers:
            del crd["metadata"]["finalizers"]
    catalog.add_crd(crd)


def condition(crd: Object, kind: str, status: str, reason: str, message: str) -> None:
    """Set a condition; its time is that of its last change of status."""
    found = [c for c in crd["status"].get("conditions") or () if c["type"] != kind]
    known = next((c for c in crd["status"].get("conditions") or () if c["type"] == kind), None)
    same = known is not None and known["status"] == status
    changed = known["lastTransitionTime"] if known is not None and same else objects.now()
    made = {"type": kind, "status": status, "lastTransitionTime": changed, "reason": reason, "message": message}
    crd["status"]["conditions"] = [*found, made]


def _taken(catalog: Catalog, crd: Object) -> tuple[str, str] | None:
    """The reason and words when another kind of the group has one of the names."""
    spec, names = crd["spec"], crd["spec"]["names"]
    others = [
        t for t in catalog.types() if t.resource.group == spec["group"] and t.resource.plural != names["plural"]
    ]
    used = {name for t in others for name in (t.resource.plural, t.singular, *t.short_names)}
    for field, reason in (("plural", "PluralConflict"), ("singular", "SingularConflict")):
        if names.get(field) in used:
            return reason, f'"{names[field]}" is already in use'
    for short in names.get("shortNames") or ():
        if short in used:
            return "ShortNamesConflict", f'"{short}" is already in use'
    kinds = {kind for t in others for kind in (t.resource.kind, f"{t.resource.kind}List")}
    for field, reason in (("kind", "KindConflict"), ("listKind", "ListKindConflict")):
        if names.get(field) in kinds:
            return reason, f'"{names[field]}" is already in use'
    return None


def types_of(catalog: Catalog, crd: Object) -> Iterable[ResourceType]:
    """The types that a definition's versions are served as."""
    group, plural = crd["spec"]["group"], crd["spec"]["names"]["plural"]
    return [t for t in catalog.types() if (t.resource.group, t.resource.plural) == (group, plural)]


def name_of(served: ResourceType) -> str:
    """The name of a custom resource's definition."""
    return f"{served.resource.plural}.{served.resource.group}"
