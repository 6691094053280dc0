//! Connections that a pod opens. The address the application asked for becomes a route: a tunnel
//! to a workload of the mesh, or a plain connection for everything else.

use std::{fmt::Write, future::pending, io, net::SocketAddr, sync::Arc, time::Instant};

use http::{header::FORWARDED, HeaderMap, HeaderName, HeaderValue};
use tokio::net::TcpStream;
use tracing::debug;

use super::{
    copy::{self, refuse_tcp},
    observation::{refused_early, Observation, Parties},
    pool::PoolKey,
    sockets::original_destination,
    Pod, ProxyContext, OWN_PORTS,
};
use crate::{
    state::{
        route::{Client, HboneRoute, PlainRoute, Route, Target},
        workload::Workload,
    },
    telemetry::{
        metrics::{Reporter, ResponseFlags},
        End,
    },
};

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Serves one captured connection to its end.
pub async fn serve(context: Arc<ProxyContext>, pod: Arc<Pod>, tcp: TcpStream, peer: SocketAddr) {
    let started = Instant::now();
    let _socket = context.metrics.socket(Reporter::Source);
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
        refuse_tcp(&tcp);
        return refused_early(
            &context,
            Reporter::Source,
            peer,
            End::at(destination),
            ResponseFlags::ConnectionFailure,
            "the port is the proxy's own",
        );
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
        source: End {
            workload: client,
            ..End::at(peer)
        },
        destination: End::at(destination),
        target: destination,
        hbone_address: None,
        service: None,
    };
    match route {
        Ok(Route::Hbone(route)) => {
            parties.source.identity = Some(pod.identity.clone());
            parties.destination = End {
                address: route.gateway,
                workload: Some(route.workload.clone()),
                identity: Some(route.workload.identity()),
            };
            parties.hbone_address = Some(route.authority.to_string());
            parties.service.clone_from(&route.service);
            through_tunnel(&context, &pod, tcp, parties, route, started).await;
        }
        Ok(Route::Plain(route)) => {
            parties.service.clone_from(&route.service);
            parties.destination.workload.clone_from(&route.workload);
            plainly(&context, &pod, tcp, parties, route, started).await;
        }
        Err(error) => {
            refuse_tcp(&tcp);
            Observation::start(&context, &pod, parties, started)
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
        destination: route.identities,
    };
    let headers = headers(
        &context.config.cluster_id,
        parties.source.workload.as_deref(),
        parties.source.address,
        parties
            .service
            .as_ref()
            .map(|service| &*service.key.hostname),
    );
    let authority = route.authority.to_string();
    let observation = Observation::start(context, pod, parties, started);
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
            observation.fail(error.flags(), error);
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
        Target::Name(name, port) => {
            context
                .metrics
                .looked_up(&name, parties.source.workload.as_deref());
            resolve(&name, port, parties.source.address.is_ipv4()).await
        }
    };
    if let Ok(target) = target {
        parties.destination.address = target;
    }
    let observation = Observation::start(context, pod, parties, started);
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

/// One of a name's addresses, of the client's family if there is one.
async fn resolve(name: &str, port: u16, v4: bool) -> io::Result<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host((name, port)).await?.collect();
    if addresses.iter().any(|address| address.is_ipv4() == v4) {
        addresses.retain(|address| address.is_ipv4() == v4);
    }
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
fn headers(
    cluster: &str,
    client: Option<&Workload>,
    address: SocketAddr,
    service: Option<&str>,
) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(3);
    let mut forwarded = format!("for=\"{address}\"");
    if let Some(host) = service {
        let _ = write!(forwarded, ";host={host}");
    }
    let (trace, span): (u128, u64) = (rand::random(), rand::random());
    if let Ok(value) = HeaderValue::try_from(format!("00-{trace:032x}-{span:016x}-00")) {
        headers.insert(TRACEPARENT, value);
    }
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
        let address = SocketAddr::new(client.addresses[0], 4660);
        let headers = headers("Kubernetes", Some(&client), address, Some("cart.shop"));
        assert_eq!(headers[FORWARDED], "for=\"10.0.0.1:4660\";host=cart.shop");
        let traceparent = headers[TRACEPARENT].to_str().unwrap();
        assert_eq!(traceparent.len(), 55);
        assert!(traceparent.starts_with("00-"));
        assert_eq!(
            headers[BAGGAGE],
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=cart"
        );
    }

    #[test]
    fn an_ipv6_client_is_quoted() {
        let headers = headers("c", None, "[2001:db8::1]:7".parse().unwrap(), None);
        assert_eq!(headers[FORWARDED], "for=\"[2001:db8::1]:7\"");
    }

    #[test]
    fn weights_without_weight_are_equal() {
        assert!(weighted(&[0, 0, 0]) < 3);
        assert_eq!(weighted(&[0, 5, 0]), 1);
    }
}
