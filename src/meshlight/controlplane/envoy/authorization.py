"""AuthorizationPolicy as the RBAC filters of waypoints and gateways. Pure.

Filters stand in Istio's order: CUSTOM, AUDIT, DENY, ALLOW. Every rule becomes one RBAC policy whose name
says which object and rule it is, so that a denial names them (`response_code_details` has the name).

What a connection that is not HTTP does not have (methods, headers, claims) fails safe, as at the node
proxies: an ALLOW rule that asks for it allows nothing, a DENY rule forgets that condition and denies more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from envoy.config.core.v3 import config_source_pb2, grpc_service_pb2, http_uri_pb2
from envoy.config.listener.v3 import listener_components_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.extensions.filters.http.ext_authz.v3 import ext_authz_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as http_rbac
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm
from envoy.extensions.filters.network.rbac.v3 import rbac_pb2 as network_rbac
from envoy.type.matcher.v3 import metadata_pb2, string_pb2, value_pb2
from google.protobuf import any_pb2

from meshlight.controlplane.envoy import authorization_matches as m
from meshlight.controlplane.envoy import wire
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.policy import DRY_RUN, OWN_TRUST, Finding, TrustDomains
from meshlight.kube.resources import Object

HTTP_FILTER, NETWORK_FILTER = "envoy.filters.http.rbac", "envoy.filters.network.rbac"
EXTERNAL = "envoy.filters.http.ext_authz"
_ACTIONS = {
    "AUDIT": rbac_pb2.RBAC.LOG,
    "DENY": rbac_pb2.RBAC.DENY,
    "ALLOW": rbac_pb2.RBAC.ALLOW,
}
_HTTP_SOURCE = ("requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks")
_HTTP_OPERATION = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
_CONDITION = re.compile(r"(?P<name>[a-zA-Z.]+)(?P<keys>(\[[^\]]+\])*)")


@dataclass(frozen=True, slots=True)
class ExternalAuthorizer:
    """An extension provider of meshConfig for CUSTOM policies (`envoyExtAuthzHttp`, `envoyExtAuthzGrpc`).

    `cluster` is the Envoy cluster of its service and port; `timeout` in seconds. Header names may end in `*`.
    """

    name: str
    cluster: str
    grpc: bool
    timeout: float = 600.0
    fail_open: bool = False
    status_on_error: int = 403
    path_prefix: str = ""
    headers_to_upstream: tuple[str, ...] = ()
    headers_to_downstream_on_deny: tuple[str, ...] = ()
    headers_to_downstream_on_allow: tuple[str, ...] = ()
    include_request_headers: tuple[str, ...] = ()
    additional_headers: tuple[tuple[str, str], ...] = ()
    body_bytes: int = 0
    body_allow_partial: bool = False
    body_raw: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """One AuthorizationPolicy compiled, for HTTP and for connections that are not.

    The keys of `http` and `tcp` are rule names; `provider` is set for CUSTOM; `findings` name what is not
    enforced as written.
    """

    key: ObjectKey
    action: str
    dry_run: bool
    provider: str
    http: Mapping[str, Any]
    tcp: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()


class _Unseen(Exception):
    """A field that a connection without HTTP does not have, or a value that cannot be read."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.finding = Finding(path, message)


def rule_name(key: ObjectKey, index: int) -> str:
    """The RBAC policy of a rule, as Istio names it."""
    return f"ns[{key.namespace}]-policy[{key.name}]-rule[{index}]"


def policy_of(name: str) -> tuple[ObjectKey, int] | None:
    """The policy and rule that a name of `rule_name` means, None when it is no such name."""
    found = re.search(r"ns\[([^\]]+)\]-policy\[([^\]]+)\]-rule\[(\d+)\]", name)
    return (ObjectKey(found[1], found[2]), int(found[3])) if found else None


def compile_policy(obj: Object, trust: TrustDomains = OWN_TRUST) -> Policy:
    """Compile one AuthorizationPolicy for a waypoint or gateway; whom it is for is the caller's to decide."""
    spec, key = obj.get("spec") or {}, ObjectKey.of(obj)
    action = spec.get("action") or "ALLOW"
    annotations = obj["metadata"].get("annotations") or {}
    findings: list[Finding] = []
    built: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for index, rule in enumerate(spec.get("rules") or []):
        for http in (True, False):
            compiler = _Rule(key, trust, http, safe_to_widen=action != "ALLOW")
            policy = compiler.compile(rule or {}, f"spec.rules[{index}]")
            if policy is not None:
                built[http][rule_name(key, index)] = policy
            if http:
                findings += compiler.findings
    return Policy(
        key=key,
        action=action,
        dry_run=str(annotations.get(DRY_RUN, "")).lower() in ("true", "1", "t"),
        provider=(spec.get("provider") or {}).get("name") or "",
        http=built[True],
        tcp=built[False],
        findings=tuple(findings),
    )


