"""Istio's in-pod redirection, in nftables: what a pod sends and receives goes through ztunnel.

The rules are Istio's (marks, ports and exceptions), with two changes that keep live connections
alive: only a TCP flow's first packet (SYN) is considered, and un-enrolment empties the chains instead
of deleting the table, so that conntrack keeps translating the flows it knows.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from meshlight.node import netns
from meshlight.node.network import PROBE_ADDRESS, NetworkError, nft

TABLE = "istio-ambient"
MARK = "0x539"
"""Mark of sockets that belong to the proxy."""
ORIGINAL_SOURCE_MARK = "0x111"
"""Conntrack mark of flows that the proxy opened with the client's own address as source."""
OUTBOUND, INBOUND, HBONE, DNS = 15001, 15006, 15008, 15053
_CHAINS = {
    "nat-output": "type nat hook output priority -100",
    "nat-prerouting": "type nat hook prerouting priority -100",
    "mangle-output": "type route hook output priority -150",
    "mangle-prerouting": "type filter hook prerouting priority -150",
}
_SYN = "tcp flags & (syn | ack) == syn"


def _proxy(match: str) -> str:
    return f"meta mark & 0xfff {match} {MARK}"


def rules(*, dns: bool = False) -> str:
    """The ruleset that captures a pod's new connections; `dns` also its queries (to 15053)."""
    output = [f"ip daddr {PROBE_ADDRESS} accept"]
    if dns:
        output += [
            f'oifname != "lo" udp dport 53 {_proxy("!=")} redirect to :{DNS}',
            f"ip daddr != 127.0.0.1 tcp dport 53 {_SYN} {_proxy('!=')} redirect to :{DNS}",
        ]
    output += [
        f"meta l4proto tcp meta mark & 0xfff == {ORIGINAL_SOURCE_MARK} accept",
        'oifname "lo" ip daddr != 127.0.0.1 accept',
        f"ip daddr != 127.0.0.1 {_SYN} {_proxy('!=')} redirect to :{OUTBOUND}",
    ]
    chains = {
        "nat-output": output,
        "nat-prerouting": [
            f"ip saddr {PROBE_ADDRESS} accept",
            f"ip daddr != 127.0.0.1 tcp dport != {HBONE} {_SYN} {_proxy('!=')} redirect to :{INBOUND}",
        ],
        "mangle-output": [f"ct mark & 0xfff == {ORIGINAL_SOURCE_MARK} meta mark set ct mark"],
        "mangle-prerouting": [f"{_proxy('==')} ct mark set {ORIGINAL_SOURCE_MARK}"],
    }
    lines = [_empty()]
    for chain, statements in chains.items():
        lines += [f"add rule ip {TABLE} {chain} {statement}" for statement in statements]
    return "\n".join(lines) + "\n"


def _empty() -> str:
    lines = [f"add table ip {TABLE}"]
    for chain, hook in _CHAINS.items():
        lines += [f"add chain ip {TABLE} {chain} {{ {hook} ; }}", f"flush chain ip {TABLE} {chain}"]
    return "\n".join(lines)


def flushed() -> str:
    """The ruleset after un-enrolment: nothing new is captured, known flows are left alone.

    The marks of the proxy's flows stay, for those flows still need them.
    """
    lines = [f"add table ip {TABLE}"]
    for chain in ("nat-output", "nat-prerouting"):
        lines += [f"add chain ip {TABLE} {chain} {{ {_CHAINS[chain]} ; }}", f"flush chain ip {TABLE} {chain}"]
    return "\n".join(lines) + "\n"


def _route_marked() -> None:
    """Answers to a spoofed source address come back to the proxy instead of leaving the pod."""
    for command in (
        ["ip", "route", "replace", "local", "0.0.0.0/0", "dev", "lo", "table", "100"],
        ["ip", "rule", "add", "fwmark", f"{ORIGINAL_SOURCE_MARK}/0xfff", "lookup", "100", "priority", "32764"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "File exists" not in done.stderr:
            raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")


def apply(namespace: Path) -> None:
    """Redirect a pod's new connections to ztunnel. Idempotent; blocking; raises NetworkError, OSError."""

    def work() -> None:
        _route_marked()
        nft(rules())

    netns.inside(namespace, work)


def flush(namespace: Path) -> None:
    """Redirect no new connections of a pod. Idempotent; blocking; raises NetworkError, OSError."""
    netns.inside(namespace, lambda: nft(flushed()))
