"""The resource types that the API serves: built-in ones, and those of CustomResourceDefinitions.

Pure: it maps group, version and plural to what a type is called, how it may be used and which
schema and printer columns it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meshlight.kube import schema_language
from meshlight.kube.resources import Object, Resource
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
    storage_version: bool = True

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
        return f"{self.resource.group}/{self.resource.plural}"


def _builtin(
    api_version: str,
    plural: str,
    kind: str,
    short: str = "",
    *,
    namespaced: bool = True,
    category: str = "",
    sub: str = "",
    verbs: tuple[str, ...] = ALL_VERBS,
) -> ResourceType:
    group, _, version = api_version.rpartition("/")
    subresources = []
    for name in sub.split():
        if name == "scale":
            subresources.append(Subresource("scale", ("get", "patch", "update"), "Scale", "autoscaling", "v1"))
        elif name in ("status", "finalize"):
            subresources.append(Subresource(name, ("get", "patch", "update"), kind, group, version))
        else:
            special = {
                "log": ("get", kind, "", "v1"),
                "exec": ("get", "PodExecOptions", "", "v1"),
                "attach": ("get", "PodAttachOptions", "", "v1"),
                "portforward": ("get", "PodPortForwardOptions", "", "v1"),
                "binding": ("create", "Binding", "", "v1"),
                "eviction": ("create", "Eviction", "policy", "v1"),
                "token": ("create", "TokenRequest", "authentication.k8s.io", "v1"),
            }[name]
            subresources.append(Subresource(name, (special[0],), *special[1:]))
    return ResourceType(
        Resource(group, version, plural, kind, namespaced),
        kind.lower(),
        tuple(short.split()),
        tuple(category.split()),
        verbs,
        tuple(subresources),
    )


BUILTIN: tuple[ResourceType, ...] = (
    _builtin("v1", "namespaces", "Namespace", "ns", namespaced=False, sub="status finalize"),
    _builtin("v1", "nodes", "Node", "no", namespaced=False, sub="status"),
    _builtin("v1", "pods", "Pod", "po", category="all",
             sub="status log exec attach portforward binding eviction"),
    _builtin("v1", "services", "Service", "svc", category="all", sub="status"),
    _builtin("v1", "serviceaccounts", "ServiceAccount", "sa", sub="token"),
    _builtin("v1", "configmaps", "ConfigMap", "cm"),
    _builtin("v1", "secrets", "Secret"),
    _builtin("v1", "events", "Event", "ev"),
    _builtin("v1", "endpoints", "Endpoints", "ep"),
    _builtin("v1", "resourcequotas", "ResourceQuota", "quota", sub="status"),
    _builtin("v1", "limitranges", "LimitRange", "limits"),
    _builtin("apps/v1", "deployments", "Deployment", "deploy", category="all", sub="scale status"),
    _builtin("apps/v1", "replicasets", "ReplicaSet", "rs", category="all", sub="scale status"),
    _builtin("apps/v1", "daemonsets", "DaemonSet", "ds", category="all", sub="status"),
    _builtin("apps/v1", "controllerrevisions", "ControllerRevision"),
    _builtin("discovery.k8s.io/v1", "endpointslices", "EndpointSlice"),
    _builtin("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget", "pdb", sub="status"),
    _builtin("autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", "hpa", category="all",
             sub="status"),
    _builtin("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", "netpol"),
    _builtin("networking.k8s.io/v1", "ingresses", "Ingress", "ing", sub="status"),
    _builtin("networking.k8s.io/v1", "ingressclasses", "IngressClass", namespaced=False),
    _builtin("rbac.authorization.k8s.io/v1", "roles", "Role"),
    _builtin("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding"),
    _builtin("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", namespaced=False),
    _builtin("rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    _builtin("admissionregistration.k8s.io/v1", "validatingwebhookconfigurations",
             "ValidatingWebhookConfiguration", namespaced=False),
    _builtin("admissionregistration.k8s.io/v1", "mutatingwebhookconfigurations",
             "MutatingWebhookConfiguration", namespaced=False),
    _builtin("scheduling.k8s.io/v1", "priorityclasses", "PriorityClass", "pc", namespaced=False),
    _builtin("coordination.k8s.io/v1", "leases", "Lease"),
    _builtin("rbac.authorization.k8s.io/v1", "roles", "Role"),
    _builtin("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding"),
    _builtin("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", namespaced=False),
    _builtin("rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    _builtin("authorization.k8s.io/v1", "subjectaccessreviews", "SubjectAccessReview",
             namespaced=False, verbs=CREATE_ONLY),
    _builtin("authentication.k8s.io/v1", "selfsubjectreviews", "SelfSubjectReview",
             namespaced=False, verbs=CREATE_ONLY),
    _builtin("authentication.k8s.io/v1", "tokenreviews", "TokenReview",
             namespaced=False, verbs=CREATE_ONLY),
    _builtin("authorization.k8s.io/v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview",
             namespaced=False, verbs=CREATE_ONLY),
    _builtin("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition",
             "crd crds", namespaced=False, sub="status"),
)  # fmt: skip


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


def _crd_types(crd: Object) -> Iterable[ResourceType]:
    spec, names = crd["spec"], crd["spec"]["names"]
    for version in spec["versions"]:
        if not version.get("served", True):
            continue
        group, number = spec["group"], version["name"]
        subresources = []
        if "status" in (version.get("subresources") or {}):
            subresources.append(Subresource("status", ("get", "patch", "update"), names["kind"], group, number))
        yield ResourceType(
            Resource(group, number, names["plural"], names["kind"], spec["scope"] == "Namespaced"),
            names.get("singular") or names["kind"].lower(),
            tuple(names.get("shortNames") or ()),
            tuple(names.get("categories") or ()),
            ALL_VERBS,
            tuple(subresources),
            (version.get("schema") or {}).get("openAPIV3Schema") or _ANYTHING,
            tuple(version.get("additionalPrinterColumns") or ()),
            bool(version.get("storage")),
        )
