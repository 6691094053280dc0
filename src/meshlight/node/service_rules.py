"""Service addresses as nftables text: what the node's kernel is given, and the way from one state to another.

Chains are named by their content, so a chain never changes: a Service that changes has its map
element pointed at another chain. A change is thus one small transaction of set elements and new
chains, as large as what changed; chains nobody points at any more are deleted afterwards. NAT is
decided by a flow's first packet, hence no established flow notices. One table a family of addresses.
Pure: knows nothing of the Kubernetes API or of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from meshlight.kube.service_addresses import RANGES

TABLE = "meshlight-services"
_MASQUERADE = "0x4000"
"""Packet mark, in the node's namespace, of flows that must come back through this node."""
_FABRIC_LINK = "eth0"


@dataclass(frozen=True, slots=True)
class Family:
    """An address family as nftables and Kubernetes name it."""

    name: str
    table: str
    datatype: str
    loopback: str
    pods: str

    @property
    def services(self) -> str:
        """The range of cluster addresses."""
        return str(RANGES[self.name])

    @property
    def path(self) -> str:
        """The table as nft commands name it."""
        return f"{self.table} {TABLE}"

    def has(self, address: str) -> bool:
        """Whether an address is of this family."""
        return (":" in address) == (self.name == "IPv6")


IPV4 = Family("IPv4", "ip", "ipv4_addr", "127.0.0.0/8", "10.244.0.0/16")
IPV6 = Family("IPv6", "ip6", "ipv6_addr", "::1", "fd6d:6c10:244::/48")
FAMILIES = (IPV4, IPV6)


def _maps(family: Family) -> dict[str, str]:
    return {
        "services": f"type {family.datatype} . inet_proto . inet_service : verdict",
        "node-ports": "type inet_proto . inet_service : verdict",
    }


def _sets(family: Family) -> dict[str, str]:
    return {
        "refused": f"type {family.datatype} . inet_proto . inet_service",
        "hairpins": f"type {family.datatype} . {family.datatype}",
    }


def _skeleton(family: Family) -> dict[str, tuple[str, tuple[str, ...]]]:
    ip, services = family.table, family.services
    refuse = f"ct state new {ip} daddr . meta l4proto . th dport @refused goto refuse"
    unknown = f"ct state new {ip} daddr {services} goto refuse"
    return {
        "dispatch": (
            "",
            (
                f"{ip} daddr . meta l4proto . th dport vmap @services",
                f"{ip} daddr != {family.loopback} fib daddr type local "
                "meta l4proto . th dport vmap @node-ports",
            ),
        ),
        "prerouting": (
            "type nat hook prerouting priority -100",
            (
                # From outside the nodes: the endpoint's answer has to find back through here.
                f'iifname "{_FABRIC_LINK}" {ip} daddr {services} meta mark set meta mark | {_MASQUERADE}',
                "jump dispatch",
            ),
        ),
        "output": ("type nat hook output priority -100", ("jump dispatch",)),
        "postrouting": (
            "type nat hook postrouting priority 90",
            (
                f"meta mark & {_MASQUERADE} != 0 masquerade",
                # A pod that reaches itself would see its own address as its peer, and never answer.
                f"ct status dnat {ip} saddr . {ip} daddr @hairpins masquerade",
            ),
        ),
        "refuse": ("", ("meta l4proto tcp reject with tcp reset", "reject")),
        "filter-forward": (
            "type filter hook forward priority 0",
            (
                # Not translated because out of the flow's window: delivered, it would reset the flow.
                "ct state invalid drop",
                refuse,
                unknown,
            ),
        ),
        "filter-output": ("type filter hook output priority 0", (refuse, unknown)),
    }


