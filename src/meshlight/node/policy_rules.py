"""NetworkPolicies as nftables text: one table for both families in the node's namespace.

What a packet meets: flows that are under way pass; a pod's address leads by a map to the chain of its
isolation, which jumps through its policies and drops what none accepts. Egress and ingress are two base
chains, because an accept ends only its own. Chains are named by their content and never change; who peers
are stands in sets, so that a pod's coming or going is an element. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from meshlight.kube.resources import Object

TABLE = "inet meshlight-policy"
HBONE = 15008
Direction = Literal["ingress", "egress"]
FAMILIES = (4, 6)
_IP = {4: "ip", 6: "ip6"}
_DATATYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
_SIDE: dict[Direction, str] = {"ingress": "saddr", "egress": "daddr"}
_OWN: dict[Direction, str] = {"ingress": "daddr", "egress": "saddr"}
_PRIORITY: dict[Direction, int] = {"egress": -11, "ingress": -10}
_PROTOCOLS = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}


@dataclass(frozen=True, slots=True)
class Selector:
    """Which pods are peers; selectors are JSON text, empty for an absent one."""

    namespace: str
    pods: str
    namespaces: str

    @property
    def name(self) -> str:
        """The stem of its sets' names."""
        return f"peers-{digest(self.namespace if not self.namespaces else '', self.pods, self.namespaces)}"


@dataclass(frozen=True, slots=True)
class PortName:
    """A named port with its protocol (`tcp` …)."""

    name: str
    protocol: str

    @property
    def stem(self) -> str:
        """The stem of its sets' names."""
        return f"named-{digest(self.name, self.protocol)}"


@dataclass(slots=True)
class Compiled:
    """One policy: per direction that it isolates, the statements; and the sets these refer to."""

    pods: Object
    statements: dict[Direction, tuple[str, ...]] = field(default_factory=dict)
    selectors: set[Selector] = field(default_factory=set)
    names: set[PortName] = field(default_factory=set)


def digest(*parts: object) -> str:
    """A short name for content."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def chain_name(statements: Iterable[str]) -> str:
    """The name of the chain with these statements."""
    return f"rules-{digest(*statements)}"


def _text(selector: Object | None) -> str:
    return "" if selector is None else json.dumps(selector, sort_keys=True)


def compile_policy(policy: Object) -> Compiled:
    """A NetworkPolicy as statements."""
    spec, namespace = policy["spec"], policy["metadata"]["namespace"]
    compiled = Compiled(spec.get("podSelector") or {})
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    directions: tuple[tuple[str, Direction, str], ...] = (
        ("Ingress", "ingress", "from"),
        ("Egress", "egress", "to"),
    )
    for kind, direction, peers in directions:
        if kind in types:
            statements: list[str] = []
            for rule in spec.get(direction) or []:
                statements += _rule(
                    compiled, namespace, direction, rule.get(peers) or [], rule.get("ports") or []
                )
            compiled.statements[direction] = tuple(dict.fromkeys(statements))
    return compiled


Match = tuple[int, str]
"""A family (0: either) and a statement's part that needs it."""


def _rule(
    compiled: Compiled, namespace: str, direction: Direction, peers: list[Object], ports: list[Object]
) -> list[str]:
    side = _SIDE[direction]
    who: list[Match] = [m for peer in peers for m in _peer(compiled, namespace, side, peer)] or [(0, "")]
    where = _ports(compiled, ports) or [(0, "")]
    if peers and who == [(0, "")]:
        return []
    return [
        " ".join(part for part in (peer, port, "accept") if part)
        for family, peer in who
        for other, port in where
        if not family or not other or family == other
    ]


def _peer(compiled: Compiled, namespace: str, side: str, peer: Object) -> list[Match]:
    if block := peer.get("ipBlock"):
        family = 6 if ":" in block["cidr"] else 4
        text = f"{_IP[family]} {side} {block['cidr']}"
        if block.get("except"):
            text += f" {_IP[family]} {side} != {{ {', '.join(sorted(block['except']))} }}"
        return [(family, text)]
    selector = Selector(namespace, _text(peer.get("podSelector")), _text(peer.get("namespaceSelector")))
    compiled.selectors.add(selector)
    return [(f, f"{_IP[f]} {side} @{selector.name}-{f}") for f in FAMILIES]


def _ports(compiled: Compiled, ports: list[Object]) -> list[Match]:
    numbers: dict[str, list[str]] = {}
    found: list[Match] = []
    for port in ports:
        protocol, value = _PROTOCOLS[port.get("protocol", "TCP")], port.get("port")
        if value is None:
            found.append((0, f"meta l4proto {protocol}"))
        elif isinstance(value, int):
            end = port.get("endPort")
            numbers.setdefault(protocol, []).append(f"{value}-{end}" if end and end > value else str(value))
        else:
            name = PortName(value, protocol)
            compiled.names.add(name)
            found += [(f, f"{_IP[f]} daddr . {protocol} dport @{name.stem}-{f}") for f in FAMILIES]
    for protocol, texts in numbers.items():
        found.append((0, f"{protocol} dport {{ {', '.join(dict.fromkeys(texts))} }}"))
    if any(port.get("protocol", "TCP") == "TCP" for port in ports):
        # What is sent to a pod in the mesh arrives in HBONE; the port is the proxy's to judge then.
        found += [(f, f"{_IP[f]} daddr @mesh-{f} tcp dport {HBONE}") for f in FAMILIES]
    return found


