//! The connection to istiod's aggregated discovery service: opened again whenever it ends, with
//! growing pauses. While it is down the proxy goes on with what it knows.

use std::{path::PathBuf, sync::Arc, time::Duration};

use prost::Message;
use prost_types::{value::Kind as ValueKind, Struct, Value};
use tracing::{debug, info, warn};

use super::session::Session;
use crate::{
    backoff::{Backoff, WHILE_ABSENT},
    config::Config,
    grpc::{Endpoint, GrpcError, Metadata},
    proto::discovery::{DeltaDiscoveryResponse, Node},
    state::shared::SharedState,
    telemetry::metrics::Metrics,
};

const STREAM: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// Keeps the mesh state up to date.
pub struct DiscoveryClient {
    endpoint: Endpoint,
    token: PathBuf,
    node: Node,
    session: Session,
    state: Arc<SharedState>,
    metrics: Arc<Metrics>,
}

impl DiscoveryClient {
    /// A client of the server at `endpoint`.
    pub fn new(
        endpoint: Endpoint,
        config: &Config,
        state: Arc<SharedState>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            endpoint,
            token: config.token.clone(),
            node: node(config),
            session: Session::new(&config.trust_domain),
            state,
            metrics,
        }
    }

    /// Runs for the life of the process.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(15));
        loop {
            let mut served = false;
            let result = self.serve_once(&mut served).await;
            if served {
                backoff.reset();
            }
            let pause = match &result {
                Err(GrpcError::Absent { .. }) => backoff.next_within(WHILE_ABSENT),
                _ => backoff.next(),
            };
            self.metrics.xds_terminated(match &result {
                Ok(()) => "complete",
                Err(GrpcError::Status { .. }) => "error",
                Err(_) => "connection_error",
            });
            let retry_in_ms = pause.as_millis() as u64;
            match result {
                Ok(()) => info!(retry_in_ms, "discovery stream ended by the server"),
                Err(error) => warn!(error = %error, retry_in_ms, "discovery stream failed"),
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn serve_once(&mut self, served: &mut bool) -> Result<(), GrpcError> {
        let metadata = Metadata::with_token(&self.token)?;
        let channel = self.endpoint.connect().await?;
        let (mut requests, responses) = channel.open(STREAM, &metadata).await?;
        for request in self.session.opening(&self.node) {
            requests.send(&request)?;
        }
        let mut responses = responses.await_headers().await?;
        info!("discovery stream open");
        while let Some(response) = responses.message::<DeltaDiscoveryResponse>().await? {
            *served = true;
            self.metrics
                .xds_received(&response.type_url, response.encoded_len() as u64);
            debug!(
                type_url = response.type_url,
                resources = response.resources.len(),
                removed = response.removed_resources.len(),
                "discovery response"
            );
            let outcome = self.session.receive(response);
            if !outcome.refused.is_empty() {
                warn!(refused = ?outcome.refused, "discovery response refused in part");
            }
            self.state.apply(outcome.changes);
            requests.send(&outcome.answer)?;
            if self.session.synchronized() {
                self.state.set_synchronized();
            }
        }
        Ok(())
    }
}

/// How the proxy introduces itself, as Istio's proxies do.
fn node(config: &Config) -> Node {
    let text = |value: &str| Value {
        kind: Some(ValueKind::StringValue(value.to_owned())),
    };
    let namespace = &config.pod_namespace;
    Node {
        id: format!(
            "ztunnel~{}~{}.{namespace}~{namespace}.svc.{}",
            config.instance_ip, config.pod_name, config.cluster_domain
        ),
        metadata: Some(Struct {
            fields: [
                ("NAME", config.pod_name.as_str()),
                ("NAMESPACE", namespace),
                ("NODE_NAME", &config.node_name),
                ("INSTANCE_IPS", &config.instance_ip),
                ("CLUSTER_ID", &config.cluster_id),
                ("ISTIO_VERSION", env!("CARGO_PKG_VERSION")),
            ]
            .into_iter()
            .map(|(key, value)| (key.to_owned(), text(value)))
            .collect(),
        }),
        ..Node::default()
    }
}
