"""The resource types that the API serves: built-in ones, and those of CustomResourceDefinitions.

Pure: it maps group, version and plural to what a type is called, how it may be used and which
schema and printer columns it has.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshlight.kube.builtin_kinds import BUILTIN
from meshlight.kube.resource_types import ALL_VERBS, ResourceType, ScalePaths, Subresource
from meshlight.kube.resources import Object, Resource

__all__ = ["BUILTIN", "Catalog", "ResourceType", "Subresource"]


class Catalog:
    """All types now served."""

    def __init__(self) -> None:
        self._types = {self._key(t): t for t in BUILTIN}

    @staticmethod
    def _key(served: ResourceType) -> tuple[str, str, str]:
        return served.resource.group, served.resource.version, served.resource.plural

    def types(self) -> list[ResourceType]:
        """Every served type, built-in ones first."""
        return list(self._types.values())

    def lookup(self, group: str, version: str, plural: str) -> ResourceType | None:
        """The type behind a REST path."""
        return self._types.get((group, version, plural))

    def by_kind(self, api_version: str, kind: str) -> ResourceType | None:
        """The type of an object."""
        for served in self._types.values():
            if served.resource.api_version == api_version and served.resource.kind == kind:
                return served
        return None

    def stored_version(self, served: ResourceType) -> str:
        """The apiVersion in which objects of a type are stored."""
        if served.storage_version:
            return served.resource.api_version
        for other in self._types.values():
            if other.storage_key == served.storage_key and other.storage_version:
                return other.resource.api_version
        return served.resource.api_version

    def add_crd(self, crd: Object) -> None:
        """Serve every version that a CustomResourceDefinition declares as served."""
        self.remove_crd(crd)
        for served in _crd_types(crd):
            self._types[self._key(served)] = served

    def remove_crd(self, crd: Object) -> None:
        """Stop serving a CustomResourceDefinition's types."""
        spec = crd["spec"]
        for key in [k for k in self._types if (k[0], k[2]) == (spec["group"], spec["names"]["plural"])]:
            del self._types[key]


_ANYTHING = {"x-kubernetes-preserve-unknown-fields": True}
_WRITES = ("get", "patch", "update")


def _path(text: str) -> tuple[str, ...]:
    return tuple(text.removeprefix(".").split(".")) if text else ()


def _crd_types(crd: Object) -> Iterable[ResourceType]:
    spec, names = crd["spec"], crd["spec"]["names"]
    for version in spec["versions"]:
        if not version.get("served", True):
            continue
        group, number, kind = spec["group"], version["name"], names["kind"]
        below = version.get("subresources") or {}
        subresources = []
        if "status" in below:
            subresources.append(Subresource("status", _WRITES, kind, group, number))
        scale = None
        if paths := below.get("scale"):
            subresources.append(Subresource("scale", _WRITES, "Scale", "autoscaling", "v1"))
            scale = ScalePaths(
                _path(paths["specReplicasPath"]),
                _path(paths["statusReplicasPath"]),
                _path(paths.get("labelSelectorPath") or ""),
            )
        deprecation = ""
        if version.get("deprecated"):
            deprecation = version.get("deprecationWarning") or f"{group}/{number} {kind} is deprecated"
        yield ResourceType(
            Resource(group, number, names["plural"], kind, spec["scope"] == "Namespaced"),
            names.get("singular") or kind.lower(),
            tuple(names.get("shortNames") or ()),
            tuple(names.get("categories") or ()),
            ALL_VERBS,
            tuple(subresources),
            (version.get("schema") or {}).get("openAPIV3Schema") or _ANYTHING,
            tuple(version.get("additionalPrinterColumns") or ()),
            scale,
            deprecation,
            tuple(f["jsonPath"].removeprefix(".") for f in version.get("selectableFields") or ()),
            bool(version.get("storage")),
        )
