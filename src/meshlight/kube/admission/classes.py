"""Classes that objects name, or are given: priorities of pods, storage of claims."""

from __future__ import annotations

from meshlight.kube.admission import Request
from meshlight.kube.admission.stored import Stored
from meshlight.kube.store import Store

_DEFAULT_STORAGE = "storageclass.kubernetes.io/is-default-class"


class Priorities:
    """A pod's priority is its class's; without one, the default class's."""

    def __init__(self, store: Store) -> None:
        self._classes = Stored(store, "scheduling.k8s.io/priorityclasses")

    def __call__(self, request: Request) -> None:
        """Set a new pod's priority, or check a class's being the only default."""
        if request.kind == "PriorityClass" and request.obj is not None and request.obj.get("globalDefault"):
            others = [c for c in self._classes.all() if c.get("globalDefault")]
            taken = next((c["metadata"]["name"] for c in others if c["metadata"]["name"] != request.name), None)
            if taken:
                raise request.refusal(
                    f"PriorityClass {taken} is already marked as default. Only one default can exist"
                )
        if request.kind != "Pod" or request.operation != "CREATE" or request.subresource or request.obj is None:
            return
        spec = request.obj["spec"]
        name = spec.get("priorityClassName") or ""
        if name:
            found = self._classes.named(name)
            if found is None:
                raise request.refusal(f"no PriorityClass with name {name} was found")
        else:
            found = next((c for c in self._classes.all() if c.get("globalDefault")), None)
            if found is not None:
                spec["priorityClassName"] = found["metadata"]["name"]
        spec["priority"] = found["value"] if found is not None else 0
        if found is not None:
            spec["preemptionPolicy"] = found.get("preemptionPolicy", "PreemptLowerPriority")


class DefaultStorage:
    """A claim without a class gets the default one, the newest if there are several."""

    def __init__(self, store: Store) -> None:
        self._classes = Stored(store, "storage.k8s.io/storageclasses")

    def __call__(self, request: Request) -> None:
        """Name the class of a new claim."""
        if request.kind != "PersistentVolumeClaim" or request.operation != "CREATE" or request.obj is None:
            return
        spec = request.obj.setdefault("spec", {})
        if "storageClassName" in spec:
            return
        defaults = [
            c for c in self._classes.all()
            if (c["metadata"].get("annotations") or {}).get(_DEFAULT_STORAGE) == "true"
        ]  # fmt: skip
        if defaults:
            newest = max(defaults, key=lambda c: (c["metadata"]["creationTimestamp"], c["metadata"]["name"]))
            spec["storageClassName"] = newest["metadata"]["name"]
