//! The pods' DNS: queries are captured to a port of the proxy inside the pod, over UDP and TCP.
//! Names of the mesh are answered from the index, the rest is asked of the node proxy's own name
//! servers, from inside the pod, so that its network policies see the pod asking.

mod forward;
pub mod message;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    proxy::{Pod, ProxyContext},
    state::route::Client,
    telemetry::metrics::DnsLabels,
};
use message::{Code, Query, A, AAAA};

/// How long a client may keep an answer, in seconds: services move rarely, and not for long.
const TIME_TO_LIVE: u32 = 30;
/// Queries of one pod that may wait for a name server; further ones are dropped, as on a full
/// queue, and asked again.
const WAITING: usize = 512;
const LARGEST_QUERY: usize = 4096;
const TCP_IDLE: Duration = Duration::from_secs(20);

/// Answers one pod's queries.
#[derive(Clone)]
pub struct Responder {
    context: Arc<ProxyContext>,
    pod: Arc<Pod>,
    waiting: Arc<Semaphore>,
}

impl Responder {
    pub fn new(context: Arc<ProxyContext>, pod: Arc<Pod>) -> Self {
        Self {
            context,
            pod,
            waiting: Arc::new(Semaphore::new(WAITING)),
        }
    }

    /// Serves datagrams until stopped, then what has arrived by then.
    pub async fn serve_datagrams(self, socket: UdpSocket, stop: CancellationToken) {
        let socket = Arc::new(socket);
        let mut buffer = vec![0; LARGEST_QUERY];
        loop {
            tokio::select! {
                received = socket.recv_from(&mut buffer) => match received {
                    Ok((length, client)) => self.datagram(&socket, &buffer[..length], client).await,
                    // An answer to a client that has gone comes back as an error.
                    Err(error) => debug!(error = %error, "no DNS query received"),
                },
                () = stop.cancelled() => break,
            }
        }
        while let Ok((length, client)) = socket.try_recv_from(&mut buffer) {
            self.datagram(&socket, &buffer[..length], client).await;
        }
    }

    async fn datagram(&self, socket: &Arc<UdpSocket>, message: &[u8], client: SocketAddr) {
        let query = Query::parse(message);
        let limit = query
            .as_ref()
            .map_or(message::SMALLEST_DATAGRAM, |query| query.datagram);
        if let Some(answer) = self.known(query.as_ref(), client.ip(), limit) {
            let _ = socket.send_to(&answer, client).await;
            return;
        }
        let Ok(permit) = self.waiting.clone().try_acquire_owned() else {
            return debug!(client = %client, "too many DNS queries wait, one dropped");
        };
        let (responder, socket, message) = (self.clone(), socket.clone(), message.to_vec());
        self.context.connections.spawn(async move {
            let answer = responder
                .forwarded(&message, query.as_ref(), client.ip(), false)
                .await;
            if let Some(answer) = answer {
                let _ = socket
                    .send_to(&message::shortened(&answer, limit), client)
                    .await;
            }
            drop(permit);
        });
    }

    /// Serves one TCP connection.
    pub async fn serve_connection(self, mut tcp: TcpStream, client: SocketAddr) {
        let Ok(_permit) = self.waiting.clone().try_acquire_owned() else {
            return;
        };
        // A client that says no more has no more to ask.
        while let Ok(Ok(message)) = timeout(TCP_IDLE, read_message(&mut tcp)).await {
            let query = Query::parse(&message);
            let whole = usize::from(u16::MAX);
            let answer = match self.known(query.as_ref(), client.ip(), whole) {
                Some(answer) => Some(answer),
                None => {
                    self.forwarded(&message, query.as_ref(), client.ip(), true)
                        .await
                }
            };
            let Some(answer) = answer else {
                return;
            };
            if write_message(&mut tcp, &answer).await.is_err() {
                return;
            }
        }
    }

    /// The answer to a query for a name of the mesh.
    fn known(&self, query: Option<&Query>, client: IpAddr, limit: usize) -> Option<Vec<u8>> {
        let workload = self.context.workload_of(&self.pod, client);
        let labels = DnsLabels::of(workload.as_deref());
        self.context
            .metrics
            .dns_requests
            .get_or_create(&labels)
            .inc();
        let query = query.filter(|query| [A, AAAA].contains(&query.kind))?;
        let config = &self.context.config;
        let asking = Client {
            network: &config.network,
            address: client,
            workload: workload.as_deref(),
        };
        let mut addresses = self.context.state.read().addresses_of_name(
            asking,
            &self.pod.namespace,
            &config.cluster_domain,
            &query.name,
        )?;
        // Clients take the first; each should have its turn.
        if addresses.len() > 1 {
            let first = rand::random_range(0..addresses.len());
            addresses.rotate_left(first);
        }
        Some(query.answer(Code::Success, &addresses, TIME_TO_LIVE, limit))
    }

    /// What a name server answers.
    async fn forwarded(
        &self,
        message: &[u8],
        query: Option<&Query>,
        client: IpAddr,
        over_tcp: bool,
    ) -> Option<Vec<u8>> {
        let metrics = &self.context.metrics;
        let workload = self.context.workload_of(&self.pod, client);
        let labels = DnsLabels::of(workload.as_deref());
        metrics.dns_upstream_requests.get_or_create(&labels).inc();
        let started = Instant::now();
        let servers = &self.context.name_servers;
        match forward::ask(&self.pod.sockets, servers, message, over_tcp).await {
            Ok(answer) => {
                metrics
                    .dns_upstream_seconds
                    .get_or_create(&labels)
                    .observe(started.elapsed().as_secs_f64());
                Some(answer)
            }
            Err(error) => {
                debug!(error = %error, name = query.map(|query| query.name.as_str()),
                    "DNS query not answered upstream");
                metrics.dns_upstream_failures.get_or_create(&labels).inc();
                let query = query?;
                Some(query.answer(Code::ServerFailure, &[], 0, message::SMALLEST_DATAGRAM))
            }
        }
    }
}

/// Reads a message with its length before it (RFC 1035, 4.2.2).
async fn read_message(tcp: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = tcp.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    tcp.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(tcp: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let framed = [&length.to_be_bytes(), message].concat();
    tcp.write_all(&framed).await
}

/// The name servers of a `resolv.conf`.
pub fn name_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse().ok())
        .map(|address: IpAddr| SocketAddr::new(address, 53))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_come_from_resolv_conf() {
        let text =
            "search a b\n# nameserver 10.0.0.9\nnameserver 10.96.0.10\n nameserver fd00::1 \n";
        assert_eq!(
            name_servers(text),
            [
                "10.96.0.10:53".parse().unwrap(),
                "[fd00::1]:53".parse().unwrap()
            ]
        );
    }
}
