"""What runs in pods and how: init containers, sidecars, probes, hooks, environment, volumes, ends."""

from __future__ import annotations

import json
import sys
from typing import Any

from clusters import Cluster, pod, wait_until


def shell(name: str, namespace: str, script: str, **spec: Any) -> dict[str, Any]:
    return pod(name, namespace, ["sh", "-c", script], **spec)


def status(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = cluster.get("pod", name, "-n", namespace).get("status") or {}
    return found


def main_state(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    found = status(cluster, namespace, name).get("containerStatuses") or [{}]
    return dict(found[0])


def events(cluster: Cluster, namespace: str, name: str) -> dict[str, str]:
    listed = cluster.get("events", "-n", namespace, "--field-selector", f"involvedObject.name={name}")
    return {e["reason"]: e["message"] for e in listed["items"]}


def until_phase(cluster: Cluster, namespace: str, name: str, phase: str) -> None:
    cluster.kubectl(
        "wait", "-n", namespace, f"--for=jsonpath={{.status.phase}}={phase}", f"pod/{name}", "--timeout=60s"
    )


def test_init_containers_sidecars_and_shared_folders(cluster: Cluster, namespace: str) -> None:
    mounts = [{"name": "shared", "mountPath": "/shared"}]

    def step(name: str, script: str, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "image": "local/x",
            "command": ["sh", "-c", script],
            "volumeMounts": mounts,
            **more,
        }

    item = shell("steps", namespace, "", restartPolicy="Never", volumes=[{"name": "shared", "emptyDir": {}}])
    item["spec"]["initContainers"] = [
        step("first", "echo first >> /shared/order"),
        step(
            "side", "echo side >> /shared/order; trap 'exit 0' TERM; sleep 1000 & wait",
            restartPolicy="Always", startupProbe={"exec": {"command": ["grep", "side", "/shared/order"]}},
        ),
        step("second", "echo second >> /shared/order"),
    ]  # fmt: skip
    item["spec"]["containers"] = [
        step("main", "echo main >> /shared/order; sleep 0.3; cat /shared/order"),
        step("other", "until grep -q main /shared/order; do sleep 0.05; done; echo seen"),
    ]
    cluster.apply(item)
    until_phase(cluster, namespace, "steps", "Succeeded")
    assert cluster.kubectl("logs", "-n", namespace, "steps", "-c", "main").split() == [
        "first",
        "side",
        "second",
        "main",
    ]
    assert cluster.kubectl("logs", "-n", namespace, "steps", "-c", "other").strip() == "seen"
    found = status(cluster, namespace, "steps")
    assert all(s["state"]["terminated"]["exitCode"] == 0 for s in found["initContainerStatuses"])


def test_environment_from_everything(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "configmap", "settings", "-n", namespace, "--from-literal=colour=red")
    cluster.kubectl("create", "secret", "generic", "hidden", "-n", namespace, "--from-literal=word=swordfish")

    def origin(kind: str, **reference: Any) -> dict[str, Any]:
        return {"valueFrom": {kind: reference}}

    item = shell("env", namespace, "env; cat /info/labels", restartPolicy="Never")
    (container,) = item["spec"]["containers"]
    container |= {
        "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}},
        "envFrom": [{"prefix": "C_", "configMapRef": {"name": "settings"}}],
        "env": [
            {"name": "WORD", **origin("secretKeyRef", name="hidden", key="word")},
            {"name": "COLOUR", **origin("configMapKeyRef", name="settings", key="colour")},
            {"name": "ABSENT", **origin("configMapKeyRef", name="none", key="x", optional=True)},
            {"name": "POD", **origin("fieldRef", fieldPath="metadata.name")},
            {"name": "ADDRESS", **origin("fieldRef", fieldPath="status.podIP")},
            {"name": "CPU", **origin("resourceFieldRef", resource="limits.cpu")},
            {"name": "MEMORY", **origin("resourceFieldRef", resource="limits.memory", divisor="1Mi")},
            {"name": "BOTH", "value": "$(WORD)-$(COLOUR)-$$(POD)-$(NONE)"},
        ],
        "volumeMounts": [{"name": "info", "mountPath": "/info"}],
    }
    labels = {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}
    item["spec"]["volumes"] = [{"name": "info", "downwardAPI": {"items": [labels]}}]
    cluster.apply(item)
    until_phase(cluster, namespace, "env", "Succeeded")
    told = cluster.kubectl("logs", "-n", namespace, "env").splitlines()
    address = status(cluster, namespace, "env")["podIP"]
    wanted = {
        "C_colour=red", "WORD=swordfish", "COLOUR=red", "POD=env", f"ADDRESS={address}", "CPU=2", "MEMORY=64",
        "BOTH=swordfish-red-$(POD)-$(NONE)", 'app="env"',
    }  # fmt: skip
    assert wanted <= set(told) and not any(line.startswith("ABSENT") for line in told)


def test_probes_restart_and_withhold(cluster: Cluster, namespace: str) -> None:
    sick = shell("sick", namespace, "sleep 1000")
    sick["spec"]["containers"][0]["livenessProbe"] = {
        "exec": {"command": ["sh", "-c", "echo poorly; exit 1"]}, "periodSeconds": 1, "failureThreshold": 1,
    }  # fmt: skip
    shy = shell("shy", namespace, "sleep 1000")
    shy["spec"]["containers"][0]["readinessProbe"] = {"exec": {"command": ["test", "-e", "/ready"]}}
    gated = shell("gated", namespace, "sleep 1000", readinessGates=[{"conditionType": "example.com/ok"}])
    web = pod("web", namespace, [sys.executable, "-m", "http.server", "8080"])
    http = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1, "failureThreshold": 60}
    web["spec"]["containers"][0] |= {"startupProbe": http, "readinessProbe": {"tcpSocket": {"port": 8080}}}
    cluster.apply(sick, shy, gated, web)
    cluster.kubectl("wait", "-n", namespace, "--for=condition=ready", "pod/web", "--timeout=60s")
    wait_until(lambda: main_state(cluster, namespace, "sick").get("restartCount", 0) >= 1, what="a restart")
    found = events(cluster, namespace, "sick")
    assert found["Unhealthy"] == "Liveness probe failed: poorly"
    assert found["Killing"] == "Container main failed liveness probe, will be restarted"
    for name in ("shy", "gated"):
        until_phase(cluster, namespace, name, "Running")
        ready = next(c for c in status(cluster, namespace, name)["conditions"] if c["type"] == "Ready")
        assert ready["status"] == "False"
    cluster.kubectl("exec", "-n", namespace, "shy", "--", "touch", "/ready")
    gate = {"status": {"conditions": [{"type": "example.com/ok", "status": "True"}]}}
    cluster.kubectl("patch", "pod", "gated", "-n", namespace, "--subresource=status", "-p", json.dumps(gate))
    cluster.kubectl("wait", "-n", namespace, "--for=condition=ready", "pod/shy", "pod/gated", "--timeout=60s")


def test_hooks_grace_and_the_last_words(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "configmap", "notes", "-n", namespace)
    script = (
        "trap 'echo terminated > /notes/end; exit 0' TERM; touch /notes/started; while :; do sleep 0.1; done"
    )
    volume = {"name": "notes", "hostPath": {"path": f"/notes-{namespace}", "type": "DirectoryOrCreate"}}
    node = cluster.get("nodes")["items"][0]["metadata"]["name"]
    item = shell("hooked", namespace, script, terminationGracePeriodSeconds=20, volumes=[volume], nodeName=node)
    mounts = [{"name": "notes", "mountPath": "/notes"}]
    item["spec"]["containers"][0] |= {
        "volumeMounts": mounts,
        "lifecycle": {
            "postStart": {"exec": {"command": ["sh", "-c", "echo hello > /notes/post"]}},
            "preStop": {"exec": {"command": ["sh", "-c", "echo bye > /notes/pre"]}},
        },
    }
    cluster.apply(item)
    cluster.kubectl("wait", "-n", namespace, "--for=condition=ready", "pod/hooked", "--timeout=60s")
    cluster.kubectl(
        "exec", "-n", namespace, "hooked", "--", "sh", "-c", "until test -e /notes/started; do :; done"
    )
    cluster.kubectl("delete", "pod", "hooked", "-n", namespace, "--timeout=60s")
    reader = shell("reader", namespace, "cat /notes/post /notes/pre /notes/end", restartPolicy="Never")
    reader["spec"] |= {"volumes": [volume], "nodeName": node}
    reader["spec"]["containers"][0]["volumeMounts"] = mounts
    cluster.apply(reader)
    until_phase(cluster, namespace, "reader", "Succeeded")
    assert cluster.kubectl("logs", "-n", namespace, "reader").split() == ["hello", "bye", "terminated"]


def test_ends_and_what_they_say(cluster: Cluster, namespace: str) -> None:
    said = shell("said", namespace, "echo reason > /dev/termination-log; exit 3", restartPolicy="Never")
    logged = shell("logged", namespace, "echo last line; exit 4", restartPolicy="Never")
    logged["spec"]["containers"][0]["terminationMessagePolicy"] = "FallbackToLogsOnError"
    late = shell("late", namespace, "sleep 1000", restartPolicy="Never", activeDeadlineSeconds=1)
    looping = shell("looping", namespace, "exit 1")
    again = shell("again", namespace, "exit 5", restartPolicy="OnFailure")
    cluster.apply(said, logged, late, looping, again)
    for name in ("said", "logged", "late"):
        until_phase(cluster, namespace, name, "Failed")
    ended = {n: main_state(cluster, namespace, n)["state"]["terminated"] for n in ("said", "logged")}
    assert (ended["said"]["exitCode"], ended["said"]["message"], ended["said"]["reason"]) == (
        3,
        "reason\n",
        "Error",
    )
    assert (ended["logged"]["exitCode"], ended["logged"]["message"]) == (4, "last line\n")
    assert status(cluster, namespace, "late")["reason"] == "DeadlineExceeded"
    for name in ("looping", "again"):
        waiting = wait_until(
            lambda n=name: main_state(cluster, namespace, n).get("state", {}).get("waiting", {}).get("reason")
            == "CrashLoopBackOff" and main_state(cluster, namespace, n),
            what="back-off",
        )  # fmt: skip
        assert waiting["lastState"]["terminated"]["exitCode"] in (1, 5) and waiting["restartCount"] >= 1
    assert "Back-off restarting failed container main" in events(cluster, namespace, "looping")["BackOff"]


def test_identity_powers_and_read_only_roots(cluster: Cluster, namespace: str) -> None:
    script = (
        "id -u; id -g; id -G; grep -c NoNewPrivs.*1 /proc/self/status; grep CapEff /proc/self/status; "
        "stat -c %g /data; touch /nowhere 2>/dev/null || echo read-only; touch /data/x && echo written"
    )
    item = shell("who", namespace, script, restartPolicy="Never", volumes=[{"name": "data", "emptyDir": {}}])
    item["spec"]["securityContext"] = {"runAsUser": 1234, "runAsGroup": 2345, "fsGroup": 3456}
    item["spec"]["containers"][0] |= {
        "securityContext": {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    root = shell("root", namespace, "true", securityContext={"runAsNonRoot": True, "runAsUser": 0})
    cluster.apply(item, root)
    until_phase(cluster, namespace, "who", "Succeeded")
    told = cluster.kubectl("logs", "-n", namespace, "who").splitlines()
    assert told[:2] == ["1234", "2345"] and told[2].split() == ["2345", "3456"]
    assert told[3:] == ["1", "CapEff:\t0000000000000000", "3456", "read-only", "written"]
    waiting = wait_until(
        lambda: main_state(cluster, namespace, "root").get("state", {}).get("waiting", {}).get("message"),
        what="a refusal",
    )
    assert waiting == "container's runAsUser breaks non-root policy"


def test_volumes_follow_their_objects(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "configmap", "live", "-n", namespace, "--from-literal=a=one")
    cluster.kubectl("create", "secret", "generic", "key", "-n", namespace, "--from-literal=k=secret")
    projected = {
        "defaultMode": 0o400,
        "sources": [
            {"configMap": {"name": "live"}},
            {"secret": {"name": "key", "items": [{"key": "k", "path": "sub/k", "mode": 0o440}]}},
            {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
            {"serviceAccountToken": {"path": "token", "audience": "me", "expirationSeconds": 600}},
        ],
    }
    memory = {"medium": "Memory", "sizeLimit": "1Mi"}
    item = shell("reads", namespace, "sleep 1000")
    item["spec"]["volumes"] = [{"name": "all", "projected": projected}, {"name": "ram", "emptyDir": memory}]
    item["spec"]["containers"][0]["volumeMounts"] = [
        {"name": "all", "mountPath": "/all"},
        {"name": "all", "mountPath": "/etc/single", "subPath": "a"},
        {"name": "ram", "mountPath": "/ram"},
    ]
    cluster.apply(item)
    cluster.kubectl("wait", "-n", namespace, "--for=condition=ready", "pod/reads", "--timeout=60s")

    def inside(script: str) -> str:
        return cluster.kubectl("exec", "-n", namespace, "reads", "--", "sh", "-c", script)

    assert inside("cat /all/a /all/sub/k /all/name /etc/single").strip() == "onesecretreadsone"
    assert inside("stat -L -c %a /all/a /all/sub/k").split() == ["400", "440"]
    assert inside("wc -c < /all/token").strip() > "100"
    assert inside("df -k --output=size /ram | tail -1").strip() == "1024"
    assert "Read-only" in cluster.kubectl(
        "exec", "-n", namespace, "reads", "--", "sh", "-c", "touch /all/x", check=False
    )
    cluster.kubectl("patch", "configmap", "live", "-n", namespace, "-p", '{"data":{"a":"two","b":"new"}}')
    wait_until(lambda: inside("cat /all/a /all/b 2>/dev/null || true") == "twonew", what="the files change")
    assert inside("cat /etc/single") == "one", "what is mounted by subPath stays"


def test_folders_that_grow_too_large_evict_their_pod(cluster: Cluster, namespace: str) -> None:
    item = shell("greedy", namespace, "head -c 3000000 /dev/zero > /data/x; sleep 1000")
    item["spec"]["volumes"] = [{"name": "data", "emptyDir": {"sizeLimit": "1Mi"}}]
    item["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    cluster.apply(item)
    until_phase(cluster, namespace, "greedy", "Failed")
    found = status(cluster, namespace, "greedy")
    assert found["reason"] == "Evicted"
    assert found["message"] == 'Usage of EmptyDir volume "data" exceeds the limit "1Mi". '
    assert "Evicted" in events(cluster, namespace, "greedy")
