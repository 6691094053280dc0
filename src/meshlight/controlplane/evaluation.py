"""What the node proxy decides of a connection, decided from the same compiled policies.

The twin of the proxy's own evaluator (`ztunnel/src/rbac.rs`), for explanations and for trying policies
before they are applied: any rule of a policy, all clauses of a rule, any match of a clause, all fields of
a match; a clause without matches holds, a match without fields never does. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from meshlight.proto import authorization_pb2 as rbac

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Peer:
    """Who the source proved to be by its certificate."""

    trust_domain: str
    namespace: str
    service_account: str

    @property
    def principal(self) -> str:
        """As policies write it: the SPIFFE identity without its scheme."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"


@dataclass(frozen=True, slots=True)
class Connection:
    """What a policy judges; `peer` is None for plaintext."""

    source: Address
    peer: Peer | None
    destination: Address
    port: int


class Outcome(Enum):
    """The judgement over all policies."""

    NO_POLICY = "allowed: no ALLOW policy applies"
    ALLOWED_BY = "allowed by a policy"
    DENIED_BY = "denied by a policy"
    NOT_ALLOWED = "denied: no rule of any ALLOW policy matches"


@dataclass(frozen=True, slots=True)
class Examined:
    """One policy that was looked at: `rule` is the index of the compiled rule that matches, None if none does.

    `misses` says for each rule that does not match which fields kept it from matching.
    """

    policy: str
    action: str
    dry_run: bool
    rule: int | None
    misses: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """The judgement, the policies that made it (`NAMESPACE/NAME`), and all that were examined."""

    outcome: Outcome
    decided_by: tuple[str, ...]
    examined: tuple[Examined, ...]

    @property
    def allowed(self) -> bool:
        """Whether the connection passes."""
        return self.outcome in (Outcome.NO_POLICY, Outcome.ALLOWED_BY)


def decide(policies: Iterable[rbac.Authorization], connection: Connection) -> Decision:
    """Judge a connection: any DENY that matches refuses, then, if there are ALLOWs, one must match."""
    examined = tuple(examine(policy, connection) for policy in policies)
    effective = [one for one in examined if not one.dry_run]
    for one in effective:
        if one.action == "DENY" and one.rule is not None:
            return Decision(Outcome.DENIED_BY, (one.policy,), examined)
    allows = [one for one in effective if one.action == "ALLOW"]
    if not allows:
        return Decision(Outcome.NO_POLICY, (), examined)
    for one in allows:
        if one.rule is not None:
            return Decision(Outcome.ALLOWED_BY, (one.policy,), examined)
    return Decision(Outcome.NOT_ALLOWED, tuple(one.policy for one in allows), examined)


def applicable(
    policies: Iterable[rbac.Authorization], namespace: str, attached: Sequence[str]
) -> list[rbac.Authorization]:
    """The policies that a node proxy applies to a workload: mesh-wide, its namespace's, those attached."""

    def applies(policy: rbac.Authorization) -> bool:
        if policy.scope == rbac.WORKLOAD_SELECTOR:
            return f"{policy.namespace}/{policy.name}" in attached
        return policy.scope == rbac.GLOBAL or policy.namespace == namespace

    return [policy for policy in policies if applies(policy)]


def examine(policy: rbac.Authorization, connection: Connection) -> Examined:
    """One policy against one connection."""
    misses: list[tuple[str, ...]] = []
    matching = None
    for index, rule in enumerate(policy.rules):
        missed = _rule_misses(rule, connection)
        if not missed:
            matching = index
            break
        misses.append(missed)
    name, action = f"{policy.namespace}/{policy.name}", "DENY" if policy.action == rbac.DENY else "ALLOW"
    return Examined(name, action, policy.dry_run, matching, tuple(misses))


def _rule_misses(rule: rbac.Rule, connection: Connection) -> tuple[str, ...]:
    """Why a rule does not match, a sentence for each clause that does not hold; empty when it matches."""
    missed = []
    for clause in rule.clauses:
        fields = [_match_misses(match, connection) for match in clause.matches]
        if fields and all(fields):
            missed.append(" nor ".join(sorted({", ".join(names) for names in fields})))
    return tuple(missed)


def _match_misses(match: rbac.Match, connection: Connection) -> list[str]:
    """Fields of a match that do not hold."""
    if not match.ByteSize():
        return ["nothing"]
    peer = connection.peer
    namespace = peer.namespace if peer else None
    principal = peer.principal if peer else None
    account = (peer.namespace, peer.service_account) if peer else None
    texts = [
        ("namespaces", namespace, match.namespaces, match.not_namespaces),
        ("principals", principal, match.principals, match.not_principals),
    ]
    blocks = [
        ("ipBlocks", connection.source, match.source_ips, match.not_source_ips),
        ("destination.ip", connection.destination, match.destination_ips, match.not_destination_ips),
    ]
    missed = []
    for name, value, wanted, unwanted in texts:
        held = [_text_matches(one, value) for one in wanted]
        missed += _missing(name, held, [_text_matches(one, value) for one in unwanted])
    missed += _missing(
        "serviceAccounts",
        [account == (one.namespace, one.service_account) for one in match.service_accounts],
        [account == (one.namespace, one.service_account) for one in match.not_service_accounts],
    )
    for name, address, inside, outside in blocks:
        missed += _missing(
            name, [contains(b, address) for b in inside], [contains(b, address) for b in outside]
        )
    ports, others = match.destination_ports, match.not_destination_ports
    missed += _missing(
        "ports", [port == connection.port for port in ports], [port == connection.port for port in others]
    )
    return missed


def _missing(name: str, wanted: list[bool], unwanted: list[bool]) -> list[str]:
    missed = []
    if wanted and not any(wanted):
        missed.append(name)
    if any(unwanted):
        missed.append("not" + name[0].upper() + name[1:])
    return missed


def _text_matches(match: rbac.StringMatch, value: str | None) -> bool:
    if value is None:
        return False
    match match.WhichOneof("match_type"):
        case "exact":
            return value == match.exact
        case "prefix":
            return value.startswith(match.prefix)
        case "suffix":
            return value.endswith(match.suffix)
        case "presence":
            return bool(value)
    return False


def contains(block: rbac.Address, address: Address) -> bool:
    """Whether an address lies in a block; an IPv4 address in IPv6 clothes is an IPv4 address."""
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    packed = block.address
    if len(packed) != len(address.packed):
        return False
    bits = len(packed) * 8
    if block.length > bits:
        return False
    shift = bits - block.length
    return int.from_bytes(packed, "big") >> shift == int(address) >> shift
