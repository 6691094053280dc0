//! What a host name of the mesh means to a client: the addresses of the service of that name.
//! Pure. Whatever the mesh does not know is somebody else's to answer.

use std::net::IpAddr;

use super::{route::Client, service::Service, MeshState};

impl MeshState {
    /// The addresses of a name that the mesh answers for, of both families; `None` for others.
    /// `namespace` is the client's, `domain` the cluster's (`cluster.local`).
    ///
    /// A name may be short, as a program writes it, or have one of the client's search domains
    /// too many, as its resolver tries them one after the other.
    pub fn addresses_of_name(
        &self,
        client: Client<'_>,
        namespace: &str,
        domain: &str,
        name: &str,
    ) -> Option<Vec<IpAddr>> {
        let service = forms(name, namespace, domain)
            .iter()
            .find_map(|form| self.service_for_name(form, namespace))?;
        let virtual_addresses: Vec<IpAddr> = service
            .addresses
            .iter()
            .filter(|at| *at.network == *client.network)
            .map(|at| at.address)
            .collect();
        if !virtual_addresses.is_empty() {
            return Some(virtual_addresses);
        }
        // Headless: its endpoints'.
        let mut addresses: Vec<IpAddr> = self
            .endpoints(&service.key)
            .filter(|workload| workload.healthy || service.balancing.any_health)
            .flat_map(|workload| workload.addresses.iter().copied())
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        (!addresses.is_empty()).then_some(addresses)
    }

    fn service_for_name(&self, name: &str, namespace: &str) -> Option<&Service> {
        if let Some(service) = self.service_named(name, namespace) {
            return Some(service);
        }
        // `*.example.com` stands for every name below, the nearest first.
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(service) = self.service_named(&format!("*.{parent}"), namespace) {
                return Some(service);
            }
            rest = parent;
        }
        None
    }
}

/// The host names that a queried name may stand for, the likeliest first.
fn forms(name: &str, namespace: &str, domain: &str) -> Vec<String> {
    let name = name.trim_end_matches('.');
    let search = [
        format!("{namespace}.svc.{domain}"),
        format!("svc.{domain}"),
        domain.to_owned(),
    ];
    let mut forms = vec![name.to_owned()];
    for suffix in &search {
        if let Some(stripped) = name
            .strip_suffix(suffix.as_str())
            .and_then(|rest| rest.strip_suffix('.'))
        {
            forms.push(stripped.to_owned());
        }
    }
    match name.split('.').collect::<Vec<_>>()[..] {
        [_] => forms.push(format!("{name}.{}", search[0])),
        [_, _] => forms.push(format!("{name}.{}", search[1])),
        [_, _, "svc"] => forms.push(format!("{name}.{}", search[2])),
        _ => {}
    }
    forms
}

#[cfg(test)]
mod tests {
    use super::{super::fixtures::*, *};

    fn state() -> MeshState {
        let mut state = MeshState::default();
        state.put_service(cart());
        let mut external = cart();
        external.key.hostname = "api.example.com".into();
        external.addresses[0].address = "240.240.0.1".parse().unwrap();
        state.put_service(external);
        let mut wildcard = cart();
        wildcard.key.hostname = "*.example.org".into();
        wildcard.addresses[0].address = "240.240.0.2".parse().unwrap();
        state.put_service(wildcard);
        let mut headless = cart();
        headless.key.hostname = "db.shop.svc.cluster.local".into();
        headless.addresses.clear();
        let mut member = pod("db-0", "10.0.0.8");
        member.services = [(headless.key.clone(), [].into())].into();
        state.put_workload(member);
        state.put_service(headless);
        state
    }

    #[test]
    fn names_of_the_mesh_have_addresses() {
        let state = state();
        let client = Client {
            network: "",
            address: "10.0.0.77".parse().unwrap(),
            workload: None,
        };
        for (namespace, name, expected) in [
            ("shop", "cart.shop.svc.cluster.local", Some("10.96.0.20")),
            ("web", "cart.shop.svc.cluster.local", Some("10.96.0.20")),
            ("shop", "cart", Some("10.96.0.20")),
            ("web", "cart", None),
            ("web", "cart.shop", Some("10.96.0.20")),
            ("web", "cart.shop.svc", Some("10.96.0.20")),
            ("web", "api.example.com", Some("240.240.0.1")),
            // A resolver with five dots in mind tries its search domains first.
            (
                "web",
                "api.example.com.web.svc.cluster.local",
                Some("240.240.0.1"),
            ),
            (
                "web",
                "api.example.com.svc.cluster.local",
                Some("240.240.0.1"),
            ),
            ("web", "api.example.com.cluster.local", Some("240.240.0.1")),
            ("web", "a.example.org", Some("240.240.0.2")),
            ("web", "a.b.example.org", Some("240.240.0.2")),
            ("web", "example.org", None),
            ("web", "db.shop", Some("10.0.0.8")),
            ("web", "www.example.net", None),
            ("web", "", None),
        ] {
            let found = state.addresses_of_name(client, namespace, "cluster.local", name);
            let expected = expected.map(|address| vec![address.parse().unwrap()]);
            assert_eq!(found, expected, "{name} from {namespace}");
        }
    }

    #[test]
    fn a_headless_service_without_endpoints_is_left_to_others() {
        let mut state = state();
        state.remove_address("Kubernetes//Pod/shop/db-0");
        let client = Client {
            network: "",
            address: "10.0.0.77".parse().unwrap(),
            workload: None,
        };
        let found = state.addresses_of_name(client, "shop", "cluster.local", "db");
        assert_eq!(found, None);
    }
}
