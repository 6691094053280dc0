"""`discoverySelectors`: which namespaces' objects the control plane sees at all.

Stands between the caches and the index: objects of a namespace that is not selected are as good as absent,
and when a namespace comes or goes (its labels or the selectors changed) its objects are fed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.settings import Mesh
from meshlight.kube.client import Cache
from meshlight.kube.resources import Object

Observe = Callable[[str, ObjectKey, Object | None], None]


class DiscoveryScope:
    """Feeds the index with what may be seen. The root namespace always is."""

    def __init__(self, mesh: Mesh, caches: Mapping[str, Cache], observe: Observe) -> None:
        self._mesh, self._caches, self._observe = mesh, caches, observe
        self._labels: dict[str, Mapping[str, str]] = {}

    def observe(self, kind: str, key: ObjectKey, obj: Object | None) -> None:
        """Take an object's present state, None once it is deleted."""
        if kind == "Namespace":
            self._namespace(key, obj)
        elif key.namespace and not self._admits(key.namespace):
            obj = None
        self._observe(kind, key, obj)

    def reconfigure(self, mesh: Mesh) -> None:
        """Take other selectors."""
        before = {name: self._admits(name) for name in self._labels}
        self._mesh = mesh
        for name, was in before.items():
            if self._admits(name) != was:
                self._feed(name)

    def _namespace(self, key: ObjectKey, obj: Object | None) -> None:
        was = self._admits(key.name)
        if obj is None:
            self._labels.pop(key.name, None)
        else:
            self._labels[key.name] = obj["metadata"].get("labels") or {}
        if self._admits(key.name) != was:
            self._feed(key.name)

    def _admits(self, namespace: str) -> bool:
        if not self._mesh.discovery_selectors or namespace == self._mesh.root_namespace:
            return True
        return self._mesh.discovers(self._labels.get(namespace, {}))

    def _feed(self, namespace: str) -> None:
        admitted = self._admits(namespace)
        for kind, cache in self._caches.items():
            if cache.resource.namespaced:
                for (space, name), obj in list(cache.objects.items()):
                    if space == namespace:
                        self._observe(kind, ObjectKey(space, name), obj if admitted else None)
