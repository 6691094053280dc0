"""What the API refuses, completes and keeps: Kubernetes' rules through the whole write path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from meshlight.kube import deletion
from meshlight.kube.catalog import Catalog
from meshlight.kube.resources import Object
from meshlight.kube.rest import (
    APPLY_PATCH,
    JSON_PATCH,
    MERGE_PATCH,
    STRATEGIC_MERGE_PATCH,
    Rest,
    Target,
    WriteOptions,
)
from meshlight.kube.status import StatusError
from meshlight.kube.store import Store

Change = Callable[[Object], None]
OPTIONS = WriteOptions(field_manager="test")


@pytest.fixture
def rest() -> Rest:
    made = Rest(Store(":memory:"), Catalog())
    made.create(target(made, "namespaces"), {"metadata": {"name": "x"}}, OPTIONS)
    return made


def target(rest: Rest, plural: str, name: str = "", subresource: str = "", namespace: str = "x") -> Target:
    served = next(t for t in rest.catalog.types() if t.resource.plural == plural)
    return Target(served, namespace if served.resource.namespaced else None, name, subresource)


def create(rest: Rest, plural: str, obj: Object, options: WriteOptions = OPTIONS) -> Object:
    return copy.deepcopy(rest.create(target(rest, plural), copy.deepcopy(obj), options))


def patch(
    rest: Rest,
    plural: str,
    name: str,
    body: Any,
    kind: str = MERGE_PATCH,
    sub: str = "",
    options: WriteOptions = OPTIONS,
) -> Object:
    return rest.patch(target(rest, plural, name, sub), copy.deepcopy(body), kind, options)[0]


def refusal(act: Callable[[], Any]) -> StatusError:
    with pytest.raises(StatusError) as refused:
        act()
    return refused.value


CONTAINER = {"name": "a", "image": "i:1"}


def pod(**spec: Any) -> Object:
    return {"metadata": {"name": "p"}, "spec": {"containers": [dict(CONTAINER)], **spec}}


def with_container(**fields: Any) -> Object:
    return pod(containers=[{**CONTAINER, **fields}])


def workload(**spec: Any) -> Object:
    template = {"metadata": {"labels": {"app": "w"}}, "spec": {"containers": [dict(CONTAINER)]}}
    return {
        "metadata": {"name": "w"},
        "spec": {"selector": {"matchLabels": {"app": "w"}}, "template": template, **spec},
    }


def service(**spec: Any) -> Object:
    return {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}], **spec}}


def config(**fields: Any) -> Object:
    return {"metadata": {"name": "c"}, **fields}


INVALID = [
    # plural, object, field at fault, words of the message
    ("pods", pod(containers=[]), "spec.containers", "Required value"),
    ("pods", pod(containers=[{"name": "a"}]), "spec.containers[0].image", "Required value"),
    ("pods", pod(containers=[{"image": "a"}]), "spec.containers[0].name", "Required value"),
    ("pods", pod(containers=[CONTAINER, CONTAINER]), "spec.containers[1].name", 'Duplicate value: "a"'),
    ("pods", pod(initContainers=[CONTAINER]), "spec.containers[0].name", 'Duplicate value: "a"'),
    ("pods", with_container(name="A_b"), "spec.containers[0].name", "a lowercase RFC 1123 label must consist"),
    ("pods", with_container(ports=[{"containerPort": 0}]), "spec.containers[0].ports[0].containerPort",
     "Required value"),
    ("pods", with_container(ports=[{"containerPort": 65536}]), "spec.containers[0].ports[0].containerPort",
     "Invalid value: 65536: must be between 1 and 65535, inclusive"),
    ("pods", with_container(ports=[{"containerPort": 1, "protocol": "ICMP"}]),
     "spec.containers[0].ports[0].protocol",
     'Unsupported value: "ICMP": supported values: "SCTP", "TCP", "UDP"'),
    ("pods", with_container(ports=[{"containerPort": 1, "name": "much-too-long-name"}]),
     "spec.containers[0].ports[0].name", "must be no more than 15 characters"),
    ("pods", with_container(env=[{"name": "a=b"}]), "spec.containers[0].env[0].name", "printable ASCII"),
    ("pods", with_container(env=[{"name": "A", "valueFrom": {}}]), "spec.containers[0].env[0].valueFrom",
     "must specify one of"),
    ("pods", with_container(volumeMounts=[{"name": "v", "mountPath": "/v"}]),
     "spec.containers[0].volumeMounts[0].name", 'Not found: "v"'),
    ("pods", with_container(livenessProbe={}), "spec.containers[0].livenessProbe",
     "Required value: must specify a handler type"),
    ("pods", with_container(livenessProbe={"exec": {"command": ["x"]}, "successThreshold": 2}),
     "spec.containers[0].livenessProbe.successThreshold", "Invalid value: 2: must be 1"),
    ("pods", with_container(readinessProbe={"httpGet": {"port": 99999}}),
     "spec.containers[0].readinessProbe.httpGet.port", "must be between 1 and 65535"),
    ("pods", with_container(resources={"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
     "spec.containers[0].resources.requests",
     'Invalid value: "2": must be less than or equal to cpu limit of 1'),
    ("pods", with_container(resources={"limits": {"cores": "1"}}), "spec.containers[0].resources.limits[cores]",
     "must be a standard resource for containers"),
    ("pods", pod(restartPolicy="Sometimes"), "spec.restartPolicy",
     'Unsupported value: "Sometimes": supported values: "Always", "Never", "OnFailure"'),
    ("pods", pod(volumes=[{"name": "v"}, {"name": "v"}]), "spec.volumes[1].name", 'Duplicate value: "v"'),
    ("pods", pod(volumes=[{"name": "v", "emptyDir": {}, "secret": {"secretName": "s"}}]),
     "spec.volumes[0].secret",
     "may not specify more than 1 volume type"),
    ("pods", pod(volumes=[{"name": "v", "configMap": {}}]), "spec.volumes[0].configMap.name", "Required value"),
    ("pods", pod(tolerations=[{"operator": "Exists", "value": "v"}]), "spec.tolerations[0].operator",
     "value must be empty when `operator` is 'Exists'"),
    ("deployments", workload(selector={"matchLabels": {"app": "v"}}), "spec.template.metadata.labels",
     'Invalid value: map[string]string{"app":"w"}: `selector` does not match template `labels`'),
    ("deployments", workload(selector={}), "spec.selector", "empty selector is invalid for deployment"),
    ("deployments", workload(replicas=-1), "spec.replicas", "must be greater than or equal to 0"),
    ("deployments", workload(strategy={"type": "Recreate", "rollingUpdate": {}}), "spec.strategy.rollingUpdate",
     "may not be specified when strategy `type` is 'Recreate'"),
    ("deployments", workload(strategy={"rollingUpdate": {"maxSurge": "x%"}}),
     "spec.strategy.rollingUpdate.maxSurge", "a valid percent string must be"),
    ("deployments", workload(strategy={"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}),
     "spec.strategy.rollingUpdate.maxUnavailable", "may not be 0 when `maxSurge` is 0"),
    ("daemonsets", {"metadata": {"name": "d"}, "spec": {}}, "spec.selector", "Required value"),
    ("services", service(ports=[]), "spec.ports", "Required value"),
    ("services", service(ports=[{"port": 1}, {"port": 2}]), "spec.ports[0].name", "Required value"),
    ("services", service(ports=[{"port": 1, "name": "a"}, {"port": 2, "name": "a"}]), "spec.ports[1].name",
     'Duplicate value: "a"'),
    ("services", service(ports=[{"port": 0}]), "spec.ports[0].port", "must be between 1 and 65535"),
    ("services", service(type="Magic"), "spec.type", 'Unsupported value: "Magic"'),
    ("services", service(type="ExternalName"), "spec.externalName", "Required value"),
    ("services", service(ports=[{"port": 1, "nodePort": 30000}]), "spec.ports[0].nodePort",
     "may not be used when `type` is 'ClusterIP'"),
    ("services", {"metadata": {"name": "1a"}, "spec": {"ports": [{"port": 1}]}}, "metadata.name",
     "a DNS-1035 label must consist"),
    ("configmaps", config(data={"a/b": ""}), "data[a/b]", "a valid config key must consist of"),
    ("configmaps", config(data={"a": ""}, binaryData={"a": ""}), "data[a]",
     "duplicate of key present in binaryData"),
    ("configmaps", config(data={"a": "x" * 2**20 + "x"}), "", "Too long: may not be more than 1048576 bytes"),
    ("configmaps", {"metadata": {"name": "C"}}, "metadata.name", "a lowercase RFC 1123 subdomain must consist"),
    ("configmaps", {"metadata": {}}, "metadata.name", "Required value: name or generateName is required"),
    ("configmaps", {"metadata": {"name": "c", "labels": {"a b": "c"}}}, "metadata.labels",
     "name part must consist"),
    ("configmaps", {"metadata": {"name": "c", "labels": {"a": "b c"}}}, "metadata.labels",
     "a valid label must be"),
    ("secrets", {"metadata": {"name": "s"}, "type": "kubernetes.io/tls"}, "data[tls.crt]", "Required value"),
    ("namespaces", {"metadata": {"name": "a.b"}}, "metadata.name", "a lowercase RFC 1123 label must consist"),
    ("endpointslices", {"metadata": {"name": "e"}, "addressType": "IPv4", "endpoints": [{"addresses": ["x"]}]},
     "endpoints[0].addresses[0]", "must be a valid IP address"),
    ("roles", {"metadata": {"name": "r"}, "rules": [{"apiGroups": [""], "resources": ["pods"]}]},
     "rules[0].verbs",
     "Required value"),
    ("clusterrolebindings", {"metadata": {"name": "r"}, "roleRef": {"kind": "Role", "name": "r"}},
     "roleRef.kind",
     'Unsupported value: "Role": supported values: "ClusterRole"'),
    ("ingresses", {"metadata": {"name": "i"}, "spec": {}}, "spec",
     "either `defaultBackend` or `rules` must be specified"),
    ("poddisruptionbudgets", {"metadata": {"name": "p"}, "spec": {"minAvailable": 1, "maxUnavailable": 1}},
     "spec",
     "minAvailable and maxUnavailable cannot be both set"),
    ("customresourcedefinitions",
     {"metadata": {"name": "a.e.io"},
      "spec": {"group": "e.io", "scope": "Cluster", "names": {"plural": "b", "kind": "B"}, "versions": []}},
     "metadata.name", 'must be spec.names.plural+"."+spec.group'),
]  # fmt: skip


@pytest.mark.parametrize(("plural", "obj", "field", "words"), INVALID)
def test_invalid_objects_are_refused(rest: Rest, plural: str, obj: Object, field: str, words: str) -> None:
    refused = refusal(lambda: create(rest, plural, obj))
    assert (refused.code, refused.reason) == (422, "Invalid")
    causes = {c["field"]: c["message"] for c in refused.details["causes"]}
    assert words in causes[field], causes


IMMUTABLE = [
    # plural, object, patch, words
    ("deployments", workload(), {"spec": {"selector": {"matchLabels": {"app": "w", "b": "c"}},
                                          "template": {"metadata": {"labels": {"b": "c"}}}}},
     'MatchLabels:map[string]string{"app":"w", "b":"c"}, '
     "MatchExpressions:[]v1.LabelSelectorRequirement(nil)}: field is immutable"),
    ("pods", pod(), {"spec": {"hostNetwork": True}}, "pod updates may not change fields other than"),
    ("configmaps", config(immutable=True, data={"a": "b"}), {"data": {"a": "c"}},
     "data: Forbidden: field is immutable when `immutable` is set"),
    ("configmaps", config(immutable=True), {"immutable": False}, "immutable: Forbidden: field is immutable"),
    ("secrets", config(), {"type": "other"}, 'type: Invalid value: "other": field is immutable'),
    ("services", service(), {"spec": {"clusterIP": "10.96.0.77", "clusterIPs": ["10.96.0.77"]}},
     "may not change once set"),
    ("rolebindings", config(roleRef={"kind": "Role", "name": "a"}), {"roleRef": {"name": "b"}},
     "cannot change roleRef"),
]  # fmt: skip


@pytest.mark.parametrize(("plural", "obj", "change", "words"), IMMUTABLE)
def test_what_is_immutable_stays(rest: Rest, plural: str, obj: Object, change: Object, words: str) -> None:
    create(rest, plural, obj)
    refused = refusal(lambda: patch(rest, plural, obj["metadata"]["name"], change))
    assert refused.code == 422
    assert words in refused.message


def test_the_changes_that_pods_allow(rest: Rest) -> None:
    create(rest, "pods", pod())
    image = {"spec": {"containers": [{"name": "a", "image": "i:2"}]}}
    assert patch(rest, "pods", "p", image, STRATEGIC_MERGE_PATCH)["spec"]["containers"][0]["image"] == "i:2"
    before = rest.get(target(rest, "pods", "p"))["spec"]["tolerations"]
    more = {"spec": {"tolerations": [*before, {"operator": "Exists"}]}}
    assert len(patch(rest, "pods", "p", more)["spec"]["tolerations"]) == len(before) + 1


# Defaults


def test_pods_are_complete(rest: Rest) -> None:
    made = create(
        rest,
        "pods",
        with_container(image="i", readinessProbe={"httpGet": {"port": 80}}, resources={"limits": {"cpu": "1"}}),
    )
    spec = made["spec"]
    assert spec["containers"][0] == {
        "name": "a",
        "image": "i",
        "imagePullPolicy": "Always",
        "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}},
        "readinessProbe": {
            "httpGet": {"path": "/", "port": 80, "scheme": "HTTP"},
            "timeoutSeconds": 1,
            "periodSeconds": 10,
            "successThreshold": 1,
            "failureThreshold": 3,
        },
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
    }
    wanted = {
        "restartPolicy": "Always",
        "dnsPolicy": "ClusterFirst",
        "schedulerName": "default-scheduler",
        "securityContext": {},
        "serviceAccountName": "default",
        "serviceAccount": "default",
        "terminationGracePeriodSeconds": 30,
        "enableServiceLinks": True,
        "priority": 0,
        "preemptionPolicy": "PreemptLowerPriority",
    }
    assert {k: spec.get(k) for k in wanted} == wanted
    assert made["status"] == {"phase": "Pending", "qosClass": "Burstable"}
    assert "generation" not in made["metadata"]


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("a", "Always"), ("a:latest", "Always"), ("a:1", "IfNotPresent"), ("h:5000/a", "Always"),
        ("h:5000/a:1", "IfNotPresent"), ("a@sha256:0", "IfNotPresent"),
    ],
)  # fmt: skip
def test_pull_policies_follow_the_tag(rest: Rest, image: str, policy: str) -> None:
    assert (
        create(rest, "pods", with_container(image=image))["spec"]["containers"][0]["imagePullPolicy"] == policy
    )


def test_deployments_and_daemon_sets_are_complete(rest: Rest) -> None:
    spec = create(rest, "deployments", workload())["spec"]
    rolling = {"maxSurge": "25%", "maxUnavailable": "25%"}
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": rolling}
    assert (spec["replicas"], spec["revisionHistoryLimit"], spec["progressDeadlineSeconds"]) == (1, 10, 600)
    assert spec["template"]["spec"]["containers"][0]["terminationMessagePolicy"] == "File"
    assert "enableServiceLinks" not in spec["template"]["spec"]
    made = create(rest, "daemonsets", workload())
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    assert made["spec"]["updateStrategy"] == strategy
    assert made["status"]["numberReady"] == 0
    recreate = create(
        rest, "deployments", {**workload(strategy={"type": "Recreate"}), "metadata": {"name": "r"}}
    )
    assert recreate["spec"]["strategy"] == {"type": "Recreate"}


def test_services_are_complete_and_drop_what_a_type_has_no_use_for(rest: Rest) -> None:
    spec = create(rest, "services", service(type="NodePort"))["spec"]
    assert spec["ports"][0]["targetPort"] == 80
    assert spec["ports"][0]["protocol"] == "TCP"
    assert (spec["internalTrafficPolicy"], spec["externalTrafficPolicy"]) == ("Cluster", "Cluster")
    assert (spec["ipFamilies"], spec["ipFamilyPolicy"], spec["sessionAffinity"]) == (
        ["IPv4"],
        "SingleStack",
        "None",
    )
    plain = patch(rest, "services", "s", {"spec": {"type": "ClusterIP"}})["spec"]
    assert "nodePort" not in plain["ports"][0]
    assert "externalTrafficPolicy" not in plain
    assert plain["clusterIP"] == spec["clusterIP"]
    outside = patch(rest, "services", "s", {"spec": {"type": "ExternalName", "externalName": "a.b"}})["spec"]
    assert "clusterIP" not in outside


def test_secrets_take_text(rest: Rest) -> None:
    made = create(rest, "secrets", config(stringData={"a": "b"}, data={"a": "eA==", "c": "eA=="}))
    assert made["data"] == {"a": "Yg==", "c": "eA=="}
    assert "stringData" not in made
    assert made["type"] == "Opaque"


def test_namespaces_keep_their_finalizer_until_they_are_finalized(rest: Rest) -> None:
    made = patch(rest, "namespaces", "x", {"spec": {"finalizers": []}})
    assert made["spec"]["finalizers"] == ["kubernetes"]
    assert made["metadata"]["labels"] == {"kubernetes.io/metadata.name": "x"}
    assert made["status"]["phase"] == "Active"
    rest.delete(target(rest, "namespaces", "x"), deletion.parse({}, {}))
    ending = rest.get(target(rest, "namespaces", "x"))
    ending["spec"]["finalizers"] = []
    rest.finalize(target(rest, "namespaces", "x", "finalize"), ending, OPTIONS)
    assert refusal(lambda: rest.get(target(rest, "namespaces", "x"))).code == 404


# Strictness


def test_undeclared_fields_by_validation_mode(rest: Rest) -> None:
    obj = {"metadata": {"name": "c"}, "dataz": {}}
    strict = WriteOptions(field_validation="Strict")
    refused = refusal(lambda: create(rest, "configmaps", obj, strict))
    assert (refused.code, refused.message) == (400, 'strict decoding error: unknown field "dataz"')
    warn = WriteOptions()
    assert "dataz" not in create(rest, "configmaps", obj, warn)
    assert warn.warnings == ['unknown field "dataz"']
    ignore = WriteOptions(field_validation="Ignore")
    patch(rest, "configmaps", "c", {"dataz": {}}, options=ignore)
    assert ignore.warnings == []
    twice = WriteOptions(field_validation="Strict", duplicates=("data.a",))
    assert 'duplicate field "data.a"' in refusal(lambda: create(rest, "configmaps", config(), twice)).message


def test_namespaces_must_exist_and_not_be_on_their_way_out(rest: Rest) -> None:
    missing = refusal(lambda: rest.create(target(rest, "configmaps", namespace="y"), config(), OPTIONS))
    assert (missing.code, missing.message) == (404, 'namespaces "y" not found')
    rest.delete(target(rest, "namespaces", "x"), deletion.parse({}, {}))
    ending = refusal(lambda: create(rest, "configmaps", config()))
    assert ending.code == 403
    assert ending.message == (
        'configmaps "c" is forbidden: unable to create new content in namespace x '
        "because it is being terminated"
    )


# Revisions, generations, dry runs


def test_a_write_that_changes_nothing_takes_no_revision(rest: Rest) -> None:
    made = create(rest, "deployments", workload())
    revision = rest.store.revision
    assert patch(rest, "deployments", "w", {"spec": {"replicas": 1}}) == made
    assert rest.replace(target(rest, "deployments", "w"), copy.deepcopy(made), OPTIONS) == made
    bare = {"apiVersion": "apps/v1", "kind": "Deployment", **workload()}
    replaced = rest.replace(target(rest, "deployments", "w"), copy.deepcopy(bare), OPTIONS)
    assert replaced["metadata"]["uid"] == made["metadata"]["uid"]
    applied = patch(rest, "deployments", "w", bare, APPLY_PATCH)
    again = patch(rest, "deployments", "w", bare, APPLY_PATCH)
    assert again == applied
    assert rest.store.revision == revision + 1  # the first apply took ownership


def test_generations_count_what_is_wanted(rest: Rest) -> None:
    assert create(rest, "deployments", workload())["metadata"]["generation"] == 1
    labelled = patch(rest, "deployments", "w", {"metadata": {"labels": {"a": "b"}}})
    assert labelled["metadata"]["generation"] == 1
    assert (
        patch(rest, "deployments", "w", {"status": {"replicas": 1}}, sub="status")["metadata"]["generation"]
        == 1
    )
    assert patch(rest, "deployments", "w", {"spec": {"replicas": 2}})["metadata"]["generation"] == 2
    assert patch(rest, "deployments", "w", {"metadata": {"generation": 9}})["metadata"]["generation"] == 2
    held, _ = rest.delete(
        target(rest, "deployments", "w"), deletion.parse({"propagationPolicy": "Foreground"}, {})
    )
    assert held["metadata"]["generation"] == 3


def test_a_stale_write_is_a_conflict(rest: Rest) -> None:
    made = create(rest, "configmaps", config())
    patch(rest, "configmaps", "c", {"data": {"a": "b"}})
    refused = refusal(lambda: rest.replace(target(rest, "configmaps", "c"), made, OPTIONS))
    assert (refused.code, refused.reason) == (409, "Conflict")
    assert refused.message == (
        'Operation cannot be fulfilled on configmaps "c": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )


def test_dry_runs_store_nothing(rest: Rest) -> None:
    dry = WriteOptions(dry_run=True, field_manager="test")
    create(rest, "configmaps", config(), dry)
    assert refusal(lambda: rest.get(target(rest, "configmaps", "c"))).code == 404
    patch(rest, "configmaps", "c", {"apiVersion": "v1", "kind": "ConfigMap"}, APPLY_PATCH, options=dry)
    assert refusal(lambda: rest.get(target(rest, "configmaps", "c"))).code == 404
    create(rest, "configmaps", config())
    revision = rest.store.revision
    assert patch(rest, "configmaps", "c", {"data": {"a": "b"}}, options=dry)["data"] == {"a": "b"}
    rest.delete(target(rest, "configmaps", "c"), deletion.parse({"dryRun": ["All"]}, {}))
    assert rest.store.revision == revision


def test_patches_of_what_is_not_there(rest: Rest) -> None:
    assert refusal(lambda: patch(rest, "configmaps", "c", {})).code == 404
    create(rest, "configmaps", config())
    failed = [{"op": "test", "path": "/data", "value": 1}]
    assert refusal(lambda: patch(rest, "configmaps", "c", failed, JSON_PATCH)).code == 422
    assert refusal(lambda: patch(rest, "configmaps", "c", {}, "text/plain")).code == 415
    unnamed = refusal(lambda: patch(rest, "configmaps", "c", config(), APPLY_PATCH, options=WriteOptions()))
    assert (unnamed.code, "fieldManager: Required value" in unnamed.message) == (422, True)
    renamed = {"metadata": {"name": "d"}}
    assert (
        "does not match the name on the URL (c)"
        in refusal(lambda: patch(rest, "configmaps", "c", renamed)).message
    )


# Deletion


def test_deletion_preconditions(rest: Rest) -> None:
    made = create(rest, "configmaps", config())
    one = target(rest, "configmaps", "c")
    refused = refusal(lambda: rest.delete(one, deletion.parse({"preconditions": {"uid": "other"}}, {})))
    assert refused.code == 409
    assert refused.message == (
        'Operation cannot be fulfilled on configmaps "c": Precondition failed: UID in precondition: other, '
        f"UID in object meta: {made['metadata']['uid']}"
    )
    right = {
        "preconditions": {
            "uid": made["metadata"]["uid"],
            "resourceVersion": made["metadata"]["resourceVersion"],
        }
    }
    assert rest.delete(one, deletion.parse(right, {}))[1]


@pytest.mark.parametrize(
    ("policy", "finalizers"),
    [("Foreground", ["foregroundDeletion"]), ("Orphan", ["orphan"]), ("Background", None), ("", None)],
)
def test_propagation_policies_are_finalizers(rest: Rest, policy: str, finalizers: list[str] | None) -> None:
    create(rest, "deployments", workload())
    one = target(rest, "deployments", "w")
    obj, gone = rest.delete(one, deletion.parse({"propagationPolicy": policy} if policy else {}, {}))
    assert gone == (finalizers is None)
    assert obj["metadata"].get("finalizers") == finalizers
    if finalizers:
        patch(rest, "deployments", "w", {"metadata": {"finalizers": None}})
        assert refusal(lambda: rest.get(one)).code == 404


def test_an_unknown_policy_is_refused() -> None:
    refused = refusal(lambda: deletion.parse({"propagationPolicy": "Upward"}, {}))
    assert refused.code == 422
    assert "supported values" in refused.message


def test_pods_on_nodes_have_grace_and_a_second_deletion_may_shorten_it(rest: Rest) -> None:
    create(rest, "pods", pod(nodeName="n"))
    one = target(rest, "pods", "p")
    obj, gone = rest.delete(one, deletion.parse({}, {}))
    assert (gone, obj["metadata"]["deletionGracePeriodSeconds"]) == (False, 30)
    obj, gone = rest.delete(one, deletion.parse({"gracePeriodSeconds": 5}, {}))
    assert (gone, obj["metadata"]["deletionGracePeriodSeconds"]) == (False, 5)
    assert rest.delete(one, deletion.parse({}, {"gracePeriodSeconds": "0"}))[1]


# Scale


def test_scale_is_read_and_written(rest: Rest) -> None:
    create(rest, "deployments", workload())
    scale = rest.get(target(rest, "deployments", "w", "scale"))
    assert (scale["kind"], scale["spec"], scale["status"]) == (
        "Scale",
        {"replicas": 1},
        {"replicas": 0, "selector": "app=w"},
    )
    scale["spec"]["replicas"] = 4
    rest.replace(target(rest, "deployments", "w", "scale"), scale, OPTIONS)
    stale = refusal(lambda: rest.replace(target(rest, "deployments", "w", "scale"), scale, OPTIONS))
    assert stale.code == 409
    change = [{"op": "replace", "path": "/spec/replicas", "value": 5}]
    assert patch(rest, "deployments", "w", change, JSON_PATCH, "scale")["spec"]["replicas"] == 5
    assert refusal(lambda: patch(rest, "deployments", "w", {"spec": {"replicas": -1}}, sub="scale")).code == 422
    stored = rest.get(target(rest, "deployments", "w"))
    assert stored["spec"]["replicas"] == 5
    assert stored["metadata"]["generation"] == 3
    assert any(e.get("subresource") == "scale" for e in stored["metadata"]["managedFields"])
