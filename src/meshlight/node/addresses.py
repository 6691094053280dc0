"""The second address of everything: an IPv6 address that follows from the IPv4 one, number for number.

Pure but for one look at the kernel. 10.244.3.17 is fd6d:6c10:244:3::17 as well, 172.20.0.12 is
fd6d:6c10:172::12: digits are kept as people read them, so nothing has to be allotted or remembered twice.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

PREFIX = "fd6d:6c10"
"""Unique local addresses (RFC 4193) of embedded clusters; they never leave a cluster's namespaces."""
FABRIC_GATEWAY = f"{PREFIX}:172::1"
PROBE_ADDRESS = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"
"""Source of node-local traffic to pods in the mesh over IPv6 (Istio's)."""


def has_ipv6() -> bool:
    """Whether the kernel knows IPv6 at all."""
    return Path("/proc/sys/net/ipv6").exists()


def second(address: str) -> str:
    """The IPv6 address beside a pod's or node's IPv4 address. Raises ValueError for any other."""
    first, _, third, last = str(ipaddress.IPv4Address(address)).split(".")
    if first == "10":
        return f"{PREFIX}:244:{third}::{last}"
    if first == "172":
        return f"{PREFIX}:172::{last}"
    raise ValueError(f"{address} is no address of a pod or node")


def both(address: str) -> tuple[str, ...]:
    """An address with the second one, where the kernel has IPv6; nothing for none."""
    if not address:
        return ()
    return (address, second(address)) if has_ipv6() else (address,)


def pod_cidr(index: int) -> str:
    """IPv6 addresses of the pods of node `index`."""
    return f"{PREFIX}:244:{index}::/64"
