//! All that the proxy knows of the mesh: one index, written by discovery, read by every
//! connection. Pure: no socket, no clock, no randomness of its own.

mod balance;
pub mod dump;
pub mod inbound;
mod names;
pub mod reference;
pub mod route;
pub mod service;
pub mod shared;
pub mod workload;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use crate::rbac::{Policy, Scope};
use reference::{NetworkAddress, ServiceKey};
use service::Service;
use workload::Workload;

/// The index over workloads, services and policies.
#[derive(Debug, Default)]
pub struct MeshState {
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    /// Several workloads share an address when they use their node's.
    workloads_by_address: HashMap<NetworkAddress, Vec<Arc<Workload>>>,
    services: HashMap<ServiceKey, Arc<Service>>,
    services_by_address: HashMap<NetworkAddress, ServiceKey>,
    services_by_hostname: HashMap<Arc<str>, HashSet<ServiceKey>>,
    /// Members of a service by uid: a stable order makes choices reproducible.
    endpoints: HashMap<ServiceKey, BTreeMap<Arc<str>, Arc<Workload>>>,
    policies: HashMap<Arc<str>, Arc<Policy>>,
    global_policies: BTreeMap<Arc<str>, Arc<Policy>>,
    namespace_policies: HashMap<Arc<str>, BTreeMap<Arc<str>, Arc<Policy>>>,
}

impl MeshState {
    /// Adds a workload or replaces the one with its uid; answers whether other policies select
    /// it now than before.
    pub fn put_workload(&mut self, workload: Workload) -> bool {
        let selected_differently = match self.workloads.get(&workload.uid) {
            Some(old) => old.policies != workload.policies,
            None => !workload.policies.is_empty(),
        };
        self.remove_workload(&workload.uid);
        let workload = Arc::new(workload);
        for address in addresses_of(&workload) {
            self.workloads_by_address
                .entry(address)
                .or_default()
                .push(workload.clone());
        }
        for key in workload.services.keys() {
            self.endpoints
                .entry(key.clone())
                .or_default()
                .insert(workload.uid.clone(), workload.clone());
        }
        self.workloads.insert(workload.uid.clone(), workload);
        selected_differently
    }

    /// Adds a service or replaces the one with its key.
    pub fn put_service(&mut self, service: Service) {
        self.remove_service(&service.key);
        for address in &service.addresses {
            self.services_by_address
                .insert(address.clone(), service.key.clone());
        }
        self.services_by_hostname
            .entry(service.key.hostname.clone())
            .or_default()
            .insert(service.key.clone());
        self.services.insert(service.key.clone(), Arc::new(service));
    }

    /// Adds a policy or replaces the one with its name.
    pub fn put_policy(&mut self, policy: Policy) {
        let key: Arc<str> = policy.key().into();
        self.remove_policy(&key);
        let policy = Arc::new(policy);
        match policy.scope {
            Scope::Global => {
                self.global_policies.insert(key.clone(), policy.clone());
            }
            Scope::Namespace => {
                self.namespace_policies
                    .entry(policy.namespace.clone())
                    .or_default()
                    .insert(key.clone(), policy.clone());
            }
            Scope::WorkloadSelector => {}
        }
        self.policies.insert(key, policy);
    }

    /// Removes the workload with this uid or, failing that, the service with this key; unknown
    /// names are nothing to remove.
    pub fn remove_address(&mut self, name: &str) {
        if !self.remove_workload(name) {
            if let Ok(key) = name.parse() {
                self.remove_service(&key);
            }
        }
    }

