//! Connections that a pod opens. The address the application asked for becomes a route: a tunnel
//! to a workload of the mesh, or a plain connection for everything else.

use std::{
    fmt::Write,
    future::pending,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use http::{header::FORWARDED, HeaderMap, HeaderName, HeaderValue};
use tokio::net::TcpStream;
use tracing::debug;

use super::{
    copy::{self, refuse_tcp},
    observation::{Observation, Parties},
    pool::PoolKey,
    sockets::original_destination,
    Pod, ProxyContext, OWN_PORTS,
};
use crate::{
    metrics::{Reporter, ResponseFlags},
    state::{
        route::{Client, HboneRoute, PlainRoute, Route, Target},
        workload::Workload,
    },
};

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// Serves one captured connection to its end.
pub async fn serve(context: Arc<ProxyContext>, pod: Arc<Pod>, tcp: TcpStream, peer: SocketAddr) {
    let started = Instant::now();
    let destination = match original_destination(&tcp) {
        Ok(destination) => destination,
        Err(error) => {
            debug!(error = %error, "not a redirected connection");
            return refuse_tcp(&tcp);
        }
    };
    let own_address = tcp.local_addr().map(|address| address.ip().to_canonical());
    if OWN_PORTS.contains(&destination.port())
        && own_address.is_ok_and(|own| own == destination.ip())
    {
        debug!(peer = %peer, "connection to the proxy's own port refused");
        return refuse_tcp(&tcp);
    }
    let client = context.workload_of(&pod, peer.ip());
    let route = context.state.read().route(
        Client {
            network: &context.config.network,
            address: peer.ip(),
            workload: client.as_deref(),
        },
        destination,
        weighted,
    );
    let mut parties = Parties {
        reporter: Reporter::Source,
        source_address: peer,
        source: client,
        source_identity: None,
        destination_address: destination,
        hbone_address: None,
        service: None,
        destination: None,
        destination_identity: None,
    };
    match route {
        Ok(Route::Hbone(route)) => {
            parties.source_identity = Some(pod.identity.clone());
            parties.destination_address = route.gateway;
            parties.hbone_address = Some(route.authority.to_string());
            parties.service.clone_from(&route.service);
            parties.destination = Some(route.workload.clone());
            parties.destination_identity = Some(route.identity.clone());
            through_tunnel(&context, &pod, tcp, parties, route, started).await;
        }
        Ok(Route::Plain(route)) => {
            parties.service.clone_from(&route.service);
            parties.destination.clone_from(&route.workload);
            plainly(&context, &pod, tcp, parties, route, started).await;
        }
        Err(error) => {
            refuse_tcp(&tcp);
            Observation::start(&context, parties, started)
                .fail(ResponseFlags::ConnectionFailure, error);
        }
    }
}

async fn through_tunnel(
    context: &ProxyContext,
    pod: &Arc<Pod>,
    tcp: TcpStream,
    parties: Parties,
    route: HboneRoute,
    started: Instant,
) {
    let key = PoolKey {
        source: pod.identity.clone(),
        pod: pod.uid.clone(),
        to: route.gateway,
        destination: route.identity,
    };
    let headers = headers(
        &context.config.cluster_id,
        parties.source.as_deref(),
        parties.source_address.ip(),
    );
    let authority = route.authority.to_string();
    let observation = Observation::start(context, parties, started);
    match context.pool.open(pod, &key, &authority, &headers).await {
        Ok((tunnel, lease)) => {
            let traffic = &observation.traffic;
            let result =
                copy::tunnel(tcp, tunnel, &traffic.received, &traffic.sent, pending()).await;
            drop(lease);
            observation.finish(result);
        }
        Err(error) => {
            refuse_tcp(&tcp);
            observation.fail(ResponseFlags::ConnectionFailure, error);
        }
    }
}

async fn plainly(
    context: &ProxyContext,
    pod: &Pod,
    tcp: TcpStream,
    mut parties: Parties,
    route: PlainRoute,
    started: Instant,
) {
    let target = match route.target {
        Target::Address(address) => Ok(address),
        Target::Name(name, port) => resolve(&name, port).await,
    };
    if let Ok(target) = target {
        parties.destination_address = target;
    }
    let observation = Observation::start(context, parties, started);
    let connected = match target {
        Ok(target) => pod.sockets.connect(target).await,
        Err(error) => Err(error),
    };
    match connected {
        Ok(far) => {
            let traffic = &observation.traffic;
            let result = copy::plain(tcp, far, &traffic.received, &traffic.sent, pending()).await;
            observation.finish(result);
        }
        Err(error) => {
            refuse_tcp(&tcp);
            observation.fail(ResponseFlags::ConnectionFailure, error);
        }
    }
}

async fn resolve(name: &str, port: u16) -> io::Result<SocketAddr> {
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host((name, port)).await?.collect();
    if addresses.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("{name} has no address"),
        ));
    }
    Ok(addresses[rand::random_range(0..addresses.len())])
}

/// An index by chance, in proportion to the weights.
fn weighted(weights: &[u32]) -> usize {
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    if total == 0 {
        return rand::random_range(0..weights.len());
    }
    let mut left = rand::random_range(0..total);
    for (index, weight) in weights.iter().enumerate() {
        let weight = u64::from(*weight);
        if left < weight {
            return index;
        }
        left -= weight;
    }
    0
}

/// What a tunnel tells the other side about its client.
fn headers(cluster: &str, client: Option<&Workload>, address: IpAddr) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(2);
    let forwarded = match address {
        IpAddr::V4(v4) => format!("for={v4}"),
        IpAddr::V6(v6) => format!("for=\"[{v6}]\""),
    };
    if let Ok(value) = HeaderValue::try_from(forwarded) {
        headers.insert(FORWARDED, value);
    }
    if let Some(client) = client {
        if let Ok(value) = HeaderValue::try_from(baggage(cluster, client)) {
            headers.insert(BAGGAGE, value);
        }
    }
    headers
}

fn baggage(cluster: &str, client: &Workload) -> String {
    let kind = format!("k8s.{}.name", client.workload_type.key());
    let entries: [(&str, &str); 7] = [
        ("k8s.cluster.name", cluster),
        ("k8s.namespace.name", &client.namespace),
        (&kind, &client.workload_name),
        ("service.name", &client.canonical_name),
        ("service.version", &client.canonical_revision),
        ("cloud.region", &client.locality.region),
        ("cloud.availability_zone", &client.locality.zone),
    ];
    let mut text = String::new();
    for (key, value) in entries {
        if !value.is_empty() {
            let separator = if text.is_empty() { "" } else { "," };
            let _ = write!(text, "{separator}{key}={value}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixtures::pod;

    #[test]
    fn headers_say_who_the_client_is() {
        let mut client = pod("a", "10.0.0.1");
        client.workload_name = "cart".into();
        let headers = headers("Kubernetes", Some(&client), client.addresses[0]);
        assert_eq!(headers[FORWARDED], "for=10.0.0.1");
        assert_eq!(
            headers[BAGGAGE],
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=cart"
        );
    }

    #[test]
    fn an_ipv6_client_is_quoted() {
        let headers = headers("c", None, "2001:db8::1".parse().unwrap());
        assert_eq!(headers[FORWARDED], "for=\"[2001:db8::1]\"");
    }

    #[test]
    fn weights_without_weight_are_equal() {
        assert!(weighted(&[0, 0, 0]) < 3);
        assert_eq!(weighted(&[0, 5, 0]), 1);
    }
}
