"""NetworkPolicies on a whole cluster: applied with kubectl, in force before a pod's first process."""

from __future__ import annotations

from clusters import Cluster, pod, service, wait_until

TRY = """
import socket
try:
    socket.create_connection(({host!r}, 80), 2).close()
    print("open", flush=True)
except OSError:
    print("shut", flush=True)
"""


def policy(name: str, namespace: str, **spec: object) -> dict[str, object]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": {}, **spec},
    }


def test_policies_hold_from_the_first_moment_and_follow_labels(cluster: Cluster, namespace: str) -> None:
    server = pod("server", namespace, ["python3", "-m", "http.server", "80"])
    server["spec"]["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": 80}, "periodSeconds": 1}
    cluster.apply(
        policy("deny", namespace, policyTypes=["Ingress", "Egress"]), server, service("server", namespace, 80)
    )
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod", "--all", "--timeout=60s")
    own = cluster.get("pod", "server", "-n", namespace)["status"]["podIP"]
    script = TRY.format(host=own)
    # Its very first act: nothing lets it out.
    cluster.apply(pod("early", namespace, ["python3", "-c", script + "\nimport time; time.sleep(600)"]))

    def said() -> str:
        return cluster.kubectl("logs", "-n", namespace, "early", check=False).strip()

    assert wait_until(lambda: said() in ("open", "shut") and said(), what="its first try") == "shut"
    dns = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}
    allow = {"podSelector": {"matchLabels": {"role": "client"}}}
    cluster.apply(
        policy("in", namespace, podSelector={"matchLabels": {"app": "server"}},
               ingress=[{"from": [allow], "ports": [{"port": 80}]}]),
        policy("out", namespace, podSelector={"matchLabels": {"role": "client"}}, policyTypes=["Egress"],
               egress=[{"to": [{"podSelector": {}}], "ports": [{"port": 80}]},
                       {"to": [dns], "ports": [{"port": 53, "protocol": "UDP"}]}]),
    )  # fmt: skip

    def tried(host: str) -> str:
        script = TRY.format(host=host)
        return cluster.kubectl("exec", "-n", namespace, "early", "--", "python3", "-c", script).strip()

    assert tried(own) == "shut"
    cluster.kubectl("label", "pod", "early", "-n", namespace, "role=client")
    wait_until(lambda: tried(own) == "open", what="the label to let it out and in")
    assert tried("server") == "open", "by its Service's name: DNS is let out too"
    cluster.kubectl("label", "pod", "early", "-n", namespace, "role-")
    wait_until(lambda: tried(own) == "shut", what="the label's going to shut it out")
