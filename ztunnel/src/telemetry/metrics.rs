//! Numbers for Prometheus under Istio's names and labels, so that Istio's dashboards and Kiali read
//! them as they read Istio's own proxies'.

use std::{
    fmt::{self, Write},
    sync::Arc,
};

use prometheus_client::{
    encoding::{text::encode, EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::{identity::Identity, rbac::Judgement, state::workload::Workload};

/// A label's value; an empty one is written `unknown`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Label(Arc<str>);

impl<T: Into<Arc<str>>> From<T> for Label {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

impl EncodeLabelValue for Label {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(if self.0.is_empty() {
            "unknown"
        } else {
            &self.0
        })
    }
}

/// Who observed a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    Source,
    Destination,
}

impl EncodeLabelValue for Reporter {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// How a connection was protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    MutualTls,
    Unknown,
}

impl EncodeLabelValue for Security {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => "unknown",
        })
    }
}

/// Why a connection did not end well, in Istio's letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ResponseFlags {
    #[default]
    None,
    ConnectionFailure,
    PolicyDenied,
    TlsFailure,
    Http2Failure,
    /// Port 15008 of the peer does not answer at all.
    NetworkPolicy,
    IdentityError,
}

impl ResponseFlags {
    pub fn text(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::ConnectionFailure => "CONNECT",
            Self::PolicyDenied => "DENY",
            Self::TlsFailure => "TLS_FAILURE",
            Self::Http2Failure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
        }
    }
}

impl EncodeLabelValue for ResponseFlags {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(self.text())
    }
}

/// The labels of all TCP metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TrafficLabels {
    pub reporter: Reporter,
    pub source_workload: Label,
    pub source_canonical_service: Label,
    pub source_canonical_revision: Label,
    pub source_workload_namespace: Label,
    pub source_principal: Label,
    pub source_app: Label,
    pub source_version: Label,
    pub source_cluster: Label,
    pub destination_service: Label,
    pub destination_service_namespace: Label,
    pub destination_service_name: Label,
    pub destination_workload: Label,
    pub destination_canonical_service: Label,
    pub destination_canonical_revision: Label,
    pub destination_workload_namespace: Label,
    pub destination_principal: Label,
    pub destination_app: Label,
    pub destination_version: Label,
    pub destination_cluster: Label,
    pub request_protocol: Label,
    pub response_flags: ResponseFlags,
    pub connection_security_policy: Security,
    pub source_region: Label,
    pub source_zone: Label,
    pub destination_region: Label,
    pub destination_zone: Label,
}

impl TrafficLabels {
    /// Labels with nobody on either side yet.
    pub fn new(reporter: Reporter, security: Security) -> Self {
        let none = Label::default;
        Self {
            reporter,
            source_workload: none(),
            source_canonical_service: none(),
            source_canonical_revision: none(),
            source_workload_namespace: none(),
            source_principal: none(),
            source_app: none(),
            source_version: none(),
            source_cluster: none(),
            destination_service: none(),
            destination_service_namespace: none(),
            destination_service_name: none(),
            destination_workload: none(),
            destination_canonical_service: none(),
            destination_canonical_revision: none(),
            destination_workload_namespace: none(),
            destination_principal: none(),
            destination_app: none(),
            destination_version: none(),
            destination_cluster: none(),
            request_protocol: "tcp".into(),
            response_flags: ResponseFlags::None,
            connection_security_policy: security,
            source_region: none(),
            source_zone: none(),
            destination_region: none(),
            destination_zone: none(),
        }
    }

    pub fn set_source(&mut self, workload: &Workload) {
        self.source_workload = Label(workload.workload_name.clone());
        self.source_canonical_service = Label(workload.canonical_name.clone());
        self.source_canonical_revision = Label(workload.canonical_revision.clone());
        self.source_workload_namespace = Label(workload.namespace.clone());
        self.source_app = Label(workload.canonical_name.clone());
        self.source_version = Label(workload.canonical_revision.clone());
        self.source_cluster = Label(workload.cluster.clone());
        self.source_region = Label(workload.locality.region.clone());
        self.source_zone = Label(workload.locality.zone.clone());
    }

    pub fn set_destination(&mut self, workload: &Workload) {
        self.destination_workload = Label(workload.workload_name.clone());
        self.destination_canonical_service = Label(workload.canonical_name.clone());
        self.destination_canonical_revision = Label(workload.canonical_revision.clone());
        self.destination_workload_namespace = Label(workload.namespace.clone());
        self.destination_app = Label(workload.canonical_name.clone());
        self.destination_version = Label(workload.canonical_revision.clone());
        self.destination_cluster = Label(workload.cluster.clone());
        self.destination_region = Label(workload.locality.region.clone());
        self.destination_zone = Label(workload.locality.zone.clone());
        self.destination_principal = workload.identity().to_string().into();
    }

