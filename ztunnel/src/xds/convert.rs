//! Discovery messages parsed into exact types. What cannot be understood is an error with its
//! reason, answered to the control plane as a refusal; nothing half-understood enters the state.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use thiserror::Error;

use crate::{
    config::INBOUND_HBONE_PORT,
    proto::{security, workload as proto},
    rbac::{Action, Block, Match, Policy, Scope, ServiceAccount, StringMatch, Values},
    state::{
        reference::{Gateway, GatewayDestination, NetworkAddress, ServiceKey},
        service::{BalanceMode, LoadBalancing, Scope as LocalityScope, Service, ServicePort},
        workload::{Locality, Tunnel, Workload, WorkloadType},
    },
};

/// A field that cannot be understood.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{field}: {reason}")]
pub struct Unusable {
    field: &'static str,
    reason: String,
}

fn unusable(field: &'static str, reason: impl Into<String>) -> Unusable {
    Unusable {
        field,
        reason: reason.into(),
    }
}

type Result<T> = std::result::Result<T, Unusable>;

/// A workload; an empty trust domain means `trust_domain`, the mesh's.
pub fn workload(message: proto::Workload, trust_domain: &str) -> Result<Workload> {
    if message.uid.is_empty() {
        return Err(unusable("uid", "empty"));
    }
    let tunnel = match message.tunnel_protocol() {
        proto::TunnelProtocol::Hbone => Tunnel::Hbone,
        // A tunnel this proxy does not speak would be a wrong guess either way; plain TCP is
        // what such a workload also accepts.
        proto::TunnelProtocol::None | proto::TunnelProtocol::LegacyIstioMtls => Tunnel::None,
    };
    let workload_type = match message.workload_type() {
        proto::WorkloadType::Deployment => WorkloadType::Deployment,
        proto::WorkloadType::Cronjob => WorkloadType::CronJob,
        proto::WorkloadType::Pod => WorkloadType::Pod,
        proto::WorkloadType::Job => WorkloadType::Job,
    };
    let healthy = message.status() == proto::WorkloadStatus::Healthy;
    let host_network = message.network_mode() == proto::NetworkMode::HostNetwork;
    let proxy_protocol_port = match &message.application_tunnel {
        Some(tunnel) if tunnel.protocol() == proto::application_tunnel::Protocol::Proxy => {
            Some(port("application_tunnel.port", tunnel.port)?)
        }
        _ => None,
    };
    let services = message
        .services
        .into_iter()
        .map(|(key, ports)| {
            let key: ServiceKey = key
                .parse()
                .map_err(|reason: String| unusable("services", reason))?;
            let ports = ports
                .ports
                .into_iter()
                // Zero: the port's name means nothing to this workload.
                .filter(|pair| pair.target_port != 0)
                .map(|pair| {
                    Ok((
                        port("services.service_port", pair.service_port)?,
                        port("services.target_port", pair.target_port)?,
                    ))
                })
                .collect::<Result<HashMap<_, _>>>()?;
            Ok((key, ports))
        })
        .collect::<Result<HashMap<_, _>>>()?;
    let locality = message.locality.unwrap_or_default();
    Ok(Workload {
        uid: message.uid.into(),
        name: message.name.into(),
        namespace: message.namespace.into(),
        addresses: message
            .addresses
            .iter()
            .map(|bytes| address("addresses", bytes))
            .collect::<Result<_>>()?,
        hostname: message.hostname.into(),
        network: message.network.into(),
        tunnel,
        trust_domain: if message.trust_domain.is_empty() {
            trust_domain.into()
        } else {
            message.trust_domain.into()
        },
        service_account: if message.service_account.is_empty() {
            "default".into()
        } else {
            message.service_account.into()
        },
        waypoint: message.waypoint.map(gateway).transpose()?,
        node: message.node.into(),
        cluster: message.cluster_id.into(),
        canonical_name: message.canonical_name.into(),
        canonical_revision: message.canonical_revision.into(),
        workload_name: message.workload_name.into(),
        workload_type,
        proxy_protocol_port,
        policies: message
            .authorization_policies
            .into_iter()
            .map(Into::into)
            .collect(),
        healthy,
        locality: Locality {
            region: locality.region.into(),
            zone: locality.zone.into(),
            subzone: locality.subzone.into(),
        },
        capacity: message.capacity.unwrap_or(1),
        host_network,
        services,
    })
}