    /// Removes the policy `NAMESPACE/NAME`.
    pub fn remove_policy(&mut self, key: &str) {
        let Some(policy) = self.policies.remove(key) else {
            return;
        };
        self.global_policies.remove(key);
        if let Some(policies) = self.namespace_policies.get_mut(&policy.namespace) {
            policies.remove(key);
            if policies.is_empty() {
                self.namespace_policies.remove(&policy.namespace);
            }
        }
    }

    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload at an address; with several, one that does not use its node's address.
    pub fn workload_at(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        let at = self.workloads_by_address.get(&NetworkAddress {
            network: network.into(),
            address,
        })?;
        at.iter()
            .find(|workload| !workload.host_network)
            .or_else(|| at.first())
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service with a virtual address.
    pub fn service_at(&self, network: &str, address: IpAddr) -> Option<&Arc<Service>> {
        self.services
            .get(self.services_by_address.get(&NetworkAddress {
                network: network.into(),
                address,
            })?)
    }

    /// The service a client in `namespace` means by a hostname: its own namespace's, else the
    /// canonical one, else the first by name.
    pub fn service_named(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        self.services_by_hostname
            .get(hostname)?
            .iter()
            .filter_map(|key| self.services.get(key))
            .min_by_key(|service| {
                (
                    &*service.key.namespace != namespace,
                    !service.canonical,
                    service.key.namespace.clone(),
                )
            })
    }

    /// The members of a service.
    pub fn endpoints(&self, key: &ServiceKey) -> impl Iterator<Item = &Arc<Workload>> {
        self.endpoints
            .get(key)
            .into_iter()
            .flat_map(BTreeMap::values)
    }

    /// The policies that govern connections to a workload: global ones, its namespace's, those
    /// that select it. Unknown names are reported through `unknown`.
    pub fn policies_of(
        &self,
        workload: &Workload,
        mut unknown: impl FnMut(&str),
    ) -> Vec<Arc<Policy>> {
        let named = workload.policies.iter().filter_map(|key| {
            let policy = self.policies.get(key);
            if policy.is_none() {
                unknown(key);
            }
            policy
        });
        let in_namespace = self
            .namespace_policies
            .get(&workload.namespace)
            .into_iter()
            .flat_map(BTreeMap::values);
        self.global_policies
            .values()
            .chain(in_namespace)
            .chain(named)
            .cloned()
            .collect()
    }

    fn remove_workload(&mut self, uid: &str) -> bool {
        let Some(old) = self.workloads.remove(uid) else {
            return false;
        };
        for address in addresses_of(&old) {
            if let Some(at) = self.workloads_by_address.get_mut(&address) {
                at.retain(|workload| workload.uid != old.uid);
                if at.is_empty() {
                    self.workloads_by_address.remove(&address);
                }
            }
        }
        for key in old.services.keys() {
            if let Some(members) = self.endpoints.get_mut(key) {
                members.remove(uid);
                if members.is_empty() {
                    self.endpoints.remove(key);
                }
            }
        }
        true
    }

    fn remove_service(&mut self, key: &ServiceKey) {
        let Some(old) = self.services.remove(key) else {
            return;
        };
        for address in &old.addresses {
            if self.services_by_address.get(address) == Some(key) {
                self.services_by_address.remove(address);
            }
        }
        if let Some(keys) = self.services_by_hostname.get_mut(&key.hostname) {
            keys.remove(key);
            if keys.is_empty() {
                self.services_by_hostname.remove(&key.hostname);
            }
        }
    }
}

fn addresses_of(workload: &Workload) -> impl Iterator<Item = NetworkAddress> + '_ {
    workload.addresses.iter().map(|address| NetworkAddress {
        network: workload.network.clone(),
        address: *address,
    })
}

#[cfg(test)]
pub mod fixtures {
    //! A small mesh for tests.
    use super::*;
    use service::{LoadBalancing, ServicePort};
    use workload::Tunnel;

    pub fn key() -> ServiceKey {
        "shop/cart.shop.svc.cluster.local".parse().unwrap()
    }

    pub fn pod(name: &str, address: &str) -> Workload {
        Workload {
            uid: format!("Kubernetes//Pod/shop/{name}").into(),
            name: name.into(),
            namespace: "shop".into(),
            addresses: vec![address.parse().unwrap()],
            tunnel: Tunnel::Hbone,
            trust_domain: "cluster.local".into(),
            service_account: "cart".into(),
            healthy: true,
            capacity: 1,
            services: [(key(), [(80, 8080)].into())].into(),
            ..Workload::default()
        }
    }

