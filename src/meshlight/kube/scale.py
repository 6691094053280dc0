"""The `scale` subresource: an object seen as autoscaling/v1 Scale, and written through it."""

from __future__ import annotations

from typing import Any

from meshlight.kube import field_errors
from meshlight.kube.resources import Object
from meshlight.kube.status import bad_request, invalid


def of(obj: Object) -> Object:
    """The object as a Scale."""
    spec = obj.get("spec") or {}
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    scale: Object = {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": {k: v for k, v in obj["metadata"].items() if k in kept},
        "spec": {"replicas": spec.get("replicas", 1)},
        "status": {"replicas": (obj.get("status") or {}).get("replicas", 0)},
    }
    if selector := _shown(spec.get("selector") or {}):
        scale["status"]["selector"] = selector
    return scale


def _shown(selector: Object) -> str:
    """A LabelSelector as a query parameter writes it."""
    terms = [f"{k}={v}" for k, v in (selector.get("matchLabels") or {}).items()]
    for rule in selector.get("matchExpressions") or ():
        values = ",".join(rule.get("values") or ())
        terms.append(
            {
                "In": f"{rule['key']} in ({values})",
                "NotIn": f"{rule['key']} notin ({values})",
                "Exists": rule["key"],
                "DoesNotExist": f"!{rule['key']}",
            }[rule["operator"]]
        )
    return ",".join(terms)


def written(obj: Object, scale: Any) -> Object:
    """The object with the replicas that a Scale asks for. Raises StatusError 400 or 422."""
    spec = scale.get("spec") if isinstance(scale, dict) else None
    replicas = (spec or {}).get("replicas", 0) if isinstance(spec, (dict, type(None))) else None
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise bad_request("spec.replicas of the Scale is not an integer")
    if replicas < 0:
        detail = "must be greater than or equal to 0"
        cause = field_errors.invalid_value("spec.replicas", replicas, detail)
        raise invalid("autoscaling", "Scale", obj["metadata"]["name"], [cause])
    metadata = dict(obj["metadata"])
    stated = (scale.get("metadata") or {}).get("resourceVersion")
    if stated:
        metadata["resourceVersion"] = stated
    return {**obj, "metadata": metadata, "spec": {**(obj.get("spec") or {}), "replicas": replicas}}