/// A service.
pub fn service(message: proto::Service) -> Result<Service> {
    if message.hostname.is_empty() {
        return Err(unusable("hostname", "empty"));
    }
    Ok(Service {
        key: ServiceKey {
            namespace: message.namespace.into(),
            hostname: message.hostname.into(),
        },
        name: message.name.into(),
        addresses: message
            .addresses
            .into_iter()
            .map(|one| network_address("addresses", one))
            .collect::<Result<_>>()?,
        ports: message
            .ports
            .into_iter()
            .map(|one| {
                Ok(ServicePort {
                    port: port("ports.service_port", one.service_port)?,
                    // Zero: the endpoints say, because the target is a name.
                    target_port: u16::try_from(one.target_port)
                        .map_err(|_| unusable("ports.target_port", one.target_port.to_string()))?,
                })
            })
            .collect::<Result<_>>()?,
        waypoint: message.waypoint.map(gateway).transpose()?,
        balancing: message.load_balancing.map(balancing).unwrap_or_default(),
        identities: message
            .subject_alt_names
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect(),
        canonical: message.canonical,
    })
}

/// An authorization policy. A condition that cannot be read makes the whole policy unusable:
/// leaving it out would make the policy match more than was asked.
pub fn policy(message: security::Authorization) -> Result<Policy> {
    if message.name.is_empty() {
        return Err(unusable("name", "empty"));
    }
    let scope = match security::Scope::try_from(message.scope) {
        Ok(security::Scope::Global) => Scope::Global,
        Ok(security::Scope::Namespace) => Scope::Namespace,
        Ok(security::Scope::WorkloadSelector) => Scope::WorkloadSelector,
        Err(error) => return Err(unusable("scope", error.to_string())),
    };
    let action = match security::Action::try_from(message.action) {
        Ok(security::Action::Allow) => Action::Allow,
        Ok(security::Action::Deny) => Action::Deny,
        Err(error) => return Err(unusable("action", error.to_string())),
    };
    let clause = |clause: security::Clause| clause.matches.into_iter().map(condition).collect();
    let rules = message
        .rules
        .into_iter()
        .map(|rule| rule.clauses.into_iter().map(clause).collect())
        .collect::<Result<_>>()?;
    Ok(Policy {
        name: message.name.into(),
        namespace: message.namespace.into(),
        scope,
        action,
        rules,
        dry_run: message.dry_run,
    })
}

fn condition(message: security::Match) -> Result<Match> {
    Ok(Match {
        namespaces: values(message.namespaces, message.not_namespaces, string_match)?,
        principals: values(message.principals, message.not_principals, string_match)?,
        service_accounts: values(
            message.service_accounts,
            message.not_service_accounts,
            |account| {
                Ok(ServiceAccount {
                    namespace: account.namespace.into(),
                    name: account.service_account.into(),
                })
            },
        )?,
        source_ips: values(message.source_ips, message.not_source_ips, block)?,
        destination_ips: values(message.destination_ips, message.not_destination_ips, block)?,
        destination_ports: values(
            message.destination_ports,
            message.not_destination_ports,
            |number| port("destination_ports", number),
        )?,
    })
}

fn values<M, T>(any: Vec<M>, none: Vec<M>, parse: impl Fn(M) -> Result<T>) -> Result<Values<T>> {
    Ok(Values {
        any: any.into_iter().map(&parse).collect::<Result<_>>()?,
        none: none.into_iter().map(&parse).collect::<Result<_>>()?,
    })
}

fn string_match(message: security::StringMatch) -> Result<StringMatch> {
    use security::string_match::MatchType;
    Ok(match message.match_type {
        Some(MatchType::Exact(text)) => StringMatch::Exact(text.into()),
        Some(MatchType::Prefix(text)) => StringMatch::Prefix(text.into()),
        Some(MatchType::Suffix(text)) => StringMatch::Suffix(text.into()),
        Some(MatchType::Presence(_)) => StringMatch::Presence,
        None => return Err(unusable("string match", "of no known kind")),
    })
}

fn block(message: security::Address) -> Result<Block> {
    let address = address("address", &message.address)?;
    u8::try_from(message.length)
        .ok()
        .and_then(|length| Block::new(address, length))
        .ok_or_else(|| unusable("length", format!("{} is too long", message.length)))
}