    /// The identity a client has proved.
    pub fn set_source_principal(&mut self, identity: &Identity) {
        self.source_principal = identity.to_string().into();
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    component: String,
    tag: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Termination {
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MessageUrl {
    url: String,
}

/// One side's share of the sockets.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Side {
    reporter: Reporter,
}

/// A policy that refused a connection, or would have.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Denial {
    policy: String,
    dry_run: &'static str,
    destination_workload: Label,
    destination_workload_namespace: Label,
}

/// A name looked up when a connection wanted it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Lookup {
    hostname: Label,
    source_workload: Label,
    source_workload_namespace: Label,
}

/// Whose DNS queries.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DnsLabels {
    pub source_workload: Label,
    pub source_workload_namespace: Label,
    pub source_canonical_service: Label,
    pub source_canonical_revision: Label,
    pub source_principal: Label,
    pub source_app: Label,
    pub source_version: Label,
    pub source_cluster: Label,
}

impl DnsLabels {
    pub fn of(workload: Option<&Workload>) -> Self {
        let of = |field: fn(&Workload) -> &Arc<str>| {
            workload.map_or_else(Label::default, |workload| Label(field(workload).clone()))
        };
        Self {
            source_workload: of(|workload| &workload.workload_name),
            source_workload_namespace: of(|workload| &workload.namespace),
            source_canonical_service: of(|workload| &workload.canonical_name),
            source_canonical_revision: of(|workload| &workload.canonical_revision),
            source_principal: workload.map_or_else(Label::default, |workload| {
                workload.identity().to_string().into()
            }),
            source_app: of(|workload| &workload.canonical_name),
            source_version: of(|workload| &workload.canonical_revision),
            source_cluster: of(|workload| &workload.cluster),
        }
    }
}

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    opened: Family<TrafficLabels, Counter>,
    closed: Family<TrafficLabels, Counter>,
    failed: Family<TrafficLabels, Counter>,
    received: Family<TrafficLabels, Counter>,
    sent: Family<TrafficLabels, Counter>,
    xds_terminations: Family<Termination, Counter>,
    xds_messages: Family<MessageUrl, Counter>,
    xds_bytes: Family<MessageUrl, Counter>,
    /// Pods served now.
    pub pods: Gauge,
    /// Access-log lines lost because standard output did not take them.
    pub log_lines_lost: Counter,
    /// Flow records dropped because their collector did not take them.
    pub flow_records_dropped: Counter,
    pub dns_requests: Family<DnsLabels, Counter>,
    pub dns_upstream_requests: Family<DnsLabels, Counter>,
    pub dns_upstream_failures: Family<DnsLabels, Counter>,
    pub dns_upstream_seconds: Family<DnsLabels, Histogram, fn() -> Histogram>,
    sockets: Family<Side, Gauge>,
    denials: Family<Denial, Counter>,
    lookups: Family<Lookup, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let istio = registry.sub_registry_with_prefix("istio");
        let build = Family::<Build, Gauge>::default();
        build
            .get_or_create(&Build {
                component: "ztunnel".to_owned(),
                tag: env!("CARGO_PKG_VERSION").to_owned(),
            })
            .set(1);
        istio.register("build", "Istio component build info", build);
        macro_rules! register {
            ($name:literal, $help:literal) => {{
                let metric = Default::default();
                let registered = registered(&metric);
                istio.register($name, $help, registered);
                metric
            }};
        }
        fn registered<T: Clone>(metric: &T) -> T {
            metric.clone()
        }
        let opened: Family<TrafficLabels, Counter> =
            register!("tcp_connections_opened", "Total opened connections");
        let closed: Family<TrafficLabels, Counter> =
            register!("tcp_connections_closed", "Total closed connections");
        let failed: Family<TrafficLabels, Counter> = register!(
            "tcp_connections_failed",
            "Connections that failed or were denied"
        );
        let received: Family<TrafficLabels, Counter> =
            register!("tcp_received_bytes", "Bytes received during requests");
        let sent: Family<TrafficLabels, Counter> =
            register!("tcp_sent_bytes", "Bytes sent during responses");
        let xds_terminations: Family<Termination, Counter> = register!(
            "xds_connection_terminations",
            "Ends of the discovery stream, by reason"
        );
        let xds_messages: Family<MessageUrl, Counter> =
            register!("xds_message", "Discovery messages received");
        let xds_bytes: Family<MessageUrl, Counter> =
            register!("xds_message_bytes", "Bytes of discovery messages received");
        let dns_requests = register!("dns_requests", "Total number of DNS requests");
        let dns_upstream_requests = register!(
            "dns_upstream_requests",
            "Total number of DNS requests forwarded to upstream"
        );
        let dns_upstream_failures = register!(
            "dns_upstream_failures",
            "Total number of DNS requests that failed to forward upstream"
        );
        let dns_upstream_seconds = Family::new_with_constructor(dns_seconds as fn() -> Histogram);
        istio.register_with_unit(
            "dns_upstream_request_duration",
            "Total time in seconds Istio takes to get DNS response from upstream",
            Unit::Seconds,
            dns_upstream_seconds.clone(),
        );
        let sockets: Family<Side, Gauge> =
            register!("tcp_sockets_open", "The current number of open TCP sockets");
        let lookups: Family<Lookup, Counter> = register!(
            "on_demand_dns",
            "The total number of requests that used on-demand DNS"
        );
        let denials: Family<Denial, Counter> = register!(
            "authorization_denials",
            "Connections that a policy refused, or would have refused were it not a dry run"
        );
        let flow_records_dropped: Counter = register!(
            "flow_records_dropped",
            "Flow records dropped because their collector did not take them"
        );
        let own = registry.sub_registry_with_prefix("workload_manager");
        let pods = Gauge::default();
        own.register("active_proxy_count", "Pods served", pods.clone());
        let log_lines_lost = Counter::default();
        registry.register(
            "access_log_lines_lost",
            "Access-log lines that standard output did not take",
            log_lines_lost.clone(),
        );
        Self {
            registry,
            opened,
            closed,
            failed,
            received,
            sent,
            xds_terminations,
            xds_messages,
            xds_bytes,
            pods,
            log_lines_lost,
            flow_records_dropped,
            dns_requests,
            dns_upstream_requests,
            dns_upstream_failures,
            dns_upstream_seconds,
            sockets,
            denials,
            lookups,
        }
    }
}