@dataclass(frozen=True, slots=True, order=True)
class Frontend:
    """An address that a Service answers on, and how; `protocol` is `tcp`, `udp` or `sctp`.

    An empty address stands for the node's own addresses (a NodePort). `masquerade`: endpoints see
    the node as their client. `affinity`: seconds for which a client keeps its endpoint; 0: none.
    `sources`: networks that may come in; empty: all.
    """

    address: str
    protocol: str
    port: int
    masquerade: bool = False
    affinity: int = 0
    sources: tuple[str, ...] = ()

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


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The endpoints behind a frontend.

    `everywhere` is given where a traffic policy Local narrows `chosen` to this node: what is outside
    the policy's reach (nobody, or the node and its pods) is sent there. None: no such policy.
    `inside_everywhere`: pods and the node itself are such.
    """

    chosen: tuple[Backend, ...]
    everywhere: tuple[Backend, ...] | None = None
    inside_everywhere: bool = False


_EMPTY = ""


@dataclass(slots=True)
class Ruleset:
    """A state of the table, or one Service's part of it; see the module's text.

    Maps go from key to chain, sets from key to nothing, `chains` to statements, `affinity` to seconds.
    """

    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    affinity: dict[str, int] = field(default_factory=dict)
    services: dict[str, str] = field(default_factory=dict)
    node_ports: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    hairpins: dict[str, str] = field(default_factory=dict)

    def entries(self) -> Iterator[tuple[str, str, object]]:
        """Everything in it as (kind, name, value)."""
        for kind in KINDS:
            for name, value in getattr(self, kind).items():
                yield kind, name, value

    def elements(self) -> dict[str, list[str]]:
        """Set or map → its elements as nft writes them."""
        return {
            name: [_element(kind, key, value) for key, value in getattr(self, kind).items()]
            for kind, name in _CONTAINERS.items()
        }


_CONTAINERS = {
    "services": "services",
    "node_ports": "node-ports",
    "refused": "refused",
    "hairpins": "hairpins",
}
KINDS = ("chains", "affinity", *_CONTAINERS)


def _element(kind: str, key: str, value: object) -> str:
    return f"{key} : goto {value}" if kind in ("services", "node_ports") else key


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_service(family: Family, owner: str, frontends: Mapping[Frontend, Endpoints]) -> Ruleset:
    """The part of the table that one Service makes; `owner` keeps its clients' affinity its own."""
    rules = Ruleset()
    for frontend, behind in frontends.items():
        known = behind.chosen if behind.everywhere is None else (*behind.chosen, *behind.everywhere)
        for backend in known:
            rules.hairpins[f"{backend.address} . {backend.address}"] = _EMPTY
        if not known:
            if frontend.address:
                rules.refused[frontend.key] = _EMPTY
            continue
        chain = _frontend(rules, family, owner, frontend, behind)
        (rules.services if frontend.address else rules.node_ports)[frontend.key] = chain
    return rules


def _frontend(rules: Ruleset, family: Family, owner: str, frontend: Frontend, behind: Endpoints) -> str:
    """Add the chain behind a frontend, with what it needs; returns its name."""
    statements = []
    if frontend.sources:
        allowed = ", ".join(frontend.sources)
        statements.append(f"{family.table} saddr != {{ {allowed} }} fib saddr type != local drop")
    if behind.everywhere is not None and behind.inside_everywhere and behind.everywhere:
        anywhere = _endpoints(rules, family, owner, frontend, behind.everywhere, masquerade=False)
        statements.append(f"{family.table} saddr {family.pods} goto {anywhere}")
        as_node = _endpoints(rules, family, owner, frontend, behind.everywhere, masquerade=True)
        statements.append(f"fib saddr type local goto {as_node}")
    if not statements and behind.chosen:
        return _endpoints(rules, family, owner, frontend, behind.chosen, masquerade=frontend.masquerade)
    if behind.chosen:
        masquerade = frontend.masquerade
        chosen = _endpoints(rules, family, owner, frontend, behind.chosen, masquerade=masquerade)
        statements.append(f"goto {chosen}")
    else:
        statements.append("drop")  # the policy keeps it on this node, which has nothing to offer
    name = f"front-{_digest(*statements)}"
    rules.chains[name] = tuple(statements)
    return name


def _endpoints(
    rules: Ruleset,
    family: Family,
    owner: str,
    frontend: Frontend,
    backends: tuple[Backend, ...],
    *,
    masquerade: bool,
) -> str:
    """Add the chain that chooses among endpoints; returns its name."""
    statements = [f"meta mark set meta mark | {_MASQUERADE}"] if masquerade else []
    count, protocol = len(backends), f"meta l4proto {frontend.protocol}"
    if frontend.affinity:
        picks = []
        for backend in backends:
            digest = _digest(owner, frontend.protocol, backend, frontend.affinity)
            clients, pick = f"clients-{digest}", f"pick-{digest}"
            rules.affinity[clients] = frontend.affinity
            shown = f"[{backend.address}]" if family is IPV6 else backend.address
            rules.chains[pick] = (
                f"update @{clients} {{ {family.table} saddr }}",
                f"{protocol} dnat to {shown}:{backend.port}",
            )
            statements.append(f"{family.table} saddr @{clients} goto {pick}")
            picks.append(pick)
        choices = ", ".join(f"{n} : goto {pick}" for n, pick in enumerate(picks))
        statements.append(f"numgen random mod {count} vmap {{ {choices} }}")
    else:
        choices = ", ".join(f"{n} : {b.address} . {b.port}" for n, b in enumerate(backends))
        statements.append(f"{protocol} dnat {family.table} to numgen random mod {count} map {{ {choices} }}")
    name = f"endpoints-{_digest(*statements)}"
    rules.chains[name] = tuple(statements)
    return name


