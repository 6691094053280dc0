//! Discovery from a JSON file, for tests and benchmarks without a control plane. The file says the
//! whole mesh; when its text changes, the difference is applied.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use tracing::{info, warn};

use crate::{
    proto::{security, workload as proto},
    state::shared::{Change, SharedState},
    xds::convert,
};

const POLL: Duration = Duration::from_millis(100);

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct MeshFile {
    workloads: Vec<WorkloadEntry>,
    services: Vec<ServiceEntry>,
    policies: Vec<PolicyEntry>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct WorkloadEntry {
    uid: String,
    name: String,
    namespace: String,
    addresses: Vec<IpAddr>,
    hostname: String,
    hbone: bool,
    service_account: String,
    workload_name: String,
    canonical_name: String,
    node: String,
    unhealthy: bool,
    policies: Vec<String>,
    /// Service to its ports, each with the workload's port.
    services: BTreeMap<String, BTreeMap<u32, u32>>,
    waypoint: Option<String>,
    proxy_protocol_port: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ServiceEntry {
    name: String,
    namespace: String,
    hostname: String,
    addresses: Vec<IpAddr>,
    ports: BTreeMap<u32, u32>,
    waypoint: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PolicyEntry {
    name: String,
    namespace: String,
    /// `global`, `namespace` or `selector`.
    scope: String,
    deny: bool,
    dry_run: bool,
    rules: Vec<Vec<Vec<MatchEntry>>>,
}

/// Strings may begin or end with `*`; alone it means any.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct MatchEntry {
    namespaces: Vec<String>,
    not_namespaces: Vec<String>,
    principals: Vec<String>,
    not_principals: Vec<String>,
    destination_ports: Vec<u32>,
    not_destination_ports: Vec<u32>,
}

/// Follows the file for the life of the process.
pub async fn follow(path: PathBuf, trust_domain: String, state: Arc<SharedState>) {
    let mut text = String::new();
    let mut held = HashSet::new();
    loop {
        match tokio::fs::read_to_string(&path).await {
            Ok(now) if now == text => {}
            Ok(now) => {
                text = now;
                match parse(&text, &trust_domain) {
                    Ok((changes, names)) => {
                        info!(path = %path.display(), resources = names.len(), "mesh file read");
                        let removed = held.difference(&names).map(Name::removal);
                        state.apply(changes.into_iter().chain(removed).collect());
                        held = names;
                        state.set_synchronized();
                    }
                    Err(error) => warn!(path = %path.display(), error, "mesh file not used"),
                }
            }
            Err(error) => report(&path, &error),
        }
        tokio::time::sleep(POLL).await;
    }
}

fn report(path: &Path, error: &io::Error) {
    warn!(path = %path.display(), error = %error, "mesh file not readable");
}

#[derive(PartialEq, Eq, Hash, Clone)]
enum Name {
    Address(String),
    Policy(String),
}

impl Name {
    fn removal(&self) -> Change {
        match self.clone() {
            Self::Address(name) => Change::RemoveAddress(name),
            Self::Policy(name) => Change::RemovePolicy(name),
        }
    }
}

fn parse(text: &str, trust_domain: &str) -> Result<(Vec<Change>, HashSet<Name>), String> {
    let file: MeshFile = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let (mut changes, mut names) = (vec![], HashSet::new());
    for entry in file.workloads {
        let parsed = convert::workload(entry.message()?, trust_domain)
            .map_err(|error| format!("workload: {error}"))?;
        names.insert(Name::Address(parsed.uid.to_string()));
        changes.push(Change::PutWorkload(Box::new(parsed)));
    }
    for entry in file.services {
        let parsed =
            convert::service(entry.message()?).map_err(|error| format!("service: {error}"))?;
        names.insert(Name::Address(parsed.key.to_string()));
        changes.push(Change::PutService(Box::new(parsed)));
    }
    for entry in file.policies {
        let parsed =
            convert::policy(entry.message()?).map_err(|error| format!("policy: {error}"))?;
        names.insert(Name::Policy(parsed.key()));
        changes.push(Change::PutPolicy(Box::new(parsed)));
    }
    Ok((changes, names))
}

impl WorkloadEntry {
    fn message(self) -> Result<proto::Workload, String> {
        let tunnel = if self.hbone {
            proto::TunnelProtocol::Hbone
        } else {
            proto::TunnelProtocol::None
        };
        let status = if self.unhealthy {
            proto::WorkloadStatus::Unhealthy
        } else {
            proto::WorkloadStatus::Healthy
        };
        let services: HashMap<_, _> = self
            .services
            .into_iter()
            .map(|(key, ports)| {
                (
                    key,
                    proto::PortList {
                        ports: pairs(ports),
                    },
                )
            })
            .collect();
        Ok(proto::Workload {
            uid: self.uid,
            name: self.name,
            namespace: self.namespace,
            addresses: self.addresses.into_iter().map(octets).collect(),
            hostname: self.hostname,
            tunnel_protocol: tunnel.into(),
            service_account: self.service_account,
            workload_name: self.workload_name,
            canonical_name: self.canonical_name,
            node: self.node,
            status: status.into(),
            authorization_policies: self.policies,
            services,
            waypoint: self.waypoint.map(gateway).transpose()?,
            application_tunnel: self
                .proxy_protocol_port
                .map(|port| proto::ApplicationTunnel {
                    protocol: proto::application_tunnel::Protocol::Proxy.into(),
                    port,
                }),
            ..proto::Workload::default()
        })
    }
}

impl ServiceEntry {
    fn message(self) -> Result<proto::Service, String> {
        Ok(proto::Service {
            name: self.name,
            namespace: self.namespace,
            hostname: self.hostname,
            addresses: self
                .addresses
                .into_iter()
                .map(|address| proto::NetworkAddress {
                    address: octets(address),
                    ..proto::NetworkAddress::default()
                })
                .collect(),
            ports: pairs(self.ports),
            waypoint: self.waypoint.map(gateway).transpose()?,
            canonical: true,
            ..proto::Service::default()
        })
    }
}

impl PolicyEntry {
    fn message(self) -> Result<security::Authorization, String> {
        let scope = match self.scope.as_str() {
            "global" => security::Scope::Global,
            "namespace" => security::Scope::Namespace,
            "selector" => security::Scope::WorkloadSelector,
            other => return Err(format!("policy {}: scope {other:?}", self.name)),
        };
        let action = if self.deny {
            security::Action::Deny
        } else {
            security::Action::Allow
        };
        let clause = |matches: Vec<MatchEntry>| security::Clause {
            matches: matches.into_iter().map(MatchEntry::message).collect(),
        };
        Ok(security::Authorization {
            name: self.name,
            namespace: self.namespace,
            scope: scope.into(),
            action: action.into(),
            dry_run: self.dry_run,
            rules: self
                .rules
                .into_iter()
                .map(|clauses| security::Rule {
                    clauses: clauses.into_iter().map(clause).collect(),
                })
                .collect(),
        })
    }
}

impl MatchEntry {
    fn message(self) -> security::Match {
        let strings = |texts: Vec<String>| texts.into_iter().map(string_match).collect();
        security::Match {
            namespaces: strings(self.namespaces),
            not_namespaces: strings(self.not_namespaces),
            principals: strings(self.principals),
            not_principals: strings(self.not_principals),
            destination_ports: self.destination_ports,
            not_destination_ports: self.not_destination_ports,
            ..security::Match::default()
        }
    }
}

fn string_match(text: String) -> security::StringMatch {
    use security::string_match::{MatchType, Presence};
    let kind = if text == "*" {
        MatchType::Presence(Presence {})
    } else if let Some(suffix) = text.strip_prefix('*') {
        MatchType::Suffix(suffix.to_owned())
    } else if let Some(prefix) = text.strip_suffix('*') {
        MatchType::Prefix(prefix.to_owned())
    } else {
        MatchType::Exact(text)
    };
    security::StringMatch {
        match_type: Some(kind),
    }
}

/// A waypoint is named by its service, `NAMESPACE/HOSTNAME`.
fn gateway(service: String) -> Result<proto::GatewayAddress, String> {
    let (namespace, hostname) = service
        .split_once('/')
        .ok_or_else(|| format!("waypoint {service:?} is not NAMESPACE/HOSTNAME"))?;
    Ok(proto::GatewayAddress {
        destination: Some(proto::gateway_address::Destination::Hostname(
            proto::NamespacedHostname {
                namespace: namespace.to_owned(),
                hostname: hostname.to_owned(),
            },
        )),
        hbone_mtls_port: 0,
    })
}

fn pairs(ports: BTreeMap<u32, u32>) -> Vec<proto::Port> {
    ports
        .into_iter()
        .map(|(service_port, target_port)| proto::Port {
            service_port,
            target_port,
            app_protocol: 0,
        })
        .collect()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(four) => four.octets().into(),
        IpAddr::V6(six) => six.octets().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_file_becomes_changes_and_names() {
        let text = r#"{
            "workloads": [{"uid": "w", "namespace": "shop", "addresses": ["10.0.0.1"], "hbone": true,
                           "services": {"shop/cart": {"80": 8080}}}],
            "services": [{"namespace": "shop", "hostname": "cart", "addresses": ["10.96.0.1"],
                          "ports": {"80": 8080}}],
            "policies": [{"name": "strict", "namespace": "shop", "scope": "namespace", "deny": true,
                          "rules": [[[{"notPrincipals": ["*"]}]]]}]
        }"#;
        let (changes, names) = parse(text, "cluster.local").unwrap();
        assert_eq!(changes.len(), 3);
        assert_eq!(names.len(), 3);
    }

    #[test]
    fn misspelled_fields_are_refused() {
        let wrong = r#"{"workloads": [{"uid": "w", "adresses": []}]}"#;
        assert!(parse(wrong, "cluster.local").is_err_and(|error| error.contains("adresses")));
    }
}
