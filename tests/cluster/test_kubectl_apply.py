"""Objects through real kubectl: apply in both ways, diff, replace, edit, patches, refusals, deletion."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
from clusters import Cluster, wait_until


def deployment(namespace: str, replicas: int | None = 0, image: str = "sleep", **more: Any) -> dict[str, Any]:
    """A Deployment `web` that runs no pods unless told to."""
    container = {"name": "main", "image": image, "command": ["sleep", "1000"], "ports": [{"containerPort": 80}]}
    spec: dict[str, Any] = {
        "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container]}},
        **more,
    }
    if replicas is not None:
        spec["replicas"] = replicas
    metadata = {"name": "web", "namespace": namespace}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}


def peer_authentication(namespace: str, mode: str) -> dict[str, Any]:
    """A custom resource."""
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "mine", "namespace": namespace},
        "spec": {"mtls": {"mode": mode}},
    }


def apply(cluster: Cluster, obj: dict[str, Any], *flags: str, check: bool = True) -> str:
    """`kubectl apply -f -`."""
    return cluster.kubectl("apply", *flags, "-f", "-", stdin=json.dumps(obj), check=check)


def managers(cluster: Cluster, namespace: str, *what: str) -> dict[str, str]:
    """Operation of each manager of an object's own fields, in `kubectl get --show-managed-fields`."""
    shown = cluster.kubectl("get", *what, "-n", namespace, "-o", "json", "--show-managed-fields")
    entries = json.loads(shown)["metadata"]["managedFields"]
    return {e["manager"]: e["operation"] for e in entries if "subresource" not in e}


def revision(cluster: Cluster, namespace: str) -> str:
    """resourceVersion of Deployment `web`."""
    return str(cluster.get("deployment", "web", "-n", namespace)["metadata"]["resourceVersion"])


def quiet(cluster: Cluster, namespace: str) -> str:
    """The revision of `web` once its controller has nothing more to say about it."""

    def observed() -> str:
        obj = cluster.get("deployment", "web", "-n", namespace)
        seen = obj.get("status", {}).get("observedGeneration") == obj["metadata"]["generation"]
        version = str(obj["metadata"]["resourceVersion"])
        return version if seen and version == revision(cluster, namespace) else ""

    return str(wait_until(observed, what="the deployment's status"))


def test_server_side_apply_twice_changes_nothing(cluster: Cluster, namespace: str) -> None:
    assert "serverside-applied" in apply(cluster, deployment(namespace), "--server-side")
    before = quiet(cluster, namespace)
    apply(cluster, deployment(namespace), "--server-side")
    assert revision(cluster, namespace) == before
    assert managers(cluster, namespace, "deployment", "web")["kubectl"] == "Apply"


def test_conflicts_are_told_and_may_be_forced(cluster: Cluster, namespace: str) -> None:
    apply(cluster, deployment(namespace), "--server-side")
    apply(
        cluster,
        deployment(namespace, image="other"),
        "--server-side",
        "--field-manager=ci",
        "--force-conflicts",
    )
    refused = apply(cluster, deployment(namespace), "--server-side", check=False)
    assert (
        'Apply failed with 1 conflict: conflict with "ci": '
        '.spec.template.spec.containers[name="main"].image' in refused
    )
    apply(cluster, deployment(namespace), "--server-side", "--force-conflicts")
    spec = cluster.get("deployment", "web", "-n", namespace)["spec"]
    assert spec["template"]["spec"]["containers"][0]["image"] == "sleep"


def test_a_field_left_out_falls_back_to_its_default(cluster: Cluster, namespace: str) -> None:
    apply(cluster, deployment(namespace, minReadySeconds=3, revisionHistoryLimit=4), "--server-side")
    apply(cluster, deployment(namespace), "--server-side")
    spec = cluster.get("deployment", "web", "-n", namespace)["spec"]
    assert "minReadySeconds" not in spec
    assert spec["revisionHistoryLimit"] == 10


