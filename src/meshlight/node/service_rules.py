"""Service addresses as nftables text: what the node's kernel is given, and the way from one state to another.

Chains are named by their content, so a chain never changes: a Service that changes has its map
element pointed at another chain. A new state is thus one small transaction of set elements and new
chains; chains nobody points at any more are deleted afterwards. NAT is decided by a flow's first
packet, hence no established flow notices. Pure: knows nothing of the Kubernetes API or of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

TABLE = "meshlight-services"
SERVICE_CIDR = "10.96.0.0/16"
_MASQUERADE = "0x4000"
"""Packet mark, in the node's namespace, of flows that must come back through this node."""
_T = f"ip {TABLE}"
_KEY = "type ipv4_addr . inet_proto . inet_service"
_MAPS = {
    "services": f"{_KEY} : verdict",
    "node-ports": "type inet_proto . inet_service : verdict",
}
_SETS = {
    "refused": _KEY,
    "hairpins": "type ipv4_addr . ipv4_addr",
}
_REFUSE = ("ip protocol tcp reject with tcp reset", "reject")
_SKELETON = {
    "dispatch": (
        "",
        (
            "ip daddr . meta l4proto . th dport vmap @services",
            "ip daddr != 127.0.0.0/8 fib daddr type local meta l4proto . th dport vmap @node-ports",
        ),
    ),
    "prerouting": ("type nat hook prerouting priority -100", ("jump dispatch",)),
    "output": ("type nat hook output priority -100", ("jump dispatch",)),
    "postrouting": (
        "type nat hook postrouting priority 90",
        (
            f"meta mark & {_MASQUERADE} != 0 masquerade",
            # A pod that reaches itself would see its own address as its peer, and never answer.
            "ct status dnat ip saddr . ip daddr @hairpins masquerade",
        ),
    ),
    "refuse": ("", _REFUSE),
    "filter-forward": (
        "type filter hook forward priority 0",
        (
            # Not translated because out of the flow's window: delivered, it would reset the flow.
            "ct state invalid drop",
            "ct state new ip daddr . meta l4proto . th dport @refused goto refuse",
            f"ct state new ip daddr {SERVICE_CIDR} goto refuse",
        ),
    ),
    "filter-output": (
        "type filter hook output priority 0",
        (
            "ct state new ip daddr . meta l4proto . th dport @refused goto refuse",
            f"ct state new ip daddr {SERVICE_CIDR} goto refuse",
        ),
    ),
}


@dataclass(frozen=True, slots=True, order=True)
class Frontend:
    """An address that a Service answers on, and how; `protocol` is `tcp` or `udp`.

    An empty address stands for the node's own addresses (a NodePort). `masquerade`: endpoints see
    the node as their client. `affinity`: seconds for which a client keeps its endpoint; 0: none.
    """

    address: str
    protocol: str
    port: int
    masquerade: bool = False
    affinity: int = 0

    @property
    def key(self) -> str:
        """The frontend as a key of its map."""
        own = f"{self.protocol} . {self.port}"
        return f"{self.address} . {own}" if self.address else own


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """An endpoint behind a frontend."""

    address: str
    port: int


@dataclass(slots=True)
class Ruleset:
    """A state of the table; see the module's text. Maps go from key to chain, sets are keys."""

    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    affinity: dict[str, int] = field(default_factory=dict)
    services: dict[str, str] = field(default_factory=dict)
    node_ports: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    hairpins: set[str] = field(default_factory=set)

    def add(self, other: Ruleset) -> None:
        """Take in another; of two that claim one key the first stays."""
        self.chains |= other.chains
        self.affinity |= other.affinity
        self.services = other.services | self.services
        self.node_ports = other.node_ports | self.node_ports
        self.refused |= other.refused
        self.hairpins |= other.hairpins

    def elements(self) -> dict[str, dict[str, str]]:
        """Set or map → key → verdict (empty in sets)."""
        return {
            "services": {key: f" : goto {chain}" for key, chain in self.services.items()},
            "node-ports": {key: f" : goto {chain}" for key, chain in self.node_ports.items()},
            "refused": dict.fromkeys(self.refused - self.services.keys(), ""),
            "hairpins": dict.fromkeys(self.hairpins, ""),
        }


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_service(owner: str, frontends: Mapping[Frontend, list[Backend]]) -> Ruleset:
    """The part of the table that one Service makes; `owner` keeps its clients' affinity its own."""
    rules = Ruleset()
    for frontend, backends in frontends.items():
        rules.hairpins.update(f"{backend.address} . {backend.address}" for backend in backends)
        if not backends:
            if frontend.address:
                rules.refused.add(frontend.key)
            continue
        chain = _endpoints(rules, owner, frontend, backends)
        (rules.services if frontend.address else rules.node_ports)[frontend.key] = chain
    return rules


