"""Who else has a say in a write: limit ranges, quotas, classes, grants of roles, policies in CEL."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from meshlight.kube import deletion
from meshlight.kube.authentication import User
from meshlight.kube.bootstrap import bootstrap
from meshlight.kube.catalog import Catalog
from meshlight.kube.resources import Object
from meshlight.kube.rest import MERGE_PATCH, Rest, Target, WriteOptions
from meshlight.kube.status import StatusError
from meshlight.kube.store import Store

RBAC, POLICIES = "rbac.authorization.k8s.io", "admissionregistration.k8s.io"
ROOT, BOB = User("root", ("system:masters",)), User("bob", ("system:authenticated",))


@pytest.fixture
def rest() -> Rest:
    made = Rest(Store(":memory:"), Catalog())
    bootstrap(made, "172.20.0.1", 6443)
    create(made, "", "namespaces", {"metadata": {"name": "x", "labels": {"team": "a"}}})
    return made


def target(rest: Rest, group: str, plural: str, name: str = "", sub: str = "") -> Target:
    served = rest.catalog.lookup(group, "v1", plural)
    assert served is not None
    return Target(served, "x" if served.resource.namespaced else None, name, sub)


def create(rest: Rest, group: str, plural: str, obj: Object, user: User = ROOT, **options: Any) -> Object:
    write = WriteOptions(field_manager="test", user=user, **options)
    return rest.create(target(rest, group, plural), copy.deepcopy(obj), write)


def pod(name: str = "p", labels: Object | None = None, **resources: Any) -> Object:
    container = {"name": "main", "image": "x", "resources": resources}
    return {"metadata": {"name": name, "labels": labels or {}}, "spec": {"containers": [container]}}


def refusal(call: Any) -> StatusError:
    with pytest.raises(StatusError) as refused:
        call()
    return refused.value


# Limit ranges


def limit(rest: Rest, **item: Any) -> None:
    create(rest, "", "limitranges", {"metadata": {"name": "l"}, "spec": {"limits": [item]}})


def test_containers_get_the_defaults_of_a_limit_range(rest: Rest) -> None:
    limit(rest, type="Container", default={"cpu": "500m", "memory": "1Gi"}, defaultRequest={"cpu": "100m"})
    made = create(rest, "", "pods", pod(limits={"memory": "2Gi"}))
    assert made["spec"]["containers"][0]["resources"] == {
        "limits": {"cpu": "500m", "memory": "2Gi"},
        "requests": {"cpu": "100m", "memory": "2Gi"},
    }
    assert made["status"]["qosClass"] == "Burstable"


@pytest.mark.parametrize(
    ("item", "resources", "message"),
    [
        (
            {"type": "Container", "min": {"cpu": "100m"}},
            {"requests": {"cpu": "50m"}},
            "minimum cpu usage per Container is 100m, but request is 50m",
        ),
        (
            {"type": "Container", "max": {"memory": "1Gi"}},
            {"limits": {"memory": "2Gi"}},
            "maximum memory usage per Container is 1Gi, but limit is 2Gi",
        ),
        ({"type": "Container", "max": {"memory": "1Gi"}}, {}, "No limit is specified"),
        (
            {"type": "Container", "maxLimitRequestRatio": {"cpu": "2"}},
            {"limits": {"cpu": "3"}, "requests": {"cpu": "1"}},
            "cpu max limit to request ratio per Container is 2, but provided ratio is 3.000000",
        ),
        (
            {"type": "Pod", "max": {"cpu": "1"}},
            {"limits": {"cpu": "2"}},
            "maximum cpu usage per Pod is 1, but limit is 2",
        ),
    ],
)
def test_bounds_of_a_limit_range(rest: Rest, item: Object, resources: Object, message: str) -> None:
    limit(rest, **item)
    refused = refusal(lambda: create(rest, "", "pods", pod(**resources)))
    assert refused.code == 403 and message in refused.message


# Quotas


def quota(rest: Rest, **hard: str) -> None:
    named = {name.replace("_", "."): value for name, value in hard.items()}
    create(rest, "", "resourcequotas", {"metadata": {"name": "q"}, "spec": {"hard": named}})


def test_a_quota_of_objects(rest: Rest) -> None:
    quota(rest, pods="1", configmaps="1")
    create(rest, "", "pods", pod())
    refused = refusal(lambda: create(rest, "", "pods", pod("second")))
    assert refused.message == (
        'pods "second" is forbidden: exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1'
    )
    create(rest, "", "configmaps", {"metadata": {"name": "a"}})
    assert refusal(lambda: create(rest, "", "configmaps", {"metadata": {"name": "b"}})).code == 403
    rest.delete(target(rest, "", "pods", "p"), deletion.parse({}, {}))
    create(rest, "", "pods", pod("third"))


def test_a_quota_of_compute(rest: Rest) -> None:
    quota(rest, requests_cpu="1")
    refused = refusal(lambda: create(rest, "", "pods", pod()))
    assert "failed quota: q: must specify requests.cpu for: main" in refused.message
    create(rest, "", "pods", pod(requests={"cpu": "700m"}))
    refused = refusal(lambda: create(rest, "", "pods", pod("b", requests={"cpu": "400m"})))
    assert "requested: requests.cpu=400m, used: requests.cpu=700m, limited: requests.cpu=1" in refused.message
    create(rest, "", "pods", pod("c", requests={"cpu": "300m"}))


def test_a_claim_may_grow_within_its_quota(rest: Rest) -> None:
    quota(rest, requests_storage="2Gi")
    claim = {"metadata": {"name": "c"}, "spec": {"accessModes": ["ReadWriteOnce"],
             "resources": {"requests": {"storage": "1Gi"}}}}  # fmt: skip
    create(rest, "", "persistentvolumeclaims", claim)
    where, write = target(rest, "", "persistentvolumeclaims", "c"), WriteOptions(field_manager="t")

    def grow(size: str) -> Object:
        body = {"spec": {"resources": {"requests": {"storage": size}}}}
        return rest.patch(where, body, MERGE_PATCH, write)[0]

    assert grow("2Gi")["spec"]["resources"]["requests"]["storage"] == "2Gi"
    assert refusal(lambda: grow("3Gi")).code == 403


# Classes


def test_priorities_come_from_classes(rest: Rest) -> None:
    create(rest, "scheduling.k8s.io", "priorityclasses", {"metadata": {"name": "high"}, "value": 1000})
    named = pod()
    named["spec"]["priorityClassName"] = "high"
    assert create(rest, "", "pods", named)["spec"]["priority"] == 1000
    named["spec"]["priorityClassName"] = "none"
    assert (
        "no PriorityClass with name none was found" in refusal(lambda: create(rest, "", "pods", named)).message
    )
    critical = pod("critical")
    critical["spec"]["priorityClassName"] = "system-node-critical"
    assert create(rest, "", "pods", critical)["spec"]["priority"] == 2_000_001_000
    default = {"metadata": {"name": "default"}, "value": 7, "globalDefault": True}
    create(rest, "scheduling.k8s.io", "priorityclasses", default)
    made = create(rest, "", "pods", pod("plain"))
    assert (made["spec"]["priority"], made["spec"]["priorityClassName"]) == (7, "default")
    default["metadata"]["name"] = "another"
    assert refusal(lambda: create(rest, "scheduling.k8s.io", "priorityclasses", default)).code == 403


def test_claims_get_the_default_class(rest: Rest) -> None:
    marked = {"storageclass.kubernetes.io/is-default-class": "true"}
    storage = {"metadata": {"name": "local", "annotations": marked}, "provisioner": "x"}
    create(rest, "storage.k8s.io", "storageclasses", storage)
    spec: Object = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    made = create(rest, "", "persistentvolumeclaims", {"metadata": {"name": "c"}, "spec": spec})
    assert made["spec"]["storageClassName"] == "local"
    none = {"metadata": {"name": "d"}, "spec": {**spec, "storageClassName": ""}}
    assert create(rest, "", "persistentvolumeclaims", none)["spec"]["storageClassName"] == ""


# Roles


def rule(verbs: list[str], *resources: str) -> Object:
    return {"verbs": verbs, "apiGroups": [""], "resources": list(resources)}


def hold(rest: Rest, *rules: Object) -> None:
    """Give bob a role."""
    create(rest, RBAC, "clusterroles", {"metadata": {"name": "held"}, "rules": list(rules)})
    subject = {"kind": "User", "name": "bob", "apiGroup": RBAC}
    reference = {"kind": "ClusterRole", "name": "held", "apiGroup": RBAC}
    create(
        rest,
        RBAC,
        "clusterrolebindings",
        {"metadata": {"name": "held"}, "subjects": [subject], "roleRef": reference},
    )


def test_nobody_grants_more_than_they_hold(rest: Rest) -> None:
    hold(rest, rule(["get", "list"], "pods"))
    create(rest, RBAC, "roles", {"metadata": {"name": "same"}, "rules": [rule(["get"], "pods")]}, BOB)
    more = {"metadata": {"name": "more"}, "rules": [rule(["get"], "pods", "secrets")]}
    refused = refusal(lambda: create(rest, RBAC, "roles", more, BOB))
    assert refused.code == 403
    assert refused.message == (
        'roles.rbac.authorization.k8s.io "more" is forbidden: user "bob" (groups=["system:authenticated"]) is '
        "attempting to grant RBAC permissions not currently held:\n"
        '{APIGroups:[""], Resources:["secrets"], Verbs:["get"]}'
    )
    everything = {"metadata": {"name": "all"}, "rules": [rule(["*"], "pods")]}
    assert refusal(lambda: create(rest, RBAC, "roles", everything, BOB)).code == 403


def test_a_binding_grants_its_role(rest: Rest) -> None:
    hold(rest, rule(["get"], "pods"))
    binding = {"metadata": {"name": "b"}, "subjects": [{"kind": "User", "name": "eve"}],
               "roleRef": {"kind": "ClusterRole", "name": "cluster-admin"}}  # fmt: skip
    assert refusal(lambda: create(rest, RBAC, "rolebindings", binding, BOB)).code == 403
    binding["roleRef"] = {"kind": "ClusterRole", "name": "held"}
    create(rest, RBAC, "rolebindings", binding, BOB)


def test_escalate_and_bind_let_one_do_it(rest: Rest) -> None:
    allowed = {"verbs": ["escalate", "bind"], "apiGroups": [RBAC], "resources": ["roles", "clusterroles"]}
    hold(rest, allowed)
    create(rest, RBAC, "roles", {"metadata": {"name": "r"}, "rules": [rule(["*"], "*")]}, BOB)
    binding = {"metadata": {"name": "b"}, "subjects": [{"kind": "User", "name": "bob"}],
               "roleRef": {"kind": "ClusterRole", "name": "cluster-admin"}}  # fmt: skip
    create(rest, RBAC, "rolebindings", binding, BOB)


def test_aggregated_roles_follow_their_parts(rest: Rest) -> None:
    def rules(name: str) -> list[Object]:
        found: list[Object] = rest.get(target(rest, RBAC, "clusterroles", name)).get("rules") or []
        return found

    lamps = {"verbs": ["get"], "apiGroups": ["example.com"], "resources": ["lamps"]}
    labels = {"rbac.authorization.k8s.io/aggregate-to-view": "true"}
    create(rest, RBAC, "clusterroles", {"metadata": {"name": "lamps", "labels": labels}, "rules": [lamps]})
    for name in ("view", "edit", "admin"):
        assert lamps in rules(name), name
    rest.delete(target(rest, RBAC, "clusterroles", "lamps"), deletion.parse({}, {}))
    assert not any(lamps in rules(name) for name in ("view", "edit", "admin"))
    assert any("secrets" in r.get("resources", ()) for r in rules("edit"))
    assert not any("secrets" in r.get("resources", ()) for r in rules("view"))


# Policies


def policy(rest: Rest, *validations: Object, actions: tuple[str, ...] = ("Deny",), **more: Any) -> None:
    match = {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"],
                                "resources": ["pods"]}]}  # fmt: skip
    binding = more.pop("binding", {})
    spec = {"matchConstraints": match, "validations": list(validations), **more}
    create(rest, POLICIES, "validatingadmissionpolicies", {"metadata": {"name": "p"}, "spec": spec})
    bound = {"policyName": "p", "validationActions": list(actions), **binding}
    create(rest, POLICIES, "validatingadmissionpolicybindings", {"metadata": {"name": "b"}, "spec": bound})


def test_a_policy_denies(rest: Rest) -> None:
    policy(rest, {"expression": "has(object.metadata.labels) && 'app' in object.metadata.labels"})
    refused = refusal(lambda: create(rest, "", "pods", pod()))
    assert (refused.code, refused.reason) == (422, "Invalid")
    assert refused.message.startswith(
        "pods \"p\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: failed "
    )
    create(rest, "", "pods", pod(labels={"app": "a"}))
    create(rest, "", "configmaps", {"metadata": {"name": "free"}})


def test_a_policy_uses_variables_and_words_of_its_own(rest: Rest) -> None:
    policy(
        rest,
        {"expression": "variables.count <= 1", "messageExpression": "'%d containers'.format([variables.count])",
         "reason": "Forbidden"},
        variables=[{"name": "list", "expression": "object.spec.containers"},
                   {"name": "count", "expression": "variables.list.size()"}],
    )  # fmt: skip
    two = pod()
    two["spec"]["containers"].append({"name": "b", "image": "x"})
    refused = refusal(lambda: create(rest, "", "pods", two))
    assert refused.code == 403 and refused.message.endswith("denied request: 2 containers")


def test_a_policy_sees_the_request_the_namespace_and_what_was(rest: Rest) -> None:
    policy(
        rest,
        {"expression": "request.userInfo.username != 'bob' && namespaceObject.metadata.labels.team == 'a'"},
        {"expression": "oldObject == null || object.metadata.labels == oldObject.metadata.labels"},
    )
    create(rest, "", "pods", pod(labels={"app": "a"}))
    assert refusal(lambda: create(rest, "", "pods", pod("q"), BOB)).code == 422
    where, write = target(rest, "", "pods", "p"), WriteOptions(field_manager="t", user=ROOT)
    relabel = {"metadata": {"labels": {"app": "b"}}}
    assert refusal(lambda: rest.patch(where, relabel, MERGE_PATCH, write)).code == 422


def test_a_policy_may_only_warn(rest: Rest) -> None:
    policy(rest, {"expression": "false", "message": "think twice"}, actions=("Warn",))
    warnings: list[str] = []
    create(rest, "", "pods", pod(), warnings=warnings)
    assert warnings == ["Validation failed for ValidatingAdmissionPolicy 'p' with binding 'b': think twice"]


def test_a_policy_takes_parameters(rest: Rest) -> None:
    create(rest, "", "configmaps", {"metadata": {"name": "limits"}, "data": {"most": "1"}})
    policy(
        rest,
        {"expression": "object.spec.containers.size() <= int(params.data.most)"},
        paramKind={"apiVersion": "v1", "kind": "ConfigMap"},
        binding={"paramRef": {"name": "limits", "parameterNotFoundAction": "Deny"}},
    )
    create(rest, "", "pods", pod())
    rest.delete(target(rest, "", "configmaps", "limits"), deletion.parse({}, {}))
    assert refusal(lambda: create(rest, "", "pods", pod("q"))).code == 403


def test_conditions_and_selectors_narrow_a_policy(rest: Rest) -> None:
    policy(
        rest,
        {"expression": "false"},
        matchConditions=[{"name": "not-exempt", "expression": "object.metadata.name != 'exempt'"}],
        binding={"matchResources": {"objectSelector": {"matchLabels": {"checked": "yes"}}}},
    )
    create(rest, "", "pods", pod("unlabelled"))
    create(rest, "", "pods", pod("exempt", {"checked": "yes"}))
    assert refusal(lambda: create(rest, "", "pods", pod("other", {"checked": "yes"}))).code == 422


@pytest.mark.parametrize(("failure", "refused"), [("Fail", True), ("Ignore", False)])
def test_a_broken_policy_fails_as_it_says(rest: Rest, failure: str, refused: bool) -> None:
    policy(rest, {"expression": "object.spec.nothing.here == 1"}, failurePolicy=failure)
    if refused:
        assert "no such key" in refusal(lambda: create(rest, "", "pods", pod())).message
    else:
        create(rest, "", "pods", pod())
