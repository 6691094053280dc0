"""Deployments, ReplicaSets and DaemonSets as kubectl drives them."""

from __future__ import annotations

import json
from typing import Any

from clusters import Cluster, pod, wait_until


def deployment(name: str, namespace: str, replicas: int, **spec: Any) -> dict[str, Any]:
    template = pod(name, namespace, ["sleep", "1000"])
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "annotations": {"kubernetes.io/change-cause": "first"},
        },
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": template["spec"]},
            **spec,
        },
    }


def reasons(cluster: Cluster, namespace: str, kind: str, name: str) -> dict[str, str]:
    """Events of an object: messages by reason, a line each."""
    selector = f"involvedObject.kind={kind},involvedObject.name={name}"
    found: dict[str, str] = {}
    for event in cluster.get("events", "-n", namespace, "--field-selector", selector)["items"]:
        found[event["reason"]] = found.get(event["reason"], "") + event["message"] + "\n"
    return found


def test_a_rollout_its_history_and_the_way_back(cluster: Cluster, namespace: str) -> None:
    cluster.apply(deployment("web", namespace, 3, revisionHistoryLimit=1))
    told = cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")
    assert 'deployment "web" successfully rolled out' in told
    cluster.kubectl("set", "env", "deploy/web", "-n", namespace, "A=1")
    cluster.kubectl(
        "annotate", "deploy/web", "-n", namespace, "--overwrite", "kubernetes.io/change-cause=second"
    )
    cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")
    history = cluster.kubectl("rollout", "history", "deploy/web", "-n", namespace)
    assert [line.split() for line in history.splitlines()[2:4]] == [["1", "first"], ["2", "second"]]
    cluster.kubectl("rollout", "undo", "deploy/web", "-n", namespace)
    cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")
    found = cluster.get("deploy", "web", "-n", namespace)
    assert found["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "3"
    assert "env" not in found["spec"]["template"]["spec"]["containers"][0]
    assert found["status"]["observedGeneration"] == found["metadata"]["generation"]
    cluster.kubectl("rollout", "restart", "deploy/web", "-n", namespace)
    cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")
    sets = wait_until(
        lambda: len(s := cluster.get("rs", "-n", namespace)["items"]) == 2 and s,
        what="one old ReplicaSet is kept",
    )
    assert sorted(s["spec"]["replicas"] for s in sets) == [0, 3]
    assert "Scaled up replica set web-" in reasons(cluster, namespace, "Deployment", "web")["ScalingReplicaSet"]


def test_a_paused_deployment_waits_and_a_stuck_one_says_so(cluster: Cluster, namespace: str) -> None:
    cluster.apply(deployment("web", namespace, 2))
    cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")
    cluster.kubectl("rollout", "pause", "deploy/web", "-n", namespace)
    cluster.kubectl("set", "env", "deploy/web", "-n", namespace, "A=1")
    cluster.kubectl("scale", "deploy/web", "-n", namespace, "--replicas=3")
    wait_until(
        lambda: cluster.get("deploy", "web", "-n", namespace)["status"].get("readyReplicas") == 3,
        what="a paused deployment is scaled",
    )
    assert len(cluster.get("rs", "-n", namespace)["items"]) == 1, "but not rolled out"
    cluster.kubectl("rollout", "resume", "deploy/web", "-n", namespace)
    cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")
    never = {"exec": {"command": ["false"]}}
    patch: dict[str, Any] = {"containers": [{"name": "main", "readinessProbe": never}]}
    change = {"spec": {"progressDeadlineSeconds": 2, "template": {"spec": patch}}}
    cluster.kubectl("patch", "deploy", "web", "-n", namespace, "-p", json.dumps(change))
    said = cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s", check=False)
    assert 'deployment "web" exceeded its progress deadline' in said
    assert cluster.get("deploy", "web", "-n", namespace)["status"]["availableReplicas"] >= 3, (
        "the old ones serve"
    )


def test_recreate_has_no_old_pod_beside_a_new_one(cluster: Cluster, namespace: str) -> None:
    cluster.apply(deployment("web", namespace, 2, strategy={"type": "Recreate"}))
    cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")
    before = {p["metadata"]["name"] for p in cluster.get("pods", "-n", namespace)["items"]}
    cluster.kubectl("set", "env", "deploy/web", "-n", namespace, "A=1")

    def mixed() -> bool:
        names = {p["metadata"]["name"] for p in cluster.get("pods", "-n", namespace)["items"]}
        assert not (names & before and names - before), f"old beside new: {names}"
        return len(names - before) == 2

    wait_until(mixed, what="new pods")
    cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")


def test_orphans_are_adopted_and_strangers_let_go(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("mine", namespace, ["sleep", "1000"]))
    item = deployment("mine", namespace, 2)
    item |= {"kind": "ReplicaSet"}
    cluster.apply(item)

    def owned() -> list[dict[str, Any]]:
        return [
            p
            for p in cluster.get("pods", "-n", namespace, "-l", "app=mine")["items"]
            if any(o["kind"] == "ReplicaSet" for o in p["metadata"].get("ownerReferences") or [])
        ]

    wait_until(lambda: len(owned()) == 2, what="two owned pods")
    assert any(p["metadata"]["name"] == "mine" for p in owned()), "the pod that was there is one of them"
    cluster.kubectl("label", "pod", "mine", "-n", namespace, "--overwrite", "app=other")
    wait_until(
        lambda: not cluster.get("pod", "mine", "-n", namespace)["metadata"].get("ownerReferences"),
        what="the relabelled pod is nobody's",
    )
    wait_until(lambda: len(owned()) == 2, what="and has been replaced")


def test_a_daemon_set_is_on_every_node_and_rolls(cluster: Cluster, namespace: str) -> None:
    item = deployment("agent", namespace, 1)
    del item["spec"]["replicas"]
    item |= {"kind": "DaemonSet"}
    cluster.apply(item)
    cluster.kubectl("rollout", "status", "ds/agent", "-n", namespace, "--timeout=60s")
    pods = cluster.get("pods", "-n", namespace, "-l", "app=agent")["items"]
    assert len({p["spec"]["nodeName"] for p in pods}) == len(pods) == 3
    cluster.kubectl("set", "env", "ds/agent", "-n", namespace, "A=1")
    cluster.kubectl("rollout", "status", "ds/agent", "-n", namespace, "--timeout=60s")
    cluster.kubectl("rollout", "undo", "ds/agent", "-n", namespace)
    cluster.kubectl("rollout", "status", "ds/agent", "-n", namespace, "--timeout=60s")
    found = cluster.get("ds", "agent", "-n", namespace)
    assert "env" not in found["spec"]["template"]["spec"]["containers"][0]
    assert found["status"]["updatedNumberScheduled"] == found["status"]["numberAvailable"] == 3
    assert reasons(cluster, namespace, "DaemonSet", "agent").keys() >= {"SuccessfulCreate", "SuccessfulDelete"}
