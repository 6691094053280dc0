"""Links, addresses and routes of a node and its pods: what a CNI plug-in does elsewhere.

Every pod hangs on a routed veth pair, so that its traffic to other nodes leaves through the node's
eth0 with the pod's own address. The kernel's interfaces are the only record of what exists: each
pod link's alias names its pod, and an agent that restarts reads it back. Neighbours are permanent
entries, hence no ARP and no neighbour table to overflow. Knows nothing of Services or of the mesh.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import json
import socket
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from meshlight.controllers.workqueue import log
from meshlight.kube.client import Client
from meshlight.kube.resources import NODES, Object
from meshlight.node import addresses, netns
from meshlight.node.netns import NetworkError

FABRIC = "fabric0"
FABRIC_GATEWAY = "172.20.0.1"
PROBE_ADDRESS = "169.254.7.127"
"""Source of kubelet probes at pods in the mesh, which stay plaintext whatever the policy (Istio's rules)."""
_NODE_MAC = "ee:ee:ee:ee:ee:ee"
"""Of the node's end of every pod link; links are separate, so one address does for all."""

NODE_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    # A refused DNS query must be told each time: a resolver that is not told waits five seconds.
    "net/ipv4/icmp_ratelimit": "0",
}
POD_SYSCTLS = {
    "net/ipv4/ip_forward": "0",
    # The proxy speaks to the workload from the client's address: no reverse path leads there.
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/route_localnet": "1",
    # A handshake under way when one of two proxies stops listening is the other's.
    "net/ipv4/tcp_migrate_req": "1",
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv4/icmp_ratelimit": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    # Addresses are given and neighbours are permanent: nothing is left to be discovered.
    "net/ipv6/conf/default/addr_gen_mode": "1",
}


def node_address(index: int) -> str:
    """Address of node `index` (1-based) on the fabric."""
    return f"172.20.0.{10 + index}"


def pod_cidr(index: int) -> str:
    """Addresses of the pods of node `index`."""
    return f"10.244.{index}.0/24"


def pod_gateway(index: int) -> str:
    """What the pods of node `index` have as their default gateway."""
    return f"10.244.{index}.1"


def node_link(index: int) -> str:
    """Name of the fabric's end of a node's link."""
    return f"node{index}"


def cut_mark(node: str) -> Path:
    """The file that says that a node's link is cut, so that an agent that starts does not mend it."""
    return Path("/run/meshlight/nodes", node, "cut")


def pod_link(uid: str) -> str:
    """Name of the node's end of a pod's link (at most 15 characters)."""
    return "pod" + hashlib.sha1(uid.encode(), usedforsecurity=False).hexdigest()[:12]


def pod_mac(address: str) -> str:
    """Link-layer address of a pod, derived from its IPv4 address."""
    return "0a:58:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(address).packed)


