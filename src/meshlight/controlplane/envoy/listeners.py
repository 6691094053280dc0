"""A waypoint's listener: connections come from the node proxy with PROXY protocol. Pure.

HTTP connections of every service end in one connection manager. It takes the routes of a request
from where the connection was going (scoped routes, keyed by address and port), so that services come and
go, and their routes and policies change, without a change of the listener: nothing is drained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envoy.config.common.matcher.v3 import matcher_pb2  # noqa: F401 - registers what matchers refer to
from envoy.config.common.mutation_rules.v3 import mutation_rules_pb2
from envoy.config.core.v3 import base_pb2, substitution_format_string_pb2
from envoy.config.listener.v3 import listener_components_pb2 as parts
from envoy.config.listener.v3 import listener_pb2
from envoy.extensions.filters.common.set_filter_state.v3 import value_pb2
from envoy.extensions.filters.listener.http_inspector.v3 import http_inspector_pb2
from envoy.extensions.filters.listener.proxy_protocol.v3 import proxy_protocol_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm
from envoy.extensions.filters.network.set_filter_state.v3 import set_filter_state_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.extensions.http.early_header_mutation.header_mutation.v3 import header_mutation_pb2
from envoy.extensions.matching.common_inputs.network.v3 import network_inputs_pb2 as inputs
from google.protobuf import wrappers_pb2
from xds.type.matcher.v3 import matcher_pb2 as match

from meshlight.controlplane.envoy import names, wire

SOURCE_PRINCIPAL = "mesh.source_principal"
"""Filter state: the client's SPIFFE identity, as the node proxy proved it."""
SOURCE = "mesh.source_"
"""Prefix of the filter state that says what workload the client is: `workload`, `namespace`, …"""
SOURCE_ADDRESS = "mesh.source_address"
"""Filter state (an IP address): where the connection came from, whatever `x-forwarded-for` says."""
_TLVS = {
    0xD0: "principal", 0xE0: "workload", 0xE1: "namespace", 0xE2: "canonical_service",
    0xE3: "canonical_revision", 0xE4: "cluster", 0xE5: "pod",
}  # fmt: skip
"""Fields of the PROXY protocol header: Istio's identity, and ours about the client."""
_TLV_NAMESPACE = "envoy.filters.listener.proxy_protocol"
INSPECTION_TIMEOUT = 5.0

HTTP_CHAIN = "http"


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a connection may be going, and the filter chain that takes it.

    `chain` HTTP_CHAIN is for HTTP; `other` is the chain of connections that turn out not to be
    HTTP, where the port's protocol is not declared (None: it is).
    """

    address: str
    port: int
    chain: str
    other: str | None = None


def waypoint(
    port: int,
    http: Any,
    destinations: Sequence[Destination],
    tcp: Mapping[str, Sequence[Any]],
    *,
    rest: Destination | None = None,
) -> Any:
    """The one listener of a waypoint. `tcp` holds the network filters of the chains that are not HTTP;
    `rest` says what becomes of connections to no known destination (None: they are closed)."""
    chains = [_chain(HTTP_CHAIN, [network_filter("envoy.filters.network.http_connection_manager", http)])]
    chains += [_chain(name, filters) for name, filters in sorted(tcp.items())]
    listener = listener_pb2.Listener(
        name=names.WAYPOINT_LISTENER,
        # Only the node proxy may hand connections over and say whose they are; it comes over loopback.
        address=wire.socket_address("127.0.0.1", port),
        listener_filters=[proxy_protocol(), _inspector(destinations)],
        listener_filters_timeout=wire.seconds(INSPECTION_TIMEOUT),
        continue_on_listener_filters_timeout=True,
        filter_chains=chains,
        traffic_direction=base_pb2.INBOUND,
    )
    listener.filter_chain_matcher.CopyFrom(_matcher(destinations, rest))
    return listener


def scoped_routes() -> hcm.ScopedRoutes:
    """Routes by the connection's destination."""
    fragment = hcm.ScopedRoutes.ScopeKeyBuilder.FragmentBuilder(
        header_value_extractor=hcm.ScopedRoutes.ScopeKeyBuilder.FragmentBuilder.HeaderValueExtractor(
            name=names.DESTINATION_HEADER, index=0
        )
    )
    return hcm.ScopedRoutes(
        name="destinations",
        scope_key_builder=hcm.ScopedRoutes.ScopeKeyBuilder(fragments=[fragment]),
        rds_config_source=wire.ads(),
        scoped_rds=hcm.ScopedRds(scoped_rds_config_source=wire.ads()),
    )


def destination_header() -> Any:
    """Writes the connection's destination over whatever the client sent under that name."""
    header = base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=names.DESTINATION_HEADER, value="%DOWNSTREAM_LOCAL_ADDRESS%"),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    mutation = header_mutation_pb2.HeaderMutation(mutations=[mutation_rules_pb2.HeaderMutation(append=header)])
    return wire.extension("envoy.http.early_header_mutation.header_mutation", mutation)


def network_filter(name: str, message: Any) -> Any:
    """A network filter."""
    return parts.Filter(name=name, typed_config=wire.packed(message))


