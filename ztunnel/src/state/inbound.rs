//! Where a tunnel that arrived in a pod may end. Pure. The pod's own addresses, without the
//! proxy's ports; in a waypoint's pod also the services and workloads that this waypoint stands
//! for. Anything else would make the pod a relay for whoever has a certificate.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use thiserror::Error;

use super::{reference::Gateway, workload::Workload, MeshState};
use crate::config::{INBOUND_HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};

/// What a tunnel asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    Address(SocketAddr),
    Name(String, u16),
}

/// A tunnel's end that is not this pod's to offer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Misdirected {
    #[error("authority {0:?} is not ADDRESS:PORT or HOST:PORT")]
    Unreadable(String),
    #[error("{0} is not an address of this pod")]
    NotHere(String),
    #[error("port {0} is the proxy's own")]
    OwnPort(u16),
}

/// A tunnel's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// The destination that policies judge.
    pub destination: SocketAddr,
    /// Where to connect.
    pub connect: SocketAddr,
    /// Whether to say with PROXY protocol who comes and where to, and the service's hostname if
    /// that was asked for.
    pub proxy_protocol: Option<Option<Arc<str>>>,
}

impl Authority {
    /// Reads the `:authority` of a CONNECT request.
    pub fn parse(text: &str) -> Result<Self, Misdirected> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && !host.contains(['[', ']', ':', '@']) => port
                .parse()
                .map(|port| Self::Name(host.to_owned(), port))
                .map_err(|_| Misdirected::Unreadable(text.to_owned())),
            _ => Err(Misdirected::Unreadable(text.to_owned())),
        }
    }
}

impl MeshState {
    /// Finds the end of a tunnel that arrived at `local`, an address of the pod that is
    /// `workload` in discovery.
    pub fn arrival(
        &self,
        network: &str,
        workload: Option<&Workload>,
        local: IpAddr,
        authority: &Authority,
    ) -> Result<Arrival, Misdirected> {
        if let Authority::Address(address) = authority {
            let known = workload.is_some_and(|own| own.addresses.contains(&address.ip()));
            if known || address.ip() == local {
                return here(workload, *address);
            }
        }
        if let (Authority::Name(host, port), Some(own)) = (authority, workload) {
            if own.proxy_protocol_port.is_none() {
                if let Some(target) = self.target_port(own, host, *port) {
                    return here(workload, SocketAddr::new(local, target));
                }
            }
        }
        workload
            .and_then(|own| self.behind(network, own, local, authority))
            .ok_or_else(|| {
                Misdirected::NotHere(match authority {
                    Authority::Address(address) => address.to_string(),
                    Authority::Name(host, port) => format!("{host}:{port}"),
                })
            })
    }

    /// The port of `own` that serves a port of the service of that name, if it is an endpoint.
    fn target_port(&self, own: &Workload, host: &str, port: u16) -> Option<u16> {
        let service = self.service_named(host, &own.namespace)?;
        let ports = own.services.get(&service.key)?;
        ports.get(&port).copied()
    }

