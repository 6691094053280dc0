"""The built-in kinds that the API serves: one table, in Kubernetes' own names."""

from __future__ import annotations

from meshlight.kube.resource_types import ALL_VERBS, CREATE_ONLY, ResourceType, Subresource
from meshlight.kube.resources import Resource


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
    stored_as: str = "",
) -> ResourceType:
    group, _, version = api_version.rpartition("/")
    subresources = []
    for name in sub.split():
        if name == "scale":
            subresources.append(Subresource("scale", ("get", "patch", "update"), "Scale", "autoscaling", "v1"))
        elif name in ("status", "finalize", "ephemeralcontainers", "resize"):
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
        storage_version=not stored_as,
        stored_as=stored_as,
    )


_ADMISSION = "admissionregistration.k8s.io/v1"
_RBAC = "rbac.authorization.k8s.io/v1"
_REVIEWS = "authorization.k8s.io/v1"

BUILTIN: tuple[ResourceType, ...] = (
    _builtin("v1", "namespaces", "Namespace", "ns", namespaced=False, sub="status finalize"),
    _builtin("v1", "nodes", "Node", "no", namespaced=False, sub="status"),
    _builtin("v1", "pods", "Pod", "po", category="all",
             sub="status log exec attach portforward binding eviction ephemeralcontainers resize"),
    _builtin("v1", "podtemplates", "PodTemplate"),
    _builtin("v1", "replicationcontrollers", "ReplicationController", "rc", category="all", sub="scale status"),
    _builtin("v1", "services", "Service", "svc", category="all", sub="status"),
    _builtin("v1", "serviceaccounts", "ServiceAccount", "sa", sub="token"),
    _builtin("v1", "configmaps", "ConfigMap", "cm"),
    _builtin("v1", "secrets", "Secret"),
    _builtin("v1", "events", "Event", "ev"),
    _builtin("v1", "endpoints", "Endpoints", "ep"),
    _builtin("v1", "persistentvolumes", "PersistentVolume", "pv", namespaced=False, sub="status"),
    _builtin("v1", "persistentvolumeclaims", "PersistentVolumeClaim", "pvc", sub="status"),
    _builtin("v1", "resourcequotas", "ResourceQuota", "quota", sub="status"),
    _builtin("v1", "limitranges", "LimitRange", "limits"),
    _builtin("metrics.k8s.io/v1beta1", "nodes", "NodeMetrics", namespaced=False, verbs=("get", "list")),
    _builtin("metrics.k8s.io/v1beta1", "pods", "PodMetrics", verbs=("get", "list")),
    _builtin("apps/v1", "deployments", "Deployment", "deploy", category="all", sub="scale status"),
    _builtin("apps/v1", "replicasets", "ReplicaSet", "rs", category="all", sub="scale status"),
    _builtin("apps/v1", "statefulsets", "StatefulSet", "sts", category="all", sub="scale status"),
    _builtin("apps/v1", "daemonsets", "DaemonSet", "ds", category="all", sub="status"),
    _builtin("apps/v1", "controllerrevisions", "ControllerRevision"),
    _builtin("batch/v1", "jobs", "Job", category="all", sub="status"),
    _builtin("batch/v1", "cronjobs", "CronJob", "cj", category="all", sub="status"),
    _builtin("discovery.k8s.io/v1", "endpointslices", "EndpointSlice"),
    _builtin("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget", "pdb", sub="status"),
    _builtin("autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", "hpa", category="all",
             sub="status"),
    _builtin("autoscaling/v1", "horizontalpodautoscalers", "HorizontalPodAutoscaler", "hpa", category="all",
             sub="status", stored_as="autoscaling/horizontalpodautoscalers"),
    _builtin("events.k8s.io/v1", "events", "Event", "ev", stored_as="/events"),
    _builtin("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", "netpol"),
    _builtin("networking.k8s.io/v1", "ingresses", "Ingress", "ing", sub="status"),
    _builtin("networking.k8s.io/v1", "ingressclasses", "IngressClass", namespaced=False),
    _builtin(_RBAC, "roles", "Role"),
    _builtin(_RBAC, "rolebindings", "RoleBinding"),
    _builtin(_RBAC, "clusterroles", "ClusterRole", namespaced=False),
    _builtin(_RBAC, "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    _builtin(_ADMISSION, "validatingwebhookconfigurations", "ValidatingWebhookConfiguration", namespaced=False),
    _builtin(_ADMISSION, "mutatingwebhookconfigurations", "MutatingWebhookConfiguration", namespaced=False),
    _builtin(_ADMISSION, "validatingadmissionpolicies", "ValidatingAdmissionPolicy", namespaced=False,
             sub="status"),
    _builtin(_ADMISSION, "validatingadmissionpolicybindings", "ValidatingAdmissionPolicyBinding",
             namespaced=False),
    _builtin("scheduling.k8s.io/v1", "priorityclasses", "PriorityClass", "pc", namespaced=False),
    _builtin("storage.k8s.io/v1", "storageclasses", "StorageClass", "sc", namespaced=False),
    _builtin("storage.k8s.io/v1", "volumeattachments", "VolumeAttachment", namespaced=False, sub="status"),
    _builtin("storage.k8s.io/v1", "csidrivers", "CSIDriver", namespaced=False),
    _builtin("storage.k8s.io/v1", "csinodes", "CSINode", namespaced=False),
    _builtin("node.k8s.io/v1", "runtimeclasses", "RuntimeClass", namespaced=False),
    _builtin("coordination.k8s.io/v1", "leases", "Lease"),
    _builtin("apiregistration.k8s.io/v1", "apiservices", "APIService", namespaced=False, sub="status"),
    _builtin("authentication.k8s.io/v1", "selfsubjectreviews", "SelfSubjectReview",
             namespaced=False, verbs=CREATE_ONLY),
    _builtin("authentication.k8s.io/v1", "tokenreviews", "TokenReview", namespaced=False, verbs=CREATE_ONLY),
    _builtin(_REVIEWS, "subjectaccessreviews", "SubjectAccessReview", namespaced=False, verbs=CREATE_ONLY),
    _builtin(_REVIEWS, "localsubjectaccessreviews", "LocalSubjectAccessReview", verbs=CREATE_ONLY),
    _builtin(_REVIEWS, "selfsubjectaccessreviews", "SelfSubjectAccessReview",
             namespaced=False, verbs=CREATE_ONLY),
    _builtin(_REVIEWS, "selfsubjectrulesreviews", "SelfSubjectRulesReview",
             namespaced=False, verbs=CREATE_ONLY),
    _builtin("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition",
             "crd crds", namespaced=False, category="api-extensions", sub="status"),
)  # fmt: skip
