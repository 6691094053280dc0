"""Cluster DNS as programs in pods meet it: through their resolv.conf and libc."""

from __future__ import annotations

import json
from typing import Any

from clusters import Cluster, pod, service, wait_until

LOOK = """
import json, socket, sys
found = {}
for name in sys.argv[1:]:
    try:
        entries = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
        found[name] = sorted({entry[4][0] for entry in entries})
    except socket.gaierror as error:
        found[name] = error.errno
print(json.dumps(found))
"""


def look(cluster: Cluster, namespace: str, name: str, *names: str) -> dict[str, Any]:
    """What names stand for in a pod: addresses, or getaddrinfo's error."""
    out = cluster.kubectl("exec", "-n", namespace, name, "--", "python3", "-c", LOOK, *names)
    found: dict[str, Any] = json.loads(out)
    return found


def test_names_in_pods(cluster: Cluster, namespace: str) -> None:
    sleep = ["sleep", "600"]
    member = pod("member-0", namespace, sleep, hostname="member-0", subdomain="members")
    member["metadata"]["labels"] = {"app": "members"}
    headless = service("members", namespace, 80)
    headless["spec"]["clusterIP"] = "None"
    plain = service("plain", namespace, 80)
    external = service("external", namespace, 80)
    external["spec"] = {"type": "ExternalName", "externalName": f"plain.{namespace}.svc.cluster.local"}
    client = pod(
        "client", namespace, sleep, hostAliases=[{"ip": "192.0.2.1", "hostnames": ["alias.example"]}],
        dnsConfig={"options": [{"name": "timeout", "value": "1"}], "searches": ["apps.test"]},
    )  # fmt: skip
    bare = pod("bare", namespace, sleep, dnsPolicy="None", dnsConfig={"nameservers": ["10.96.0.10"]})
    further = {
        "apiVersion": "externaldns.k8s.io/v1alpha1",
        "kind": "DNSEndpoint",
        "metadata": {"name": "routes", "namespace": namespace},
        "spec": {"endpoints": [{"dnsName": "web.apps.test", "recordType": "A", "targets": ["172.20.1.9"]}]},
    }
    cluster.apply(member, headless, plain, external, client, bare, further)
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod", "--all", "--timeout=60s")
    own = cluster.get("pod", "member-0", "-n", namespace)["status"]["podIP"]
    vip = cluster.get("service", "plain", "-n", namespace)["spec"]["clusterIP"]
    wanted = {
        "plain": [vip],
        f"plain.{namespace}": [vip],
        f"plain.{namespace}.svc.cluster.local": [vip],
        "external": [vip],
        "members": [own],
        "member-0.members": [own],
        f"{own.replace('.', '-')}.{namespace}.pod.cluster.local": [own],
        "alias.example": ["192.0.2.1"],
        "web": ["172.20.1.9"],  # by the search path of dnsConfig
        "web.apps.test": ["172.20.1.9"],
        "kubernetes.default": ["10.96.0.1"],
    }
    wait_until(lambda: look(cluster, namespace, "client", *wanted) == wanted or None, what="every name")
    nowhere = look(cluster, namespace, "client", "no.such.name.example", "nothing")
    assert set(nowhere.values()) == {-2}, "told at once that they do not exist"
    assert look(cluster, namespace, "bare", "plain", f"plain.{namespace}.svc.cluster.local") == {
        "plain": -2,
        f"plain.{namespace}.svc.cluster.local": [vip],
    }
    hosts = cluster.kubectl("exec", "-n", namespace, "member-0", "--", "hostname", "-f").strip()
    assert hosts == f"member-0.members.{namespace}.svc.cluster.local"
    replicas = cluster.get("deployment", "coredns", "-n", "kube-system")["status"]
    assert replicas["readyReplicas"] == 2
