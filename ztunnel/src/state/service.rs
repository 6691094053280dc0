//! Services: names and virtual addresses that stand for workloads.

use std::sync::Arc;

use super::reference::{Gateway, NetworkAddress, ServiceKey};
use crate::identity::Identity;

/// Which localities' endpoints may serve, and which go first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadBalancing {
    /// Scopes in order of importance.
    pub preference: Vec<Scope>,
    pub mode: BalanceMode,
    /// Send to unhealthy endpoints too.
    pub any_health: bool,
}

/// What two workloads may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

/// How a preference is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BalanceMode {
    /// No preference.
    #[default]
    Even,
    /// Only endpoints that match every scope.
    Strict,
    /// Those that match the most leading scopes.
    Failover,
    /// To the address the client asked for.
    Passthrough,
}

/// A port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServicePort {
    pub port: u16,
    pub target_port: u16,
}

/// One Kubernetes Service or ServiceEntry host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub key: ServiceKey,
    pub name: Arc<str>,
    pub addresses: Vec<NetworkAddress>,
    pub ports: Vec<ServicePort>,
    pub waypoint: Option<Gateway>,
    pub balancing: LoadBalancing,
    /// Identities its endpoints may prove beside their workloads' own.
    pub identities: Vec<Identity>,
    /// Of several services with this hostname, the one that owns it.
    pub canonical: bool,
}
