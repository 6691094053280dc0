"""What proxies tell: Istio's standard metrics, traces, access logs and flow records. Pure.

Everything is read from the request itself, from what the node proxy said of the client (filter state), and
from what the chosen endpoint, cluster and route say of themselves (metadata).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import config_source_pb2, grpc_service_pb2, substitution_format_string_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.config.trace.v3 import http_tracer_pb2, zipkin_pb2
from envoy.extensions.access_loggers.filters.cel.v3 import cel_pb2
from envoy.extensions.access_loggers.grpc.v3 import als_pb2
from envoy.extensions.access_loggers.open_telemetry.v3 import logs_service_pb2
from envoy.extensions.access_loggers.stats.v3 import stats_pb2
from envoy.extensions.access_loggers.stream.v3 import stream_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm
from envoy.type.matcher.v3 import string_pb2
from envoy.type.tracing.v3 import custom_tag_pb2
from envoy.type.v3 import percent_pb2
from opentelemetry.proto.common.v1 import common_pb2 as otel

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.endpoints import METADATA
from meshlight.controlplane.envoy.listeners import SOURCE, SOURCE_PRINCIPAL
from meshlight.controlplane.envoy.route_rules import ROUTE_METADATA
from meshlight.controlplane.envoy.telemetry_settings import CustomTag, Reporter, TelemetrySettings

FLOW_CLUSTER, ZIPKIN_CLUSTER = "flow-records", "zipkin"
FLOW_COLLECTOR = ("jaeger-collector.observability.svc", 4317)
_SIDES = ("workload", "canonical_service", "canonical_revision", "principal", "app", "version", "cluster")


def access_logs(settings: TelemetrySettings, reporter: Reporter) -> list[Any]:
    """The access loggers of a connection manager."""
    loggers = [_metrics(settings, reporter, grpc) for grpc in (False, True)]
    if settings.access_log:
        loggers.append(_stdout(settings))
    loggers += [_flow_records(reporter, denied) for denied in (False, True)]
    return loggers


def connection_logs(settings: TelemetrySettings, reporter: Reporter) -> list[Any]:
    """The access loggers of connections that are not HTTP."""
    labels = _labels(settings, reporter, "tcp")
    for name in ("response_code", "grpc_response_status"):
        labels.pop(name)
    config = stats_pb2.Config(stat_prefix="istio")
    for name, value in (
        ("tcp_sent_bytes_total", "%BYTES_SENT%"),
        ("tcp_received_bytes_total", "%BYTES_RECEIVED%"),
        ("tcp_connections_opened_total", None),
        ("tcp_connections_closed_total", None),
    ):
        _counter(config, settings, name, labels, value)
    return [_logger("envoy.access_loggers.stats", config)]


# Metrics.


def _metrics(settings: TelemetrySettings, reporter: Reporter, grpc: bool) -> Any:
    labels = _labels(settings, reporter, "grpc" if grpc else "http")
    config = stats_pb2.Config(stat_prefix="istio")
    _counter(config, settings, "requests_total", labels, None)
    for name, value, unit in (
        ("request_duration_milliseconds", "%DURATION%", stats_pb2.Config.Histogram.Milliseconds),
        ("request_bytes", "%BYTES_RECEIVED%", stats_pb2.Config.Histogram.Bytes),
        ("response_bytes", "%BYTES_SENT%", stats_pb2.Config.Histogram.Bytes),
    ):
        if name not in settings.disabled_metrics:
            stat = config.histograms.add(value_format=value, unit=unit).stat
            _tag(stat, name, settings, labels)
    header = route_components_pb2.HeaderMatcher(
        name="content-type",
        string_match=string_pb2.StringMatcher(prefix="application/grpc"),
        invert_match=not grpc,
        treat_missing_header_as_empty=True,
    )
    only = accesslog_pb2.AccessLogFilter(header_filter=accesslog_pb2.HeaderFilter(header=header))
    return _logger("envoy.access_loggers.stats", config, only)


def _counter(
    config: Any, settings: TelemetrySettings, name: str, labels: Mapping[str, str], value: str | None
) -> None:
    if name.removesuffix("_total") in settings.disabled_metrics or name in settings.disabled_metrics:
        return
    counter = config.counters.add()
    if value is None:
        counter.value_fixed.value = 1
    else:
        counter.value_format = value
    _tag(counter.stat, name, settings, labels)


def _tag(stat: Any, name: str, settings: TelemetrySettings, labels: Mapping[str, str]) -> None:
    stat.name = name
    changes = settings.tags(name.removesuffix("_total"))
    for label, value in ({**labels, **changes}).items():
        if value:
            stat.tags.add(name=label, value_format=value)


def _labels(settings: TelemetrySettings, reporter: Reporter, protocol: str) -> dict[str, str]:
    """Istio's labels. The names are its own; `-` is what Envoy writes for what is not known."""
    labels = {"reporter": reporter.name}
    if reporter.own is None:
        labels |= {f"source_{side}": f"%FILTER_STATE({SOURCE}{side}:PLAIN)%" for side in _SIDES}
        labels["source_workload_namespace"] = f"%FILTER_STATE({SOURCE}namespace:PLAIN)%"
        labels["source_principal"] = f"%FILTER_STATE({SOURCE_PRINCIPAL}:PLAIN)%"
        labels["source_app"] = labels["source_canonical_service"]
        labels["source_version"] = labels["source_canonical_revision"]
    else:
        own = reporter.own
        labels |= {f"source_{side}": _literal(own.get(side, "unknown")) for side in _SIDES}
        labels["source_workload_namespace"] = _literal(own.get("namespace", "unknown"))
    labels |= {f"destination_{side}": f"%UPSTREAM_METADATA({METADATA}:{side})%" for side in _SIDES}
    labels["destination_workload_namespace"] = f"%UPSTREAM_METADATA({METADATA}:namespace)%"
    labels["destination_service"] = service("service")
    labels["destination_service_name"] = service("service_name")
    labels["destination_service_namespace"] = service("service_namespace")
    labels["request_protocol"] = protocol
    labels["response_code"] = "%RESPONSE_CODE%"
    labels["grpc_response_status"] = "%GRPC_STATUS_NUMBER%"
    labels["response_flags"] = "%RESPONSE_FLAGS%"
    labels["connection_security_policy"] = reporter.security
    return labels


