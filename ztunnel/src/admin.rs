//! Windows into the running proxy: readiness for the kubelet, metrics for Prometheus, and, on the
//! loopback address only, the configuration in force.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError},
};

use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::{
    config::Config,
    http_server::{Request, Response},
    identity::store::CertificateSummary,
    proxy::{open_connections::ConnectionsView, Pod, ProxyContext},
    state::dump::Dump,
    telemetry::log_format,
};

/// Everything in force, under the keys of Istio's ztunnel.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConfigDump {
    version: Version,
    #[serde(flatten)]
    state: Dump,
    certificates: Vec<CertificateSummary>,
    workload_state: BTreeMap<String, PodView>,
    config: ConfigView,
    pool: PoolUsage,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    version: &'static str,
    git_revision: &'static str,
    build_status: &'static str,
}

#[derive(Serialize)]
struct PodView {
    state: &'static str,
    connections: ConnectionsView,
    info: PodInfo,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodInfo {
    name: String,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

/// What the proxy was started with; no secret is among it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConfigView {
    node_name: String,
    cluster_id: String,
    cluster_domain: String,
    trust_domain: String,
    trust_domain_aliases: Vec<String>,
    network: String,
    secret_ttl_seconds: u64,
    num_worker_threads: usize,
    pool_max_streams_per_conn: usize,
    pool_unused_release_timeout_seconds: u64,
    self_termination_deadline_seconds: u64,
    enable_original_source: bool,
    dns_proxy: bool,
    flow_collector: Option<String>,
}

#[derive(Serialize)]
struct PoolUsage {
    connections: usize,
    tunnels: usize,
}

const USAGE: &str = "\
GET  /config_dump           workloads, services, policies, certificates, connections
GET  /healthz
POST /logging               the log levels in force
POST /logging?level=LEVEL   change them: LEVEL or SCOPE:LEVEL, several with commas between
POST /logging?reset         as at the start
POST /quitquitquit          drain and end
";

/// Answers on the admin port. `quit` is told to stop the process.
pub fn handler(
    context: Arc<ProxyContext>,
    quit: CancellationToken,
) -> impl Fn(&Request<'_>) -> Response {
    move |request| match (request.method, request.path) {
        ("GET", "/config_dump") => config_dump(&context),
        ("GET" | "HEAD", "/healthz") => Response::text("200 OK", "ok\n"),
        ("POST", "/logging") => logging(request, &context.config.log_levels),
        ("POST", "/quitquitquit") => {
            quit.cancel();
            Response::text("200 OK", "shutdown now\n")
        }
        ("GET", "/") => Response::text("200 OK", USAGE),
        (_, "/logging" | "/quitquitquit") => {
            Response::text("405 Method Not Allowed", format!("use POST\n\n{USAGE}"))
        }
        (_, path) => not_found(path),
    }
}

fn logging(request: &Request<'_>, at_start: &str) -> Response {
    let wanted = match (request.query("level"), request.query("reset")) {
        (Some(levels), _) => Some(levels),
        (None, Some(_)) => Some(at_start),
        (None, None) => None,
    };
    if let Some(Err(error)) = wanted.map(log_format::set_levels) {
        return Response::text("400 Bad Request", format!("{error}\n"));
    }
    let levels = log_format::levels();
    Response::text("200 OK", format!("current log level is {levels}\n"))
}

/// Answers on the metrics port.
pub fn metrics_handler(context: Arc<ProxyContext>) -> impl Fn(&Request<'_>) -> Response {
    move |request| match request.path {
        "/metrics" | "/stats/prometheus" => match context.metrics.text() {
            Ok(body) => Response {
                status: "200 OK",
                content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
                body,
            },
            Err(error) => failed(&error),
        },
        path => not_found(path),
    }
}

/// Answers on the readiness port: ready once the mesh is known and the node's pods are served.
pub fn readiness_handler(
    mesh_known: watch::Receiver<bool>,
    pods_served: watch::Receiver<bool>,
) -> impl Fn(&Request<'_>) -> Response {
    move |request| {
        if request.path != "/healthz/ready" {
            return not_found(request.path);
        }
        let waiting: Vec<&str> = [
            (*mesh_known.borrow(), "discovery has not answered"),
            (
                *pods_served.borrow(),
                "the node agent has not sent its pods",
            ),
        ]
        .into_iter()
        .filter_map(|(done, reason)| (!done).then_some(reason))
        .collect();
        if waiting.is_empty() {
            Response::text("200 OK", "ready\n")
        } else {
            Response::text(
                "503 Service Unavailable",
                format!("not ready: {}\n", waiting.join(", ")),
            )
        }
    }
}

fn config_dump(context: &ProxyContext) -> Response {
    let (connections, tunnels) = context.pool.usage();
    let pods = context.pods.lock().unwrap_or_else(PoisonError::into_inner);
    let workload_state = pods
        .iter()
        .map(|(uid, pod)| (uid.clone(), PodView::of(pod)))
        .collect();
    drop(pods);
    let dump = ConfigDump {
        version: Version {
            version: env!("CARGO_PKG_VERSION"),
            git_revision: "unknown",
            build_status: "Meshlight",
        },
        state: context.state.read().dump(),
        certificates: context.certificates.summaries(),
        workload_state,
        config: ConfigView::of(&context.config),
        pool: PoolUsage {
            connections,
            tunnels,
        },
    };
    match serde_json::to_string_pretty(&dump) {
        Ok(body) => Response {
            status: "200 OK",
            content_type: "application/json",
            body,
        },
        Err(error) => failed(&error),
    }
}

impl PodView {
    fn of(pod: &Pod) -> Self {
        Self {
            state: "Up",
            connections: pod.connections.view(),
            info: PodInfo {
                name: pod.name.clone(),
                namespace: pod.namespace.clone(),
                service_account: pod.identity.service_account.clone(),
            },
        }
    }
}

impl ConfigView {
    fn of(config: &Config) -> Self {
        Self {
            node_name: config.node_name.clone(),
            cluster_id: config.cluster_id.clone(),
            cluster_domain: config.cluster_domain.clone(),
            trust_domain: config.trust_domain.clone(),
            trust_domain_aliases: config.trust_domain_aliases.clone(),
            network: config.network.clone(),
            secret_ttl_seconds: config.certificate_ttl.as_secs(),
            num_worker_threads: config.worker_threads,
            pool_max_streams_per_conn: config.pool_max_streams,
            pool_unused_release_timeout_seconds: config.pool_idle.as_secs(),
            self_termination_deadline_seconds: config.termination_grace.as_secs(),
            enable_original_source: config.original_source,
            dns_proxy: config.dns_capture,
            flow_collector: config.flow_collector.clone(),
        }
    }
}

fn not_found(path: &str) -> Response {
    Response::text("404 Not Found", format!("nothing at {path}\n"))
}

fn failed(error: &dyn std::error::Error) -> Response {
    error!(error = %error, "admin request failed");
    Response::text("500 Internal Server Error", format!("{error}\n"))
}
