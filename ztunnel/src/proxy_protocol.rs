//! PROXY protocol version 2, as a waypoint behind the proxy reads it: who connects to where, with
//! the client's proven identity and the service's name as type-length-value fields of Istio's.

use std::net::{IpAddr, SocketAddr};

use crate::{identity::Identity, state::workload::Workload};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
const SOURCE_IDENTITY: u8 = 0xD0;
const SERVICE_HOSTNAME: u8 = 0xD1;
/// Ours (the range for custom fields): what the client is to the metrics of the waypoint.
const SOURCE_WORKLOAD: u8 = 0xE0;
const SOURCE_NAMESPACE: u8 = 0xE1;
const SOURCE_SERVICE: u8 = 0xE2;
const SOURCE_REVISION: u8 = 0xE3;
const SOURCE_CLUSTER: u8 = 0xE4;
const SOURCE_POD: u8 = 0xE5;

/// The header that precedes a connection's bytes.
pub fn header(
    source: SocketAddr,
    destination: SocketAddr,
    identity: &Identity,
    hostname: Option<&str>,
    client: Option<&Workload>,
) -> Vec<u8> {
    let mut body = Vec::with_capacity(320);
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            body.extend(source.octets());
            body.extend(destination.octets());
            TCP_OVER_IPV4
        }
        (source, destination) => {
            for address in [source, destination] {
                body.extend(match address {
                    IpAddr::V4(four) => four.to_ipv6_mapped().octets(),
                    IpAddr::V6(six) => six.octets(),
                });
            }
            TCP_OVER_IPV6
        }
    };
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    let identity = identity.to_string();
    for (kind, value) in [
        (SOURCE_IDENTITY, Some(identity.as_str())),
        (SERVICE_HOSTNAME, hostname),
        (SOURCE_WORKLOAD, client.map(|c| &*c.workload_name)),
        (SOURCE_NAMESPACE, client.map(|c| &*c.namespace)),
        (SOURCE_SERVICE, client.map(|c| &*c.canonical_name)),
        (SOURCE_REVISION, client.map(|c| &*c.canonical_revision)),
        (SOURCE_CLUSTER, client.map(|c| &*c.cluster)),
        (SOURCE_POD, client.map(|c| &*c.name)),
    ] {
        // Names that long do not exist; cutting one would make it another.
        if let Some((value, length)) = value.and_then(|v| Some((v, u16::try_from(v.len()).ok()?))) {
            body.push(kind);
            body.extend(length.to_be_bytes());
            body.extend(value.as_bytes());
        }
    }
    let mut header = Vec::with_capacity(16 + body.len());
    header.extend(SIGNATURE);
    header.extend([PROXY, family]);
    header.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
    header.extend(body);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_specified() {
        let identity = Identity::new("c", "n", "s");
        let header = header(
            "10.0.0.1:4660".parse().unwrap(),
            "10.96.0.1:80".parse().unwrap(),
            &identity,
            Some("h"),
            None,
        );
        let tlvs = 3 + identity.to_string().len() + 3 + 1;
        assert_eq!(&header[..14], b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
        assert_eq!(usize::from(header[15]), 12 + tlvs);
        assert_eq!(
            &header[16..28],
            [10, 0, 0, 1, 10, 96, 0, 1, 0x12, 0x34, 0, 80]
        );
        assert_eq!(header[28], 0xD0);
        assert_eq!(&header[header.len() - 4..], [0xD1, 0, 1, b'h']);
        assert_eq!(header.len(), 16 + 12 + tlvs);
    }

    #[test]
    fn mixed_families_are_written_as_ipv6() {
        let header = header(
            "10.0.0.1:1".parse().unwrap(),
            "[2001:db8::1]:2".parse().unwrap(),
            &Identity::new("c", "n", "s"),
            None,
            None,
        );
        assert_eq!(header[13], 0x21);
        assert_eq!(&header[26..32], [0xFF, 0xFF, 10, 0, 0, 1]);
    }
}