fn gateway(message: proto::GatewayAddress) -> Result<Gateway> {
    use proto::gateway_address::Destination;
    let destination = match message.destination {
        Some(Destination::Hostname(name)) => GatewayDestination::Service(ServiceKey {
            namespace: name.namespace.into(),
            hostname: name.hostname.into(),
        }),
        Some(Destination::Address(at)) => {
            GatewayDestination::Address(network_address("waypoint.address", at)?)
        }
        None => return Err(unusable("waypoint", "without destination")),
    };
    let hbone_port = match message.hbone_mtls_port {
        0 => INBOUND_HBONE_PORT,
        number => port("waypoint.hbone_mtls_port", number)?,
    };
    Ok(Gateway {
        destination,
        hbone_port,
    })
}

fn balancing(message: proto::LoadBalancing) -> LoadBalancing {
    use proto::load_balancing::{HealthPolicy, Mode, Scope};
    LoadBalancing {
        preference: message
            .routing_preference()
            .filter_map(|scope| match scope {
                Scope::Region => Some(LocalityScope::Region),
                Scope::Zone => Some(LocalityScope::Zone),
                Scope::Subzone => Some(LocalityScope::Subzone),
                Scope::Node => Some(LocalityScope::Node),
                Scope::Cluster => Some(LocalityScope::Cluster),
                Scope::Network => Some(LocalityScope::Network),
                Scope::UnspecifiedScope => None,
            })
            .collect(),
        mode: match message.mode() {
            Mode::UnspecifiedMode => BalanceMode::Even,
            Mode::Strict => BalanceMode::Strict,
            Mode::Failover => BalanceMode::Failover,
            Mode::Passthrough => BalanceMode::Passthrough,
        },
        any_health: message.health_policy() == HealthPolicy::AllowAll,
    }
}

fn network_address(field: &'static str, message: proto::NetworkAddress) -> Result<NetworkAddress> {
    Ok(NetworkAddress {
        network: message.network.into(),
        address: address(field, &message.address)?,
    })
}

fn address(field: &'static str, bytes: &[u8]) -> Result<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(four).into());
    }
    <[u8; 16]>::try_from(bytes)
        .map(|sixteen| Ipv6Addr::from(sixteen).into())
        .map_err(|_| unusable(field, format!("{} bytes are no address", bytes.len())))
}

fn port(field: &'static str, number: u32) -> Result<u16> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| unusable(field, format!("{number} is no port")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_takes_the_meshs_defaults() {
        let message = proto::Workload {
            uid: "Kubernetes//Pod/shop/a".into(),
            namespace: "shop".into(),
            addresses: vec![vec![10, 0, 0, 1]],
            tunnel_protocol: proto::TunnelProtocol::Hbone.into(),
            services: [(
                "shop/cart.shop.svc.cluster.local".to_owned(),
                proto::PortList {
                    ports: vec![proto::Port {
                        service_port: 80,
                        target_port: 8080,
                        app_protocol: 0,
                    }],
                },
            )]
            .into(),
            ..Default::default()
        };
        let parsed = workload(message, "cluster.local").unwrap();
        assert_eq!(
            parsed.identity().to_string(),
            "spiffe://cluster.local/ns/shop/sa/default"
        );
        assert_eq!(parsed.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(parsed.tunnel, Tunnel::Hbone);
        assert!(parsed.healthy);
        assert_eq!(parsed.capacity, 1);
        assert_eq!(parsed.services.values().next().unwrap()[&80], 8080);
    }

    #[test]
    fn wrong_addresses_and_ports_are_refused_with_their_field() {
        let message = proto::Workload {
            uid: "x".into(),
            addresses: vec![vec![1, 2, 3]],
            ..Default::default()
        };
        let error = workload(message, "cluster.local").unwrap_err();
        assert_eq!(error.to_string(), "addresses: 3 bytes are no address");
        assert!(port("p", 0).is_err());
        assert!(port("p", 65_536).is_err());
    }

    #[test]
    fn a_policy_with_an_unreadable_condition_is_refused_whole() {
        let matching = |condition| security::Authorization {
            name: "p".into(),
            namespace: "shop".into(),
            rules: vec![security::Rule {
                clauses: vec![security::Clause {
                    matches: vec![condition],
                }],
            }],
            ..Default::default()
        };
        let too_long = security::Address {
            address: vec![10, 0, 0, 0],
            length: 40,
        };
        assert!(policy(matching(security::Match {
            source_ips: vec![too_long],
            ..Default::default()
        }))
        .is_err());
        assert!(policy(matching(security::Match {
            principals: vec![security::StringMatch { match_type: None }],
            ..Default::default()
        }))
        .is_err());
        assert!(policy(matching(security::Match::default())).is_ok());
    }
}
