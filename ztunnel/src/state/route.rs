//! Where a captured connection goes: the address a client asked for, turned into a workload, the
//! tunnel to it and the identity that must answer. Pure; the caller supplies the dice.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    balance::pick,
    reference::{Gateway, GatewayDestination},
    service::{BalanceMode, Service},
    workload::{Tunnel, Workload},
    MeshState,
};
use crate::{config::INBOUND_HBONE_PORT, identity::Identity};

/// The way to a destination.
#[derive(Debug, Clone, PartialEq)]
pub enum Route {
    Hbone(HboneRoute),
    Plain(PlainRoute),
}

/// Through a tunnel.
#[derive(Debug, Clone, PartialEq)]
pub struct HboneRoute {
    /// Where the tunnel's TLS connection goes.
    pub gateway: SocketAddr,
    /// Who may answer there: the workload itself first.
    pub identities: Vec<Identity>,
    /// What the tunnel is asked to connect to.
    pub authority: SocketAddr,
    /// The workload behind `gateway`.
    pub workload: Arc<Workload>,
    pub service: Option<Arc<Service>>,
}

/// As plain TCP.
#[derive(Debug, Clone, PartialEq)]
pub struct PlainRoute {
    pub target: Target,
    pub workload: Option<Arc<Workload>>,
    pub service: Option<Arc<Service>>,
}

/// An address, or a name to be resolved (external workloads).
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    Address(SocketAddr),
    Name(Arc<str>, u16),
}

/// Why there is no way to a destination that the mesh knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    #[error("service {service} has no port {port}")]
    Port { service: String, port: u16 },
    #[error("no healthy upstream: service {service} has no endpoint to take port {port}")]
    Endpoint { service: String, port: u16 },
    #[error("no healthy upstream: the waypoint of {destination} has no endpoint")]
    Waypoint { destination: String },
    #[error("workload {0} has no address to tunnel to")]
    Address(String),
}

/// Who is asking.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    pub network: &'a str,
    pub address: IpAddr,
    pub workload: Option<&'a Workload>,
}

impl MeshState {
    /// Finds the way for a client's connection to `destination`. `choose` takes the weights of
    /// equally good endpoints (at least one) and answers an index.
    pub fn route(
        &self,
        client: Client<'_>,
        destination: SocketAddr,
        mut choose: impl FnMut(&[u32]) -> usize,
    ) -> Result<Route, NoRoute> {
        if let Some(service) = self.service_at(client.network, destination.ip()) {
            if let Some(waypoint) = self.waypoint_towards(client, service.waypoint.as_ref()) {
                let route = self.through(waypoint, client, destination, &mut choose);
                return route
                    .map(|route| {
                        Route::Hbone(HboneRoute {
                            service: Some(service.clone()),
                            ..route
                        })
                    })
                    .ok_or_else(|| NoRoute::Waypoint {
                        destination: service.key.to_string(),
                    });
            }
            if service.balancing.mode != BalanceMode::Passthrough {
                let (workload, port) =
                    self.endpoint(client, service, destination.port(), &mut choose)?;
                return to_workload(client, workload, port, None, Some(service));
            }
        }
        let Some(workload) = self.workload_at(client.network, destination.ip()) else {
            return Ok(Route::Plain(PlainRoute {
                target: Target::Address(destination),
                workload: None,
                service: None,
            }));
        };
        if let Some(waypoint) = self.waypoint_towards(client, workload.waypoint.as_ref()) {
            return self
                .through(waypoint, client, destination, &mut choose)
                .map(Route::Hbone)
                .ok_or_else(|| NoRoute::Waypoint {
                    destination: workload.uid.to_string(),
                });
        }
        to_workload(
            client,
            workload,
            destination.port(),
            Some(destination.ip()),
            None,
        )
    }

    /// Whether `workload`, at `address`, is one of the instances of a waypoint.
    pub fn is_instance(
        &self,
        gateway: &Gateway,
        workload: Option<&Workload>,
        address: IpAddr,
    ) -> bool {
        match &gateway.destination {
            GatewayDestination::Service(key) => {
                workload.is_some_and(|workload| workload.services.contains_key(key))
            }
            GatewayDestination::Address(at) => {
                at.address == address
                    || self
                        .service_at(&at.network, at.address)
                        .zip(workload)
                        .is_some_and(|(service, workload)| {
                            workload.services.contains_key(&service.key)
                        })
            }
        }
    }