fn dns_seconds() -> Histogram {
    Histogram::new([0.0005, 0.001, 0.01, 0.1, 1.0, 5.0])
}

/// A socket of one side, counted while it is held.
pub struct OpenSocket(Gauge);

impl Drop for OpenSocket {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Counts an opened connection; answers the counters of its bytes, received and sent.
    pub fn opened(&self, labels: &TrafficLabels) -> (Counter, Counter) {
        self.opened.get_or_create(labels).inc();
        (
            self.received.get_or_create(labels).clone(),
            self.sent.get_or_create(labels).clone(),
        )
    }

    /// Counts the end of a connection; `flags` say whether it failed.
    pub fn closed(&self, labels: &TrafficLabels, flags: ResponseFlags) {
        let mut labels = labels.clone();
        labels.response_flags = flags;
        self.closed.get_or_create(&labels).inc();
        if flags != ResponseFlags::None {
            self.failed.get_or_create(&labels).inc();
        }
    }

    /// Counts a refused connection that nothing else was counted for.
    pub fn refused(&self, labels: &TrafficLabels, flags: ResponseFlags) {
        let mut labels = labels.clone();
        labels.response_flags = flags;
        self.failed.get_or_create(&labels).inc();
    }

    /// Counts an accepted connection in, until the answer is dropped.
    pub fn socket(&self, reporter: Reporter) -> OpenSocket {
        let gauge = self.sockets.get_or_create(&Side { reporter }).clone();
        gauge.inc();
        OpenSocket(gauge)
    }

    /// Counts what policies refused of connections to `workload`.
    pub fn judged(&self, judgement: &Judgement, workload: &Workload) {
        let real = (&judgement.decision, "false");
        let dry = judgement
            .dry_run
            .as_ref()
            .map(|decision| (decision, "true"));
        for (decision, dry_run) in std::iter::once(real).chain(dry) {
            if decision.allows() {
                continue;
            }
            for policy in decision.policies() {
                self.denials
                    .get_or_create(&Denial {
                        policy: policy.key(),
                        dry_run,
                        destination_workload: Label(workload.workload_name.clone()),
                        destination_workload_namespace: Label(workload.namespace.clone()),
                    })
                    .inc();
            }
        }
    }

    /// Counts a name looked up for a connection of `client`.
    pub fn looked_up(&self, hostname: &Arc<str>, client: Option<&Workload>) {
        let of = |field: fn(&Workload) -> &Arc<str>| {
            client.map_or_else(Label::default, |client| Label(field(client).clone()))
        };
        self.lookups
            .get_or_create(&Lookup {
                hostname: Label(hostname.clone()),
                source_workload: of(|client| &client.workload_name),
                source_workload_namespace: of(|client| &client.namespace),
            })
            .inc();
    }

    pub fn xds_terminated(&self, reason: &str) {
        let reason = reason.to_owned();
        self.xds_terminations
            .get_or_create(&Termination { reason })
            .inc();
    }

    pub fn xds_received(&self, url: &str, bytes: u64) {
        let label = MessageUrl {
            url: url.to_owned(),
        };
        self.xds_messages.get_or_create(&label).inc();
        self.xds_bytes.get_or_create(&label).inc_by(bytes);
    }

    /// The exposition in OpenMetrics text.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_istios() {
        let metrics = Metrics::default();
        let mut labels = TrafficLabels::new(Reporter::Destination, Security::MutualTls);
        labels.set_source_principal(&Identity::new("cluster.local", "a", "b"));
        let (received, _) = metrics.opened(&labels);
        received.inc_by(7);
        metrics.closed(&labels, ResponseFlags::PolicyDenied);
        let text = metrics.text().unwrap();
        for expected in [
            "istio_build{component=\"ztunnel\"",
            "istio_tcp_connections_opened_total{reporter=\"destination\",source_workload=\"unknown\"",
            "source_principal=\"spiffe://cluster.local/ns/a/sa/b\"",
            "connection_security_policy=\"mutual_tls\",source_region=\"unknown\"",
            "destination_zone=\"unknown\"} 7",
            "response_flags=\"DENY\"",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
    }
}
