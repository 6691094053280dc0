//! Windows into the running proxy: readiness for the kubelet, metrics for Prometheus, and, on the
//! loopback address only, the configuration in force.

use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::{http_server::Response, proxy::ProxyContext, state::Dump};

/// Everything in force, under the keys istioctl reads.
#[derive(Serialize)]
struct ConfigDump {
    version: &'static str,
    #[serde(flatten)]
    state: Dump,
    certificates: Vec<crate::identity::store::CertificateSummary>,
    pool: PoolUsage,
}

#[derive(Serialize)]
struct PoolUsage {
    connections: usize,
    tunnels: usize,
}

/// Answers on the admin port. `quit` is told to stop the process.
pub fn handler(
    context: Arc<ProxyContext>,
    quit: CancellationToken,
) -> impl Fn(&str, &str) -> Response {
    move |method, path| match (method, path) {
        ("GET", "/config_dump") => config_dump(&context),
        ("GET" | "HEAD", "/healthz") => Response::text("200 OK", "ok\n"),
        ("POST", "/quitquitquit") => {
            quit.cancel();
            Response::text("200 OK", "shutting down\n")
        }
        ("GET", "/") => Response::text(
            "200 OK",
            "GET /config_dump\nGET /healthz\nPOST /quitquitquit\n",
        ),
        _ => not_found(path),
    }
}

/// Answers on the metrics port.
pub fn metrics_handler(context: Arc<ProxyContext>) -> impl Fn(&str, &str) -> Response {
    move |_, path| match path {
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
) -> impl Fn(&str, &str) -> Response {
    move |_, path| {
        if path != "/healthz/ready" {
            return not_found(path);
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
    let dump = ConfigDump {
        version: env!("CARGO_PKG_VERSION"),
        state: context.state.read().dump(),
        certificates: context.certificates.summaries(),
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

fn not_found(path: &str) -> Response {
    Response::text("404 Not Found", format!("nothing at {path}\n"))
}

fn failed(error: &dyn std::error::Error) -> Response {
    error!(error = %error, "admin request failed");
    Response::text("500 Internal Server Error", format!("{error}\n"))
}