class Claims:
    """The rulesets of all owners as one: of several that claim a key, the first by name has it.

    Work is by what an owner's change touches, never by what there is.
    """

    def __init__(self) -> None:
        self._claims: dict[tuple[str, str], dict[str, object]] = {}
        self._owners: dict[str, Ruleset] = {}
        self._written: dict[tuple[str, str], object] = {}
        """What touched entries were at the last `taken`; None: absent."""

    def put(self, owner: str, rules: Ruleset | None) -> None:
        """An owner's part is now this; None: it has none."""
        before = self._owners.get(owner) or Ruleset()
        after = rules or Ruleset()
        if rules is None:
            self._owners.pop(owner, None)
        else:
            self._owners[owner] = rules
        for kind, name, _ in before.entries():
            if name not in getattr(after, kind):
                self._touch(kind, name)
                claims = self._claims[kind, name]
                del claims[owner]
                if not claims:
                    del self._claims[kind, name]
        for kind, name, value in after.entries():
            if getattr(before, kind).get(name) != value:
                self._touch(kind, name)
                self._claims.setdefault((kind, name), {})[owner] = value

    def _value(self, entry: tuple[str, str]) -> object:
        claims = self._claims.get(entry)
        return claims[min(claims)] if claims else None

    def _touch(self, kind: str, name: str) -> None:
        entry = (kind, name)
        if entry not in self._written:
            self._written[entry] = self._value(entry)

    def whole(self) -> Ruleset:
        """The table's whole state."""
        rules = Ruleset()
        for kind, name in self._claims:
            getattr(rules, kind)[name] = self._value((kind, name))
        return rules

    def taken(self) -> tuple[Ruleset, Ruleset]:
        """What changed since this was last asked: entries as they were, and as they are."""
        before, after = Ruleset(), Ruleset()
        for entry, was in self._written.items():
            now = self._value(entry)
            if was == now:
                continue
            for rules, value in ((before, was), (after, now)):
                if value is not None:
                    getattr(rules, entry[0])[entry[1]] = value
        self._written.clear()
        return before, after


def whole(family: Family, rules: Ruleset, present: Collection[str] = ()) -> str:
    """The transaction that brings a table in an unknown state, or none, to `rules`.

    `present`: names of the chains it has now; those that `rules` lack are left for `cleanup`.
    """
    path, skeleton = family.path, _skeleton(family)
    lines = [f"table {path} {{"]
    lines += [f"  map {name} {{\n    {kind}\n  }}" for name, kind in _maps(family).items()]
    lines += [f"  set {name} {{\n    {kind}\n  }}" for name, kind in _sets(family).items()]
    lines.append("}")
    for name, (hook, _) in skeleton.items():
        lines.append(f"add chain {path} {name}" + (f" {{ {hook} ; }}" if hook else ""))
    for name, (_, statements) in skeleton.items():
        lines.append(f"flush chain {path} {name}")
        lines += [f"add rule {path} {name} {statement}" for statement in statements]
    lines += [f"flush map {path} {name}" for name in _maps(family)]
    lines += [f"flush set {path} {name}" for name in _sets(family)]
    lines += _new_sets(family, rules.affinity)
    lines += [f"add chain {path} {name}" for name in rules.chains]
    lines += [f"flush chain {path} {name}" for name in rules.chains if name in present]
    lines += _new_rules(path, rules.chains)
    for name, elements in rules.elements().items():
        lines += _with_elements("add", path, name, elements)
    return "\n".join(lines) + "\n"


def change(family: Family, old: Ruleset, new: Ruleset) -> str:
    """The transaction for entries that were `old` and are `new`; empty when there is nothing to do."""
    path = family.path
    chains = {name: text for name, text in new.chains.items() if name not in old.chains}
    lines = _new_sets(family, {n: t for n, t in new.affinity.items() if n not in old.affinity})
    lines += [f"add chain {path} {name}" for name in chains]
    lines += _new_rules(path, chains)
    before, after = old.elements(), new.elements()
    for verb, ours, others in (("delete", before, after), ("add", after, before)):
        for name, elements in ours.items():
            kept = set(others[name])
            lines += _with_elements(verb, path, name, [e for e in elements if e not in kept])
    return "\n".join(lines) + "\n" if lines else ""


def cleanup(family: Family, chains: Iterable[str], sets: Iterable[str]) -> str:
    """The transaction that deletes chains and affinity sets; names of the table's skeleton stay."""
    path, skeleton = family.path, _skeleton(family)
    kept = _sets(family).keys() | _maps(family).keys()
    stale = [name for name in chains if name not in skeleton]
    lines = [f"flush chain {path} {name}" for name in stale]
    # What points at others goes before them.
    stale.sort(key=lambda name: ("front-", "endpoints-", "pick-").index(name.partition("-")[0] + "-"))
    lines += [f"delete chain {path} {name}" for name in stale]
    lines += [f"delete set {path} {name}" for name in sets if name not in kept]
    return "\n".join(lines) + "\n" if lines else ""


def _new_sets(family: Family, affinity: Mapping[str, int]) -> list[str]:
    kind = f"type {family.datatype} ; flags dynamic,timeout ; size 65535 ; timeout"
    return [f"add set {family.path} {name} {{ {kind} {seconds}s ; }}" for name, seconds in affinity.items()]


def _new_rules(path: str, chains: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [f"add rule {path} {name} {statement}" for name, text in chains.items() for statement in text]


def _with_elements(verb: str, path: str, name: str, elements: list[str]) -> list[str]:
    return [f"{verb} element {path} {name} {{ {', '.join(elements)} }}"] if elements else []