@dataclass(slots=True)
class _Rule:
    """Compiles one rule; `safe_to_widen` when forgetting a condition makes the policy stricter."""

    key: ObjectKey
    trust: TrustDomains
    http: bool
    safe_to_widen: bool
    findings: list[Finding] = field(default_factory=list)

    def compile(self, rule: Object, path: str) -> Any:
        """The RBAC policy, None when the rule can match nothing."""
        principals: list[Any] = []
        permissions: list[Any] = []
        try:
            for section, inner, build, into in (
                ("from", "source", self._source, principals),
                ("to", "operation", self._operation, permissions),
            ):
                entries = [(entry or {}).get(inner) or {} for entry in rule.get(section) or []]
                parts = [build(entry, f"{path}.{section}[{i}].{inner}") for i, entry in enumerate(entries)]
                # An entry that says nothing matches everything, and then so does the whole list.
                if parts and all(parts):
                    into.append(m.any_of([m.all_of(part) for part in parts]))
            for i, condition in enumerate(rule.get("when") or []):
                where = f"{path}.when[{i}]"
                parts = self._known(where, partial(self._condition, condition or {}, where))
                for part in parts:
                    (principals if type(part) is m.Principal else permissions).append(part)
        except _Unseen as error:
            self.findings.append(error.finding)
            return None
        anyone, anything = m.Principal(any=True), m.Permission(any=True)
        return rbac_pb2.Policy(
            principals=[m.all_of(principals) if principals else anyone],
            permissions=[m.all_of(permissions) if permissions else anything],
        )

    def _known(self, path: str, build: Callable[[], list[Any]]) -> list[Any]:
        """What `build` makes; nothing in its place where it cannot be and the policy gets stricter so."""
        try:
            return build()
        except ValueError as error:
            unseen = _Unseen(path, str(error))
        except _Unseen as error:
            unseen = error
        if not self.safe_to_widen:
            raise unseen
        self.findings.append(unseen.finding)
        return []

    def _field(
        self, part: Object, path: str, name: str, build: Callable[[str], Any], *, http: bool = False
    ) -> list[Any]:
        opposite = "not" + name[0].upper() + name[1:]
        wanted, unwanted = part.get(name) or [], part.get(opposite) or []
        if not wanted and not unwanted:
            return []
        if http and not self.http:
            raise _Unseen(f"{path}.{name}", "an HTTP attribute, which this connection does not have")
        return m.values(build, wanted, unwanted)

    def _source(self, source: Object, path: str) -> list[Any]:
        def account(value: str) -> Any:
            return m.service_account(value, self.key.namespace)

        expanded = dict(source)
        for name in ("principals", "notPrincipals"):
            expanded[name] = self.trust.expand(source.get(name))
        fields: list[tuple[str, Callable[[str], Any], bool]] = [
            ("principals", m.principal, False),
            ("namespaces", m.namespace, False),
            ("serviceAccounts", account, False),
            ("ipBlocks", m.source_block, False),
            ("remoteIpBlocks", m.remote_block, True),
            ("requestPrincipals", m.request_principal, True),
        ]
        return self._fields(expanded, path, fields)

    def _operation(self, operation: Object, path: str) -> list[Any]:
        fields: list[tuple[str, Callable[[str], Any], bool]] = [
            ("hosts", m.host, True),
            ("methods", m.method, True),
            ("paths", m.path, True),
            ("ports", m.port, False),
        ]
        return self._fields(operation, path, fields)

    def _fields(
        self, part: Object, path: str, fields: Iterable[tuple[str, Callable[[str], Any], bool]]
    ) -> list[Any]:
        result: list[Any] = []
        for name, build, http in fields:
            one = partial(self._field, part, path, name, build, http=http)
            result += self._known(f"{path}.{name}", one)
        return result

    def _condition(self, condition: Object, path: str) -> list[Any]:
        key = str(condition.get("key") or "")
        found = _CONDITION.fullmatch(key)
        name = found["name"] if found else key
        keys = re.findall(r"\[([^\]]+)\]", found["keys"]) if found else []
        wanted, unwanted = condition.get("values") or [], condition.get("notValues") or []
        if name == "source.principal":
            wanted, unwanted = self.trust.expand(wanted), self.trust.expand(unwanted)
        builders: dict[str, tuple[Callable[[str], Any], bool]] = {
            "source.ip": (m.source_block, False),
            "source.namespace": (m.namespace, False),
            "source.principal": (m.principal, False),
            "source.serviceAccount": (lambda v: m.service_account(v, self.key.namespace), False),
            "remote.ip": (m.remote_block, True),
            "destination.ip": (m.destination_block, False),
            "destination.port": (m.port, False),
            "connection.sni": (m.sni, False),
            "request.headers": (lambda v: m.request_header(keys[0], v), True),
            "request.auth.principal": (m.request_principal, True),
            "request.auth.audiences": (lambda v: m.claim(["aud"], v), True),
            "request.auth.presenter": (lambda v: m.claim(["azp"], v), True),
            "request.auth.claims": (lambda v: m.claim(keys, v), True),
        }
        if name not in builders or (name in ("request.headers", "request.auth.claims")) != bool(keys):
            raise _Unseen(f"{path}.key", f"{key!r} is no condition that is known")
        build, http = builders[name]
        if http and not self.http:
            raise _Unseen(f"{path}.key", f"{key} is an HTTP attribute, which this connection does not have")
        return m.values(build, wanted, unwanted)


