"""Istio's in-pod redirection, in nftables: what a pod sends and receives goes through ztunnel.

The rules are Istio's (marks, ports and exceptions), with what keeps live connections alive added:
only a TCP flow's first packet (SYN) is redirected, connection tracking starts before redirection
does, and un-enrolment empties chains instead of deleting the table, so that conntrack keeps
translating the flows it knows. Knows nothing of who is enrolled, or why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshlight.node import addresses, conntrack, netns
from meshlight.node.netns import NetworkError
from meshlight.node.network import PROBE_ADDRESS

TABLE = "istio-ambient"
MARK = "0x539"
"""Mark of sockets that belong to the proxy."""
ORIGINAL_SOURCE_MARK = "0x111"
"""Conntrack mark of flows that the proxy opened with the client's own address as source."""
OUTBOUND, INBOUND, HBONE, DNS = 15001, 15006, 15008, 15053
_ROUTES = 100
_BASE_CHAINS = {
    "nat-output": "type nat hook output priority -100",
    "nat-prerouting": "type nat hook prerouting priority -100",
    "mangle-output": "type route hook output priority -150",
    "mangle-prerouting": "type filter hook prerouting priority -150",
}
_DNS_CHAINS = {
    "raw-output": "type filter hook output priority -300",
    "raw-prerouting": "type filter hook prerouting priority -300",
}
_CAPTURING = ("nat-output", "nat-prerouting")
_SYN = "tcp flags & (syn | ack) == syn"
_PROXYS = f"meta mark & 0xfff == {MARK}"
_NOT_PROXYS = f"meta mark & 0xfff != {MARK}"


@dataclass(frozen=True, slots=True)
class Family:
    """An address family, as nftables and the rules name it."""

    table: str
    loopback: str
    probe: str
    everywhere: str

    @property
    def path(self) -> str:
        """The table as nft commands name it."""
        return f"{self.table} {TABLE}"


IPV4 = Family("ip", "127.0.0.1", PROBE_ADDRESS, "0.0.0.0/0")
IPV6 = Family("ip6", "::1", addresses.PROBE_ADDRESS, "::/0")


def families() -> tuple[Family, ...]:
    """Families that pods have addresses of."""
    return (IPV4, IPV6) if addresses.has_ipv6() else (IPV4,)


def tracking(family: Family = IPV4, *, dns: bool = False) -> str:
    """The table with its hooks and no rules: from here on conntrack knows every flow of the pod.

    Applied before `rules`, so that a handshake under way when redirection begins is a known flow,
    and its retransmitted SYN is not taken for the start of a new one.
    """
    lines = [f"add table {family.path}"]
    for chain, hook in (_BASE_CHAINS | (_DNS_CHAINS if dns else {})).items():
        lines.append(f"add chain {family.path} {chain} {{ {hook} ; }}")
    return "\n".join(lines) + "\n"


def rules(family: Family = IPV4, *, dns: bool = False) -> str:
    """The ruleset that captures a pod's new connections; `dns` also its queries (to 15053)."""
    ip, loopback = family.table, family.loopback
    output = [f"{ip} daddr {family.probe} meta l4proto tcp accept"]
    if dns:
        output += [
            f'oifname != "lo" udp dport 53 {_NOT_PROXYS} redirect to :{DNS}',
            f"{ip} daddr != {loopback} tcp dport 53 {_SYN} {_NOT_PROXYS} redirect to :{DNS}",
        ]
    output += [
        f"meta l4proto tcp meta mark & 0xfff == {ORIGINAL_SOURCE_MARK} accept",
        f'oifname "lo" {ip} daddr != {loopback} accept',
        f"{ip} daddr != {loopback} {_SYN} {_NOT_PROXYS} redirect to :{OUTBOUND}",
    ]
    chains = {
        "nat-output": output,
        "nat-prerouting": [
            f"{ip} saddr {family.probe} meta l4proto tcp accept",
            f"{ip} daddr != {loopback} tcp dport != {HBONE} {_SYN} {_NOT_PROXYS} redirect to :{INBOUND}",
        ],
        "mangle-output": [f"ct mark & 0xfff == {ORIGINAL_SOURCE_MARK} meta mark set ct mark"],
        "mangle-prerouting": [f"{_PROXYS} ct mark set {ORIGINAL_SOURCE_MARK}"],
    }
    if dns:
        # The proxy's own queries to the server must not meet the entry of the query it answers.
        chains["raw-output"] = [f"udp dport 53 {_PROXYS} ct zone set 1"]
        chains["raw-prerouting"] = [f"udp sport 53 {_NOT_PROXYS} ct zone set 1"]
    lines = []
    for chain, statements in chains.items():
        lines.append(f"flush chain {family.path} {chain}")
        lines += [f"add rule {family.path} {chain} {statement}" for statement in statements]
    return tracking(family, dns=dns) + "\n".join(lines) + "\n"


def flushed(family: Family = IPV4) -> str:
    """What un-enrolment does to the table: nothing new is captured.

    The marks stay, because connections that the proxy still carries need them to the end.
    """
    return "".join(f"flush chain {family.path} {chain}\n" for chain in _CAPTURING)


def _return_routes(family: Family) -> list[str]:
    """Answers to a spoofed source address come back to the proxy instead of leaving the pod."""
    return [
        "link set lo up",  # without it there is no local table to route to
        f"route replace local {family.everywhere} dev lo table {_ROUTES}",
        f"rule add fwmark {ORIGINAL_SOURCE_MARK}/0xfff lookup {_ROUTES} priority 32764",
    ]


def apply(namespace: Path, *, dns: bool = False) -> None:
    """Redirect a pod's new connections to ztunnel. Idempotent; blocking; raises NetworkError, OSError."""

    def work() -> None:
        for family in families():
            # Of a rule that is there already `ip` complains.
            netns.ip(_return_routes(family), tolerant=True, six=family is IPV6)
        captured = {family: dns and family is IPV4 for family in families()}  # nameservers are IPv4
        netns.nft("".join(tracking(family, dns=names) for family, names in captured.items()))
        netns.nft("".join(rules(family, dns=names) for family, names in captured.items()))

    netns.inside(namespace, work)


def redirected(namespace: Path) -> bool:
    """Whether a pod's new connections are captured now. Blocking; raises NetworkError, OSError."""
    listed = ["nft", "-s", "list", "chain", "ip", TABLE, "nat-prerouting"]
    try:
        return "redirect" in netns.inside(namespace, lambda: netns.run(listed, ""))
    except NetworkError as error:
        if "No such file" in str(error):
            return False
        raise


def flush(namespace: Path) -> None:
    """Redirect no new connections of a pod. Idempotent; blocking; raises NetworkError, OSError."""

    def work() -> None:
        for family in families():
            try:
                netns.nft(flushed(family))
            except NetworkError as error:
                if "No such file" not in str(error):  # a pod that never was in the mesh
                    raise

    netns.inside(namespace, work)


def forget_queries() -> None:
    """In a pod that leaves: end what the kernel remembers of captured DNS queries.

    A later query from the same port would be taken for one of them and go on to a proxy that listens no more.
    Raises OSError.
    """
    conntrack.forget_datagrams({("127.0.0.1", DNS), ("::1", DNS)})
