//! The index as the admin interface shows it, under the keys of Istio's ztunnel, so that whatever
//! reads its configuration dump reads this one.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use serde::{Serialize, Serializer};

use super::{
    reference::{Gateway, GatewayDestination, NetworkAddress, ServiceKey},
    service::{BalanceMode, LoadBalancing, Scope, Service},
    workload::{Tunnel, Workload},
    MeshState,
};
use crate::rbac::Policy;

/// Everything in the index, in a stable order.
#[derive(Debug, Serialize)]
pub struct Dump {
    workloads: Vec<WorkloadView>,
    services: Vec<ServiceView>,
    policies: Vec<Arc<Policy>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct WorkloadView {
    workload_ips: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayView>,
    protocol: &'static str,
    network_mode: &'static str,
    uid: Arc<str>,
    name: Arc<str>,
    namespace: Arc<str>,
    trust_domain: Arc<str>,
    service_account: Arc<str>,
    #[serde(skip_serializing_if = "is_empty")]
    network: Arc<str>,
    workload_name: Arc<str>,
    workload_type: &'static str,
    canonical_name: Arc<str>,
    canonical_revision: Arc<str>,
    #[serde(skip_serializing_if = "is_empty")]
    hostname: Arc<str>,
    #[serde(skip_serializing_if = "is_empty")]
    node: Arc<str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    application_tunnel: Option<TunnelView>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    authorization_policies: Vec<Arc<str>>,
    status: &'static str,
    cluster_id: Arc<str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    locality: Option<LocalityView>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    services: Vec<Text<ServiceKey>>,
    capacity: u32,
}

#[derive(Debug, Serialize)]
struct LocalityView {
    region: Arc<str>,
    zone: Arc<str>,
    subzone: Arc<str>,
}

#[derive(Debug, Serialize)]
struct TunnelView {
    protocol: &'static str,
    port: u16,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct GatewayView {
    destination: GatewayDestinationView,
    hbone_mtls_port: u16,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum GatewayDestinationView {
    Address(Text<NetworkAddress>),
    Hostname {
        namespace: Arc<str>,
        hostname: Arc<str>,
    },
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceView {
    name: Arc<str>,
    namespace: Arc<str>,
    hostname: Arc<str>,
    vips: Vec<Text<NetworkAddress>>,
    ports: BTreeMap<u16, u16>,
    endpoints: BTreeMap<Arc<str>, EndpointView>,
    subject_alt_names: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancer: Option<LoadBalancerView>,
    canonical: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointView {
    workload_uid: Arc<str>,
    port: BTreeMap<u16, u16>,
    status: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct LoadBalancerView {
    routing_preferences: Vec<&'static str>,
    mode: &'static str,
    health_policy: &'static str,
}

/// Written as its text.
#[derive(Debug)]
struct Text<T>(T);

impl<T: std::fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

fn is_empty(text: &str) -> bool {
    text.is_empty()
}

impl MeshState {
    pub fn dump(&self) -> Dump {
        let mut workloads: Vec<_> = self
            .workloads
            .values()
            .map(|workload| WorkloadView::of(workload))
            .collect();
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        let mut keys: Vec<_> = self.services.keys().collect();
        keys.sort_by_key(|key| (&key.hostname, &key.namespace));
        let services = keys
            .into_iter()
            .map(|key| ServiceView::of(&self.services[key], self.endpoints(key)))
            .collect();
        let mut policies: Vec<_> = self.policies.values().cloned().collect();
        policies.sort_by_key(|policy| policy.key());
        Dump {
            workloads,
            services,
            policies,
        }
    }
}

impl WorkloadView {
    fn of(workload: &Workload) -> Self {
        let locality = &workload.locality;
        let mut services: Vec<_> = workload.services.keys().cloned().collect();
        services.sort();
        Self {
            workload_ips: workload.addresses.clone(),
            waypoint: workload.waypoint.as_ref().map(GatewayView::of),
            protocol: match workload.tunnel {
                Tunnel::None => "TCP",
                Tunnel::Hbone => "HBONE",
            },
            network_mode: if workload.host_network {
                "HostNetwork"
            } else {
                "Standard"
            },
            uid: workload.uid.clone(),
            name: workload.name.clone(),
            namespace: workload.namespace.clone(),
            trust_domain: workload.trust_domain.clone(),
            service_account: workload.service_account.clone(),
            network: workload.network.clone(),
            workload_name: workload.workload_name.clone(),
            workload_type: workload.workload_type.key(),
            canonical_name: workload.canonical_name.clone(),
            canonical_revision: workload.canonical_revision.clone(),
            hostname: workload.hostname.clone(),
            node: workload.node.clone(),
            application_tunnel: workload.proxy_protocol_port.map(|port| TunnelView {
                protocol: "PROXY",
                port,
            }),
            authorization_policies: workload.policies.clone(),
            status: health(workload),
            cluster_id: workload.cluster.clone(),
            locality: (!locality.region.is_empty()).then(|| LocalityView {
                region: locality.region.clone(),
                zone: locality.zone.clone(),
                subzone: locality.subzone.clone(),
            }),
            services: services.into_iter().map(Text).collect(),
            capacity: workload.capacity,
        }
    }
}

impl GatewayView {
    fn of(gateway: &Gateway) -> Self {
        Self {
            destination: match &gateway.destination {
                GatewayDestination::Address(at) => {
                    GatewayDestinationView::Address(Text(at.clone()))
                }
                GatewayDestination::Service(key) => GatewayDestinationView::Hostname {
                    namespace: key.namespace.clone(),
                    hostname: key.hostname.clone(),
                },
            },
            hbone_mtls_port: gateway.hbone_port,
        }
    }
}

impl ServiceView {
    fn of<'a>(service: &Service, endpoints: impl Iterator<Item = &'a Arc<Workload>>) -> Self {
        let sorted = |ports: &HashMap<u16, u16>| ports.iter().map(|(a, b)| (*a, *b)).collect();
        Self {
            name: service.name.clone(),
            namespace: service.key.namespace.clone(),
            hostname: service.key.hostname.clone(),
            vips: service.addresses.iter().cloned().map(Text).collect(),
            ports: service
                .ports
                .iter()
                .map(|port| (port.port, port.target_port))
                .collect(),
            endpoints: endpoints
                .map(|workload| {
                    let endpoint = EndpointView {
                        workload_uid: workload.uid.clone(),
                        port: workload
                            .services
                            .get(&service.key)
                            .map(sorted)
                            .unwrap_or_default(),
                        status: health(workload),
                    };
                    (workload.uid.clone(), endpoint)
                })
                .collect(),
            subject_alt_names: service.identities.iter().map(ToString::to_string).collect(),
            waypoint: service.waypoint.as_ref().map(GatewayView::of),
            load_balancer: LoadBalancerView::of(&service.balancing),
            canonical: service.canonical,
        }
    }
}

impl LoadBalancerView {
    fn of(balancing: &LoadBalancing) -> Option<Self> {
        (*balancing != LoadBalancing::default()).then(|| Self {
            routing_preferences: balancing
                .preference
                .iter()
                .map(|scope| match scope {
                    Scope::Region => "Region",
                    Scope::Zone => "Zone",
                    Scope::Subzone => "Subzone",
                    Scope::Node => "Node",
                    Scope::Cluster => "Cluster",
                    Scope::Network => "Network",
                })
                .collect(),
            mode: match balancing.mode {
                BalanceMode::Even => "Standard",
                BalanceMode::Strict => "Strict",
                BalanceMode::Failover => "Failover",
                BalanceMode::Passthrough => "Passthrough",
            },
            health_policy: if balancing.any_health {
                "AllowAll"
            } else {
                "OnlyHealthy"
            },
        })
    }
}

fn health(workload: &Workload) -> &'static str {
    if workload.healthy {
        "Healthy"
    } else {
        "Unhealthy"
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixtures::*, *};
    use serde_json::{json, to_value};

    #[test]
    fn the_keys_are_those_of_istios_ztunnel() {
        let mut state = MeshState::default();
        let mut workload = pod("a", "10.0.0.1");
        workload.workload_name = "cart".into();
        workload.proxy_protocol_port = Some(15088);
        state.put_workload(workload);
        let mut service = cart();
        service.waypoint = Some(Gateway {
            destination: GatewayDestination::Service(key()),
            hbone_port: 15008,
        });
        state.put_service(service);
        let dump = to_value(state.dump()).unwrap();
        assert_eq!(
            dump["workloads"][0],
            json!({
                "workloadIps": ["10.0.0.1"], "protocol": "HBONE", "networkMode": "Standard",
                "uid": "Kubernetes//Pod/shop/a", "name": "a", "namespace": "shop",
                "trustDomain": "cluster.local", "serviceAccount": "cart", "workloadName": "cart",
                "workloadType": "pod", "canonicalName": "", "canonicalRevision": "",
                "applicationTunnel": {"protocol": "PROXY", "port": 15088},
                "status": "Healthy", "clusterId": "", "capacity": 1,
                "services": ["shop/cart.shop.svc.cluster.local"],
            })
        );
        assert_eq!(
            dump["services"][0],
            json!({
                "name": "cart", "namespace": "shop", "hostname": "cart.shop.svc.cluster.local",
                "vips": ["/10.96.0.20"], "ports": {"80": 8080},
                "endpoints": {"Kubernetes//Pod/shop/a": {
                    "workloadUid": "Kubernetes//Pod/shop/a", "port": {"80": 8080}, "status": "Healthy",
                }},
                "waypoint": {
                    "destination": {"namespace": "shop", "hostname": "cart.shop.svc.cluster.local"},
                    "hboneMtlsPort": 15008,
                },
                "subjectAltNames": [], "canonical": true,
            })
        );
    }
}