# Filters.


def http_filters(
    providers: Iterable[str], authorizers: Mapping[str, ExternalAuthorizer]
) -> list[hcm.HttpFilter]:
    """The filters of HTTP requests, in the order in which they decide; each does nothing until a route
    gives it rules (`route_rules`). So policies change without a change of a listener: nothing is drained.

    `providers` are those that any CUSTOM policy of the proxy names.
    """
    filters = []
    for provider in sorted(providers):
        filters.append(_http_filter(f"{HTTP_FILTER}.custom.{provider}", http_rbac.RBAC()))
        if (authorizer := authorizers.get(provider)) is not None:
            filters.append(_http_filter(f"{EXTERNAL}.{provider}", _authorizer(authorizer)))
    for action in _ACTIONS:
        # Dry runs are counted under the filter's prefix, whatever the route's.
        message = http_rbac.RBAC(shadow_rules_stat_prefix=_dry_run_prefix(action))
        filters.append(_http_filter(f"{HTTP_FILTER}.{action.lower()}", message))
    return filters


def _dry_run_prefix(action: str) -> str:
    return f"istio_dry_run_{action.lower()}_"


def _http_filter(name: str, message: Any) -> hcm.HttpFilter:
    return hcm.HttpFilter(name=name, typed_config=wire.packed(message))


def route_rules(
    policies: Sequence[Policy], authorizers: Mapping[str, ExternalAuthorizer]
) -> dict[str, any_pb2.Any]:
    """What all policies of one target ask of its requests: `typed_per_filter_config` of its routes."""
    rules: dict[str, any_pb2.Any] = {}
    for provider in providers_of(policies):
        name = f"{HTTP_FILTER}.custom.{provider}"
        rules[name] = _for_route(_custom(policies, provider, provider in authorizers))
    for action in _ACTIONS:
        enforced, tried = _rules(policies, action, "http")
        if enforced is not None or tried is not None:
            message = http_rbac.RBAC(rules=enforced, shadow_rules=tried)
            message.shadow_rules_stat_prefix = _dry_run_prefix(action) if tried is not None else ""
            rules[f"{HTTP_FILTER}.{action.lower()}"] = _for_route(message)
    return rules


def providers_of(policies: Iterable[Policy]) -> list[str]:
    """The external authorizers that CUSTOM policies name."""
    return sorted({policy.provider for policy in policies if policy.action == "CUSTOM" and policy.http})


def _for_route(message: Any) -> any_pb2.Any:
    return wire.packed(http_rbac.RBACPerRoute(rbac=message))


def _custom(policies: Sequence[Policy], provider: str, known: bool) -> Any:
    """Shadow rules find the requests that a provider must be asked about; its filter then asks.

    A provider that is not there denies what its policies match (Istio: fail closed).
    """
    matched = {
        f"istio-ext-authz-{provider}-{name}": rule
        for policy in policies
        if policy.action == "CUSTOM" and policy.provider == provider and not policy.dry_run
        for name, rule in policy.http.items()
    }
    rules = rbac_pb2.RBAC(action=rbac_pb2.RBAC.DENY, policies=matched)
    if not known:
        return http_rbac.RBAC(rules=rules)
    return http_rbac.RBAC(shadow_rules=rules, shadow_rules_stat_prefix=f"istio_ext_authz_{provider}_")