def _endpoints(rules: Ruleset, owner: str, frontend: Frontend, backends: list[Backend]) -> str:
    """Add the chain that chooses among the endpoints, with what it needs; returns its name."""
    statements = [f"meta mark set meta mark | {_MASQUERADE}"] if frontend.masquerade else []
    count, protocol = len(backends), f"meta l4proto {frontend.protocol}"
    if frontend.affinity:
        picks = []
        for backend in backends:
            digest = _digest(owner, frontend.protocol, backend, frontend.affinity)
            clients, pick = f"clients-{digest}", f"pick-{digest}"
            rules.affinity[clients] = frontend.affinity
            rules.chains[pick] = (
                f"update @{clients} {{ ip saddr }}",
                f"{protocol} dnat to {backend.address}:{backend.port}",
            )
            statements.append(f"ip saddr @{clients} goto {pick}")
            picks.append(pick)
        choices = ", ".join(f"{n} : goto {pick}" for n, pick in enumerate(picks))
        statements.append(f"numgen random mod {count} vmap {{ {choices} }}")
    else:
        choices = ", ".join(f"{n} : {b.address} . {b.port}" for n, b in enumerate(backends))
        statements.append(f"{protocol} dnat ip to numgen random mod {count} map {{ {choices} }}")
    name = f"endpoints-{_digest(*statements)}"
    rules.chains[name] = tuple(statements)
    return name


def whole(rules: Ruleset, present: Collection[str] = ()) -> str:
    """The transaction that brings a table in an unknown state, or none, to `rules`.

    `present`: names of the chains it has now; those that `rules` lack are left for `cleanup`.
    """
    lines = [f"table {_T} {{"]
    lines += [f"  map {name} {{\n    {kind}\n  }}" for name, kind in _MAPS.items()]
    lines += [f"  set {name} {{\n    {kind}\n  }}" for name, kind in _SETS.items()]
    lines.append("}")
    for name, (hook, _) in _SKELETON.items():
        lines.append(f"add chain {_T} {name}" + (f" {{ {hook} ; }}" if hook else ""))
    for name, (_, statements) in _SKELETON.items():
        lines.append(f"flush chain {_T} {name}")
        lines += [f"add rule {_T} {name} {statement}" for statement in statements]
    lines += [f"flush map {_T} {name}" for name in _MAPS]
    lines += [f"flush set {_T} {name}" for name in _SETS]
    lines += _new_sets(rules.affinity)
    lines += [f"add chain {_T} {name}" for name in rules.chains]
    lines += [f"flush chain {_T} {name}" for name in rules.chains if name in present]
    lines += _new_rules(rules.chains)
    for name, elements in rules.elements().items():
        lines += _with_elements("add", name, [key + verdict for key, verdict in elements.items()])
    return "\n".join(lines) + "\n"


def change(old: Ruleset, new: Ruleset) -> str:
    """The transaction from one state to another; empty when there is nothing to do."""
    chains = {name: text for name, text in new.chains.items() if name not in old.chains}
    lines = _new_sets({name: timeout for name, timeout in new.affinity.items() if name not in old.affinity})
    lines += [f"add chain {_T} {name}" for name in chains]
    lines += _new_rules(chains)
    before, after = old.elements(), new.elements()
    for name in before:
        gone = [k + v for k, v in before[name].items() if after[name].get(k) != v]
        lines += _with_elements("delete", name, gone)
    for name in after:
        fresh = [k + v for k, v in after[name].items() if before[name].get(k) != v]
        lines += _with_elements("add", name, fresh)
    return "\n".join(lines) + "\n" if lines else ""


def cleanup(chains: Iterable[str], sets: Iterable[str], new: Ruleset) -> str:
    """The transaction that deletes those chains and affinity sets that `new` does not use."""
    stale = [name for name in chains if name not in new.chains and name not in _SKELETON]
    kept = new.affinity.keys() | _SETS.keys() | _MAPS.keys()
    lines = [f"flush chain {_T} {name}" for name in stale]
    # The choosing chains point at the picking ones: those go last.
    stale.sort(key=lambda name: name.startswith("pick-"))
    lines += [f"delete chain {_T} {name}" for name in stale]
    lines += [f"delete set {_T} {name}" for name in sets if name not in kept]
    return "\n".join(lines) + "\n" if lines else ""


def _new_sets(affinity: Mapping[str, int]) -> list[str]:
    kind = "type ipv4_addr ; flags dynamic,timeout ; size 65535 ; timeout"
    return [f"add set {_T} {name} {{ {kind} {seconds}s ; }}" for name, seconds in affinity.items()]


def _new_rules(chains: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [f"add rule {_T} {name} {statement}" for name, text in chains.items() for statement in text]


def _with_elements(verb: str, name: str, elements: list[str]) -> list[str]:
    return [f"{verb} element {_T} {name} {{ {', '.join(elements)} }}"] if elements else []
