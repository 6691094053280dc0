"""The CNI's role: a node's network namespace and the links, addresses and routes of its pods.

Pod links are routed veth pairs, so that everything a pod sends to another node passes the node's
`eth0` with the pod's own source address. Addresses are those of docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

from meshlight.node import netns

NODES = Path("/run/meshlight/nodes")
FABRIC = "fabric0"
FABRIC_GATEWAY = "172.20.0.1"
MAX_NODES = 64
PROBE_ADDRESS = "169.254.7.127"
"""Source of kubelet probes, which stay plaintext whatever the policy (Istio's in-pod rules)."""
_POD_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/eth0/rp_filter": "0",
    "net/ipv4/conf/all/route_localnet": "1",
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv4/ping_group_range": "0 2147483647",
}
_NODE_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
}


class NetworkError(Exception):
    """A link, address or rule could not be made; the message has the tool's own words."""


def node_address(index: int) -> str:
    """Address of node `index` (1-based) on the fabric."""
    return f"172.20.0.{10 + index}"


def gateway(index: int) -> str:
    """The address of a node's end of its pods' links."""
    return f"10.244.{index}.1"


def pod_cidr(index: int) -> str:
    """The addresses of a node's pods."""
    return f"10.244.{index}.0/24"


def ip_batch(commands: list[str], *, namespace: str | None = None, force: bool = False) -> None:
    """Run `ip` commands in one process; with `force` those that are already so do not matter."""
    command = ["ip", *(["-n", namespace] if namespace else []), *(["-force"] if force else []), "-batch", "-"]
    done = subprocess.run(command, input="\n".join(commands) + "\n", capture_output=True, text=True)
    if done.returncode and not force:
        raise NetworkError(f"ip: {done.stderr.strip()} (of: {'; '.join(commands)})")


def _sysctls(values: dict[str, str]) -> None:
    for name, value in values.items():
        path = Path("/proc/sys") / name
        if path.exists():
            path.write_text(value)


def enter_node(name: str, index: int) -> None:
    """Create the node's network namespace, or find it after an agent's restart, and enter it.

    Call first, before any thread or event loop. Raises NetworkError.
    """
    path = netns.NETNS / name
    if not path.exists():
        ip_batch([f"netns add {name}"])
        ip_batch(
            [
                f"link add veth-node{index} type veth peer name eth0 netns {name}",
                f"link set veth-node{index} master {FABRIC}",
                f"link set veth-node{index} up",
            ]
        )
    netns.enter(path)
    _sysctls(_NODE_SYSCTLS)
    others = [j for j in range(1, MAX_NODES + 1) if j != index]
    ip_batch(
        [
            "link set lo up",
            f"address add {gateway(index)}/32 dev lo",
            f"address add {PROBE_ADDRESS}/32 dev lo",
            f"address add {node_address(index)}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {FABRIC_GATEWAY}",
            *(f"route add {pod_cidr(j)} via {node_address(j)}" for j in others),
        ],
        force=True,
    )
    _probe_source(index)


def _probe_source(index: int) -> None:
    """What this node's own processes send to its own pods comes from the probe address."""
    rules = f"""
table ip meshlight-probes
delete table ip meshlight-probes
table ip meshlight-probes {{
  chain postrouting {{
    type nat hook postrouting priority 100
    iifname != "" return
    ip saddr {{ {gateway(index)}, {node_address(index)} }} ip daddr {pod_cidr(index)} snat to {PROBE_ADDRESS}
  }}
}}
"""
    nft(rules)


def nft(rules: str) -> None:
    """Apply a ruleset in one transaction in the current namespace. Raises NetworkError."""
    done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(f"nft: {done.stderr.strip()}")


class PodNetwork:
    """The network namespaces of one node's pods."""

    def __init__(self, node: str, index: int) -> None:
        self._index = index
        self._folder = NODES / node / "network"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._addresses = self.existing()

    def existing(self) -> dict[str, str]:
        """Addresses by pod uid, as kept across restarts of the agent."""
        return {file.name: file.read_text() for file in self._folder.iterdir()}

    async def add(self, uid: str, address: str | None = None) -> str:
        """Make a pod's namespace and link; returns its address. What exists already is kept."""
        if uid in self._addresses:
            return self._addresses[uid]
        chosen = address or self._free()
        self._addresses[uid] = chosen
        try:
            await asyncio.to_thread(self._make, uid, chosen)
        except BaseException:
            self._addresses.pop(uid, None)
            await asyncio.to_thread(self._unmake, uid)
            raise
        (self._folder / uid).write_text(chosen)
        return chosen

    async def remove(self, uid: str) -> None:
        """Take a pod's namespace and link away; absence is not an error."""
        if self._addresses.pop(uid, None) is not None:
            await asyncio.to_thread(self._unmake, uid)

    def _free(self) -> str:
        taken = set(self._addresses.values())
        for host in range(2, 255):
            candidate = f"10.244.{self._index}.{host}"
            if candidate not in taken:
                return candidate
        raise NetworkError(f"no address is free in {pod_cidr(self._index)}")

    def _make(self, uid: str, address: str) -> None:
        link = link_name(uid)
        ip_batch([f"netns add {uid}"])
        ip_batch(
            [
                f"link add {link} type veth peer name eth0 netns {uid}",
                f"link set {link} up",
                f"route add {address}/32 dev {link} src {gateway(self._index)}",
            ]
        )
        ip_batch(
            [
                "link set lo up",
                f"address add {address}/32 dev eth0",
                "link set eth0 up",
                f"route add {gateway(self._index)} dev eth0",
                f"route add default via {gateway(self._index)}",
            ],
            namespace=uid,
        )
        netns.inside(netns.NETNS / uid, lambda: _sysctls(_POD_SYSCTLS))

    def _unmake(self, uid: str) -> None:
        ip_batch([f"link delete {link_name(uid)}", f"netns delete {uid}"], force=True)
        (self._folder / uid).unlink(missing_ok=True)


def link_name(uid: str) -> str:
    """The node's end of a pod's link; names of links are at most 15 characters."""
    return "pod" + uid.replace("-", "")[:12]