    pub fn cart() -> Service {
        Service {
            key: key(),
            name: "cart".into(),
            addresses: vec![NetworkAddress {
                network: "".into(),
                address: "10.96.0.20".parse().unwrap(),
            }],
            ports: vec![ServicePort {
                port: 80,
                target_port: 8080,
            }],
            waypoint: None,
            balancing: LoadBalancing::default(),
            identities: vec![],
            canonical: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{fixtures::*, *};
    use crate::rbac::Action;

    fn policy(namespace: &str, name: &str, scope: Scope) -> Policy {
        Policy {
            name: name.into(),
            namespace: namespace.into(),
            scope,
            action: Action::Deny,
            rules: vec![],
            dry_run: false,
        }
    }

    #[test]
    fn a_workload_is_found_by_uid_address_and_service_until_removed() {
        let mut state = MeshState::default();
        state.put_workload(pod("a", "10.0.0.1"));
        state.put_workload(pod("b", "10.0.0.2"));
        assert!(state.workload("Kubernetes//Pod/shop/a").is_some());
        assert!(state.workload_at("", "10.0.0.1".parse().unwrap()).is_some());
        assert!(state
            .workload_at("other", "10.0.0.1".parse().unwrap())
            .is_none());
        assert_eq!(state.endpoints(&key()).count(), 2);

        state.remove_address("Kubernetes//Pod/shop/a");
        assert!(state.workload_at("", "10.0.0.1".parse().unwrap()).is_none());
        assert_eq!(state.endpoints(&key()).count(), 1);
    }

    #[test]
    fn an_update_replaces_addresses_and_memberships() {
        let mut state = MeshState::default();
        state.put_workload(pod("a", "10.0.0.1"));
        let mut moved = pod("a", "10.0.0.9");
        moved.services.clear();
        state.put_workload(moved);
        assert!(state.workload_at("", "10.0.0.1".parse().unwrap()).is_none());
        assert!(state.workload_at("", "10.0.0.9".parse().unwrap()).is_some());
        assert_eq!(state.endpoints(&key()).count(), 0);
    }

    #[test]
    fn endpoints_may_arrive_before_their_service() {
        let mut state = MeshState::default();
        state.put_workload(pod("a", "10.0.0.1"));
        state.put_service(cart());
        assert_eq!(state.endpoints(&key()).count(), 1);
        state.remove_address(&key().to_string());
        assert!(state
            .service_at("", "10.96.0.20".parse().unwrap())
            .is_none());
        assert_eq!(state.endpoints(&key()).count(), 1);
    }

    #[test]
    fn a_hostname_means_the_clients_namespace_first() {
        let mut state = MeshState::default();
        for (namespace, canonical) in [("a", false), ("b", true), ("c", false)] {
            let mut service = cart();
            service.key.namespace = namespace.into();
            service.canonical = canonical;
            state.put_service(service);
        }
        let host = &*key().hostname;
        let of = |client: &str| {
            state
                .service_named(host, client)
                .unwrap()
                .key
                .namespace
                .clone()
        };
        assert_eq!(&*of("c"), "c");
        assert_eq!(&*of("elsewhere"), "b");
    }

    #[test]
    fn policies_come_from_mesh_namespace_and_selector() {
        let mut state = MeshState::default();
        state.put_policy(policy("istio-system", "all", Scope::Global));
        state.put_policy(policy("shop", "ours", Scope::Namespace));
        state.put_policy(policy("bank", "theirs", Scope::Namespace));
        state.put_policy(policy("shop", "selected", Scope::WorkloadSelector));
        let mut workload = pod("a", "10.0.0.1");
        workload.policies = vec!["shop/selected".into(), "shop/gone".into()];
        let mut unknown = vec![];
        let found = state.policies_of(&workload, |key| unknown.push(key.to_owned()));
        let names: Vec<_> = found.iter().map(|policy| policy.key()).collect();
        assert_eq!(names, ["istio-system/all", "shop/ours", "shop/selected"]);
        assert_eq!(unknown, ["shop/gone"]);

        state.remove_policy("shop/ours");
        assert_eq!(state.policies_of(&workload, |_| ()).len(), 2);
    }
}
