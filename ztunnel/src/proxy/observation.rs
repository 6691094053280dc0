//! What is written down about a connection: metrics while it runs, a flow when it ends.

use std::{
    fmt::Display,
    net::SocketAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use super::{
    copy::{Broken, Direction, Traffic},
    open_connections::{OpenConnection, Registered},
    Pod, ProxyContext,
};
use crate::{
    rbac::Judgement,
    state::service::Service,
    telemetry::{
        access_log::EARLY,
        metrics::{Reporter, ResponseFlags, Security, TrafficLabels},
        End, Flow,
    },
};

/// Who is on both sides of a connection, as far as it is known.
#[derive(Debug)]
pub struct Parties {
    pub reporter: Reporter,
    pub source: End,
    pub destination: End,
    /// The address the client asked for, or the tunnel ends at.
    pub target: SocketAddr,
    /// What the tunnel was asked for, if there is one.
    pub hbone_address: Option<String>,
    pub service: Option<Arc<Service>>,
}

/// One connection being watched.
pub struct Observation<'a> {
    context: &'a ProxyContext,
    parties: Parties,
    labels: TrafficLabels,
    started: Instant,
    judgement: Option<Judgement>,
    _registered: Registered,
    pub traffic: Traffic,
}

impl<'a> Observation<'a> {
    /// Begins; the connection counts as opened, and as one of the pod's.
    pub fn start(context: &'a ProxyContext, pod: &Pod, parties: Parties, started: Instant) -> Self {
        let labels = labels(&parties);
        let (received, sent) = context.metrics.opened(&labels);
        let registered = pod.connections.register(OpenConnection {
            reporter: parties.reporter,
            source: parties.source.address,
            target: parties.target,
            through: parties.destination.address,
            service: parties
                .service
                .as_ref()
                .map(|service| service.key.hostname.clone()),
            tunnelled: parties.hbone_address.is_some(),
        });
        Self {
            context,
            parties,
            labels,
            started,
            judgement: None,
            _registered: registered,
            traffic: Traffic {
                received: Direction::new(received),
                sent: Direction::new(sent),
            },
        }
    }

    /// Notes what the policies said of it.
    pub fn judged(&mut self, judgement: Judgement) {
        self.judgement = Some(judgement);
    }

    /// Ends after bytes could flow.
    pub fn finish(mut self, result: Result<(), Broken>) {
        match result {
            Ok(()) => self.end(ResponseFlags::None, None),
            Err(Broken::Revoked(judgement)) => {
                let error = format!(
                    "connection closed due to policy change: {}",
                    judgement.decision
                );
                self.judgement = Some(judgement);
                self.end(ResponseFlags::PolicyDenied, Some(error));
            }
            Err(error) => self.end(ResponseFlags::None, Some(error.to_string())),
        }
    }

    /// Ends with a failure of the proxy's own making.
    pub fn fail(self, flags: ResponseFlags, error: impl Display) {
        self.end(flags, Some(error.to_string()));
    }

    fn end(self, flags: ResponseFlags, error: Option<String>) {
        self.context.metrics.closed(&self.labels, flags);
        let (received, sent) = (self.traffic.received.total(), self.traffic.sent.total());
        let parties = self.parties;
        let source = parties.reporter == Reporter::Source;
        self.context.flows.record(Flow {
            reporter: parties.reporter,
            message: "connection complete",
            source: parties.source,
            destination: parties.destination,
            hbone_address: parties.hbone_address,
            service: parties.service,
            // Metrics count from the client's side, the log from the reporter's.
            bytes_sent: if source { received } else { sent },
            bytes_received: if source { sent } else { received },
            ended: SystemTime::now(),
            duration: self.started.elapsed(),
            flags,
            error,
            judgement: self.judgement,
        });
    }
}

/// Writes down a connection that was refused before its parties were known.
pub fn refused_early(
    context: &ProxyContext,
    reporter: Reporter,
    source: SocketAddr,
    destination: End,
    flags: ResponseFlags,
    error: impl Display,
) {
    let mut labels = TrafficLabels::new(reporter, Security::Unknown);
    if let Some(workload) = &destination.workload {
        labels.set_destination(workload);
    }
    context.metrics.refused(&labels, flags);
    context.flows.record(Flow {
        reporter,
        message: EARLY,
        source: End::at(source),
        destination,
        hbone_address: None,
        service: None,
        bytes_sent: 0,
        bytes_received: 0,
        ended: SystemTime::now(),
        duration: std::time::Duration::ZERO,
        flags,
        error: Some(error.to_string()),
        judgement: None,
    });
}

fn labels(parties: &Parties) -> TrafficLabels {
    let (source, destination) = (&parties.source, &parties.destination);
    let security = if source.identity.is_some() && destination.identity.is_some() {
        Security::MutualTls
    } else {
        Security::Unknown
    };
    let mut labels = TrafficLabels::new(parties.reporter, security);
    if let Some(workload) = &source.workload {
        labels.set_source(workload);
    }
    if let Some(workload) = &destination.workload {
        labels.set_destination(workload);
    }
    if let Some(service) = &parties.service {
        labels.destination_service = service.key.hostname.clone().into();
        labels.destination_service_namespace = service.key.namespace.clone().into();
        labels.destination_service_name = service.name.clone().into();
    }
    if let Some(identity) = &source.identity {
        labels.set_source_principal(identity);
    }
    labels
}
