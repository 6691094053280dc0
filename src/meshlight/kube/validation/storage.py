"""Rules of volumes, claims and their classes."""

from __future__ import annotations

from meshlight.kube import field_errors as faults
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause
from meshlight.kube.validation import names

_MODES = ("ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod")
_SOURCES = ("hostPath", "local", "nfs", "csi")


def _access_modes(spec: Object) -> list[Cause]:
    modes = spec.get("accessModes") or []
    if not modes:
        return [faults.required("spec.accessModes", "at least 1 access mode is required")]
    return [
        faults.not_supported(f"spec.accessModes[{index}]", mode, _MODES)
        for index, mode in enumerate(modes)
        if mode not in _MODES
    ]


def volume(obj: Object) -> list[Cause]:
    """Faults of a PersistentVolume."""
    spec = obj.get("spec") or {}
    causes = _access_modes(spec)
    if not (spec.get("capacity") or {}).get("storage"):
        causes.append(faults.required("spec.capacity"))
    given = [source for source in _SOURCES if source in spec]
    if not given:
        causes.append(faults.required("spec", "must specify a volume type"))
    causes += [
        faults.forbidden(f"spec.{extra}", "may not specify more than 1 volume type") for extra in given[1:]
    ]
    if "local" in spec and not (spec.get("nodeAffinity") or {}).get("required"):
        causes.append(faults.required("spec.nodeAffinity", "Local volume requires node affinity"))
    return causes


def volume_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change: where the volume's data are stays."""
    before, after = old.get("spec") or {}, new.get("spec") or {}
    if all(before.get(source) == after.get(source) for source in _SOURCES):
        return []
    detail = "spec.persistentvolumesource is immutable after creation"
    return [faults.forbidden("spec.persistentvolumesource", detail)]


def claim(obj: Object) -> list[Cause]:
    """Faults of a PersistentVolumeClaim."""
    spec = obj.get("spec") or {}
    causes = _access_modes(spec)
    if not ((spec.get("resources") or {}).get("requests") or {}).get("storage"):
        causes.append(faults.required("spec.resources[storage]"))
    return causes + names.selector(spec.get("selector"), "spec.selector")


def claim_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change: a claim grows, is bound, and otherwise stays."""
    before, after = dict(old.get("spec") or {}), dict(new.get("spec") or {})
    for spec in (before, after):
        spec.pop("resources", None)
    if not before.get("volumeName"):
        before.pop("volumeName", None)
        after.pop("volumeName", None)
    if "storageClassName" not in before:
        after.pop("storageClassName", None)
    if before == after:
        return []
    detail = "spec is immutable after creation except resources.requests and volumeAttributesClassName"
    return [faults.forbidden("spec", f"{detail} for bound claims")]


def storage_class_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change of a StorageClass: what its volumes were made with stays."""
    causes = []
    for field, shown in (("provisioner", "provisioner"), ("parameters", "parameters")):
        if old.get(field) != new.get(field):
            causes.append(faults.forbidden(shown, f"updates to {shown} are forbidden."))
    for field in ("reclaimPolicy", "volumeBindingMode"):
        if old.get(field) != new.get(field):
            causes.append(faults.invalid_value(field, new.get(field), "field is immutable"))
    return causes