    fn waypoint_towards<'a>(
        &self,
        client: Client<'_>,
        waypoint: Option<&'a Gateway>,
    ) -> Option<&'a Gateway> {
        waypoint.filter(|gateway| !self.is_instance(gateway, client.workload, client.address))
    }

    fn through(
        &self,
        gateway: &Gateway,
        client: Client<'_>,
        authority: SocketAddr,
        choose: &mut impl FnMut(&[u32]) -> usize,
    ) -> Option<HboneRoute> {
        let service = match &gateway.destination {
            GatewayDestination::Service(key) => Some(key),
            GatewayDestination::Address(at) => self
                .service_at(&at.network, at.address)
                .map(|service| &service.key),
        };
        let candidates: Vec<&Arc<Workload>> = match (service, &gateway.destination) {
            (Some(key), _) => self.endpoints(key).collect(),
            (None, GatewayDestination::Address(at)) => self
                .workload_at(&at.network, at.address)
                .into_iter()
                .collect(),
            (None, GatewayDestination::Service(_)) => vec![],
        };
        let healthy: Vec<_> = candidates
            .into_iter()
            .filter(|workload| workload.healthy)
            .filter_map(|workload| Some((workload, address_for(client, workload)?)))
            .collect();
        let (workload, address) = pick(&healthy, |(workload, _)| workload.capacity, choose)?;
        Some(HboneRoute {
            gateway: SocketAddr::new(*address, gateway.hbone_port),
            identities: identities(workload, service.and_then(|key| self.service(key))),
            authority,
            workload: (*workload).clone(),
            service: None,
        })
    }
}

fn to_workload(
    client: Client<'_>,
    workload: &Arc<Workload>,
    port: u16,
    asked_for: Option<IpAddr>,
    service: Option<&Arc<Service>>,
) -> Result<Route, NoRoute> {
    let service = service.cloned();
    let Some(address) = asked_for.or_else(|| address_for(client, workload)) else {
        if workload.tunnel == Tunnel::Hbone || workload.hostname.is_empty() {
            return Err(NoRoute::Address(workload.uid.to_string()));
        }
        return Ok(Route::Plain(PlainRoute {
            target: Target::Name(workload.hostname.clone(), port),
            workload: Some(workload.clone()),
            service,
        }));
    };
    let target = SocketAddr::new(address, port);
    Ok(match workload.tunnel {
        Tunnel::Hbone => Route::Hbone(HboneRoute {
            gateway: SocketAddr::new(address, INBOUND_HBONE_PORT),
            identities: identities(workload, service.as_ref()),
            authority: target,
            workload: workload.clone(),
            service,
        }),
        Tunnel::None => Route::Plain(PlainRoute {
            target: Target::Address(target),
            workload: Some(workload.clone()),
            service,
        }),
    })
}

fn identities(workload: &Workload, service: Option<&Arc<Service>>) -> Vec<Identity> {
    let others = service.map_or(&[][..], |service| &service.identities);
    std::iter::once(workload.identity())
        .chain(others.iter().cloned())
        .collect()
}

/// An address of a workload in the client's family, else any.
fn address_for(client: Client<'_>, workload: &Workload) -> Option<IpAddr> {
    let same_family = |address: &&IpAddr| address.is_ipv4() == client.address.is_ipv4();
    let addresses = &workload.addresses;
    addresses
        .iter()
        .find(same_family)
        .or_else(|| addresses.first())
        .copied()
}

#[cfg(test)]
mod tests {
    use super::{super::fixtures::*, *};

    const VIP: &str = "10.96.0.20:80";

    fn state() -> MeshState {
        let mut state = MeshState::default();
        state.put_service(cart());
        state.put_workload(pod("a", "10.0.0.1"));
        state.put_workload(pod("b", "10.0.0.2"));
        state
    }

