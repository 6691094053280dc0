"""The files by which a pod's programs resolve names: /etc/resolv.conf, /etc/hosts, /etc/hostname.

Pure. Rules: Kubernetes' "DNS for Services and Pods" (dnsPolicy, dnsConfig, hostAliases, subdomain).
"""

from __future__ import annotations

from meshlight.kube.resources import Object
from meshlight.node.addresses import both

CLUSTER_DNS = "10.96.0.10"
CLUSTER_DOMAIN = "cluster.local"
_MAX_NAMESERVERS = 3


def hostname(pod: Object) -> str:
    """The pod's host name, at most 63 characters."""
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])[:63].rstrip("-.")


def files(pod: Object, address: str, machine_resolv_conf: str) -> dict[str, str]:
    """The three files by path; `machine_resolv_conf` is the machine's own, for dnsPolicy Default."""
    return {
        "/etc/resolv.conf": resolv_conf(pod, machine_resolv_conf),
        "/etc/hosts": hosts(pod, address),
        "/etc/hostname": hostname(pod) + "\n",
    }


def resolv_conf(pod: Object, machine: str) -> str:
    """The resolver's configuration by the pod's dnsPolicy and dnsConfig."""
    spec = pod["spec"]
    policy = spec.get("dnsPolicy") or "ClusterFirst"
    if spec.get("hostNetwork") and policy == "ClusterFirst":
        policy = "Default"
    nameservers: list[str] = []
    searches: list[str] = []
    options: dict[str, str | None] = {}
    if policy == "Default":
        for line in machine.splitlines():
            words = line.split()
            if not words:
                continue
            if words[0] == "nameserver":
                nameservers += words[1:2]
            elif words[0] == "search":
                searches = words[1:]
            elif words[0] == "options":
                options.update(_option(word) for word in words[1:])
    elif policy != "None":
        namespace = pod["metadata"]["namespace"]
        nameservers = [CLUSTER_DNS]
        searches = [f"{namespace}.svc.{CLUSTER_DOMAIN}", f"svc.{CLUSTER_DOMAIN}", CLUSTER_DOMAIN]
        options = {"ndots": "5"}
    config = spec.get("dnsConfig") or {}
    nameservers += [n for n in config.get("nameservers") or [] if n not in nameservers]
    searches += [s for s in config.get("searches") or [] if s not in searches]
    options.update({o["name"]: o.get("value") for o in config.get("options") or []})
    lines = [f"nameserver {n}" for n in nameservers[:_MAX_NAMESERVERS]]
    if searches:
        lines.append("search " + " ".join(searches))
    if options:
        words = [name if value is None else f"{name}:{value}" for name, value in options.items()]
        lines.append("options " + " ".join(words))
    return "\n".join(lines) + "\n"


def _option(word: str) -> tuple[str, str | None]:
    name, colon, value = word.partition(":")
    return name, value if colon else None


def hosts(pod: Object, address: str) -> str:
    """The static host table: loopback, the pod itself, its hostAliases."""
    spec, name = pod["spec"], hostname(pod)
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    if address:
        names = name
        if spec.get("subdomain"):
            full = f"{name}.{spec['subdomain']}.{pod['metadata']['namespace']}.svc.{CLUSTER_DOMAIN}"
            names = f"{full}\t{name}"
        lines += [f"{one}\t{names}" for one in both(address)]
    for alias in spec.get("hostAliases") or []:
        lines.append("\t".join([alias["ip"], *(alias.get("hostnames") or [])]))
    return "\n".join(lines) + "\n"
