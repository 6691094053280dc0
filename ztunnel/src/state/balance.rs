//! Which of a service's endpoints takes a connection: healthy ones, the nearest as far as the
//! service prefers them, by chance in proportion to their capacity.

use std::sync::Arc;

use super::{
    route::{Client, NoRoute},
    service::{BalanceMode, Scope, Service},
    workload::Workload,
    MeshState,
};

impl MeshState {
    /// An endpoint of a service and the port it listens on for the service's `port`.
    pub fn endpoint(
        &self,
        client: Client<'_>,
        service: &Service,
        port: u16,
        choose: &mut impl FnMut(&[u32]) -> usize,
    ) -> Result<(&Arc<Workload>, u16), NoRoute> {
        if !service.ports.is_empty() && !service.ports.iter().any(|known| known.port == port) {
            return Err(NoRoute::Port {
                service: service.key.to_string(),
                port,
            });
        }
        let candidates: Vec<(&Arc<Workload>, u16)> = self
            .endpoints(&service.key)
            .filter(|workload| workload.healthy || service.balancing.any_health)
            .filter_map(|workload| {
                let target = *workload.services.get(&service.key)?.get(&port)?;
                Some((workload, target))
            })
            .collect();
        let best = preferred(client, service, candidates);
        pick(&best, |(workload, _)| workload.capacity, choose)
            .copied()
            .ok_or_else(|| NoRoute::Endpoint {
                service: service.key.to_string(),
                port,
            })
    }
}

/// The candidates a service's locality preference puts first.
fn preferred<'a>(
    client: Client<'_>,
    service: &Service,
    candidates: Vec<(&'a Arc<Workload>, u16)>,
) -> Vec<(&'a Arc<Workload>, u16)> {
    let scopes = &service.balancing.preference;
    let Some(me) = client.workload.filter(|_| !scopes.is_empty()) else {
        return candidates;
    };
    let rank = |workload: &Workload| {
        scopes
            .iter()
            .take_while(|scope| in_common(**scope, me, workload))
            .count()
    };
    let needed = match service.balancing.mode {
        BalanceMode::Strict => scopes.len(),
        BalanceMode::Failover => candidates
            .iter()
            .map(|(workload, _)| rank(workload))
            .max()
            .unwrap_or(0),
        BalanceMode::Even | BalanceMode::Passthrough => 0,
    };
    candidates
        .into_iter()
        .filter(|(workload, _)| rank(workload) >= needed)
        .collect()
}

fn in_common(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Zone => a.locality.zone == b.locality.zone,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        Scope::Node => a.node == b.node,
        Scope::Cluster => a.cluster == b.cluster,
        Scope::Network => a.network == b.network,
    }
}

pub(super) fn pick<'a, T>(
    candidates: &'a [T],
    weight: impl Fn(&T) -> u32,
    choose: &mut impl FnMut(&[u32]) -> usize,
) -> Option<&'a T> {
    if candidates.len() < 2 {
        return candidates.first();
    }
    let weights: Vec<u32> = candidates.iter().map(weight).collect();
    candidates.get(choose(&weights))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{fixtures::*, route::Route, service::LoadBalancing},
        *,
    };

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

    fn route(state: &MeshState, destination: &str) -> Result<Route, NoRoute> {
        state.route(client(None), destination.parse().unwrap(), |_| 0)
    }

    #[test]
    fn unhealthy_endpoints_and_unknown_ports_are_no_route() {
        let mut state = state();
        assert!(matches!(
            route(&state, "10.96.0.20:81"),
            Err(NoRoute::Port { port: 81, .. })
        ));
        for name in ["a", "b"] {
            let mut sick = pod(name, "10.0.0.1");
            sick.healthy = false;
            state.put_workload(sick);
        }
        assert!(matches!(route(&state, VIP), Err(NoRoute::Endpoint { .. })));
        let mut service = cart();
        service.balancing.any_health = true;
        state.put_service(service);
        assert!(route(&state, VIP).is_ok());
    }

    #[test]
    fn locality_preference_narrows_the_choice() {
        let mut state = state();
        let mut near = pod("near", "10.0.0.3");
        near.node = "node-1".into();
        state.put_workload(near.clone());
        for mode in [BalanceMode::Failover, BalanceMode::Strict] {
            let mut service = cart();
            service.balancing = LoadBalancing {
                preference: vec![Scope::Node],
                mode,
                any_health: false,
            };
            state.put_service(service);
            let mut me = pod("me", "10.0.0.77");
            me.node = "node-1".into();
            let Ok(Route::Hbone(route)) =
                state.route(client(Some(&me)), VIP.parse().unwrap(), |_| 0)
            else {
                panic!()
            };
            assert_eq!(route.workload.uid, near.uid);
            // On a node without endpoints, failover finds others and strict none.
            me.node = "node-2".into();
            let elsewhere = state.route(client(Some(&me)), VIP.parse().unwrap(), |_| 0);
            assert_eq!(elsewhere.is_ok(), mode == BalanceMode::Failover);
        }
    }
}