    fn client(workload: Option<&Workload>) -> Client<'_> {
        Client {
            network: "",
            address: "10.0.0.77".parse().unwrap(),
            workload,
        }
    }

    fn hbone(state: &MeshState, destination: &str) -> HboneRoute {
        match route(state, destination).unwrap() {
            Route::Hbone(route) => route,
            plain => panic!("{plain:?}"),
        }
    }

    fn route(state: &MeshState, destination: &str) -> Result<Route, NoRoute> {
        state.route(client(None), destination.parse().unwrap(), |weights| {
            weights.len() - 1
        })
    }

    #[test]
    fn a_virtual_address_leads_to_an_endpoints_target_port() {
        let route = hbone(&state(), VIP);
        assert_eq!(route.gateway, "10.0.0.2:15008".parse().unwrap());
        assert_eq!(route.authority, "10.0.0.2:8080".parse().unwrap());
        assert_eq!(
            route.identities[0].to_string(),
            "spiffe://cluster.local/ns/shop/sa/cart"
        );
        assert_eq!(route.service.unwrap().key, key());
    }

    #[test]
    fn a_workloads_address_keeps_its_port() {
        let route = hbone(&state(), "10.0.0.1:9999");
        assert_eq!(route.authority, "10.0.0.1:9999".parse().unwrap());
        assert!(route.service.is_none());
    }

    #[test]
    fn outside_the_mesh_the_connection_goes_where_it_wanted() {
        let Ok(Route::Plain(route)) = route(&state(), "203.0.113.5:443") else {
            panic!()
        };
        assert_eq!(
            route.target,
            Target::Address("203.0.113.5:443".parse().unwrap())
        );
        assert!(route.workload.is_none());
    }

    #[test]
    fn a_workload_without_tunnel_is_reached_plainly() {
        let mut state = state();
        let mut plain = pod("a", "10.0.0.1");
        plain.tunnel = Tunnel::None;
        state.put_workload(plain);
        assert!(matches!(route(&state, "10.0.0.1:80"), Ok(Route::Plain(_))));
    }

    #[test]
    fn an_external_name_is_left_to_the_resolver() {
        let mut state = state();
        let mut external = pod("x", "10.0.0.9");
        external.addresses.clear();
        external.hostname = "db.example.com".into();
        external.tunnel = Tunnel::None;
        state.remove_address("Kubernetes//Pod/shop/a");
        state.remove_address("Kubernetes//Pod/shop/b");
        state.put_workload(external);
        let Ok(Route::Plain(route)) = route(&state, VIP) else {
            panic!()
        };
        assert_eq!(route.target, Target::Name("db.example.com".into(), 8080));
    }

    mod waypoint {
        use super::*;

        fn gateway() -> Gateway {
            Gateway {
                destination: GatewayDestination::Service(
                    "shop/waypoint.shop.svc.cluster.local".parse().unwrap(),
                ),
                hbone_port: 15008,
            }
        }

        fn instance() -> Workload {
            let mut workload = pod("waypoint", "10.0.0.50");
            workload.service_account = "waypoint".into();
            workload.services = [(
                "shop/waypoint.shop.svc.cluster.local".parse().unwrap(),
                [].into(),
            )]
            .into();
            workload
        }

        fn with_waypoint() -> MeshState {
            let mut state = state();
            let mut service = cart();
            service.waypoint = Some(gateway());
            state.put_service(service);
            state
        }

        #[test]
        fn takes_the_services_connections_by_their_virtual_address() {
            let mut state = with_waypoint();
            state.put_workload(instance());
            let route = hbone(&state, VIP);
            assert_eq!(route.gateway, "10.0.0.50:15008".parse().unwrap());
            assert_eq!(route.authority, VIP.parse().unwrap());
            assert!(route.identities[0].to_string().ends_with("/sa/waypoint"));
        }

        #[test]
        fn is_not_sent_to_itself() {
            let mut state = with_waypoint();
            state.put_workload(instance());
            let me = instance();
            let Ok(Route::Hbone(route)) =
                state.route(client(Some(&me)), VIP.parse().unwrap(), |_| 0)
            else {
                panic!()
            };
            assert_eq!(route.gateway, "10.0.0.1:15008".parse().unwrap());
        }

        #[test]
        fn is_never_bypassed_when_it_is_down() {
            assert!(matches!(
                route(&with_waypoint(), VIP),
                Err(NoRoute::Waypoint { .. })
            ));
        }
    }
}
