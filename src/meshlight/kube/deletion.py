"""What deleting an object means before anything is stored: preconditions, finalizers, grace, marking.

Pure; the time comes as an argument. Dependents are the garbage collector's business: here only the finalizers
that make it act.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshlight.kube import objects
from meshlight.kube.catalog import ResourceType
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause, bad_request, invalid

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"
_FINALIZERS = {"Foreground": FOREGROUND, "Orphan": ORPHAN, "Background": ""}


@dataclass(frozen=True, slots=True)
class DeleteOptions:
    """A request's `DeleteOptions`, from its body and its query parameters."""

    grace_period: int | None = None
    propagation: str = ""
    uid: str = ""
    resource_version: str = ""
    dry_run: bool = False


def parse(body: Any, query: Any) -> DeleteOptions:
    """Read the options; the body wins. Raises StatusError 400 or 422."""
    if not isinstance(body, dict):
        raise bad_request("the body is not DeleteOptions")
    grace = body.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
    try:
        grace = None if grace is None else int(grace)
    except (TypeError, ValueError):
        raise bad_request(f"gracePeriodSeconds is not a number: {grace!r}") from None
    propagation = body.get("propagationPolicy") or query.get("propagationPolicy") or ""
    orphan = body.get("orphanDependents")
    if orphan is not None and not propagation:
        propagation = "Orphan" if orphan else "Background"
    if propagation and propagation not in _FINALIZERS:
        shown = (
            f'Unsupported value: "{propagation}": supported values: "Background", "Foreground", "Orphan", "nil"'
        )
        raise invalid("", "DeleteOptions", "", [Cause("propagationPolicy", "FieldValueNotSupported", shown)])
    conditions = body.get("preconditions") or {}
    dry_run = body.get("dryRun") or query.get("dryRun")
    return DeleteOptions(
        grace,
        propagation,
        conditions.get("uid") or "",
        conditions.get("resourceVersion") or "",
        dry_run in ("All", ["All"]),
    )


def check(served: ResourceType, obj: Object, options: DeleteOptions) -> None:
    """Refuse the deletion of another object than the client means. Raises StatusError 409."""
    metadata = obj["metadata"]
    for given, field, name in (
        (options.uid, "uid", "UID"),
        (options.resource_version, "resourceVersion", "ResourceVersion"),
    ):
        if given and given != metadata[field]:
            detail = f"{name} in precondition: {given}, {name} in object meta: {metadata[field]}"
            raise objects.precondition_failed(served, obj, detail)


def grace_period(obj: Object, options: DeleteOptions) -> int:
    """Seconds of grace: only a Pod that a node has accepted has any."""
    if obj["kind"] != "Pod" or not obj["spec"].get("nodeName"):
        return 0
    if obj["status"].get("phase") in ("Succeeded", "Failed"):
        return 0
    if options.grace_period is not None:
        return max(options.grace_period, 0)
    return int(obj["spec"].get("terminationGracePeriodSeconds", 30))


def mark(obj: Object, options: DeleteOptions, time: str) -> bool:
    """Mark an object that something still holds, in place; False when it can go at once.

    A second deletion may shorten the grace of the first.
    """
    metadata = obj["metadata"]
    if finalizer := _FINALIZERS.get(options.propagation):
        finalizers = [f for f in metadata.get("finalizers") or () if f not in (FOREGROUND, ORPHAN)]
        metadata["finalizers"] = [*finalizers, finalizer]
    elif options.propagation:
        finalizers = [f for f in metadata.get("finalizers") or () if f not in (FOREGROUND, ORPHAN)]
        if metadata.pop("finalizers", None) and finalizers:
            metadata["finalizers"] = finalizers
    grace = grace_period(obj, options)
    held = bool(metadata.get("finalizers")) or (obj["kind"] == "Namespace" and obj["spec"].get("finalizers"))
    if "deletionTimestamp" in metadata:
        if options.grace_period is not None and grace < metadata.get("deletionGracePeriodSeconds", 0):
            metadata["deletionGracePeriodSeconds"] = grace
        return bool(held or metadata.get("deletionGracePeriodSeconds"))
    if not held and not grace:
        return False
    metadata["deletionTimestamp"] = time
    metadata["deletionGracePeriodSeconds"] = grace
    if "generation" in metadata:
        metadata["generation"] += 1
    if obj["kind"] == "Namespace":
        obj["status"] = {**obj.get("status", {}), "phase": "Terminating"}
    return True