def service(field: str) -> str:
    """A field of the service that was asked, by its cluster, or by the route where there was none."""
    places = [{"command": "METADATA", "param": f"{place}:{METADATA}:{field}"} for place in ("CLUSTER", "ROUTE")]
    return f"%COALESCE({json.dumps({'operators': places}, separators=(',', ':'))})%"


def _literal(text: str) -> str:
    return text.replace("%", "%%")


# Access logs.

ACCESS_LOG = {
    "start_time": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
    "protocol": "%PROTOCOL%",
    "response_code": "%RESPONSE_CODE%",
    "response_flags": "%RESPONSE_FLAGS%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
    "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration": "%DURATION%",
    "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
    "user_agent": "%REQ(USER-AGENT)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "authority": "%REQ(:AUTHORITY)%",
    "upstream_host": "%UPSTREAM_HOST%",
    "upstream_cluster": "%UPSTREAM_CLUSTER_RAW%",
    "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
    "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "requested_server_name": "%REQUESTED_SERVER_NAME%",
    "route_name": "%ROUTE_NAME%",
    "source_principal": f"%FILTER_STATE({SOURCE_PRINCIPAL}:PLAIN)%",
    "traceparent": "%REQ(TRACEPARENT)%",
}
"""Istio's fields of JSON access logs, with the client's identity beside them."""


def _stdout(settings: TelemetrySettings) -> Any:
    message = stream_pb2.StdoutAccessLog(log_format=substitution_format_string_pb2.SubstitutionFormatString())
    message.log_format.json_format.update(ACCESS_LOG)
    only = _expression(settings.access_log_filter) if settings.access_log_filter else None
    return _logger("envoy.access_loggers.stdout", message, only)


def _expression(text: str) -> Any:
    config = wire.packed(cel_pb2.ExpressionFilter(expression=text))
    extension = accesslog_pb2.ExtensionFilter(
        name="envoy.access_loggers.extension_filters.cel", typed_config=config
    )
    return accesslog_pb2.AccessLogFilter(extension_filter=extension)


# Flow records: docs/reference/flow-records.md.

_DENIED = " || ".join(
    f"response.code_details.startsWith('{text}')" for text in ("rbac_access_denied", "ext_authz_denied")
)


def _flow_records(reporter: Reporter, denied: bool) -> Any:
    config = logs_service_pb2.OpenTelemetryAccessLogConfig(
        common_config=als_pb2.CommonGrpcAccessLogConfig(
            log_name="mesh.flow",
            transport_api_version=config_source_pb2.V3,
            buffer_flush_interval=wire.seconds(1),
            grpc_service=grpc_service_pb2.GrpcService(
                envoy_grpc=grpc_service_pb2.GrpcService.EnvoyGrpc(cluster_name=FLOW_CLUSTER)
            ),
        ),
        disable_builtin_labels=True,
        resource_attributes=_pairs(
            {
                "service.name": _literal(reporter.proxy),
                "k8s.namespace.name": _literal(reporter.namespace),
                "k8s.pod.name": "%ENVIRONMENT(POD_NAME)%",
                "k8s.node.name": "%ENVIRONMENT(NODE_NAME)%",
                "k8s.cluster.name": _literal(reporter.cluster),
            }
        ),
        body=otel.AnyValue(
            string_value="%REQ(:METHOD)% %REQ(:AUTHORITY)%%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL% "
            "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%"
        ),
        attributes=_pairs(_flow(reporter) | {"policy.verdict": "deny" if denied else "allow"}),
    )
    only = _expression(_DENIED if denied else f"!({_DENIED})")
    return _logger("envoy.access_loggers.open_telemetry", config, only)


