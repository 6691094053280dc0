"""ResourceQuotas at the door: what would exceed one is refused, counted from what is stored now.

The controller writes the quotas' status; here nothing is kept, so nothing can be out of date.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from meshlight.kube import quantity, quota_usage
from meshlight.kube.admission import Request
from meshlight.kube.admission.stored import Stored
from meshlight.kube.resources import Object
from meshlight.kube.store import Store

_COMPUTE = ("cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory")


class Quotas:
    """The plug-in."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._quotas = Stored(store, "/resourcequotas")

    def __call__(self, request: Request) -> None:
        """Refuse a new object, or a larger claim, that a quota has no room for. Raises StatusError 403."""
        creates = request.operation == "CREATE" and not request.subresource
        grows = request.kind == "PersistentVolumeClaim" and request.operation == "UPDATE"
        if request.obj is None or not request.namespace or not (creates or grows):
            return
        for quota in self._quotas.of(request.namespace):
            self._check(quota, request, request.obj)

    def _check(self, quota: Object, request: Request, obj: Object) -> None:
        hard = (quota.get("spec") or {}).get("hard") or {}
        r = request.served.resource
        is_pod = r.kind == "Pod"
        if is_pod and not quota_usage.in_scope(quota, obj):
            return
        names = [n for n in hard if _bounds(n, r.group, r.plural)]
        if not names:
            return
        name = quota["metadata"]["name"]
        if is_pod and (unstated := _unstated(obj, names)):
            raise request.refusal(f"failed quota: {name}: must specify {unstated}")
        bounded = {**quota, "spec": {**quota["spec"], "hard": {n: hard[n] for n in names}}}
        now = self._used(bounded, request, None)
        then = self._used(bounded, request, obj)
        over = [n for n in names if _value(then[n]) > _value(hard[n]) and _value(then[n]) > _value(now[n])]
        if over:
            asked = {n: quantity.canonical(format(_value(then[n]) - _value(now[n]), "f")) for n in over}
            shown = (
                f"{what}: {','.join(f'{n}={found[n]}' for n in sorted(over))}"
                for what, found in (("requested", asked), ("used", now), ("limited", hard))
            )
            raise request.refusal(f"exceeded quota: {name}, {', '.join(shown)}")

    def _used(self, quota: Object, request: Request, obj: Object | None) -> Object:
        """What is used, with `obj` in place of the object of its name if it is given."""
        r = request.served.resource

        def there(plural: str) -> list[Object]:
            found = list(self._store.objects(f"/{plural}", request.namespace))
            if obj is not None and (r.group, r.plural) == ("", plural):
                found = [o for o in found if o["metadata"]["name"] != request.name] + [obj]
            return found

        pods: Iterable[Object] = there("pods") if r.plural == "pods" else ()
        claims: Iterable[Object] = (
            there("persistentvolumeclaims") if r.plural == "persistentvolumeclaims" else ()
        )
        count = len(self._store.bodies(request.served.storage_key, request.namespace))
        counts = {r.plural: count + (obj is not None and request.operation == "CREATE")}
        if r.plural == "services":
            services = there("services")
            for kind, plural in (
                ("NodePort", "services.nodeports"),
                ("LoadBalancer", "services.loadbalancers"),
            ):
                counts[plural] = sum((s.get("spec") or {}).get("type") == kind for s in services)
        return quota_usage.used(quota, pods, counts, claims)


def _value(text: str) -> Decimal:
    return quantity.value(str(text))


def _bounds(name: str, group: str, plural: str) -> bool:
    """Whether a bounded resource is about objects of a kind."""
    counted = f"count/{plural}.{group}" if group else f"count/{plural}"
    if name == counted:
        return True
    if group:
        return False
    if plural == "pods":
        compute = name.startswith(("requests.", "limits.")) and name != "requests.storage"
        return name == "pods" or name in _COMPUTE or name == "ephemeral-storage" or compute
    if plural == "persistentvolumeclaims" and name == "requests.storage":
        return True
    return name == plural or (plural == "services" and name.startswith("services."))


def _unstated(pod: Object, names: list[str]) -> str:
    """Compute resources that a quota bounds and a container leaves out, as `cpu for: main; …`."""
    lacking: dict[str, list[str]] = {}
    for name in names:
        if name not in _COMPUTE:
            continue
        kind, _, resource = name.rpartition(".")
        for container in pod["spec"].get("containers") or ():
            stated = (container.get("resources") or {}).get(kind or "requests") or {}
            if resource not in stated:
                lacking.setdefault(name, []).append(container["name"])
    return "; ".join(f"{name} for: {','.join(found)}" for name, found in sorted(lacking.items()))