    /// What lies behind the waypoint that `own` is an instance of.
    fn behind(
        &self,
        network: &str,
        own: &Workload,
        local: IpAddr,
        authority: &Authority,
    ) -> Option<Arrival> {
        // Over the loopback address: the program behind may listen there alone, so that nobody
        // else can hand it a connection and say whose it is.
        let loopback = match local {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let hand_over = SocketAddr::new(loopback, own.proxy_protocol_port?);
        let stands_for = |waypoint: Option<&Gateway>| {
            waypoint.is_some_and(|gateway| self.is_instance(gateway, Some(own), local))
        };
        let (destination, hostname) = match authority {
            Authority::Address(address) => {
                let waypoint = match self.service_at(network, address.ip()) {
                    Some(service) => service.waypoint.as_ref(),
                    None => self
                        .workload_at(network, address.ip())
                        .and_then(|workload| workload.waypoint.as_ref()),
                };
                stands_for(waypoint).then_some((*address, None))?
            }
            Authority::Name(host, port) => {
                let service = self.service_named(host, &own.namespace)?;
                let at = service
                    .addresses
                    .iter()
                    .find(|at| *at.network == *network)?
                    .address;
                stands_for(service.waypoint.as_ref()).then(|| {
                    let hostname = service.key.hostname.clone();
                    (SocketAddr::new(at, *port), Some(hostname))
                })?
            }
        };
        Some(Arrival {
            destination,
            connect: hand_over,
            proxy_protocol: Some(hostname),
        })
    }
}

/// The pod itself, but for the ports that are not for tunnels.
fn here(workload: Option<&Workload>, address: SocketAddr) -> Result<Arrival, Misdirected> {
    let port = address.port();
    // Who could reach the hand-over port could claim to be anybody.
    let hand_over = workload.and_then(|own| own.proxy_protocol_port);
    if [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, INBOUND_HBONE_PORT].contains(&port)
        || hand_over == Some(port)
    {
        return Err(Misdirected::OwnPort(port));
    }
    Ok(Arrival {
        destination: address,
        connect: address,
        proxy_protocol: None,
    })
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            fixtures::*,
            reference::{GatewayDestination, ServiceKey},
        },
        *,
    };

    fn arrive(state: &MeshState, own: &Workload, authority: &str) -> Result<Arrival, Misdirected> {
        state.arrival(
            "",
            Some(own),
            own.addresses[0],
            &Authority::parse(authority)?,
        )
    }

    #[test]
    fn a_tunnel_ends_in_its_pod() {
        let (state, own) = (MeshState::default(), pod("a", "10.0.0.1"));
        let arrival = arrive(&state, &own, "10.0.0.1:8080").unwrap();
        assert_eq!(arrival.connect, "10.0.0.1:8080".parse().unwrap());
        assert_eq!(arrival.proxy_protocol, None);
    }

    #[test]
    fn a_pod_is_no_relay_and_no_loop() {
        let mut state = MeshState::default();
        state.put_service(cart());
        state.put_workload(pod("b", "10.0.0.2"));
        let own = pod("a", "10.0.0.1");
        for (authority, expected) in [
            (
                "10.0.0.2:8080",
                Misdirected::NotHere("10.0.0.2:8080".into()),
            ),
            (
                "10.96.0.20:80",
                Misdirected::NotHere("10.96.0.20:80".into()),
            ),
            (
                "127.0.0.1:8080",
                Misdirected::NotHere("127.0.0.1:8080".into()),
            ),
            ("cart:80", Misdirected::NotHere("cart:80".into())),
            ("10.0.0.1:15001", Misdirected::OwnPort(15001)),
            ("10.0.0.1:15006", Misdirected::OwnPort(15006)),
            ("10.0.0.1:15008", Misdirected::OwnPort(15008)),
            ("10.0.0.1", Misdirected::Unreadable("10.0.0.1".into())),
            (
                "user@host:80",
                Misdirected::Unreadable("user@host:80".into()),
            ),
        ] {
            assert_eq!(arrive(&state, &own, authority), Err(expected));
        }
    }

    #[test]
    fn a_waypoint_takes_what_it_stands_for_and_hands_it_over() {
        let waypoint: ServiceKey = "shop/waypoint.shop.svc.cluster.local".parse().unwrap();
        let mut state = MeshState::default();
        let mut service = cart();
        service.waypoint = Some(Gateway {
            destination: GatewayDestination::Service(waypoint.clone()),
            hbone_port: 15008,
        });
        state.put_service(service);
        let mut own = pod("waypoint", "10.0.0.50");
        own.services = [(waypoint, [].into())].into();
        assert!(arrive(&state, &own, "10.96.0.20:80").is_err());

        own.proxy_protocol_port = Some(15088);
        let by_address = arrive(&state, &own, "10.96.0.20:80").unwrap();
        assert_eq!(by_address.connect, "127.0.0.1:15088".parse().unwrap());
        assert_eq!(by_address.destination, "10.96.0.20:80".parse().unwrap());
        assert_eq!(by_address.proxy_protocol, Some(None));

        let by_name = arrive(&state, &own, "cart.shop.svc.cluster.local:80").unwrap();
        assert_eq!(by_name.destination, by_address.destination);
        assert_eq!(by_name.proxy_protocol, Some(Some(key().hostname)));

        assert!(arrive(&state, &own, "10.96.0.99:80").is_err());
    }
}