def _has_interface(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def enter_node(name: str, index: int) -> None:
    """Make the node's network, or find it after a restart, and move this process into it.

    To be called in the fabric's namespace before any thread or event loop exists: threads keep the
    namespace of the one that started them.
    """
    if not 1 <= index <= 200:
        raise NetworkError(f"node index {index}: must be 1 to 200, the fabric has no more addresses")
    link = node_link(index)
    path = netns.create(name)
    netns.inside(path, lambda: netns.set_sysctls(NODE_SYSCTLS))
    commands = []
    if not _has_interface(link):
        commands.append(f"link add {link} type veth peer name eth0 netns {name}")
    commands += [
        f"link set {link} master {FABRIC} {'down' if cut_mark(name).exists() else 'up'}",
        # The API server answers pods at their own addresses.
        f"route replace {pod_cidr(index)} via {node_address(index)} dev {FABRIC} onlink",
    ]
    six = addresses.has_ipv6()
    if six:
        via = addresses.second(node_address(index))
        commands.append(f"route replace {addresses.pod_cidr(index)} via {via} dev {FABRIC} onlink")
    netns.ip(commands)
    netns.enter(path)
    own = [
        "link set lo up",
        f"address replace {pod_gateway(index)}/32 dev lo",
        f"address replace {node_address(index)}/24 dev eth0",
        "link set eth0 up",
        f"route replace default via {FABRIC_GATEWAY} dev eth0",
        # Without it a packet to a pod that is gone would go round through the fabric.
        f"route replace unreachable {pod_cidr(index)}",
    ]
    if six:
        own += [
            f"address replace {addresses.second(pod_gateway(index))}/128 dev lo nodad",
            f"address replace {addresses.second(node_address(index))}/64 dev eth0 nodad",
            f"route replace default via {addresses.FABRIC_GATEWAY} dev eth0",
            f"route replace unreachable {addresses.pod_cidr(index)}",
        ]
    netns.ip(own)
    netns.nft(probe_rules(index))


def probe_rules(index: int) -> str:
    """nft text: what the node's own processes send to its own pods has the probes' source address.

    Pods in the mesh let that address in unredirected. What other pods send, Service addresses
    included, is forwarded and has no local source: it keeps its address.
    """
    text = ""
    for family, pods, probe in (
        ("ip", pod_cidr(index), PROBE_ADDRESS),
        ("ip6", addresses.pod_cidr(index), addresses.PROBE_ADDRESS),
    ):
        table = f"{family} meshlight-probes"
        match = f"meta l4proto tcp {family} daddr {pods} fib saddr type local"
        text += (
            f"add table {table}\n"
            f"add chain {table} postrouting {{ type nat hook postrouting priority 100 ; }}\n"
            f"flush chain {table} postrouting\n"
            f"add rule {table} postrouting {match} snat to {probe}\n"
        )
    return text


def node_routes(nodes: Iterable[Object], own: str) -> dict[str, str]:
    """Pod CIDR → fabric address of its family for every node but `own`; what a node lacks is left out."""
    routes = {}
    for node in nodes:
        spec = node.get("spec", {})
        known = [a for a in node.get("status", {}).get("addresses") or [] if a["type"] == "InternalIP"]
        for cidr in spec.get("podCIDRs") or [spec.get("podCIDR")]:
            via = next((a["address"] for a in known if cidr and (":" in a["address"]) == (":" in cidr)), None)
            if node["metadata"]["name"] != own and via:
                routes[cidr] = via
    return routes


async def run_routes(client: Client, node: str) -> None:
    """Keep a route to the pods of every other node, until cancelled."""
    nodes: dict[str, Object] = {}
    current: dict[str, str] = {}
    synced = False
    async with contextlib.aclosing(client.watch(NODES)) as events:
        async for event in events:
            if event.type == "SYNCED":
                synced = True
            elif event.type == "DELETED":
                nodes.pop(event.object["metadata"]["name"], None)
            else:
                nodes[event.object["metadata"]["name"]] = event.object
            wanted = node_routes(nodes.values(), node)
            if not synced or wanted == current:
                continue
            gone = current.keys() - wanted.keys()
            commands = [f"route del {cidr}" for cidr in sorted(gone)]
            commands += [
                f"route replace {cidr} via {via} dev eth0"
                for cidr, via in sorted(wanted.items())
                if current.get(cidr) != via
            ]
            await netns.within(None, functools.partial(netns.ip, commands, tolerant=True))
            current = wanted
            log("info", "routes to other nodes", count=len(wanted))


class PodNetwork:
    """Makes and removes the networks of one node's pods; runs inside the node's namespace."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._addresses: dict[str, str] = {}
        self._known = False
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def existing(self) -> dict[str, str]:
        """Pods that have a complete network: uid → address, as the kernel has it."""
        links = json.loads(netns.run(["ip", "-json", "link", "show", "type", "veth"], "") or "[]")
        pods = {link["ifname"]: link["ifalias"] for link in links if "ifalias" in link}
        routes = json.loads(netns.run(["ip", "-json", "-4", "route", "show"], "") or "[]")
        found = {}
        for route in routes:
            uid = pods.get(route.get("dev", ""))
            if uid is not None and "/" not in route["dst"] and netns.exists(uid):
                found[uid] = str(route["dst"])
        return found

    def _learn(self) -> None:
        if not self._known:
            self._addresses = self.existing()
            self._known = True

    def _allocate(self, uid: str, address: str | None) -> str:
        """Reserve an address for a pod."""
        taken = set(self._addresses.values())
        if address is None:
            subnet = ipaddress.IPv4Network(pod_cidr(self.index))
            free = (str(host) for host in list(subnet.hosts())[1:] if str(host) not in taken)
            address = next(free, None)
            if address is None:
                raise NetworkError(f"pod {uid}: no address of {subnet} is free; delete pods of this node")
        elif address in taken:
            raise NetworkError(f"pod {uid}: its address {address} belongs to another pod of this node")
        self._addresses[uid] = address
        return address

    async def add(self, uid: str, address: str | None) -> str:
        """Give a pod its namespace, link and address (a free one if None); returns the address.

        Asking again for a pod that has its network changes nothing. Raises NetworkError when no
        address is left or the kernel refuses.
        """
        async with self._turns[uid]:
            self._learn()
            complete = uid in self._addresses
            chosen = self._addresses[uid] if complete else self._allocate(uid, address)
            if complete and await netns.within(None, lambda: self.existing().get(uid) == chosen):
                return chosen
            try:
                await netns.within(None, lambda: self._make(uid, chosen))
            except BaseException:
                self._addresses.pop(uid, None)
                raise
            return chosen

    def _make(self, uid: str, address: str) -> None:
        link, gateway, mac = pod_link(uid), pod_gateway(self.index), pod_mac(address)
        path = netns.create(uid)
        netns.inside(path, lambda: netns.set_sysctls(POD_SYSCTLS))
        inner = []
        if not _has_interface(link):
            # Made from within, its other end in the node: two runs of `ip` instead of three.
            peer = f"peer name {link} address {_NODE_MAC} netns {threading.get_native_id()}"
            inner.append(f"link add eth0 address {mac} type veth {peer}")
        six = addresses.has_ipv6()
        address6, gateway6 = addresses.second(address), addresses.second(gateway)
        inner += [
            "link set lo up",
            f"address replace {address}/32 dev eth0",
            "link set eth0 up",
            f"neighbour replace {gateway} lladdr {_NODE_MAC} dev eth0 nud permanent",
            f"route replace default via {gateway} dev eth0 onlink src {address}",
        ]
        if six:
            inner += [
                f"address replace {address6}/128 dev eth0 nodad",
                f"neighbour replace {gateway6} lladdr {_NODE_MAC} dev eth0 nud permanent",
                f"route replace default via {gateway6} dev eth0 onlink src {address6}",
            ]
        netns.inside(path, lambda: netns.ip(inner))
        outer = [f"link set {link} up", f"neighbour replace {address} lladdr {mac} dev {link} nud permanent"]
        if six:
            outer += [
                f"neighbour replace {address6} lladdr {mac} dev {link} nud permanent",
                f"route replace {address6}/128 dev {link} src {gateway6}",
            ]
        # Alias and route come last: they are what makes the pod count as complete.
        outer += [f"link set {link} alias {uid}", f"route replace {address}/32 dev {link} src {gateway}"]
        netns.ip(outer)

    async def remove(self, uid: str) -> None:
        """Take a pod's network away; absence is fine."""
        async with self._turns[uid]:
            self._learn()
            await netns.within(None, lambda: self._unmake(uid))
            self._addresses.pop(uid, None)
        self._turns.pop(uid, None)

    def _unmake(self, uid: str) -> None:
        link = pod_link(uid)
        if _has_interface(link):
            netns.ip([f"link del {link}"])
        netns.remove(uid)


def namespace_path(uid: str) -> Path:
    """Where a pod's network namespace is mounted."""
    return netns.NETNS / uid