def network_filters(policies: Sequence[Policy], stat_prefix: str = "tcp.") -> list[Any]:
    """The filters of connections that are not HTTP. CUSTOM is for HTTP: there it denies."""
    filters = []
    for action in ("CUSTOM", "AUDIT", "DENY", "ALLOW"):
        enforced, tried = _rules(policies, action, "tcp")
        if enforced is None and tried is None:
            continue
        message = network_rbac.RBAC(stat_prefix=stat_prefix)
        if enforced is not None:
            message.rules.CopyFrom(enforced)
        if tried is not None:
            message.shadow_rules.CopyFrom(tried)
            message.shadow_rules_stat_prefix = _dry_run_prefix(action)
        filters.append(listener_components_pb2.Filter(name=NETWORK_FILTER, typed_config=wire.packed(message)))
    return filters


def _rules(policies: Sequence[Policy], action: str, protocol: str) -> tuple[Any, Any]:
    """The enforced and the dry-run rules of an action; None where there is no such policy.

    An ALLOW policy without a rule that can match still denies all: that is what makes it different
    from no policy.
    """
    envoy_action = _ACTIONS.get(action, rbac_pb2.RBAC.DENY)
    found: list[Any] = []
    for dry_run in (False, True):
        chosen = [p for p in policies if p.action == action and p.dry_run == dry_run]
        merged = {name: rule for p in chosen for name, rule in getattr(p, protocol).items()}
        wanted = bool(merged) or (bool(chosen) and action == "ALLOW")
        found.append(rbac_pb2.RBAC(action=envoy_action, policies=merged) if wanted else None)
    return found[0], found[1]


def _authorizer(provider: ExternalAuthorizer) -> Any:
    asked = metadata_pb2.MetadataMatcher(
        filter=HTTP_FILTER,
        path=[
            metadata_pb2.MetadataMatcher.PathSegment(
                key=f"istio_ext_authz_{provider.name}_shadow_effective_policy_id"
            )
        ],
        value=value_pb2.ValueMatcher(
            string_match=string_pb2.StringMatcher(prefix=f"istio-ext-authz-{provider.name}-")
        ),
    )
    message = ext_authz_pb2.ExtAuthz(
        transport_api_version=config_source_pb2.V3,
        failure_mode_allow=provider.fail_open,
        filter_enabled_metadata=asked,
        clear_route_cache=True,
    )
    message.status_on_error.code = provider.status_on_error
    if provider.body_bytes:
        message.with_request_body.max_request_bytes = provider.body_bytes
        message.with_request_body.allow_partial_message = provider.body_allow_partial
        message.with_request_body.pack_as_bytes = provider.body_raw
    if provider.grpc:
        target = grpc_service_pb2.GrpcService.EnvoyGrpc(cluster_name=provider.cluster)
        message.grpc_service.CopyFrom(
            grpc_service_pb2.GrpcService(envoy_grpc=target, timeout=wire.seconds(provider.timeout))
        )
        return message
    service = message.http_service
    service.server_uri.CopyFrom(
        http_uri_pb2.HttpUri(
            uri=f"http://{provider.cluster.rpartition('|')[2]}",
            cluster=provider.cluster,
            timeout=wire.seconds(provider.timeout),
        )
    )
    service.path_prefix = provider.path_prefix
    for name, value in provider.additional_headers:
        service.authorization_request.headers_to_add.add(key=name, value=value)
    if provider.include_request_headers:
        message.allowed_headers.CopyFrom(_names(provider.include_request_headers))
    response = service.authorization_response
    for names, into in (
        (provider.headers_to_upstream, response.allowed_upstream_headers),
        (provider.headers_to_downstream_on_deny, response.allowed_client_headers),
        (provider.headers_to_downstream_on_allow, response.allowed_client_headers_on_success),
    ):
        if names:
            into.CopyFrom(_names(names))
    return message


def _names(names: Iterable[str]) -> Any:
    matchers = []
    for name in names:
        matcher = m.strings(name)
        matcher.ignore_case = not matcher.HasField("safe_regex")
        matchers.append(matcher)
    return string_pb2.ListStringMatcher(patterns=matchers)
