"""AuthorizationPolicy compiled to the L4 policies that the node proxy evaluates.

The proxy's evaluator: any rule of a policy, all clauses of a rule, any match of a clause, all fields
of a match. A rule without clauses always matches; a match without fields never does (Istio's
ztunnel skips it), so the compiler never emits one: a part that says nothing drops its clause.

What the node proxy cannot see (HTTP attributes, JWT claims) fails safe: in an ALLOW the whole rule
is dropped and allows nothing, in a DENY only the unseen condition is dropped and more is denied.
Each such decision is kept as a `Finding` with the path of the field that caused it. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meshlight.controlplane.facts import ObjectKey
from meshlight.kube.resources import Object
from meshlight.proto import authorization_pb2 as rbac

DRY_RUN = "istio.io/dry-run"
LOCAL = "cluster.local"
_SOURCE = {
    "principals", "notPrincipals", "namespaces", "notNamespaces", "ipBlocks", "notIpBlocks",
    "serviceAccounts", "notServiceAccounts",
}  # fmt: skip
_OPERATION = {"ports", "notPorts"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something of a policy that the node proxy does not enforce as written; `path` is its field."""

    path: str
    message: str


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """The outcome for one AuthorizationPolicy.

    `authorization` is None when the node proxy is not to see the policy. `selector` is None unless
    the policy is attached to workloads by label. `origins` are the indices in `spec.rules` of the
    compiled rules: a denial can so name the rule that its author wrote.
    """

    key: ObjectKey
    authorization: rbac.Authorization | None
    selector: tuple[tuple[str, str], ...] | None
    findings: tuple[Finding, ...]
    origins: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TrustDomains:
    """This mesh's trust domain and the earlier or other names (`trustDomainAliases`) that are as good."""

    own: str = LOCAL
    aliases: tuple[str, ...] = ()

    def expand(self, principals: list[str] | None) -> list[str]:
        """Principals with those of any of the mesh's own trust domains repeated under each of them.

        `cluster.local` is every mesh's own name for itself. What names another domain stays as it is.
        """
        own = tuple(dict.fromkeys((self.own, *self.aliases)))
        expanded: list[str] = []
        for principal in principals or []:
            domain, slash, rest = principal.partition("/")
            if slash and domain in (*own, LOCAL):
                expanded += [f"{name}/{rest}" for name in own]
            else:
                expanded.append(principal)
        return list(dict.fromkeys(expanded))


OWN_TRUST = TrustDomains()
"""Of a mesh without a trust domain of its own."""

_Part = tuple[str, Object, Callable[[Object, str], rbac.Match]]


class _Unenforceable(Exception):
    """A field that L4 cannot enforce, or whose value cannot be read."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.finding = Finding(path, message)


def compile_policy(obj: Object, root_namespace: str, trust: TrustDomains = OWN_TRUST) -> CompiledPolicy:
    """Compile one AuthorizationPolicy object; `trust` says which trust domains are this mesh's own."""
    spec, key = obj.get("spec") or {}, ObjectKey.of(obj)
    if spec.get("targetRefs") or spec.get("targetRef"):
        return CompiledPolicy(key, None, None, ())  # for waypoints
    name = spec.get("action") or "ALLOW"
    if name not in ("ALLOW", "DENY"):
        finding = Finding("spec.action", f"the node proxy does not support the action {name}")
        return CompiledPolicy(key, None, None, (finding,))
    action = rbac.DENY if name == "DENY" else rbac.ALLOW
    labels = (spec.get("selector") or {}).get("matchLabels") or {}
    selector = tuple(sorted(labels.items())) or None
    annotations = obj["metadata"].get("annotations") or {}
    rules, findings, origins = [], [], []
    compiler = _RuleCompiler(key.namespace, trust, deny=action == rbac.DENY)
    for index, rule in enumerate(spec.get("rules") or []):
        compiled, found = compiler.rule(rule or {}, f"spec.rules[{index}]")
        findings += found
        if compiled is not None:
            rules.append(compiled)
            origins.append(index)
    if selector:
        scope = rbac.WORKLOAD_SELECTOR
    else:
        scope = rbac.GLOBAL if key.namespace == root_namespace else rbac.NAMESPACE
    authorization = rbac.Authorization(
        name=key.name,
        namespace=key.namespace,
        scope=scope,
        action=action,
        rules=rules,
        dry_run=str(annotations.get(DRY_RUN, "")).lower() in ("true", "1", "t"),
    )
    return CompiledPolicy(key, authorization, selector, tuple(findings), tuple(origins))


