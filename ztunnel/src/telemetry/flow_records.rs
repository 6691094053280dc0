//! Flows as OpenTelemetry log records, sent to a collector over OTLP/gRPC. The schema is that of
//! `docs/reference/flow-records.md`. Records wait in a bounded queue; while the collector is away
//! it fills, and what does not fit is dropped and counted.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use prometheus_client::metrics::counter::Counter;
use tokio::{
    runtime::Handle,
    sync::mpsc,
    time::{timeout, timeout_at, Instant},
};
use tracing::{debug, info};

use super::{access_log, metrics::Reporter, End, Flow};
use crate::{
    backoff::Backoff,
    config::Config,
    grpc::{Endpoint, GrpcError, Metadata},
    rbac::Decision,
};

const EXPORT: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
const QUEUE: usize = 8192;
const BATCH: usize = 512;
const BATCH_TIME: Duration = Duration::from_secs(1);
const INFO: i32 = 9;
const ERROR: i32 = 17;

/// The part of `opentelemetry.proto` that log records need.
mod otlp {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Request {
        #[prost(message, repeated, tag = "1")]
        pub resource_logs: Vec<ResourceLogs>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Response {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ResourceLogs {
        #[prost(message, optional, tag = "1")]
        pub resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub scope_logs: Vec<ScopeLogs>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Resource {
        #[prost(message, repeated, tag = "1")]
        pub attributes: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ScopeLogs {
        #[prost(message, repeated, tag = "2")]
        pub log_records: Vec<LogRecord>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct LogRecord {
        #[prost(fixed64, tag = "1")]
        pub time_unix_nano: u64,
        #[prost(int32, tag = "2")]
        pub severity_number: i32,
        #[prost(message, optional, tag = "5")]
        pub body: Option<AnyValue>,
        #[prost(message, repeated, tag = "6")]
        pub attributes: Vec<KeyValue>,
        #[prost(fixed64, tag = "11")]
        pub observed_time_unix_nano: u64,
        #[prost(string, tag = "12")]
        pub event_name: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct KeyValue {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(message, optional, tag = "2")]
        pub value: Option<AnyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct AnyValue {
        #[prost(oneof = "Value", tags = "1, 3")]
        pub value: Option<Value>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Value {
        #[prost(string, tag = "1")]
        Text(String),
        #[prost(int64, tag = "3")]
        Number(i64),
    }
}

use otlp::{AnyValue, KeyValue, LogRecord, Value};

/// Takes flows for the collector.
pub struct Exporter {
    queue: mpsc::Sender<Arc<Flow>>,
    dropped: Counter,
}

impl Exporter {
    /// Starts sending to `collector`, `http://HOST:PORT`, on `runtime`.
    pub fn start(
        collector: &str,
        config: &Config,
        dropped: Counter,
        runtime: &Handle,
    ) -> Result<Self, GrpcError> {
        let endpoint = Endpoint::new(collector, Path::new("/etc/ssl/certs/ca-certificates.crt"))?;
        let (queue, flows) = mpsc::channel(QUEUE);
        runtime.spawn(export(endpoint, resource(config), flows));
        Ok(Self { queue, dropped })
    }

    pub fn record(&self, flow: Arc<Flow>) {
        if self.queue.try_send(flow).is_err() {
            self.dropped.inc();
        }
    }
}

async fn export(
    endpoint: Endpoint,
    resource: otlp::Resource,
    mut flows: mpsc::Receiver<Arc<Flow>>,
) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    let mut away = false;
    let mut batch = Vec::with_capacity(BATCH);
    while let Some(first) = flows.recv().await {
        batch.push(first);
        let until = Instant::now() + BATCH_TIME;
        while batch.len() < BATCH {
            let room = BATCH - batch.len();
            match timeout_at(until, flows.recv_many(&mut batch, room)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let request = otlp::Request {
            resource_logs: vec![otlp::ResourceLogs {
                resource: Some(resource.clone()),
                scope_logs: vec![otlp::ScopeLogs {
                    log_records: batch.drain(..).map(|flow| record(&flow)).collect(),
                }],
            }],
        };
        while let Err(error) = send(&endpoint, &request).await {
            let pause = backoff.next();
            if away {
                debug!(error = %error, "flow records not taken");
            } else {
                info!(error = %error, "flow records wait for their collector");
            }
            away = true;
            tokio::time::sleep(pause).await;
        }
        if away {
            info!("the collector takes flow records");
            away = false;
            backoff.reset();
        }
    }
}

async fn send(endpoint: &Endpoint, request: &otlp::Request) -> Result<(), GrpcError> {
    let call = async {
        let channel = endpoint.connect().await?;
        let _: otlp::Response = channel.unary(EXPORT, &Metadata::default(), request).await?;
        Ok(())
    };
    timeout(EXPORT_TIMEOUT, call)
        .await
        .unwrap_or_else(|_| Err(GrpcError::Message("no answer in time".to_owned())))
}

fn resource(config: &Config) -> otlp::Resource {
    let mut attributes = Attributes::default();
    attributes.text("service.name", "ztunnel");
    attributes.text("k8s.namespace.name", &config.pod_namespace);
    attributes.text("k8s.pod.name", &config.pod_name);
    attributes.text("k8s.node.name", &config.node_name);
    attributes.text("k8s.cluster.name", &config.cluster_id);
    otlp::Resource {
        attributes: attributes.0,
    }
}

fn nanoseconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|age| u64::try_from(age.as_nanos()).ok())
        .unwrap_or(0)
}

#[derive(Default)]
struct Attributes(Vec<KeyValue>);

impl Attributes {
    /// Adds a text; what is not known, and so empty, is left out.
    fn text(&mut self, key: impl Into<String>, text: &str) {
        if !text.is_empty() {
            self.put(key.into(), Value::Text(text.to_owned()));
        }
    }

    fn number(&mut self, key: impl Into<String>, number: impl TryInto<i64>) {
        self.put(
            key.into(),
            Value::Number(number.try_into().unwrap_or(i64::MAX)),
        );
    }

    fn put(&mut self, key: String, value: Value) {
        self.0.push(KeyValue {
            key,
            value: Some(AnyValue { value: Some(value) }),
        });
    }

    fn end(&mut self, side: &str, end: &End) {
        self.text(format!("{side}.address"), &end.address.ip().to_string());
        self.number(format!("{side}.port"), end.address.port());
        if let Some(identity) = &end.identity {
            self.text(format!("{side}.principal"), &identity.to_string());
        }
        if let Some(workload) = &end.workload {
            self.text(format!("{side}.workload"), &workload.workload_name);
            self.text(format!("{side}.namespace"), &workload.namespace);
            self.text(format!("{side}.pod"), &workload.name);
        }
    }
}

fn record(flow: &Flow) -> LogRecord {
    let mut attributes = Attributes::default();
    attributes.text("flow.kind", "connection");
    attributes.text(
        "reporter",
        match flow.reporter {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        },
    );
    attributes.end("source", &flow.source);
    let mut destination = flow.destination.clone();
    // Of a tunnel, where it ends and not where it begins.
    if let Some(inner) = flow.hbone_address.as_deref().and_then(|at| at.parse().ok()) {
        destination.address = inner;
    }
    attributes.end("destination", &destination);
    if let Some(service) = &flow.service {
        attributes.text("destination.service", &service.key.hostname);
    }
    let both = flow.source.identity.is_some() && flow.destination.identity.is_some();
    attributes.text(
        "connection.security_policy",
        if both { "mutual_tls" } else { "none" },
    );
    attributes.text("request.protocol", "tcp");
    attributes.number("duration_ns", flow.duration.as_nanos());
    attributes.number("bytes_sent", flow.bytes_sent);
    attributes.number("bytes_received", flow.bytes_received);
    let mut denied = false;
    if let Some(judgement) = &flow.judgement {
        denied = !judgement.decision.allows();
        let (verdict, by) = match (&judgement.decision, &judgement.dry_run) {
            (Decision::Allowed(_), Some(would)) => ("dry_run_deny", would),
            (Decision::Allowed(_), None) => ("allow", &judgement.decision),
            (_, _) => ("deny", &judgement.decision),
        };
        attributes.text("policy.verdict", verdict);
        if let Some(policy) = by.policies().first() {
            attributes.text("policy.name", &policy.key());
        }
    }
    attributes.text("response.flags", flow.flags.text());
    if let Some(error) = &flow.error {
        attributes.text("error", error);
    }
    LogRecord {
        time_unix_nano: nanoseconds(flow.ended),
        severity_number: if denied || flow.error.is_some() {
            ERROR
        } else {
            INFO
        },
        body: Some(AnyValue {
            value: Some(Value::Text(access_log::text(flow))),
        }),
        attributes: attributes.0,
        observed_time_unix_nano: nanoseconds(SystemTime::now()),
        event_name: "mesh.flow".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        identity::Identity,
        rbac::{Action, Judgement, Policy, Scope},
        state::fixtures::{cart, pod},
        telemetry::metrics::ResponseFlags,
    };

    #[test]
    fn a_denied_connection_names_its_policy() {
        let identity = |account: &str| Some(Identity::new("cluster.local", "shop", account));
        let policy = Policy {
            name: "strict".into(),
            namespace: "istio-system".into(),
            scope: Scope::Global,
            action: Action::Deny,
            rules: vec![],
            dry_run: false,
        };
        let flow = Flow {
            reporter: Reporter::Destination,
            message: "connection complete",
            source: End {
                address: "10.0.0.1:4660".parse().unwrap(),
                workload: None,
                identity: identity("front"),
            },
            destination: End {
                address: "10.0.0.2:15008".parse().unwrap(),
                workload: Some(Arc::new(pod("cart-1", "10.0.0.2"))),
                identity: identity("cart"),
            },
            hbone_address: Some("10.0.0.2:8080".to_owned()),
            service: Some(Arc::new(cart())),
            bytes_sent: 0,
            bytes_received: 0,
            ended: SystemTime::UNIX_EPOCH + Duration::from_nanos(5),
            duration: Duration::from_micros(2),
            flags: ResponseFlags::PolicyDenied,
            error: Some("denied".to_owned()),
            judgement: Some(Judgement {
                decision: Decision::DeniedBy(Arc::new(policy)),
                dry_run: None,
            }),
        };
        let record = record(&flow);
        assert_eq!((record.time_unix_nano, record.severity_number), (5, ERROR));
        assert_eq!(record.event_name, "mesh.flow");
        let attributes: BTreeMap<_, _> = record
            .attributes
            .into_iter()
            .map(|pair| {
                let text = match pair.value.unwrap().value.unwrap() {
                    Value::Text(text) => text,
                    Value::Number(number) => number.to_string(),
                };
                (pair.key, text)
            })
            .collect();
        let text: Vec<_> = attributes.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            text,
            [
                "bytes_received=0",
                "bytes_sent=0",
                "connection.security_policy=mutual_tls",
                "destination.address=10.0.0.2",
                "destination.namespace=shop",
                "destination.pod=cart-1",
                "destination.port=8080",
                "destination.principal=spiffe://cluster.local/ns/shop/sa/cart",
                "destination.service=cart.shop.svc.cluster.local",
                "duration_ns=2000",
                "error=denied",
                "flow.kind=connection",
                "policy.name=istio-system/strict",
                "policy.verdict=deny",
                "reporter=destination",
                "request.protocol=tcp",
                "response.flags=DENY",
                "source.address=10.0.0.1",
                "source.port=4660",
                "source.principal=spiffe://cluster.local/ns/shop/sa/front",
            ]
        );
    }
}
