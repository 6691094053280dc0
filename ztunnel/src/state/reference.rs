//! How objects of the mesh refer to one another: by address on a network, by host name, as the
//! waypoint in front of something.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::Serialize;

/// An address on a network; the default network's name is empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkAddress {
    pub network: Arc<str>,
    pub address: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

impl Serialize for NetworkAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    pub destination: GatewayDestination,
    pub hbone_port: u16,
}

/// How a waypoint is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GatewayDestination {
    Service(ServiceKey),
    Address(NetworkAddress),
}