@dataclass(slots=True)
class Wanted:
    """A state of the table without its sets' elements. `isolated`: direction → address → chain."""

    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    isolated: dict[Direction, dict[str, str]] = field(default_factory=lambda: {"ingress": {}, "egress": {}})
    sets: set[str] = field(default_factory=set)

    def isolate(
        self, direction: Direction, addresses: Iterable[str], policies: Iterable[tuple[str, ...]]
    ) -> None:
        """Let only what one of the policies accepts pass."""
        names = []
        for statements in policies:
            names.append(name := chain_name(statements))
            self.chains[name] = statements
        steps = tuple(f"jump {name}" for name in sorted(set(names)))
        chain = f"pod-{digest(*steps)}"
        self.chains[chain] = (*steps, "drop")
        for address in addresses:
            self.isolated[direction][address] = chain

    @property
    def addresses(self) -> set[str]:
        """Of pods that are isolated in some direction."""
        return self.isolated["ingress"].keys() | self.isolated["egress"].keys()


def set_type(name: str) -> str:
    """What elements a set has, by its name: STEM-FAMILY."""
    family = int(name[-1])
    return _DATATYPE[family] + (" . inet_service" if name.startswith("named-") else "")


def family_of(address: str) -> int:
    """4 or 6."""
    return 6 if ":" in address else 4


def skeleton() -> str:
    """The table with its hooks, empty of pods: applied when its state is not known."""
    lines = [f"add table {TABLE}", f"delete table {TABLE}", f"add table {TABLE}"]
    for family in FAMILIES:
        datatype = _DATATYPE[family]
        lines.append(f"add set {TABLE} mesh-{family} {{ type {datatype} ; }}")
        lines.append(f"add set {TABLE} self-{family} {{ type {datatype} . {datatype} ; }}")
        for direction in _SIDE:
            lines.append(f"add map {TABLE} {direction}-{family} {{ type {datatype} : verdict ; }}")
    for direction, priority in _PRIORITY.items():
        own, chain = _OWN[direction], f"forward-{direction}"
        lines.append(f"add chain {TABLE} {chain} {{ type filter hook forward priority {priority} ; }}")
        lines.append(f"add rule {TABLE} {chain} ct state established,related accept")
        for family, ip in _IP.items():
            # A pod always reaches itself, also by way of a Service.
            lines.append(f"add rule {TABLE} {chain} {ip} saddr . {ip} daddr @self-{family} accept")
            lines.append(f"add rule {TABLE} {chain} {ip} {own} vmap @{direction}-{family}")
    return "\n".join(lines) + "\n"


def change(
    before: Wanted,
    after: Wanted,
    added: Mapping[str, Collection[str]],
    removed: Mapping[str, Collection[str]],
) -> str:
    """The transaction from one state to another, with what sets gained and lost; empty if nothing did."""
    lines = [
        f"add set {TABLE} {name} {{ type {set_type(name)} ; }}" for name in sorted(after.sets - before.sets)
    ]
    for verb, members in (("delete", removed), ("add", added)):
        for name, elements in sorted(members.items()):
            if elements and (name in after.sets or name.startswith("mesh-")):
                lines.append(f"{verb} element {TABLE} {name} {{ {', '.join(sorted(elements))} }}")
    fresh = {name: text for name, text in after.chains.items() if name not in before.chains}
    lines += [f"add chain {TABLE} {name}" for name in fresh]
    lines += [f"add rule {TABLE} {name} {statement}" for name, text in fresh.items() for statement in text]
    for direction in _SIDE:
        old, new = before.isolated[direction], after.isolated[direction]
        for verb, ours, others in (("delete", old, new), ("add", new, old)):
            for family in FAMILIES:
                moved = [
                    f"{address} : goto {chain}"
                    for address, chain in sorted(ours.items())
                    if others.get(address) != chain and family_of(address) == family
                ]
                if moved:
                    lines.append(f"{verb} element {TABLE} {direction}-{family} {{ {', '.join(moved)} }}")
    for verb, these, those in (("delete", before, after), ("add", after, before)):
        for family in FAMILIES:
            own = [a for a in sorted(these.addresses - those.addresses) if family_of(a) == family]
            if own:
                pairs = ", ".join(f"{address} . {address}" for address in own)
                lines.append(f"{verb} element {TABLE} self-{family} {{ {pairs} }}")
    return "\n".join(lines) + "\n" if lines else ""


def cleanup(before: Wanted, after: Wanted) -> str:
    """The transaction that deletes what nothing refers to any more."""
    stale = sorted(before.chains.keys() - after.chains.keys(), key=lambda name: not name.startswith("pod-"))
    lines = [f"flush chain {TABLE} {name}" for name in stale]
    lines += [f"delete chain {TABLE} {name}" for name in stale]
    lines += [f"delete set {TABLE} {name}" for name in sorted(before.sets - after.sets)]
    return "\n".join(lines) + "\n" if lines else ""
