"""Who may do what: RBAC as Kubernetes defines it, and what nodes may do without a role.

Pure over the stored Roles and bindings, which are read through a function; nothing is cached, because
a list of a few dozen roles costs less than a mistake in forgetting one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from meshlight.kube.authentication import Attributes, User
from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError

GROUP = "rbac.authorization.k8s.io"
SUPERUSERS = "system:masters"
NODES = "system:nodes"
_ANY = "*"

Lister = Callable[[str, str | None], Iterable[Object]]
"""(plural of the RBAC group, namespace or None for all) to the stored objects."""


def _allows(rule: Object, asked: Attributes) -> bool:
    def has(field: str, value: str) -> bool:
        return value in (values := rule.get(field) or ()) or _ANY in values

    if not has("verbs", asked.verb):
        return False
    if asked.path:
        paths = rule.get("nonResourceURLs") or ()
        return any(p == asked.path or (p.endswith(_ANY) and asked.path.startswith(p[:-1])) for p in paths)
    resources = rule.get("resources") or ()
    full = f"{asked.resource}/{asked.subresource}" if asked.subresource else asked.resource
    wanted = {_ANY, full} | ({f"*/{asked.subresource}"} if asked.subresource else set())
    names = rule.get("resourceNames") or ()
    return (
        has("apiGroups", asked.group) and bool(wanted & set(resources)) and (not names or asked.name in names)
    )


def _is_subject(subject: Object, user: User, namespace: str) -> bool:
    match subject.get("kind"):
        case "User":
            return bool(subject["name"] == user.name)
        case "Group":
            return subject["name"] in user.groups
        case "ServiceAccount":
            owner = subject.get("namespace") or namespace
            return user.name == f"system:serviceaccount:{owner}:{subject['name']}"
    return False


NODE_RULES: tuple[Object, ...] = (
    {"apiGroups": [""], "resources": ["services", "endpoints", "namespaces", "nodes", "pods", "configmaps"],
     "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["secrets", "serviceaccounts"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["persistentvolumeclaims", "persistentvolumes"], "verbs": ["get"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["create", "update", "patch"]},
    {"apiGroups": [""], "resources": ["pods", "pods/status"], "verbs": ["update", "patch", "delete"]},
    {"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"]},
    {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "update", "patch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
     "verbs": ["get", "create", "update", "patch"]},
)  # fmt: skip
"""What every node may do (the role `system:node`); `node_may_touch` narrows its writes to its own."""


def node_may_touch(user: User, asked: Attributes, pod: Object | None) -> bool:
    """Whether a node's write is about itself: its Node, its Lease, or a pod bound to it.

    As Kubernetes' NodeRestriction admission; `pod` is the pod that the request names.
    """
    if NODES not in user.groups or asked.verb in ("get", "list", "watch"):
        return True
    own = user.name.removeprefix("system:node:")
    if asked.resource in ("nodes", "leases") and asked.verb != "create":
        return asked.name == own
    if asked.resource == "pods" and pod is not None:
        return bool(pod["spec"].get("nodeName") == own)
    return True


class Authorizer:
    """Decides requests from the stored roles and bindings."""

    def __init__(self, lister: Lister) -> None:
        self._list = lister

    def rules(self, user: User, namespace: str) -> Iterator[Object]:
        """Every rule that applies to the user in a namespace (cluster-wide rules if it is empty)."""
        return (rule for _, rule in self._granted(user, namespace))

    def _granted(self, user: User, namespace: str) -> Iterator[tuple[str, Object]]:
        """Every such rule, with the words that say where it comes from."""
        if SUPERUSERS in user.groups:
            yield "", {"verbs": [_ANY], "apiGroups": [_ANY], "resources": [_ANY]}
            yield "", {"verbs": [_ANY], "nonResourceURLs": [_ANY]}
            return
        if NODES in user.groups:
            yield from (("a rule of nodes", rule) for rule in NODE_RULES)
        if "system:authenticated" in user.groups:
            yield from (("a rule of every user", rule) for rule in EVERYONE)
        for binding in self._list("clusterrolebindings", None):
            yield from self._bound(binding, user, "")
        if namespace:
            for binding in self._list("rolebindings", namespace):
                yield from self._bound(binding, user, namespace)

    def _bound(self, binding: Object, user: User, namespace: str) -> Iterator[tuple[str, Object]]:
        for subject in binding.get("subjects") or ():
            if _is_subject(subject, user, namespace):
                reference, name = binding["roleRef"], (binding.get("metadata") or {}).get("name", "")
                where = f"{name}/{namespace}" if namespace else name
                at = f"/{subject['namespace']}" if subject.get("namespace") else ""
                to = f"{subject['kind']} {subject['name']}{at}"
                source = (
                    f'{binding.get("kind")} "{where}" of {reference["kind"]} "{reference["name"]}" to {to!r}'
                )
                yield from (
                    (f"RBAC: allowed by {source}", rule) for rule in self.role_rules(reference, namespace)
                )
                return

    def role_rules(self, reference: Object, namespace: str) -> list[Object]:
        """The rules of the role that a binding in a namespace refers to; none when it is not there."""
        if reference["kind"] == "ClusterRole":
            candidates = self._list("clusterroles", None)
        else:
            candidates = self._list("roles", namespace)
        for role in candidates:
            if role["metadata"]["name"] == reference["name"]:
                return role.get("rules") or []
        return []

    def allowed(self, user: User, asked: Attributes) -> bool:
        """Whether one of the user's rules allows the request."""
        return self.reason(user, asked) is not None

    def reason(self, user: User, asked: Attributes) -> str | None:
        """The words for the rule that allows the request (perhaps ""), or None when none does."""
        return next((s for s, rule in self._granted(user, asked.namespace) if _allows(rule, asked)), None)

    def check(self, user: User, asked: Attributes) -> None:
        """Refuse with 403, in Kubernetes' words, what no rule allows."""
        if self.allowed(user, asked):
            return
        if asked.path:
            raise StatusError(403, "Forbidden", f'User "{user.name}" cannot {asked.verb} path "{asked.path}"')
        full = f"{asked.resource}/{asked.subresource}" if asked.subresource else asked.resource
        qualified = f"{asked.resource}.{asked.group}" if asked.group else asked.resource
        named = f' "{asked.name}"' if asked.name else ""
        where = f'in the namespace "{asked.namespace}"' if asked.namespace else "at the cluster scope"
        message = (
            f'{qualified}{named} is forbidden: User "{user.name}" cannot {asked.verb} resource "{full}" '
            f'in API group "{asked.group}" {where}'
        )
        raise StatusError(
            403, "Forbidden", message, {"name": asked.name, "group": asked.group, "kind": asked.resource}
        )


_DISCOVERY = [
    "/api", "/api/*", "/apis", "/apis/*", "/openapi", "/openapi/*", "/version", "/version/", "/healthz",
    "/livez", "/readyz", "/.well-known/*", "/openid/*",
]  # fmt: skip
EVERYONE: tuple[Object, ...] = (
    {"verbs": ["get"], "nonResourceURLs": _DISCOVERY},
    {"verbs": ["create"], "apiGroups": ["authorization.k8s.io"],
     "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]},
    {"verbs": ["create"], "apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"]},
)  # fmt: skip
"""What every authenticated user may do: discovery, and questions about itself."""
