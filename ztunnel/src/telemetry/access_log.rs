//! One line for each finished connection, on standard output, with the fields of Istio's ztunnel,
//! as JSON or as text. Written by a thread of its own, many lines at once; if standard output does
//! not keep up, lines are lost and counted.

use std::{
    fmt::{self, Write as _},
    io::{self, Write},
    sync::{
        mpsc::{sync_channel, Receiver, SyncSender},
        Arc,
    },
    thread,
    time::SystemTime,
};

use prometheus_client::metrics::counter::Counter;
use serde::ser::{Serialize, SerializeMap, Serializer};
use time::{format_description::well_known::Rfc3339, OffsetDateTime};

use super::{metrics::Reporter, Flow};

const QUEUE: usize = 8192;
const BATCH_BYTES: usize = 64 << 10;

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Text,
}

/// A moment as log lines write it.
pub fn timestamp(at: SystemTime) -> String {
    OffsetDateTime::from(at)
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// Takes flows; cheap to clone.
#[derive(Debug, Clone)]
pub struct AccessLog {
    queue: SyncSender<Arc<Flow>>,
    lost: Counter,
}

impl AccessLog {
    /// Starts the writing thread. It ends when the last clone is gone.
    pub fn to_stdout(format: LogFormat, lost: Counter) -> io::Result<Self> {
        let (queue, flows) = sync_channel(QUEUE);
        thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write(format, &flows))?;
        Ok(Self { queue, lost })
    }

    pub fn record(&self, flow: Arc<Flow>) {
        if self.queue.try_send(flow).is_err() {
            self.lost.inc();
        }
    }
}

fn write(format: LogFormat, flows: &Receiver<Arc<Flow>>) {
    let mut lines = Vec::with_capacity(BATCH_BYTES);
    while let Ok(first) = flows.recv() {
        let mut next = Some(first);
        while let Some(flow) = next.take() {
            match format {
                LogFormat::Json => {
                    let _ = serde_json::to_writer(&mut lines, &Json(&flow));
                }
                LogFormat::Text => {
                    let _ = lines.write_all(text(&flow).as_bytes());
                }
            }
            lines.push(b'\n');
            if lines.len() < BATCH_BYTES {
                next = flows.try_recv().ok();
            }
        }
        // A closed standard output is no reason to stop serving.
        let _ = io::stdout().lock().write_all(&lines);
        lines.clear();
    }
}

/// One value of a line.
enum Value<'a> {
    Quoted(&'a str),
    Plain(&'a dyn fmt::Display),
    Number(u64),
}

/// Calls `field` for each field in Istio's order; what is not known is left out.
fn fields(flow: &Flow, mut field: impl FnMut(&'static str, Value<'_>)) {
    let (source, destination) = (&flow.source, &flow.destination);
    let ends = [
        (
            source,
            [
                "src.addr",
                "src.workload",
                "src.namespace",
                "src.identity",
                "src.cluster",
            ],
        ),
        (
            destination,
            [
                "dst.addr",
                "dst.workload",
                "dst.namespace",
                "dst.identity",
                "dst.cluster",
            ],
        ),
    ];
    for (end, [address, name, namespace, identity, cluster]) in ends {
        field(address, Value::Plain(&end.address));
        if address == "dst.addr" {
            if let Some(hbone) = &flow.hbone_address {
                field("dst.hbone_addr", Value::Plain(hbone));
            }
            if let Some(service) = &flow.service {
                field("dst.service", Value::Quoted(&service.key.hostname));
            }
        }
        if let Some(workload) = &end.workload {
            field(name, Value::Quoted(&workload.name));
            field(namespace, Value::Quoted(&workload.namespace));
        }
        if let Some(proven) = &end.identity {
            field(identity, Value::Quoted(&proven.to_string()));
        }
        if let Some(workload) = end.workload.as_ref().filter(|w| !w.cluster.is_empty()) {
            field(cluster, Value::Quoted(&workload.cluster));
        }
    }
    let direction = match flow.reporter {
        Reporter::Source => "outbound",
        Reporter::Destination => "inbound",
    };
    field("direction", Value::Quoted(direction));
    field("bytes_sent", Value::Number(flow.bytes_sent));
    field("bytes_recv", Value::Number(flow.bytes_received));
    let duration = format!("{}ms", flow.duration.as_millis());
    field("duration", Value::Quoted(&duration));
    if let Some(error) = &flow.error {
        field("error", Value::Quoted(error));
    }
}

fn level(flow: &Flow) -> &'static str {
    match &flow.error {
        None => "info",
        Some(_) if flow.message == EARLY => "warn",
        Some(_) => "error",
    }
}

