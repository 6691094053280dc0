"""Where pods go and what they may use: the scheduler, priorities, quotas, cgroups, `kubectl top`, volumes."""

from __future__ import annotations

import json
import sys
from typing import Any

from clusters import Cluster, pod, wait_until
from test_pod_runtime import events, main_state, shell, status, until_phase
from test_rollouts import deployment


def asking(item: dict[str, Any], **amounts: str) -> dict[str, Any]:
    """The pod with requests."""
    item["spec"]["containers"][0]["resources"] = {"requests": amounts}
    return item


def placed(cluster: Cluster, namespace: str, name: str) -> str:
    return str(wait_until(lambda: cluster.get("pod", name, "-n", namespace)["spec"].get("nodeName"), what=name))


def test_what_keeps_a_pod_pending_is_said(cluster: Cluster, namespace: str) -> None:
    large = asking(pod("large", namespace, ["sleep", "1"]), cpu="1000")
    picky = pod("picky", namespace, ["sleep", "1"], nodeSelector={"disk": "ssd"})
    gated = pod("gated", namespace, ["sleep", "1"], schedulingGates=[{"name": "example.com/wait"}])
    cluster.apply(large, picky, gated)
    wait_until(lambda: "FailedScheduling" in events(cluster, namespace, "large"), what="an Event")
    assert events(cluster, namespace, "large")["FailedScheduling"] == (
        "0/3 nodes are available: 3 Insufficient cpu. preemption: 0/3 nodes are available: "
        "3 No preemption victims found for incoming pod."
    )
    wait_until(lambda: "FailedScheduling" in events(cluster, namespace, "picky"), what="an Event")
    said = events(cluster, namespace, "picky")["FailedScheduling"]
    assert said.startswith("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.")
    assert (
        cluster.get("pod", "gated", "-n", namespace)["status"]["conditions"][0]["reason"] == "SchedulingGated"
    )
    node = cluster.get("nodes")["items"][1]["metadata"]["name"]
    try:
        cluster.kubectl("label", "node", node, "disk=ssd")
        assert placed(cluster, namespace, "picky") == node
    finally:
        cluster.kubectl("label", "node", node, "disk-")
    ungate = [{"op": "remove", "path": "/spec/schedulingGates"}]
    cluster.kubectl("patch", "pod", "gated", "-n", namespace, "--type=json", "-p", json.dumps(ungate))
    placed(cluster, namespace, "gated")