def test_client_side_apply_hands_over_to_server_side_and_back(cluster: Cluster, namespace: str) -> None:
    apply(cluster, deployment(namespace, minReadySeconds=3))
    assert managers(cluster, namespace, "deployment", "web")["kubectl-client-side-apply"] == "Update"
    apply(cluster, deployment(namespace, image="second"), "--server-side")
    after = managers(cluster, namespace, "deployment", "web")
    assert "kubectl-client-side-apply" not in after
    assert after["kubectl"] == "Apply"
    assert "minReadySeconds" not in cluster.get("deployment", "web", "-n", namespace)["spec"]
    apply(cluster, deployment(namespace, image="third"))
    spec = cluster.get("deployment", "web", "-n", namespace)["spec"]
    assert spec["template"]["spec"]["containers"][0]["image"] == "third"


def test_server_side_apply_of_custom_resources(cluster: Cluster, namespace: str) -> None:
    apply(cluster, peer_authentication(namespace, "STRICT"), "--server-side")
    apply(cluster, peer_authentication(namespace, "STRICT"), "--server-side", "--field-manager=other")
    refused = apply(cluster, peer_authentication(namespace, "PERMISSIVE"), "--server-side", check=False)
    assert 'conflict with "other": .spec.mtls.mode' in refused
    assert managers(cluster, namespace, "pa", "mine") == {"kubectl": "Apply", "other": "Apply"}


def test_apply_says_unchanged_and_diff_shows_what_would_change(cluster: Cluster, namespace: str) -> None:
    apply(cluster, deployment(namespace))
    assert "unchanged" in apply(cluster, deployment(namespace))
    quiet(cluster, namespace)

    def diff(obj: dict[str, Any], *flags: str) -> str:
        return cluster.kubectl("diff", *flags, "-f", "-", stdin=json.dumps(obj), check=False)

    assert diff(deployment(namespace)) == ""
    shown = diff(deployment(namespace, revisionHistoryLimit=3))
    assert re.search(r"-\s+revisionHistoryLimit: 10\n\+\s+revisionHistoryLimit: 3", shown)
    assert cluster.get("deployment", "web", "-n", namespace)["spec"]["revisionHistoryLimit"] == 10