/// The message of a connection that was refused before its sides were known.
pub const EARLY: &str = "connection failed";

/// The line as text, without its end.
pub fn text(flow: &Flow) -> String {
    let mut line = format!(
        "{}\t{}\taccess\t{}\t",
        timestamp(flow.ended),
        level(flow),
        flow.message
    );
    let mut separator = "";
    fields(flow, |name, value| {
        let _ = match value {
            Value::Quoted(text) => write!(line, "{separator}{name}={text:?}"),
            Value::Plain(text) => write!(line, "{separator}{name}={text}"),
            Value::Number(number) => write!(line, "{separator}{name}={number}"),
        };
        separator = " ";
    });
    line
}

struct Json<'a>(&'a Flow);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("level", level(self.0))?;
        map.serialize_entry("time", &timestamp(self.0.ended))?;
        map.serialize_entry("scope", "access")?;
        map.serialize_entry("message", self.0.message)?;
        let mut result = Ok(());
        fields(self.0, |name, value| {
            if result.is_ok() {
                result = match value {
                    Value::Quoted(text) => map.serialize_entry(name, text),
                    Value::Plain(text) => map.serialize_entry(name, &text.to_string()),
                    Value::Number(number) => map.serialize_entry(name, &number),
                };
            }
        });
        result?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{
        super::{metrics::ResponseFlags, End},
        *,
    };
    use crate::{identity::Identity, state::fixtures::pod};

    fn flow() -> Flow {
        let mut source = End::at("10.0.0.1:4660".parse().unwrap());
        source.workload = Some(Arc::new(pod("front", "10.0.0.1")));
        source.identity = Some(Identity::new("cluster.local", "shop", "front"));
        Flow {
            reporter: Reporter::Destination,
            message: "connection complete",
            source,
            destination: End::at("10.0.0.2:15008".parse().unwrap()),
            hbone_address: Some("10.0.0.2:80".to_owned()),
            service: None,
            bytes_sent: 7,
            bytes_received: 9,
            ended: SystemTime::UNIX_EPOCH,
            duration: Duration::from_millis(12),
            flags: ResponseFlags::None,
            error: Some("why \"not\"".to_owned()),
            judgement: None,
        }
    }

    #[test]
    fn text_is_istios() {
        assert_eq!(
            text(&flow()),
            "1970-01-01T00:00:00Z\terror\taccess\tconnection complete\t\
             src.addr=10.0.0.1:4660 src.workload=\"front\" src.namespace=\"shop\" \
             src.identity=\"spiffe://cluster.local/ns/shop/sa/front\" \
             dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 \
             direction=\"inbound\" bytes_sent=7 bytes_recv=9 duration=\"12ms\" \
             error=\"why \\\"not\\\"\""
        );
    }

    #[test]
    fn json_has_the_same_fields() {
        let line = serde_json::to_value(Json(&flow())).unwrap();
        assert_eq!(line["scope"], "access");
        assert_eq!(line["bytes_recv"], 9);
        assert_eq!(line["dst.hbone_addr"], "10.0.0.2:80");
        assert_eq!(line["error"], "why \"not\"");
        assert!(line.get("dst.workload").is_none());
    }
}
