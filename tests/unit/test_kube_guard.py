"""What every request passes: credentials remembered, acting for others, bounds, the audit log, reviews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from multidict import CIMultiDict

from meshlight.kube import audit, guard, reviews
from meshlight.kube.audit import Asked, AuditLog
from meshlight.kube.authentication import Attributes, User, impersonated
from meshlight.kube.authorization import Authorizer
from meshlight.kube.catalog import Catalog
from meshlight.kube.guard import InFlight
from meshlight.kube.rest import Target
from meshlight.kube.status import StatusError

ANN, ROOT = User("ann", ("system:authenticated",)), User("root", ("system:masters",))


def target(group: str, plural: str, name: str = "", sub: str = "") -> Target:
    served = Catalog().lookup(group, "v1", plural)
    assert served is not None
    return Target(served, "x" if served.resource.namespaced else None, name, sub)


# Acting for others


def test_acting_for_another_needs_the_right_to_each_part() -> None:
    asked: list[Attributes] = []
    headers = CIMultiDict(
        [("Impersonate-User", "bob"), ("Impersonate-Group", "dev"), ("Impersonate-Extra-scopes", "view")]
    )
    user = impersonated(headers, asked.append)
    assert (user.name, user.groups) == ("bob", ("dev", "system:authenticated"))
    assert user.extra == {"scopes": ("view",)}
    assert [(a.resource, a.name) for a in asked] == [
        ("users", "bob"),
        ("groups", "dev"),
        ("userextras", "view"),
    ]


def test_acting_as_a_service_account_brings_its_groups() -> None:
    asked: list[Attributes] = []
    user = impersonated(CIMultiDict({"Impersonate-User": "system:serviceaccount:x:default"}), asked.append)
    assert "system:serviceaccounts:x" in user.groups
    assert (asked[0].resource, asked[0].namespace, asked[0].name) == ("serviceaccounts", "x", "default")


def test_groups_without_a_user_are_refused() -> None:
    with pytest.raises(StatusError):
        impersonated(CIMultiDict({"Impersonate-Group": "dev"}), lambda _: None)


# Bounds


def test_one_user_cannot_take_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_OF_ONE_USER", 2)
    monkeypatch.setattr(guard, "MAX_IN_FLIGHT", 4)
    places = InFlight()
    for user in (ANN, ANN):
        places.enter(user)
    with pytest.raises(StatusError) as refused:
        places.enter(ANN)
    assert refused.value.code == 429 and refused.value.details["retryAfterSeconds"] == 1
    for _ in range(2):
        places.enter(ROOT)
    with pytest.raises(StatusError):
        places.enter(ROOT)
    places.leave(ANN)
    places.enter(ANN)


# Audit


def asked(verb: str, about: Target | None) -> Asked:
    return Asked(verb, "/uri", ANN, None, "127.0.0.1", "kubectl", about)


@pytest.mark.parametrize(
    ("verb", "about", "level"),
    [
        ("get", target("", "pods", "p"), "None"),
        ("create", target("", "pods"), "Metadata"),
        ("get", target("", "secrets", "s"), "Metadata"),
        ("create", target("", "secrets"), "Metadata"),
        ("create", target("", "serviceaccounts", "a", "token"), "Metadata"),
        ("create", target("", "events"), "None"),
        ("update", target("coordination.k8s.io", "leases", "l"), "None"),
        ("create", target("rbac.authorization.k8s.io", "clusterroles"), "Request"),
        ("get", None, "None"),
    ],
)
def test_the_policy(verb: str, about: Target | None, level: str) -> None:
    assert audit.level(verb, about) == level


def test_no_secret_is_ever_in_the_log() -> None:
    body = {"data": {"password": "aHVudGVyMg=="}}
    found = audit.event(asked("create", target("", "secrets", "s")), 201, "", body, 0, 1)
    assert found is not None and b"aHVudGVyMg" not in orjson.dumps(found)
    assert found["objectRef"] == {"resource": "secrets", "namespace": "x", "name": "s", "apiVersion": "v1"}
    assert found["user"]["username"] == "ann" and found["responseStatus"]["code"] == 201


def test_changes_of_roles_are_kept_whole() -> None:
    body = {"rules": []}
    about = target("rbac.authorization.k8s.io", "clusterroles", "r")
    found = audit.event(asked("update", about), 200, "", body, 0, 1)
    assert found is not None and found["requestObject"] == body


def test_the_file_is_private_and_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_BYTES", 100)
    log = AuditLog(tmp_path / "audit.log")
    for number in range(20):
        log.write([b"%030d\n" % number] * 2)
    assert (tmp_path / "audit.log.1").stat().st_mode & 0o077 == 0
    files = sorted(f.name for f in tmp_path.iterdir())
    assert files == ["audit.log.1", "audit.log.2", "audit.log.3"]
    assert (tmp_path / "audit.log.1").read_bytes() > (tmp_path / "audit.log.2").read_bytes()


async def test_what_cannot_be_written_in_time_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_WAITING", 2)
    log = AuditLog(tmp_path / "audit.log")
    for _ in range(5):
        log.note(asked("create", target("", "pods")), 201, "", None, 0)
    log.close()
    assert log.dropped == 3 and len((tmp_path / "audit.log").read_text().splitlines()) == 2


# Reviews


def stored(plural: str, namespace: str | None) -> list[dict[str, Any]]:
    role = {"kind": "ClusterRole", "metadata": {"name": "reader"},
            "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}]}  # fmt: skip
    binding = {"kind": "ClusterRoleBinding", "metadata": {"name": "b"},
               "subjects": [{"kind": "User", "name": "ann"}],
               "roleRef": {"kind": "ClusterRole", "name": "reader"}}  # fmt: skip
    return {"clusterroles": [role], "clusterrolebindings": [binding]}.get(plural, [])


AUTHORIZER = Authorizer(stored)


@pytest.mark.parametrize(
    ("kind", "spec", "allowed"),
    [
        ("SelfSubjectAccessReview", {"resourceAttributes": {"verb": "get", "resource": "pods"}}, True),
        ("SelfSubjectAccessReview", {"resourceAttributes": {"verb": "list", "resource": "pods"}}, False),
        ("SelfSubjectAccessReview", {"nonResourceAttributes": {"verb": "get", "path": "/version"}}, True),
        (
            "SubjectAccessReview",
            {
                "user": "bob",
                "groups": ["system:masters"],
                "resourceAttributes": {"verb": "delete", "resource": "x"},
            },
            True,
        ),
        (
            "LocalSubjectAccessReview",
            {"user": "bob", "resourceAttributes": {"verb": "get", "resource": "pods", "namespace": "x"}},
            False,
        ),
    ],
)
def test_access_reviews(kind: str, spec: dict[str, Any], allowed: bool) -> None:
    status = reviews.review(AUTHORIZER, kind, {"kind": kind, "spec": spec}, ANN, "x")["status"]
    assert status["allowed"] is allowed


def test_a_review_says_which_binding_allows() -> None:
    spec = {"resourceAttributes": {"verb": "get", "resource": "pods"}}
    status = reviews.review(AUTHORIZER, "SelfSubjectAccessReview", {"spec": spec}, ANN, None)["status"]
    assert status["reason"] == 'RBAC: allowed by ClusterRoleBinding "b" of ClusterRole "reader" to \'User ann\''


def test_a_review_of_another_namespace_than_its_own_is_refused() -> None:
    spec = {"user": "bob", "resourceAttributes": {"verb": "get", "resource": "pods", "namespace": "y"}}
    with pytest.raises(StatusError):
        reviews.review(AUTHORIZER, "LocalSubjectAccessReview", {"spec": spec}, ANN, "x")


def test_a_rules_review_lists_everything() -> None:
    body = {"spec": {"namespace": "x"}}
    status = reviews.review(AUTHORIZER, "SelfSubjectRulesReview", body, ANN, None)["status"]
    assert {"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]} in status["resourceRules"]
    assert any("/version" in r["nonResourceURLs"] for r in status["nonResourceRules"])
