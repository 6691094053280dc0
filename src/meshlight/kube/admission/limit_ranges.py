"""LimitRanges: default requests and limits of containers, and the bounds of containers, pods and claims.

Rules and words are those of Kubernetes' LimitRanger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal

from meshlight.kube import defaults, quantity
from meshlight.kube.admission import Request
from meshlight.kube.admission.stored import Stored
from meshlight.kube.resources import Object
from meshlight.kube.store import Store


def complete(pod: Object, limit_range: Object) -> None:
    """Give containers the requests and limits that they leave out. In place."""
    for item in (limit_range.get("spec") or {}).get("limits") or ():
        if item.get("type") != "Container":
            continue
        limits = item.get("default") or {}
        requests = item.get("defaultRequest") or {}
        for container in _containers(pod):
            resources = container.setdefault("resources", {})
            given_limits, given_requests = resources.get("limits") or {}, resources.get("requests") or {}
            merged = {**limits, **given_limits}
            wanted = {
                **requests,
                **{k: v for k, v in given_limits.items() if k not in requests},
                **given_requests,
            }
            if merged:
                resources["limits"] = merged
            if wanted:
                resources["requests"] = wanted


def _containers(pod: Object) -> Iterator[Object]:
    for field in ("containers", "initContainers"):
        yield from pod["spec"].get(field) or ()


def faults(kind: str, requests: Mapping[str, str], limits: Mapping[str, str], item: Object) -> list[str]:
    """What is against one item of a LimitRange, in Kubernetes' sentences."""
    found = []
    for name, least in (item.get("min") or {}).items():
        request, limit = requests.get(name), limits.get(name)
        if request is None:
            found.append(f"minimum {name} usage per {kind} is {least}.  No request is specified")
        elif _value(request) < _value(least):
            found.append(f"minimum {name} usage per {kind} is {least}, but request is {request}")
        elif limit is not None and _value(limit) < _value(least):
            found.append(f"minimum {name} usage per {kind} is {least}, but limit is {limit}")
    for name, most in (item.get("max") or {}).items():
        request, limit = requests.get(name), limits.get(name)
        if limit is None and kind != "PersistentVolumeClaim":
            found.append(f"maximum {name} usage per {kind} is {most}.  No limit is specified")
        elif limit is not None and _value(limit) > _value(most):
            found.append(f"maximum {name} usage per {kind} is {most}, but limit is {limit}")
        elif request is not None and _value(request) > _value(most):
            found.append(f"maximum {name} usage per {kind} is {most}, but request is {request}")
    for name, ratio in (item.get("maxLimitRequestRatio") or {}).items():
        request, limit = requests.get(name), limits.get(name)
        if not request or not limit or not _value(request):
            found.append(
                f"{name} max limit to request ratio per {kind} is {ratio}, but no request or limit is specified"
            )
        elif _value(limit) / _value(request) > _value(ratio):
            seen = float(_value(limit) / _value(request))
            found.append(
                f"{name} max limit to request ratio per {kind} is {ratio}, but provided ratio is {seen:.6f}"
            )
    return found


def _value(text: str) -> Decimal:
    return quantity.value(str(text))


def _total(containers: list[Object], field: str) -> dict[str, str]:
    """The sum of what containers state; a resource that one leaves out has none."""
    lists = [(c.get("resources") or {}).get(field) or {} for c in containers]
    names = set.intersection(*(set(found) for found in lists)) if lists else set()
    return {n: quantity.canonical(format(sum((_value(f[n]) for f in lists), Decimal(0)), "f")) for n in names}


class LimitRanges:
    """The plug-in: completes new pods when it mutates, bounds them and claims when it validates."""

    def __init__(self, store: Store) -> None:
        self._ranges = Stored(store, "/limitranges")

    def mutate(self, request: Request) -> None:
        """Defaults of a new pod."""
        if request.kind != "Pod" or request.operation != "CREATE" or request.subresource or request.obj is None:
            return
        ranges = self._ranges.of(request.namespace)
        for limit_range in ranges:
            complete(request.obj, limit_range)
        if ranges:
            request.obj.setdefault("status", {})["qosClass"] = defaults.quality_of_service(request.obj["spec"])

    def validate(self, request: Request) -> None:
        """Bounds of a new pod or of a claim. Raises StatusError 403."""
        obj = request.obj
        if obj is None or request.subresource not in ("", "resize"):
            return
        found: list[str] = []
        for limit_range in self._ranges.of(request.namespace):
            for item in (limit_range.get("spec") or {}).get("limits") or ():
                if request.kind == "Pod" and (request.operation == "CREATE" or request.subresource):
                    found += _pod_faults(obj, item)
                elif request.kind == item.get("type") == "PersistentVolumeClaim":
                    asked = ((obj.get("spec") or {}).get("resources") or {}).get("requests") or {}
                    found += faults("PersistentVolumeClaim", asked, {}, item)
        if found:
            raise request.refusal(found[0] if len(found) == 1 else f"[{', '.join(found)}]")


def _pod_faults(pod: Object, item: Object) -> list[str]:
    found: list[str] = []
    if item.get("type") == "Container":
        for container in _containers(pod):
            resources = container.get("resources") or {}
            found += faults("Container", resources.get("requests") or {}, resources.get("limits") or {}, item)
    elif item.get("type") == "Pod":
        containers = pod["spec"].get("containers") or []
        found += faults("Pod", _total(containers, "requests"), _total(containers, "limits"), item)
    return found
