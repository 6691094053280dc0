//! Services: names and virtual addresses that stand for workloads.

use std::{fmt, str::FromStr, sync::Arc};

use serde::Serialize;

use super::workload::NetworkAddress;

/// A service's key, `NAMESPACE/HOSTNAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl FromStr for ServiceKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, hostname)) if !hostname.is_empty() => Ok(Self {
                namespace: namespace.into(),
                hostname: hostname.into(),
            }),
            _ => Err(format!("service {text:?} is not NAMESPACE/HOSTNAME")),
        }
    }
}

impl Serialize for ServiceKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A waypoint: the proxy that traffic must pass on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Gateway {
    pub destination: GatewayDestination,
    pub hbone_port: u16,
}

/// How a waypoint is named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum GatewayDestination {
    Service(ServiceKey),
    Address(NetworkAddress),
}

/// Which localities' endpoints may serve, and which go first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancing {
    /// Scopes in order of importance.
    pub preference: Vec<Scope>,
    pub mode: BalanceMode,
    /// Send to unhealthy endpoints too.
    pub any_health: bool,
}

/// What two workloads may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

/// How a preference is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    pub port: u16,
    pub target_port: u16,
}

/// One Kubernetes Service or ServiceEntry host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub key: ServiceKey,
    pub name: Arc<str>,
    pub addresses: Vec<NetworkAddress>,
    pub ports: Vec<ServicePort>,
    pub waypoint: Option<Gateway>,
    pub balancing: LoadBalancing,
    /// Of several services with this hostname, the one that owns it.
    pub canonical: bool,
}
