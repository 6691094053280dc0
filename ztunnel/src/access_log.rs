//! One line for each finished connection, on standard output, as JSON with the field names of
//! Istio's ztunnel. Written by a thread of its own, many lines at once; connections never wait
//! for it. If standard output does not keep up, lines are lost and counted.

use std::{
    io::{self, Write},
    sync::mpsc::{sync_channel, Receiver, SyncSender},
    thread,
};

use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use time::{format_description::well_known::Rfc3339, OffsetDateTime};

const QUEUE: usize = 8192;
const BATCH_BYTES: usize = 64 << 10;

/// A finished connection.
#[derive(Debug, Serialize)]
pub struct Entry {
    pub level: &'static str,
    pub time: String,
    pub scope: &'static str,
    pub message: &'static str,
    #[serde(rename = "src.addr")]
    pub source_address: String,
    #[serde(rename = "src.workload", skip_serializing_if = "Option::is_none")]
    pub source_workload: Option<String>,
    #[serde(rename = "src.namespace", skip_serializing_if = "Option::is_none")]
    pub source_namespace: Option<String>,
    #[serde(rename = "src.identity", skip_serializing_if = "Option::is_none")]
    pub source_identity: Option<String>,
    #[serde(rename = "dst.addr")]
    pub destination_address: String,
    #[serde(rename = "dst.hbone_addr", skip_serializing_if = "Option::is_none")]
    pub hbone_address: Option<String>,
    #[serde(rename = "dst.service", skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    #[serde(rename = "dst.workload", skip_serializing_if = "Option::is_none")]
    pub destination_workload: Option<String>,
    #[serde(rename = "dst.namespace", skip_serializing_if = "Option::is_none")]
    pub destination_namespace: Option<String>,
    #[serde(rename = "dst.identity", skip_serializing_if = "Option::is_none")]
    pub destination_identity: Option<String>,
    pub direction: &'static str,
    pub bytes_sent: u64,
    pub bytes_recv: u64,
    pub duration: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Now, as log lines write it.
pub fn timestamp() -> String {
    OffsetDateTime::now_utc()
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// Takes entries; cheap to clone.
#[derive(Debug, Clone)]
pub struct AccessLog {
    queue: SyncSender<Entry>,
    lost: Counter,
}

impl AccessLog {
    /// Starts the writing thread. It ends when the last clone is gone.
    pub fn to_stdout(lost: Counter) -> io::Result<Self> {
        let (queue, entries) = sync_channel(QUEUE);
        thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write(&entries))?;
        Ok(Self { queue, lost })
    }

    pub fn record(&self, entry: Entry) {
        if self.queue.try_send(entry).is_err() {
            self.lost.inc();
        }
    }
}

fn write(entries: &Receiver<Entry>) {
    let mut lines = Vec::with_capacity(BATCH_BYTES);
    while let Ok(first) = entries.recv() {
        let mut next = Some(first);
        while let Some(entry) = next.take() {
            if serde_json::to_writer(&mut lines, &entry).is_ok() {
                lines.push(b'\n');
            }
            if lines.len() < BATCH_BYTES {
                next = entries.try_recv().ok();
            }
        }
        // A closed standard output is no reason to stop serving.
        let _ = io::stdout().lock().write_all(&lines);
        lines.clear();
    }
}