@dataclass(frozen=True, slots=True)
class _RuleCompiler:
    """What all rules of one policy have in common."""

    namespace: str
    trust: TrustDomains
    deny: bool

    def rule(self, rule: Object, path: str) -> tuple[rbac.Rule | None, list[Finding]]:
        """One rule; None when it can match nothing."""
        findings: list[Finding] = []
        clauses: list[rbac.Clause] = []
        sources = [
            (f"{path}.from[{i}].source", (entry or {}).get("source") or {}, self._source)
            for i, entry in enumerate(rule.get("from") or [])
        ]
        operations = [
            (f"{path}.to[{i}].operation", (entry or {}).get("operation") or {}, _operation)
            for i, entry in enumerate(rule.get("to") or [])
        ]
        conditions = [
            [(f"{path}.when[{i}]", entry or {}, self._condition)]
            for i, entry in enumerate(rule.get("when") or [])
        ]
        alternatives: list[Sequence[_Part]] = [operations, sources, *conditions]
        kept = [self._clause(parts, clauses, findings) for parts in alternatives]
        return (rbac.Rule(clauses=clauses) if all(kept) else None), findings

    def _clause(self, parts: Sequence[_Part], clauses: list[rbac.Clause], findings: list[Finding]) -> bool:
        """Add the clause any of whose parts must match; False when the rule is lost by it."""
        matches, always = [], False
        for path, part, convert in parts:
            known, found = _enforceable(part, path)
            findings.extend(found)
            if found and not self.deny:
                return False
            try:
                match = convert(known, path)
            except _Unenforceable as error:
                findings.append(error.finding)
                if not self.deny:
                    return False
                always = True
                continue
            if match.ByteSize():
                matches.append(match)
            else:
                always = True
        if matches and not always:
            clauses.append(rbac.Clause(matches=matches))
        return True

    def _source(self, source: Object, path: str) -> rbac.Match:
        return rbac.Match(
            principals=_strings(self.trust.expand(source.get("principals"))),
            not_principals=_strings(self.trust.expand(source.get("notPrincipals"))),
            namespaces=_strings(source.get("namespaces")),
            not_namespaces=_strings(source.get("notNamespaces")),
            source_ips=_blocks(source.get("ipBlocks"), f"{path}.ipBlocks"),
            not_source_ips=_blocks(source.get("notIpBlocks"), f"{path}.notIpBlocks"),
            service_accounts=_accounts(source.get("serviceAccounts"), self.namespace),
            not_service_accounts=_accounts(source.get("notServiceAccounts"), self.namespace),
        )

    def _condition(self, condition: Object, path: str) -> rbac.Match:
        values, others = condition.get("values"), condition.get("notValues")
        here, there = f"{path}.values", f"{path}.notValues"
        match condition.get("key"):
            case "source.ip":
                return rbac.Match(source_ips=_blocks(values, here), not_source_ips=_blocks(others, there))
            case "source.namespace":
                return rbac.Match(namespaces=_strings(values), not_namespaces=_strings(others))
            case "source.principal":
                wanted, unwanted = self.trust.expand(values), self.trust.expand(others)
                return rbac.Match(principals=_strings(wanted), not_principals=_strings(unwanted))
            case "source.serviceAccount":
                return rbac.Match(
                    service_accounts=_accounts(values, self.namespace),
                    not_service_accounts=_accounts(others, self.namespace),
                )
            case "destination.ip":
                return rbac.Match(
                    destination_ips=_blocks(values, here), not_destination_ips=_blocks(others, there)
                )
            case "destination.port":
                return rbac.Match(
                    destination_ports=_ports(values, here), not_destination_ports=_ports(others, there)
                )
            case unknown:
                message = f"{unknown} is an HTTP attribute, which only a waypoint can enforce"
                raise _Unenforceable(f"{path}.key", message)


def _enforceable(part: Object, path: str) -> tuple[Object, list[Finding]]:
    """A source, operation or condition without the fields that L4 cannot see, which are reported."""
    if "key" in part:
        return part, []
    allowed = _SOURCE if path.endswith(".source") else _OPERATION
    unseen = [name for name, values in part.items() if values and name not in allowed]
    message = "an HTTP attribute, which only a waypoint can enforce"
    findings = [Finding(f"{path}.{name}", message) for name in sorted(unseen)]
    return {name: values for name, values in part.items() if name in allowed and values}, findings


def _operation(operation: Object, path: str) -> rbac.Match:
    return rbac.Match(
        destination_ports=_ports(operation.get("ports"), f"{path}.ports"),
        not_destination_ports=_ports(operation.get("notPorts"), f"{path}.notPorts"),
    )


def _strings(values: list[str] | None) -> list[rbac.StringMatch]:
    """Istio's wildcards: `*` for any present value, else a star at one end."""
    matches = []
    for value in values or []:
        if value == "*":
            matches.append(rbac.StringMatch(presence=rbac.StringMatch.Presence()))
        elif value.startswith("*"):
            matches.append(rbac.StringMatch(suffix=value[1:]))
        elif value.endswith("*"):
            matches.append(rbac.StringMatch(prefix=value[:-1]))
        else:
            matches.append(rbac.StringMatch(exact=value))
    return matches


def _accounts(values: list[str] | None, namespace: str) -> list[rbac.ServiceAccountMatch]:
    """`NAME` in the policy's own namespace, or `NAMESPACE/NAME`."""
    matches = []
    for value in values or []:
        space, slash, name = value.partition("/")
        matches.append(
            rbac.ServiceAccountMatch(
                namespace=space if slash else namespace, service_account=name if slash else space
            )
        )
    return matches


def _blocks(values: list[str] | None, path: str) -> list[rbac.Address]:
    addresses = []
    for value in values or []:
        try:
            network = ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise _Unenforceable(path, f"{value!r} is neither an address nor a CIDR block") from None
        addresses.append(rbac.Address(address=network.network_address.packed, length=network.prefixlen))
    return addresses


def _ports(values: list[Any] | None, path: str) -> list[int]:
    ports = []
    for value in values or []:
        if not str(value).isdigit() or not 0 < int(value) < 65536:
            raise _Unenforceable(path, f"{value!r} is not a port number (1 to 65535)")
        ports.append(int(value))
    return ports
