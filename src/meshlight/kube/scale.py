"""The `scale` subresource: an object seen as autoscaling/v1 Scale, and written through it."""

from __future__ import annotations

from typing import Any

from meshlight.kube import field_errors
from meshlight.kube.resource_types import ScalePaths
from meshlight.kube.resources import Object
from meshlight.kube.status import bad_request, invalid


def of(obj: Object, paths: ScalePaths | None = None) -> Object:
    """The object as a Scale; `paths` says where a custom resource keeps its numbers."""
    paths = paths or _BUILTIN
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    wanted = _read(obj, paths.replicas)
    scale: Object = {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": {k: v for k, v in obj["metadata"].items() if k in kept},
        "spec": {"replicas": (1 if paths is _BUILTIN else 0) if wanted is None else wanted},
        "status": {"replicas": _read(obj, paths.actual) or 0},
    }
    selector = _read(obj, paths.selector)
    if shown := selector if isinstance(selector, str) else _shown(selector or {}):
        scale["status"]["selector"] = shown
    return scale


_BUILTIN = ScalePaths(("spec", "replicas"), ("status", "replicas"), ("spec", "selector"))


def _read(obj: Object, path: tuple[str, ...]) -> Any:
    value: Any = obj if path else None
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _shown(selector: Object) -> str:
    """A LabelSelector as a query parameter writes it."""
    if not {"matchLabels", "matchExpressions"} & selector.keys():
        return ",".join(f"{k}={v}" for k, v in selector.items())  # a ReplicationController's
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


def written(obj: Object, scale: Any, paths: ScalePaths | None = None) -> Object:
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
    return _with({**obj, "metadata": metadata}, (paths or _BUILTIN).replicas, replicas)


def _with(obj: Object, path: tuple[str, ...], value: int) -> Object:
    if len(path) == 1:
        return {**obj, path[0]: value}
    return {**obj, path[0]: _with(obj.get(path[0]) or {}, path[1:], value)}
