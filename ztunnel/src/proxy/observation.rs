//! What is written down about a connection: metrics while it runs, a log line when it ends.

use std::{fmt::Display, net::SocketAddr, sync::Arc, time::Instant};

use super::{
    copy::{Broken, Direction, Traffic},
    ProxyContext,
};
use crate::{
    access_log::{timestamp, Entry},
    identity::Identity,
    metrics::{Reporter, ResponseFlags, Security, TrafficLabels},
    state::{service::Service, workload::Workload},
};

/// Who is on both sides of a connection, as far as it is known.
#[derive(Debug)]
pub struct Parties {
    pub reporter: Reporter,
    pub source_address: SocketAddr,
    pub source: Option<Arc<Workload>>,
    pub source_identity: Option<Identity>,
    pub destination_address: SocketAddr,
    /// What the tunnel was asked for, if there is one.
    pub hbone_address: Option<String>,
    pub service: Option<Arc<Service>>,
    pub destination: Option<Arc<Workload>>,
    pub destination_identity: Option<Identity>,
}

/// One connection being watched.
pub struct Observation<'a> {
    context: &'a ProxyContext,
    parties: Parties,
    labels: TrafficLabels,
    started: Instant,
    pub traffic: Traffic,
}

impl<'a> Observation<'a> {
    /// Begins; the connection counts as opened.
    pub fn start(context: &'a ProxyContext, parties: Parties, started: Instant) -> Self {
        let labels = labels(&parties);
        let (received, sent) = context.metrics.opened(&labels);
        Self {
            context,
            parties,
            labels,
            started,
            traffic: Traffic {
                received: Direction::new(received),
                sent: Direction::new(sent),
            },
        }
    }

    /// Ends after bytes could flow.
    pub fn finish(self, result: Result<(), Broken>) {
        match result {
            Ok(()) => self.end(ResponseFlags::None, None::<&str>),
            Err(error) => self.end(ResponseFlags::None, Some(error)),
        }
    }

    /// Ends with a failure of the proxy's own making.
    pub fn fail(self, flags: ResponseFlags, error: impl Display) {
        self.end(flags, Some(error));
    }

    fn end(self, flags: ResponseFlags, error: Option<impl Display>) {
        self.context.metrics.closed(&self.labels, flags);
        let Parties {
            reporter,
            source_address,
            source,
            source_identity,
            destination_address,
            hbone_address,
            service,
            destination,
            destination_identity,
        } = self.parties;
        let name = |workload: &Option<Arc<Workload>>| workload.as_ref().map(|w| w.name.to_string());
        let namespace =
            |workload: &Option<Arc<Workload>>| workload.as_ref().map(|w| w.namespace.to_string());
        self.context.access_log.record(Entry {
            level: if error.is_some() { "error" } else { "info" },
            time: timestamp(),
            scope: "access",
            message: "connection complete",
            source_address: source_address.to_string(),
            source_workload: name(&source),
            source_namespace: namespace(&source),
            source_identity: source_identity.map(|identity| identity.to_string()),
            destination_address: destination_address.to_string(),
            hbone_address,
            service: service.map(|service| service.key.hostname.to_string()),
            destination_workload: name(&destination),
            destination_namespace: namespace(&destination),
            destination_identity: destination_identity.map(|identity| identity.to_string()),
            direction: match reporter {
                Reporter::Source => "outbound",
                Reporter::Destination => "inbound",
            },
            bytes_sent: self.traffic.sent.total(),
            bytes_recv: self.traffic.received.total(),
            duration: format!("{}ms", self.started.elapsed().as_millis()),
            error: error.map(|error| error.to_string()),
        });
    }
}

fn labels(parties: &Parties) -> TrafficLabels {
    let security = if parties.source_identity.is_some() && parties.destination_identity.is_some() {
        Security::MutualTls
    } else {
        Security::Unknown
    };
    let mut labels = TrafficLabels::new(parties.reporter, security);
    if let Some(workload) = &parties.source {
        labels.set_source(workload);
    }
    if let Some(workload) = &parties.destination {
        labels.set_destination(workload);
    }
    if let Some(service) = &parties.service {
        labels.destination_service = service.key.hostname.clone().into();
        labels.destination_service_namespace = service.key.namespace.clone().into();
        labels.destination_service_name = service.name.clone().into();
    }
    labels.set_principals(
        parties.source_identity.as_ref(),
        parties.destination_identity.as_ref(),
    );
    labels
}