def _flow(reporter: Reporter) -> dict[str, str]:
    source = {name: f"%FILTER_STATE({SOURCE}{name}:PLAIN)%" for name in ("workload", "namespace", "pod")}
    if reporter.own is not None:
        source = {name: "-" for name in source}
    return {
        "event.name": "mesh.flow",
        "flow.kind": "request",
        "reporter": reporter.role,
        "source.address": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%"
        if reporter.own is not None
        else "%FILTER_STATE(mesh.source_address:PLAIN)%",
        "source.port": "%DOWNSTREAM_REMOTE_PORT%",
        "destination.address": "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%",
        "destination.port": "%DOWNSTREAM_LOCAL_PORT%",
        "source.principal": f"%FILTER_STATE({SOURCE_PRINCIPAL}:PLAIN)%",
        "destination.principal": f"%UPSTREAM_METADATA({METADATA}:principal)%",
        **{f"source.{name}": value for name, value in source.items()},
        **{
            f"destination.{name}": f"%UPSTREAM_METADATA({METADATA}:{name})%"
            for name in ("workload", "namespace", "pod")
        },
        "destination.service": service("service"),
        "connection.security_policy": "none" if reporter.security == "unknown" else reporter.security,
        "request.protocol": "http",
        "duration_ns": "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:ns)%",
        "bytes_sent": "%BYTES_SENT%",
        "bytes_received": "%BYTES_RECEIVED%",
        "policy.details": "%RESPONSE_CODE_DETAILS%",
        "response.flags": "%RESPONSE_FLAGS%",
        "error": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
        "http.request.method": "%REQ(:METHOD)%",
        "url.path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "server.address": "%REQ(:AUTHORITY)%",
        "http.response.status_code": "%RESPONSE_CODE%",
        "rpc.grpc.status_code": "%GRPC_STATUS_NUMBER%",
        "http.route": f"%METADATA(ROUTE:{ROUTE_METADATA}:name)%",
        "upstream.attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    }


def _pairs(values: Mapping[str, str]) -> Any:
    pairs = [otel.KeyValue(key=k, value=otel.AnyValue(string_value=v)) for k, v in values.items()]
    return otel.KeyValueList(values=pairs)


def _logger(name: str, message: Any, only: Any = None) -> Any:
    logger = accesslog_pb2.AccessLog(name=name, typed_config=wire.packed(message))
    if only is not None:
        logger.filter.CopyFrom(only)
    return logger


# Traces.


def tracing(settings: TelemetrySettings, reporter: Reporter) -> Any:
    """Spans to a Zipkin collector, contexts in B3 and W3C's form; None when nothing is to be traced."""
    if not settings.zipkin or settings.disable_spans:
        return None
    zipkin = zipkin_pb2.ZipkinConfig(
        collector_cluster=ZIPKIN_CLUSTER,
        collector_endpoint="/api/v2/spans",
        collector_endpoint_version=zipkin_pb2.ZipkinConfig.HTTP_JSON,
        trace_id_128bit=True,
        trace_context_option=zipkin_pb2.ZipkinConfig.USE_B3_WITH_W3C_PROPAGATION,
    )
    zipkin.shared_span_context.value = False
    result = hcm.HttpConnectionManager.Tracing(
        client_sampling=percent_pb2.Percent(value=100),
        random_sampling=percent_pb2.Percent(value=settings.sampling),
        overall_sampling=percent_pb2.Percent(value=100),
        provider=http_tracer_pb2.Tracing.Http(name="envoy.tracers.zipkin", typed_config=wire.packed(zipkin)),
        custom_tags=[*_standard_tags(reporter), *(_custom(tag) for tag in settings.custom_tags)],
    )
    result.max_path_tag_length.value = 256
    return result


def _standard_tags(reporter: Reporter) -> Iterable[Any]:
    for name, value in (
        ("istio.canonical_service", reporter.proxy),
        ("istio.canonical_revision", "latest"),
        ("istio.cluster_id", reporter.cluster),
        ("istio.mesh_id", "cluster.local"),
        ("istio.namespace", reporter.namespace),
    ):
        yield _custom(CustomTag(name, "literal", value))


def _custom(tag: CustomTag) -> Any:
    made = custom_tag_pb2.CustomTag(tag=tag.name)
    match tag.kind:
        case "literal":
            made.literal.value = tag.value
        case "environment":
            made.environment.name = tag.value
            made.environment.default_value = tag.default
        case _:
            made.request_header.name = tag.value
            made.request_header.default_value = tag.default
    return made
