"""ClusterRoles and bindings that every cluster has, with Kubernetes' names.

`admin`, `edit` and `view` are made of the roles that say so by their labels: those here, and those that come
with custom resources.
"""

from __future__ import annotations

from meshlight.kube.authorization import GROUP, SUPERUSERS
from meshlight.kube.resources import Object

_ANY = "*"
_READ = ["get", "list", "watch"]
_WRITE = ["create", "delete", "deletecollection", "patch", "update"]
_CORE = [
    "configmaps", "endpoints", "persistentvolumeclaims", "pods", "replicationcontrollers", "serviceaccounts",
    "services", "events", "resourcequotas", "limitranges",
]  # fmt: skip
_SHOWN = [*_CORE, "pods/log", "pods/status", "services/status", "persistentvolumeclaims/status",
          "replicationcontrollers/scale", "replicationcontrollers/status", "resourcequotas/status", "bindings",
          "namespaces", "namespaces/status"]  # fmt: skip
_APPS = ["apps", "batch", "autoscaling", "policy", "networking.k8s.io", "discovery.k8s.io"]
_MESH = ["security.istio.io", "networking.istio.io", "telemetry.istio.io", "extensions.istio.io",
         "gateway.networking.k8s.io"]  # fmt: skip
_AGGREGATE = "rbac.authorization.k8s.io/aggregate-to-"


def _role(name: str, rules: list[Object], *into: str) -> Object:
    metadata: Object = {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}}
    metadata["labels"].update({_AGGREGATE + role: "true" for role in into})
    return {"metadata": metadata, "rules": rules}


def _made_of(name: str, *into: str) -> Object:
    role = _role(name, [], *into)
    role["aggregationRule"] = {"clusterRoleSelectors": [{"matchLabels": {_AGGREGATE + name: "true"}}]}
    return role


def _rule(groups: list[str], resources: list[str], verbs: list[str]) -> Object:
    return {"apiGroups": groups, "resources": resources, "verbs": verbs}


_EXEC = ["pods/attach", "pods/exec", "pods/portforward", "pods/proxy", "services/proxy"]
ROLES: tuple[Object, ...] = (
    _role(
        "cluster-admin",
        [_rule([_ANY], [_ANY], [_ANY]), {"nonResourceURLs": [_ANY], "verbs": [_ANY]}],
    ),
    _role(
        "system:aggregate-to-view",
        [_rule([""], _SHOWN, _READ), _rule([*_APPS, *_MESH], [_ANY], _READ),
         _rule(["metrics.k8s.io"], ["pods", "nodes"], _READ)],
        "view",
    ),
    _role(
        "system:aggregate-to-edit",
        [
            _rule([""], [*_EXEC, "secrets"], _READ),
            _rule([""], ["serviceaccounts"], ["impersonate"]),
            _rule([""], [*_CORE, "secrets"], _WRITE),
            _rule([""], _EXEC, _WRITE),
            _rule([""], ["pods/eviction", "serviceaccounts/token"], ["create"]),
            _rule([*_APPS, *_MESH], [_ANY], _WRITE),
            _rule(["coordination.k8s.io"], ["leases"], _READ + _WRITE),
        ],
        "edit",
    ),
    _role(
        "system:aggregate-to-admin",
        [
            _rule(["authorization.k8s.io"], ["localsubjectaccessreviews"], ["create"]),
            _rule([GROUP], ["roles", "rolebindings"], _READ + _WRITE),
        ],
        "admin",
    ),
    _made_of("view", "edit"),
    _made_of("edit", "admin"),
    _made_of("admin"),
    _role(
        "system:auth-delegator",
        [
            _rule(["authentication.k8s.io"], ["tokenreviews"], ["create"]),
            _rule(["authorization.k8s.io"], ["subjectaccessreviews"], ["create"]),
        ],
    ),
    _role(
        "system:monitoring",
        [{"nonResourceURLs": ["/healthz", "/livez", "/metrics", "/readyz"], "verbs": ["get"]}],
    ),
    _role(
        "system:node-proxier",
        [
            _rule([""], ["endpoints", "services", "nodes"], _READ),
            _rule(["discovery.k8s.io"], ["endpointslices"], _READ),
            _rule(["", "events.k8s.io"], ["events"], ["create", "patch", "update"]),
        ],
    ),
)  # fmt: skip
BINDINGS: tuple[Object, ...] = (
    {
        "metadata": {"name": "cluster-admin", "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
        "subjects": [{"kind": "Group", "name": SUPERUSERS, "apiGroup": GROUP}],
        "roleRef": {"kind": "ClusterRole", "name": "cluster-admin", "apiGroup": GROUP},
    },
)
PRIORITIES: tuple[Object, ...] = (
    {
        "metadata": {"name": "system-node-critical"},
        "value": 2_000_001_000,
        "description": "Used for system critical pods that must not be moved from their current node.",
    },
    {
        "metadata": {"name": "system-cluster-critical"},
        "value": 2_000_000_000,
        "description": "Used for system critical pods that must run in the cluster, but can be moved.",
    },
)
