//! Numbers for Prometheus under Istio's names and labels, so that Istio's dashboards and Kiali read
//! them as they read Istio's own proxies'.

use std::{
    fmt::{self, Write},
    sync::Arc,
};

use prometheus_client::{
    encoding::{text::encode, EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::{identity::Identity, state::workload::Workload};

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
}

impl EncodeLabelValue for ResponseFlags {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(match self {
            Self::None => "-",
            Self::ConnectionFailure => "CONNECT",
            Self::PolicyDenied => "DENY",
        })
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
    }

    pub fn set_destination(&mut self, workload: &Workload) {
        self.destination_workload = Label(workload.workload_name.clone());
        self.destination_canonical_service = Label(workload.canonical_name.clone());
        self.destination_canonical_revision = Label(workload.canonical_revision.clone());
        self.destination_workload_namespace = Label(workload.namespace.clone());
        self.destination_app = Label(workload.canonical_name.clone());
        self.destination_version = Label(workload.canonical_revision.clone());
        self.destination_cluster = Label(workload.cluster.clone());
    }

    /// Identities, known only where there was mutual TLS.
    pub fn set_principals(&mut self, source: Option<&Identity>, destination: Option<&Identity>) {
        let label = |identity: Option<&Identity>| {
            identity.map_or_else(Label::default, |identity| identity.to_string().into())
        };
        self.source_principal = label(source);
        self.destination_principal = label(destination);
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
    #[allow(dead_code)]
    pub dns_requests: Counter,
    #[allow(dead_code)]
    pub dns_upstream_requests: Counter,
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
        let dns_requests: Counter = register!("dns_requests", "DNS queries of pods");
        let dns_upstream_requests: Counter =
            register!("dns_upstream_requests", "DNS queries forwarded");
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
            dns_requests,
            dns_upstream_requests,
        }
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
        labels.set_principals(Some(&Identity::new("cluster.local", "a", "b")), None);
        let (received, _) = metrics.opened(&labels);
        received.inc_by(7);
        metrics.closed(&labels, ResponseFlags::PolicyDenied);
        let text = metrics.text().unwrap();
        for expected in [
            "istio_build{component=\"ztunnel\"",
            "istio_tcp_connections_opened_total{reporter=\"destination\",source_workload=\"unknown\"",
            "source_principal=\"spiffe://cluster.local/ns/a/sa/b\"",
            "connection_security_policy=\"mutual_tls\"} 7",
            "response_flags=\"DENY\"",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
    }
}