def test_pods_keep_apart_and_together(cluster: Cluster, namespace: str) -> None:
    def term(app: str) -> dict[str, Any]:
        return {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": app}}}

    required = "requiredDuringSchedulingIgnoredDuringExecution"
    item = deployment("apart", namespace, 3)
    item["spec"]["template"]["spec"]["affinity"] = {"podAntiAffinity": {required: [term("apart")]}}
    lead = pod("lead", namespace, ["sleep", "1000"])
    near = pod("near", namespace, ["sleep", "1000"], affinity={"podAffinity": {required: [term("lead")]}})
    cluster.apply(item, lead, near)
    cluster.kubectl("rollout", "status", "deploy/apart", "-n", namespace, "--timeout=60s")
    found = cluster.get("pods", "-n", namespace, "-l", "app=apart")["items"]
    assert len({p["spec"]["nodeName"] for p in found}) == 3
    assert placed(cluster, namespace, "near") == placed(cluster, namespace, "lead")


def test_cordoned_and_tainted_nodes_are_left_alone(cluster: Cluster, namespace: str) -> None:
    names = [n["metadata"]["name"] for n in cluster.get("nodes")["items"]]
    try:
        cluster.kubectl("cordon", names[0])
        cluster.kubectl("taint", "node", names[1], "team=blue:NoSchedule")
        cluster.apply(deployment("rest", namespace, 3))
        blue = {"key": "team", "operator": "Equal", "value": "blue", "effect": "NoSchedule"}
        selector = {"kubernetes.io/hostname": names[1]}
        cluster.apply(pod("blue", namespace, ["sleep", "1000"], tolerations=[blue], nodeSelector=selector))
        cluster.kubectl("rollout", "status", "deploy/rest", "-n", namespace, "--timeout=60s")
        found = cluster.get("pods", "-n", namespace, "-l", "app=rest")["items"]
        assert {p["spec"]["nodeName"] for p in found} == {names[2]}
        assert placed(cluster, namespace, "blue") == names[1]
    finally:
        cluster.kubectl("uncordon", names[0])
        cluster.kubectl("taint", "node", names[1], "team-", check=False)


def test_the_important_take_the_place_of_others(cluster: Cluster, namespace: str) -> None:
    vital = {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": f"vital-{namespace}"},
        "value": 1000,
    }
    node = cluster.get("nodes")["items"][0]
    selector = {"kubernetes.io/hostname": node["metadata"]["name"]}
    share = "example.com/seat"
    patch = {"status": {"capacity": {share: "1"}, "allocatable": {share: "1"}}}
    cluster.kubectl(
        "patch",
        "node",
        node["metadata"]["name"],
        "--subresource=status",
        "--type=merge",
        "-p",
        json.dumps(patch),
    )
    try:
        low = pod("low", namespace, ["sleep", "1000"], nodeSelector=selector)
        high = pod(
            "high", namespace, ["sleep", "1000"], nodeSelector=selector, priorityClassName=f"vital-{namespace}"
        )
        for each in (low, high):
            each["spec"]["containers"][0]["resources"] = {"limits": {share: "1"}}
        cluster.apply(vital, low)
        placed(cluster, namespace, "low")
        cluster.apply(high)
        assert placed(cluster, namespace, "high") == node["metadata"]["name"]
        assert cluster.get("pod", "high", "-n", namespace)["spec"]["priority"] == 1000
        wait_until(
            lambda: "low" not in cluster.kubectl("get", "pods", "-n", namespace), what="the other one goes"
        )
        assert events(cluster, namespace, "low")["Preempted"].startswith("Preempted by pod ")
    finally:
        cluster.kubectl("delete", "priorityclass", f"vital-{namespace}")


def test_quotas_and_limit_ranges(cluster: Cluster, namespace: str) -> None:
    ranges = {
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": {"name": "usual", "namespace": namespace},
        "spec": {
            "limits": [{"type": "Container", "defaultRequest": {"memory": "10Mi"}, "max": {"memory": "1Gi"}}]
        },
    }
    ranges["spec"]["limits"][0]["default"] = {"memory": "20Mi"}  # type: ignore[index]
    cluster.apply(ranges)
    cluster.kubectl("create", "quota", "few", "-n", namespace, "--hard=pods=2,requests.memory=1Gi")
    cluster.apply(deployment("web", namespace, 4))
    wait_until(
        lambda: cluster.get("quota", "few", "-n", namespace).get("status", {}).get("used")
        == {"pods": "2", "requests.memory": "20Mi"},
        what="the quota is used up",
    )  # fmt: skip
    failure = wait_until(
        lambda: next(
            (
                c
                for c in cluster.get("deploy", "web", "-n", namespace)["status"].get("conditions", [])
                if c["type"] == "ReplicaFailure"
            ),
            None,
        ),
        what="the Deployment says why",
    )
    assert "exceeded quota: few, requested: pods=1, used: pods=2, limited: pods=2" in failure["message"]
    assert "requests.memory  20Mi  1Gi" in cluster.kubectl("describe", "quota", "few", "-n", namespace)


def test_budgets_hold_evictions_back(cluster: Cluster, namespace: str) -> None:
    cluster.apply(deployment("web", namespace, 2))
    cluster.kubectl("create", "pdb", "web", "-n", namespace, "--selector=app=web", "--max-unavailable=0")
    cluster.kubectl("rollout", "status", "deploy/web", "-n", namespace, "--timeout=60s")
    found = wait_until(
        lambda: (
            (s := cluster.get("pdb", "web", "-n", namespace).get("status", {})).get("currentHealthy") == 2 and s
        ),
        what="the budget knows its pods",
    )
    assert (found["desiredHealthy"], found["expectedPods"], found["disruptionsAllowed"]) == (2, 2, 0)
    name = cluster.get("pods", "-n", namespace)["items"][0]["metadata"]["name"]
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": namespace},
    }
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
    said = cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction), check=False)
    assert "Cannot evict pod as it would violate the pod's disruption budget" in said
    cluster.kubectl(
        "patch", "pdb", "web", "-n", namespace, "--type=merge", "-p", '{"spec":{"maxUnavailable":1}}'
    )
    wait_until(
        lambda: cluster.get("pdb", "web", "-n", namespace)["status"]["disruptionsAllowed"] == 1,
        what="one may go",
    )
    cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def test_memory_beyond_the_limit_is_killed_and_said(cluster: Cluster, namespace: str) -> None:
    hungry = pod("hungry", namespace, [sys.executable, "-c", "x = bytearray(200 << 20)"], restartPolicy="Never")
    hungry["spec"]["containers"][0]["resources"] = {"limits": {"memory": "32Mi"}}
    cluster.apply(hungry)
    until_phase(cluster, namespace, "hungry", "Failed")
    ended = main_state(cluster, namespace, "hungry")["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)
    assert status(cluster, namespace, "hungry")["qosClass"] == "Burstable"


def test_top_tells_what_is_used(cluster: Cluster, namespace: str) -> None:
    script = "import time\nkept = bytearray(50 << 20)\nwhile True: time.sleep(0.001)"
    busy = pod("busy", namespace, [sys.executable, "-c", script])
    busy["spec"]["containers"][0]["resources"] = {"limits": {"cpu": "200m"}}
    cluster.apply(busy)
    cluster.kubectl("wait", "-n", namespace, "--for=condition=ready", "pod/busy", "--timeout=60s")

    def used() -> tuple[str, ...] | None:
        told = cluster.kubectl(
            "top", "pod", "busy", "-n", namespace, "--containers", "--no-headers", check=False
        )
        fields = told.split()
        return tuple(fields) if len(fields) == 4 and fields[3] != "0Mi" else None

    found = wait_until(lambda: (u := used()) and int(u[3].removesuffix("Mi")) >= 50 and u, what="its memory")
    assert found[:2] == ("busy", "main") and found[2].endswith("m")
    assert int(found[2].removesuffix("m")) <= 260 and int(found[3].removesuffix("Mi")) < 150
    nodes = cluster.kubectl("top", "nodes", "--no-headers").splitlines()
    assert len(nodes) == 3 and all(int(line.split()[3].removesuffix("Mi")) > 5 for line in nodes)


def test_claims_wait_for_their_pod_and_keep_what_it_wrote(cluster: Cluster, namespace: str) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data", "namespace": namespace},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    kept = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"kept-{namespace}"},
        "spec": {
            "capacity": {"storage": "2Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "by-hand",
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": f"/kept-{namespace}"},
        },
    }
    by_hand = json.loads(json.dumps(claim))
    by_hand["metadata"]["name"] = "by-hand"
    by_hand["spec"]["storageClassName"] = "by-hand"
    cluster.apply(claim, kept, by_hand)
    wait_until(
        lambda: cluster.get("pvc", "by-hand", "-n", namespace).get("status", {}).get("phase") == "Bound",
        what="a volume made by hand is bound",
    )
    wait_until(lambda: "WaitForFirstConsumer" in events(cluster, namespace, "data"), what="an Event")
    assert cluster.get("pvc", "data", "-n", namespace)["status"]["phase"] == "Pending"
    volumes = [
        {"name": "a", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "b", "persistentVolumeClaim": {"claimName": "by-hand"}},
    ]
    mounts = [{"name": "a", "mountPath": "/a"}, {"name": "b", "mountPath": "/b"}]
    for name, script in (("writes", "echo kept | tee /a/f > /b/f"), ("reads", "cat /a/f /b/f")):
        item = shell(name, namespace, script, restartPolicy="Never", volumes=volumes)
        item["spec"]["containers"][0]["volumeMounts"] = mounts
        if name == "reads":
            item["spec"]["nodeSelector"] = {"kubernetes.io/hostname": placed(cluster, namespace, "writes")}
        cluster.apply(item)
        until_phase(cluster, namespace, name, "Succeeded")
    assert cluster.kubectl("logs", "-n", namespace, "reads").split() == ["kept", "kept"]
    cluster.kubectl("delete", "pvc", "by-hand", "-n", namespace, "--wait=false")
    assert cluster.get("pvc", "by-hand", "-n", namespace)["metadata"]["deletionTimestamp"], "pods still use it"
    cluster.kubectl("delete", "pod", "writes", "reads", "-n", namespace)
    wait_until(
        lambda: cluster.get("pv", f"kept-{namespace}")["status"]["phase"] == "Released", what="it is released"
    )
    cluster.kubectl("delete", "pv", f"kept-{namespace}", "--timeout=60s")


def test_an_autoscaler_follows_what_is_used(cluster: Cluster, namespace: str) -> None:
    item = deployment("burn", namespace, 1)
    container = item["spec"]["template"]["spec"]["containers"][0]
    container["command"] = ["sh", "-c", "while :; do :; done"]
    container["resources"] = {"requests": {"cpu": "10m"}, "limits": {"cpu": "50m"}}
    cluster.apply(item)
    cluster.kubectl("rollout", "status", "deploy/burn", "-n", namespace, "--timeout=60s")
    cluster.kubectl("autoscale", "deploy", "burn", "-n", namespace, "--min=1", "--max=2", "--cpu-percent=50")
    wait_until(
        lambda: cluster.get("deploy", "burn", "-n", namespace)["spec"]["replicas"] == 2, what="a second replica"
    )
    wait_until(lambda: "SuccessfulRescale" in events(cluster, namespace, "burn"), what="an Event")