def tcp_proxy(stat_prefix: str, shares: Sequence[tuple[str, int]], access_logs: Iterable[Any] = ()) -> Any:
    """Connections passed on as they are, to clusters by weight."""
    message = tcp_proxy_pb2.TcpProxy(stat_prefix=stat_prefix, access_log=access_logs)
    if len(shares) == 1:
        message.cluster = shares[0][0]
    else:
        for name, weight in shares:
            message.weighted_clusters.clusters.add(name=name, weight=weight)
    message.idle_timeout.CopyFrom(wire.seconds(0))
    return network_filter("envoy.filters.network.tcp_proxy", message)


def with_access_logs(filters: Iterable[Any], logs: Sequence[Any]) -> list[Any]:
    """Network filters, the TCP proxy among them telling these logs."""
    result = []
    for entry in filters:
        if entry.name == "envoy.filters.network.tcp_proxy":
            message = tcp_proxy_pb2.TcpProxy.FromString(entry.typed_config.value)
            del message.access_log[:]
            message.access_log.extend(logs)
            entry = network_filter(entry.name, message)
        result.append(entry)
    return result


def _chain(name: str, filters: Iterable[Any]) -> Any:
    return parts.FilterChain(name=name, filters=[source(), *filters])


def source() -> Any:
    """Notes who and where a connection is from, before anything a client could write is read."""
    values = [
        *(
            _filter_state(
                SOURCE + name, "envoy.hashable_string", f"%DYNAMIC_METADATA({_TLV_NAMESPACE}:{name})%"
            )
            for name in _TLVS.values()
        ),
        _filter_state(SOURCE_ADDRESS, "envoy.network.ip", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
    ]
    return network_filter(
        "envoy.filters.network.set_filter_state", set_filter_state_pb2.Config(on_new_connection=values)
    )


def _filter_state(key: str, factory: str, text: str) -> Any:
    return value_pb2.FilterStateValue(
        object_key=key,
        factory_key=factory,
        format_string=substitution_format_string_pb2.SubstitutionFormatString(
            text_format_source=base_pb2.DataSource(inline_string=text), omit_empty_values=True
        ),
        skip_if_empty=True,
    )


def proxy_protocol() -> Any:
    """Reads the header that the node proxy puts before a connection's bytes."""
    config = proxy_protocol_pb2.ProxyProtocol
    rules = [
        config.Rule(tlv_type=kind, on_tlv_present=config.KeyValuePair(key=name)) for kind, name in _TLVS.items()
    ]
    return _listener_filter("envoy.filters.listener.proxy_protocol", config(rules=rules))


def _inspector(destinations: Iterable[Destination]) -> Any:
    """Looks for HTTP, except on ports where only other protocols are spoken: a server may speak first."""
    result = _listener_filter("envoy.filters.listener.http_inspector", http_inspector_pb2.HttpInspector())
    http = {d.port for d in destinations if d.chain == HTTP_CHAIN}
    silent = sorted({d.port for d in destinations} - http)
    predicates = [
        parts.ListenerFilterChainMatchPredicate(destination_port_range={"start": port, "end": port + 1})
        for port in silent
    ]
    if len(predicates) == 1:
        result.filter_disabled.CopyFrom(predicates[0])
    elif predicates:
        result.filter_disabled.or_match.rules.extend(predicates)
    return result


def _listener_filter(name: str, message: Any) -> Any:
    return parts.ListenerFilter(name=name, typed_config=wire.packed(message))


def _matcher(destinations: Iterable[Destination], rest: Destination | None) -> Any:
    """A tree: address, then port, then (where it is not declared) protocol."""
    by_address: dict[str, dict[str, Any]] = {}
    for destination in destinations:
        ports = by_address.setdefault(destination.address, {})
        ports[str(destination.port)] = _outcome(destination)
    addresses = {
        address: match.Matcher.OnMatch(matcher=_exact("port", inputs.DestinationPortInput(), ports))
        for address, ports in by_address.items()
    }
    fallback = _outcome(rest) if rest is not None else None
    if not addresses:
        return match.Matcher(on_no_match=fallback or _take(HTTP_CHAIN))
    result = _exact("address", inputs.DestinationIPInput(), addresses)
    if fallback is not None:
        result.on_no_match.CopyFrom(fallback)
    return result


def _outcome(destination: Destination) -> Any:
    if destination.other is None:
        return _take(destination.chain)
    known = {"http/1.0": _take(HTTP_CHAIN), "http/1.1": _take(HTTP_CHAIN), "h2c": _take(HTTP_CHAIN)}
    protocols = {f"'{name}'": outcome for name, outcome in known.items()}
    tree = _exact("protocol", inputs.ApplicationProtocolInput(), protocols)
    tree.on_no_match.CopyFrom(_take(destination.other))
    return match.Matcher.OnMatch(matcher=tree)


def _exact(name: str, message: Any, outcomes: Mapping[str, Any]) -> Any:
    tree = match.Matcher.MatcherTree(
        input=_input(name, message), exact_match_map=match.Matcher.MatcherTree.MatchMap(map=outcomes)
    )
    return match.Matcher(matcher_tree=tree)


def _take(chain: str) -> Any:
    return match.Matcher.OnMatch(action=_input(chain, wrappers_pb2.StringValue(value=chain)))


def _input(name: str, message: Any) -> Any:
    from xds.core.v3 import extension_pb2

    return extension_pb2.TypedExtensionConfig(name=name, typed_config=wire.packed(message))
