"""What a served resource type is: its names, verbs, subresources, schema and printer columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meshlight.kube import schema_language
from meshlight.kube.resources import Resource
from meshlight.kube.schema import ANY, Schema, from_openapi

ALL_VERBS = (
    "create", "delete", "deletecollection", "get", "list", "patch", "update", "watch",
)  # fmt: skip
CREATE_ONLY = ("create",)


@dataclass(frozen=True, slots=True)
class Subresource:
    """`status`, `scale`, `log` …, with the kind that it speaks (its own group and version)."""

    name: str
    verbs: tuple[str, ...]
    kind: str
    group: str
    version: str


@dataclass(frozen=True, slots=True)
class ScalePaths:
    """Paths of wanted replicas, of actual ones and of the selector, each as field names."""

    replicas: tuple[str, ...]
    actual: tuple[str, ...]
    selector: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResourceType:
    """One served resource type; `schema` is a custom resource's `openAPIV3Schema`, None for built-in kinds."""

    resource: Resource
    singular: str
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    subresources: tuple[Subresource, ...] = ()
    schema: dict[str, Any] | None = None
    printer_columns: tuple[dict[str, Any], ...] = ()
    scale: ScalePaths | None = None
    """Where a custom resource keeps what its `scale` subresource shows; None for built-in kinds."""
    deprecation: str = ""
    """What users of this version are warned of."""
    selectable_fields: tuple[str, ...] = ()
    """Paths, without the first dot, by which field selectors may choose beside name and namespace."""
    storage_version: bool = True
    stored_as: str = ""
    """The storage key of another type whose objects these are in another version."""

    @property
    def has_status(self) -> bool:
        """Whether `status` is written only through its subresource."""
        return any(s.name == "status" for s in self.subresources)

    @cached_property
    def structure(self) -> Schema:
        """The schema of its objects."""
        types = schema_language.builtin()
        if self.schema is None:
            return types.kinds.get((self.resource.api_version, self.resource.kind), ANY)
        return from_openapi(self.schema, types.types["ObjectMeta"])

    @property
    def storage_key(self) -> str:
        """What the store files its objects under: the same for all versions."""
        return self.stored_as or f"{self.resource.group}/{self.resource.plural}"
