//! What comes from outside, whatever it is: no decoder panics, none takes more than it is given,
//! and where there is an inverse, it is one. Thousands of inputs in each run of the tests; one
//! that fails is made as small as it gets.

use std::net::{IpAddr, SocketAddr};

use proptest::{collection::vec, prelude::*};
use prost::Message;
use prost_types::Any;

use crate::{
    dns::message::{self, Code, Query},
    grpc,
    identity::{certificate, Identity},
    proto::{
        discovery::{DeltaDiscoveryResponse, Node, Resource},
        security, workload,
    },
    proxy_protocol,
    state::inbound::Authority,
    xds::{
        convert,
        session::{Kind, Session},
    },
};

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..most)
}

/// A good DNS query with some bytes changed.
fn nearly_a_query() -> impl Strategy<Value = Vec<u8>> {
    let name = vec("[a-zA-Z0-9-]{1,20}", 0..6);
    let changes = vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (name, any::<bool>(), changes).prop_map(|(labels, extended, changes)| {
        let size = extended.then_some(4096);
        let mut query = message::tests::query(&labels.join("."), message::A, size);
        for (at, byte) in changes {
            let at = at.index(query.len());
            query[at] = byte;
        }
        query
    })
}

/// A good workload with any content in its fields.
fn any_workload() -> impl Strategy<Value = workload::Workload> {
    (
        ".{0,12}",
        vec(bytes(18), 0..3),
        any::<i32>(),
        any::<i32>(),
        vec((".{0,12}", any::<u32>(), any::<u32>()), 0..3),
        any::<Option<u32>>(),
        any::<u32>(),
    )
        .prop_map(|(uid, addresses, kind, tunnel, services, capacity, port)| {
            workload::Workload {
                uid,
                addresses,
                workload_type: kind,
                tunnel_protocol: tunnel,
                services: services
                    .into_iter()
                    .map(|(key, service_port, target_port)| {
                        let ports = vec![workload::Port {
                            service_port,
                            target_port,
                            app_protocol: 0,
                        }];
                        (key, workload::PortList { ports })
                    })
                    .collect(),
                capacity,
                application_tunnel: Some(workload::ApplicationTunnel {
                    protocol: kind,
                    port,
                }),
                waypoint: Some(workload::GatewayAddress {
                    destination: None,
                    hbone_mtls_port: port,
                }),
                ..Default::default()
            }
        })
}

