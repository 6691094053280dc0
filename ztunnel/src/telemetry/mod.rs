//! What the proxy tells of its work: metrics while connections run, and of each connection that
//! ended one flow, written as a line of the access log and exported as a flow record. Connections
//! never wait for any of it.

pub mod access_log;
pub mod flow_records;
pub mod log_format;
pub mod metrics;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    identity::Identity,
    rbac::Judgement,
    state::{service::Service, workload::Workload},
};
use metrics::{Reporter, ResponseFlags};

/// One side of a connection, as far as it is known.
#[derive(Debug, Clone)]
pub struct End {
    pub address: SocketAddr,
    pub workload: Option<Arc<Workload>>,
    /// Proven by a certificate.
    pub identity: Option<Identity>,
}

impl End {
    /// An address of which nothing more is known.
    pub fn at(address: SocketAddr) -> Self {
        Self {
            address,
            workload: None,
            identity: None,
        }
    }
}

/// One connection that has ended.
#[derive(Debug)]
pub struct Flow {
    pub reporter: Reporter,
    pub message: &'static str,
    pub source: End,
    pub destination: End,
    /// What the tunnel was asked for, if there is one.
    pub hbone_address: Option<String>,
    pub service: Option<Arc<Service>>,
    /// As the reporter's side sees them: what it sent, and what it received.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub ended: SystemTime,
    pub duration: Duration,
    pub flags: ResponseFlags,
    pub error: Option<String>,
    /// What the destination's policies said.
    pub judgement: Option<Judgement>,
}

/// Where flows go.
pub struct Flows {
    pub access_log: access_log::AccessLog,
    pub records: Option<flow_records::Exporter>,
}

impl Flows {
    /// Takes a flow; never waits.
    pub fn record(&self, flow: Flow) {
        let flow = Arc::new(flow);
        if let Some(records) = &self.records {
            records.record(flow.clone());
        }
        self.access_log.record(flow);
    }
}
