//! Workloads: the addresses behind everything else. Parsed once from discovery; what a proxy reads
//! here is known to be well formed.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use super::reference::{Gateway, ServiceKey};
use crate::identity::Identity;

/// How a workload takes connections of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tunnel {
    /// Plain TCP.
    #[default]
    None,
    /// HTTP/2 CONNECT inside mutual TLS, on port 15008.
    Hbone,
}

/// Where a workload runs, from large to small.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// One pod, virtual machine or external endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Workload {
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub addresses: Vec<IpAddr>,
    /// Name to resolve when there are no addresses.
    pub hostname: Arc<str>,
    pub network: Arc<str>,
    pub tunnel: Tunnel,
    pub trust_domain: Arc<str>,
    pub service_account: Arc<str>,
    pub waypoint: Option<Gateway>,
    pub node: Arc<str>,
    pub cluster: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub workload_name: Arc<str>,
    pub workload_type: WorkloadType,
    /// The port on which this workload takes connections with a PROXY protocol header.
    pub proxy_protocol_port: Option<u16>,
    /// Policies that select this workload, as `NAMESPACE/NAME`.
    pub policies: Vec<Arc<str>>,
    pub healthy: bool,
    pub locality: Locality,
    /// Share of its services' connections, relative to the other endpoints.
    pub capacity: u32,
    pub host_network: bool,
    /// For each service it belongs to, service port to the port it listens on.
    pub services: HashMap<ServiceKey, HashMap<u16, u16>>,
}

impl Workload {
    /// The identity its certificate must be for.
    pub fn identity(&self) -> Identity {
        Identity::new(
            self.trust_domain.clone(),
            self.namespace.clone(),
            self.service_account.clone(),
        )
    }
}

/// What a workload is an instance of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WorkloadType {
    Deployment,
    CronJob,
    #[default]
    Pod,
    Job,
}

impl WorkloadType {
    /// As OpenTelemetry's `k8s.*.name` keys write it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}
