"""istiod's own metrics, under the names Istio's dashboards and alerts use."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

import meshlight

_SECONDS = (0.01, 0.1, 0.5, 1, 3, 5, 10, 20, 30)


class Count(Collector):
    """A counter under exactly its given name.

    prometheus-client's own appends `_total`, which most of Istio's counters do not carry.
    """

    def __init__(
        self, registry: CollectorRegistry, name: str, documentation: str, labels: tuple[str, ...] = ()
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        registry.register(self)

    def inc(self, *values: str, by: float = 1) -> None:
        """Count; `values` are the labels' values in order."""
        self._values[values] = self._values.get(values, 0) + by

    def value(self, *values: str) -> float:
        """The present count."""
        return self._values.get(values, 0)

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        # The exposition appends _total to a counter's name; untyped is scraped and rated alike.
        metric = Metric(self._name, self._documentation, "unknown")
        for values, count in self._values.items():
            metric.add_sample(self._name, dict(zip(self._labels, values, strict=True)), count)
        return [metric]


class Metrics:
    """One registry a process; tests make their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        build = Gauge("istio_build", "Istio component build info", ["component", "tag"], registry=registry)
        build.labels(component="pilot", tag=meshlight.__version__).set(1)
        self.connections = Gauge(
            "pilot_xds",
            "Number of endpoints connected to this pilot using XDS.",
            ["version"],
            registry=registry,
        )
        self.services = Gauge("pilot_services", "Total services known to pilot.", registry=registry)
        self.pushes = Count(registry, "pilot_xds_pushes", "Responses sent, by resource type.", ("type",))
        self.rejects = Count(
            registry,
            "pilot_total_xds_rejects",
            "Total number of XDS responses from pilot rejected by proxy.",
            ("type",),
        )
        self.object_changes = Count(
            registry, "pilot_k8s_cfg_events", "Changes of configuration objects.", ("type", "event")
        )
        self.unreadable_objects = Count(
            registry, "pilot_k8s_object_errors", "Objects that could not be read and were left out.", ("type",)
        )
        self.push_triggers = Count(
            registry, "pilot_push_triggers", "Batches of changes pushed, by resource type.", ("type",)
        )
        self.registry_changes = Count(
            registry, "pilot_k8s_reg_events", "Changes of pods, services and nodes.", ("type", "event")
        )
        self.internal_errors = Count(
            registry, "pilot_total_xds_internal_errors", "Objects that could not be compiled."
        )
        ProcessCollector(registry=registry)
        started = time.monotonic()
        uptime = Gauge("istiod_uptime_seconds", "Current istiod server uptime in seconds", registry=registry)
        uptime.set_function(lambda: time.monotonic() - started)
        self.convergence = Histogram(
            "pilot_proxy_convergence_time",
            "Delay in seconds between config change and a proxy receiving all required configuration.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.debounce = Histogram(
            "pilot_debounce_time",
            "Delay in seconds between the first change of a batch and its push.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.sizes = Histogram(
            "pilot_xds_config_size_bytes",
            "Distribution of configuration sizes pushed to clients.",
            ["type"],
            buckets=(1, 10_000, 1_000_000, 4_000_000, 10_000_000, 40_000_000),
            registry=registry,
        )
        self.csr_count = Count(
            registry, "citadel_server_csr_count", "The number of CSRs received by Citadel server."
        )
        self.authentication_failures = Count(
            registry, "citadel_server_authentication_failure_count", "The number of authentication failures."
        )
        self.csr_parsing_errors = Count(
            registry,
            "citadel_server_csr_parsing_err_count",
            "The number of errors occurred when parsing the CSR.",
        )
        self.csr_sign_errors = Count(
            registry, "citadel_server_csr_sign_err_count", "The number of errors occurred when signing the CSR."
        )
        self.certificates_issued = Count(
            registry,
            "citadel_server_success_cert_issuance_count",
            "The number of certificates issuances that have succeeded.",
        )
        self.root_expiry = Gauge(
            "citadel_server_root_cert_expiry_timestamp",
            "The unix timestamp, in seconds, when Citadel root cert will expire.",
            registry=registry,
        )
        self.chain_expiry = Gauge(
            "citadel_server_cert_chain_expiry_timestamp",
            "The unix timestamp, in seconds, when Citadel cert chain will expire.",
            registry=registry,
        )
        self.root_load_errors = Count(
            registry,
            "citadel_server_root_cert_load_error_count",
            "The number of times a changed authority could not be used; the last usable one stays.",
        )
        self.issuance = Histogram(
            "citadel_server_cert_issuance_seconds",
            "Time from an authenticated request to its signed certificate.",
            buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
            registry=registry,
        )

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