fn response(kind: Kind, value: Vec<u8>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.type_url().to_owned(),
        nonce: "n".to_owned(),
        resources: vec![Resource {
            name: "r".to_owned(),
            version: "1".to_owned(),
            resource: Some(Any {
                type_url: kind.type_url().to_owned(),
                value,
            }),
            aliases: vec![],
        }],
        ..Default::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn an_authority_is_read_or_refused(text in ".{0,300}") {
        let _ = Authority::parse(&text);
    }

    #[test]
    fn an_address_survives_as_authority(address: SocketAddr) {
        let authority = Authority::parse(&address.to_string());
        // Scopes are of one host alone.
        if !address.to_string().contains('%') {
            prop_assert_eq!(authority, Ok(Authority::Address(address)));
        }
    }

    #[test]
    fn an_identity_survives_as_uri(
        domain in "[a-z0-9.-]{1,20}", namespace in "[a-z0-9-]{1,20}", account in "[a-z0-9.-]{1,20}"
    ) {
        let identity = Identity::new(domain, namespace, account);
        prop_assert_eq!(identity.to_string().parse::<Identity>().ok(), Some(identity));
    }

    #[test]
    fn any_text_is_an_identity_or_not(text in "(spiffe://)?.{0,60}") {
        if let Ok(identity) = text.parse::<Identity>() {
            prop_assert_eq!(identity.to_string(), text);
        }
    }

    #[test]
    fn any_certificate_is_read_or_refused(der in bytes(600)) {
        let _ = certificate::Peer::of(&der.into());
    }

    #[test]
    fn a_proxy_header_says_what_it_was_given(
        source: SocketAddr, destination: SocketAddr, hostname in proptest::option::of("[a-z.]{0,80}")
    ) {
        let identity = Identity::new("cluster.local", "shop", "cart");
        let header = proxy_protocol::header(source, destination, &identity, hostname.as_deref(), None);
        prop_assert_eq!(&header[..13], b"\r\n\r\n\0\r\nQUIT\n\x21");
        let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
        prop_assert_eq!(header.len(), 16 + length);
        let width = if header[13] == 0x11 { 4 } else { 16 };
        let address = |at: usize| -> IpAddr {
            let octets = &header[at..at + width];
            <[u8; 4]>::try_from(octets).map_or_else(
                |_| IpAddr::from(<[u8; 16]>::try_from(octets).unwrap()).to_canonical(),
                IpAddr::from,
            )
        };
        prop_assert_eq!(address(16), source.ip().to_canonical());
        prop_assert_eq!(address(16 + width), destination.ip().to_canonical());
        let mut fields = vec![];
        let mut at = 16 + 2 * width + 4;
        while at < header.len() {
            let length = usize::from(u16::from_be_bytes([header[at + 1], header[at + 2]]));
            fields.push((header[at], String::from_utf8(header[at + 3..at + 3 + length].to_vec()).unwrap()));
            at += 3 + length;
        }
        let mut expected = vec![(0xD0, identity.to_string())];
        expected.extend(hostname.map(|name| (0xD1, name)));
        prop_assert_eq!(fields, expected);
    }

    #[test]
    fn any_datagram_is_a_query_or_not(datagram in bytes(600)) {
        let _ = Query::parse(&datagram);
    }

    #[test]
    fn every_query_has_an_answer_that_fits(
        datagram in nearly_a_query(), addresses in vec(any::<IpAddr>(), 0..200)
    ) {
        if let Some(query) = Query::parse(&datagram) {
            let answer = query.answer(Code::Success, &addresses, 30, query.datagram);
            prop_assert!(answer.len() <= query.datagram.max(datagram.len() + 11));
            prop_assert_eq!(&answer[..2], &datagram[..2]);
            prop_assert!(answer[2] & 0x80 != 0);
        }
    }

    #[test]
    fn a_shortened_response_fits(response in bytes(2000), limit in 12..1500usize) {
        prop_assert!(message::shortened(&response, limit).len() <= limit.max(response.len().min(limit)));
    }

    #[test]
    fn any_discovery_response_is_answered(value in bytes(300), policies: bool) {
        let kind = if policies { Kind::Authorization } else { Kind::Address };
        let mut session = Session::new("cluster.local");
        let outcome = session.receive(response(kind, value));
        prop_assert_eq!(outcome.changes.is_empty(), !outcome.refused.is_empty());
        prop_assert_eq!(outcome.answer.error_detail.is_some(), !outcome.refused.is_empty());
        let held = session.opening(&Node::default());
        let versions: usize = held.iter().map(|request| request.initial_resource_versions.len()).sum();
        prop_assert_eq!(versions, outcome.changes.len());
    }

    #[test]
    fn any_workload_is_understood_or_refused(message in any_workload()) {
        let encoded = message.encode_to_vec();
        prop_assert_eq!(workload::Workload::decode(&*encoded).unwrap(), message.clone());
        if let Ok(workload) = convert::workload(message, "cluster.local") {
            prop_assert!(!workload.trust_domain.is_empty() && !workload.service_account.is_empty());
        }
    }

    #[test]
    fn any_policy_is_understood_or_refused(
        scope: i32, action: i32, length: u32, address in bytes(18), port: u32
    ) {
        let condition = security::Match {
            source_ips: vec![security::Address { address, length }],
            destination_ports: vec![port],
            ..Default::default()
        };
        let message = security::Authorization {
            name: "p".to_owned(),
            scope,
            action,
            rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![condition] }] }],
            ..Default::default()
        };
        let _ = convert::policy(message);
    }

    #[test]
    fn any_frames_are_messages_or_not(stream in bytes(200)) {
        grpc::take_all(&stream);
    }
}
