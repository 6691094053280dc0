"""The tracing server's own metrics, under Jaeger's and the OpenTelemetry collector's names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Measures:
    """Counters and gauges of one server; `exposition` gives them to a scraper."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        self.accepted = counter(
            "otelcol_receiver_accepted_spans", "Spans accepted durably", "receiver", "transport"
        )
        self.refused = counter(
            "otelcol_receiver_refused_spans", "Spans refused, to be sent again", "receiver", "transport"
        )
        self.malformed = counter(
            "meshlight_tracing_malformed_requests", "Requests that no decoder could read", "receiver"
        )
        self.rejected = counter(
            "meshlight_tracing_rejected_records", "Records left out of accepted requests", "receiver"
        )
        self.logs = counter(
            "otelcol_receiver_accepted_log_records", "Log records accepted durably", "receiver", "transport"
        )
        self.queries = counter("jaeger_query_requests", "Queries", "operation", "result")
        self.latency = Histogram(
            "jaeger_query_latency", "Seconds a query took", ("operation", "result"), registry=self.registry
        )
        self.records = gauge("meshlight_tracing_records", "Records in the store", "collection")
        self.bytes = gauge("meshlight_tracing_bytes", "Bytes of parts", "collection")
        self.parts = gauge("meshlight_tracing_parts", "Parts", "collection")
        self.pending = gauge(
            "meshlight_tracing_pending_bytes", "Bytes received and not yet durable", "collection"
        )
        self.expired = gauge("meshlight_tracing_expired_records", "Records dropped by retention", "collection")
        self.damaged = gauge("meshlight_tracing_damaged_files", "Files set aside as damaged", "collection")

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