def test_replace_and_edit(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "configmap", "c", "-n", namespace, "--from-literal=a=first")
    stale = cluster.get("configmap", "c", "-n", namespace)
    replaced = {**stale, "data": {"a": "second"}}
    assert "replaced" in cluster.kubectl("replace", "-f", "-", stdin=json.dumps(replaced))
    refused = cluster.kubectl("replace", "-f", "-", stdin=json.dumps(stale), check=False)
    assert "the object has been modified; please apply your changes to the latest version" in refused
    done = subprocess.run(
        ["kubectl", "edit", "configmap", "c", "-n", namespace],
        env={**cluster.environment, "EDITOR": "sed -i s/second/third/"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "edited" in done.stdout, done.stderr
    assert cluster.get("configmap", "c", "-n", namespace)["data"] == {"a": "third"}


REFUSED = [
    # kubectl's command, words of its answer
    ("patch configmap nope -p {}", 'configmaps "nope" not found'),
    ('patch configmap c --type=json -p [{"op":"test","path":"/data/a","value":"x"}]', "The request is invalid"),
    ('patch configmap c -p {"data":{"a":1}}',
     "cannot unmarshal number into Go struct field ConfigMap.data of type string"),
    ('patch configmap c -p {"dataz":{"a":"b"}}', 'Warning: unknown field "dataz"'),
    ("label configmap c bad..label/x/y=z", "a qualified name must consist of"),
    ("create configmap Bad_Name", "a lowercase RFC 1123 subdomain must consist of lower case"),
    ("create service clusterip 1bad --tcp=80", "a DNS-1035 label must consist of lower case"),
    ("create configmap c", 'configmaps "c" already exists'),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words"), REFUSED, ids=[c for c, _ in REFUSED])
def test_answers_in_kubernetes_words(cluster: Cluster, namespace: str, command: str, words: str) -> None:
    cluster.kubectl("create", "configmap", "c", "-n", namespace, "--from-literal=a=b")
    assert words in cluster.kubectl(*command.split(), "-n", namespace, check=False)


def test_unknown_fields_are_refused_warned_of_or_ignored(cluster: Cluster, namespace: str) -> None:
    wrong = deployment(namespace, replicaz=3)
    assert 'strict decoding error: unknown field "spec.replicaz"' in apply(cluster, wrong, check=False)
    assert 'Warning: unknown field "spec.replicaz"' in apply(cluster, wrong, "--validate=warn", check=False)
    assert "Warning" not in apply(cluster, wrong, "--validate=ignore", check=False)
    assert "replicaz" not in cluster.get("deployment", "web", "-n", namespace)["spec"]
    custom = peer_authentication(namespace, "STRICT")
    custom["spec"]["mtlz"] = {}
    assert 'unknown field "spec.mtlz"' in apply(cluster, custom, check=False)


def test_invalid_and_immutable_fields_are_named(cluster: Cluster, namespace: str) -> None:
    wrong = deployment(namespace, selector={"matchLabels": {"app": "other"}})
    assert "`selector` does not match template `labels`" in apply(cluster, wrong, check=False)
    apply(cluster, deployment(namespace))
    changed = deployment(namespace, selector={"matchLabels": {"app": "other"}})
    changed["spec"]["template"]["metadata"]["labels"] = {"app": "other"}
    assert "field is immutable" in apply(cluster, changed, check=False)
    mode = apply(cluster, peer_authentication(namespace, "LAX"), check=False)
    assert 'spec.mtls.mode: Unsupported value: "LAX": supported values:' in mode


def test_lists_are_applied_and_their_items_checked(cluster: Cluster, namespace: str) -> None:
    items = [deployment(namespace), peer_authentication(namespace, "STRICT")]
    shown = apply(cluster, {"apiVersion": "v1", "kind": "List", "items": items})
    assert "deployment.apps/web created" in shown
    assert "peerauthentication.security.istio.io/mine created" in shown
    items[0]["spec"]["replicaz"] = 1
    refused = apply(cluster, {"apiVersion": "v1", "kind": "List", "items": items}, check=False)
    assert 'unknown field "spec.replicaz"' in refused


def test_explain_knows_builtin_fields(cluster: Cluster) -> None:
    shown = cluster.kubectl("explain", "pod.spec.containers.livenessProbe.httpGet")
    assert re.search(r"port\s+<IntOrString> -required-", shown)
    assert "RollingUpdateDeployment" in cluster.kubectl("explain", "deployment.spec.strategy")


def test_dry_runs_store_nothing(cluster: Cluster, namespace: str) -> None:
    apply(cluster, deployment(namespace), "--dry-run=server")
    apply(cluster, deployment(namespace), "--dry-run=server", "--server-side")
    assert cluster.kubectl("get", "deployments", "-n", namespace, "-o", "name") == ""
    cluster.kubectl("create", "configmap", "c", "-n", namespace)
    cluster.kubectl("delete", "configmap", "c", "-n", namespace, "--dry-run=server")
    cluster.kubectl("delete", "configmap", "--all", "-n", namespace, "--dry-run=server")
    assert "configmap/c" in cluster.kubectl("get", "configmap", "-n", namespace, "-o", "name")


def test_foreground_deletion_ends_with_the_dependents(cluster: Cluster, namespace: str) -> None:
    apply(cluster, deployment(namespace, replicas=1))
    wait_until(lambda: cluster.get("pods", "-n", namespace)["items"], what="a pod")
    cluster.kubectl("delete", "deployment", "web", "-n", namespace, "--cascade=foreground")
    assert cluster.kubectl("get", "deployments,replicasets", "-n", namespace, "-o", "name") == ""
    assert cluster.get("pods", "-n", namespace)["items"] == []


def test_orphans_stay_without_an_owner(cluster: Cluster, namespace: str) -> None:
    apply(cluster, deployment(namespace))
    wait_until(lambda: cluster.get("replicasets", "-n", namespace)["items"], what="a ReplicaSet")
    cluster.kubectl("delete", "deployment", "web", "-n", namespace, "--cascade=orphan")
    left = cluster.get("replicasets", "-n", namespace)["items"]
    assert len(left) == 1
    assert "ownerReferences" not in left[0]["metadata"]
