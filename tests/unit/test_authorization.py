"""RBAC decisions, case by case."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from meshlight.kube.authentication import Attributes, User
from meshlight.kube.authorization import Authorizer, node_may_touch
from meshlight.kube.status import StatusError

STORED: dict[str, list[dict[str, Any]]] = {
    "clusterroles": [
        {
            "metadata": {"name": "reader"},
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}],
        },
        {
            "metadata": {"name": "one"},
            "rules": [
                {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["mine"], "verbs": ["*"]},
                {"apiGroups": ["apps"], "resources": ["*/status"], "verbs": ["patch"]},
                {"nonResourceURLs": ["/metrics/*"], "verbs": ["get"]},
            ],
        },
    ],
    "roles": [
        {
            "metadata": {"name": "local", "namespace": "a"},
            "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["list"]}],
        }
    ],
    "clusterrolebindings": [
        {
            "subjects": [{"kind": "Group", "name": "readers"}],
            "roleRef": {"kind": "ClusterRole", "name": "reader"},
        },
        {"subjects": [{"kind": "User", "name": "ann"}], "roleRef": {"kind": "ClusterRole", "name": "one"}},
    ],
    "rolebindings": [
        {
            "metadata": {"namespace": "a"},
            "subjects": [{"kind": "ServiceAccount", "name": "default"}],
            "roleRef": {"kind": "Role", "name": "local"},
        }
    ],
}


def lister(plural: str, namespace: str | None) -> Iterable[dict[str, Any]]:
    for item in STORED[plural]:
        if namespace is None or (item.get("metadata") or {}).get("namespace") == namespace:
            yield item


READER, ANN = User("bob", ("readers",)), User("ann", ())
ACCOUNT = User("system:serviceaccount:a:default", ("system:authenticated",))
ROOT, NODE = User("root", ("system:masters",)), User("system:node:n1", ("system:nodes",))


@pytest.mark.parametrize(
    ("user", "asked", "expected"),
    [
        (READER, Attributes("get", "", "pods", namespace="b"), True),
        (READER, Attributes("list", "", "pods", namespace="b"), False),
        (READER, Attributes("get", "", "pods", "log", "b"), False),
        (ANN, Attributes("delete", "", "secrets", namespace="b", name="mine"), True),
        (ANN, Attributes("delete", "", "secrets", namespace="b", name="other"), False),
        (ANN, Attributes("patch", "apps", "deployments", "status", "b", "x"), True),
        (ANN, Attributes("patch", "apps", "deployments", "", "b", "x"), False),
        (ANN, Attributes("get", path="/metrics/cpu"), True),
        (ANN, Attributes("get", path="/logs"), False),
        (ACCOUNT, Attributes("list", "any", "things", namespace="a"), True),
        (ACCOUNT, Attributes("list", "any", "things", namespace="b"), False),
        (ACCOUNT, Attributes("list", "any", "things"), False),
        (ACCOUNT, Attributes("get", path="/version"), True),
        (ACCOUNT, Attributes("create", "authorization.k8s.io", "selfsubjectaccessreviews"), True),
        (ROOT, Attributes("delete", "any", "things"), True),
        (NODE, Attributes("patch", "", "pods", "status", "b", "p"), True),
        (NODE, Attributes("create", "", "pods", namespace="b"), False),
    ],
)
def test_decisions(user: User, asked: Attributes, expected: bool) -> None:
    assert Authorizer(lister).allowed(user, asked) is expected


def test_a_refusal_is_in_kubernetes_words() -> None:
    with pytest.raises(StatusError) as refused:
        Authorizer(lister).check(READER, Attributes("delete", "apps", "deployments", "", "b", "x"))
    assert refused.value.code == 403
    assert refused.value.message == (
        'deployments.apps "x" is forbidden: User "bob" cannot delete resource "deployments" '
        'in API group "apps" in the namespace "b"'
    )


def test_a_node_writes_only_what_is_its_own() -> None:
    mine, other = {"spec": {"nodeName": "n1"}}, {"spec": {"nodeName": "n2"}}
    patch = Attributes("patch", "", "pods", "status", "b", "p")
    assert node_may_touch(NODE, patch, mine)
    assert not node_may_touch(NODE, patch, other)
    assert not node_may_touch(NODE, Attributes("patch", "", "nodes", "status", "", "n2"), None)
    assert node_may_touch(NODE, Attributes("update", "coordination.k8s.io", "leases", "", "x", "n1"), None)
    assert node_may_touch(ROOT, Attributes("patch", "", "nodes", "status", "", "n2"), None)
