//! Tunnels that other proxies open to a pod. TLS tells who is there, each HTTP/2 CONNECT where to;
//! a tunnel may only end in the pod itself, or, in a waypoint's pod, at what the waypoint stands
//! for, which is handed over with a PROXY protocol header.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use h2::{
    server::{self, SendResponse},
    RecvStream,
};
use http::{header::FORWARDED, HeaderMap, Method, Request, Response, StatusCode};
use thiserror::Error;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_rustls::{server::TlsStream, TlsAcceptor};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    copy,
    observation::{refused_early, Observation, Parties},
    pool::TLS_WRITE_BUFFER,
    read_ahead::ReadAhead,
    stream::{Chunk, Tunnel, MAX_FRAME, MAX_HEADERS, MAX_PENDING_RESETS, SEND_BUFFER},
    windows::{Windows, CONNECTION_WINDOW},
    Pod, ProxyContext,
};
use crate::{
    identity::{certificate, Identity},
    proxy_protocol,
    rbac::Connection,
    state::{
        inbound::{Arrival, Authority},
        workload::Workload,
    },
    telemetry::{
        metrics::{Reporter, ResponseFlags},
        End,
    },
};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Tunnels one connection may have open. More than clients of this kind ask for.
const MAX_STREAMS: u32 = 1000;

/// One authenticated connection of another proxy.
struct Peer {
    context: Arc<ProxyContext>,
    pod: Arc<Pod>,
    address: SocketAddr,
    local: SocketAddr,
    identity: Identity,
    /// When the first of both ends' certificates ends.
    proved_until: SystemTime,
    windows: Arc<Windows>,
}

/// Why a connection was closed before its first tunnel.
#[derive(Debug, Error)]
enum Unusable {
    #[error(transparent)]
    NoCertificate(#[from] crate::identity::store::NoCertificate),
    #[error("TLS: {0}")]
    Tls(io::Error),
    #[error("client certificate: {0}")]
    Certificate(#[from] crate::identity::certificate::CertificateError),
    #[error("client certificate: trust domain {0} is not one of ours")]
    TrustDomain(Arc<str>),
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
}

impl Unusable {
    fn flags(&self) -> ResponseFlags {
        match self {
            Self::NoCertificate(_) => ResponseFlags::IdentityError,
            Self::Tls(_) | Self::Certificate(_) | Self::TrustDomain(_) => ResponseFlags::TlsFailure,
            Self::Http2(_) => ResponseFlags::Http2Failure,
        }
    }
}

/// Serves one connection until its last tunnel has ended. After `stop` it takes no new ones.
pub async fn serve(
    context: Arc<ProxyContext>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    address: SocketAddr,
    stop: CancellationToken,
) {
    let _socket = context.metrics.socket(Reporter::Destination);
    let local = tcp.local_addr().map(super::sockets::canonical);
    match accept(context.clone(), pod.clone(), tcp, address).await {
        Ok((peer, connection)) => {
            let peer = Arc::new(peer);
            if let Err(error) = drive(&peer, connection, &stop).await {
                debug!(peer = %peer.address, identity = %peer.identity, error = %error,
                    "tunnel connection ended");
            }
        }
        Err(error) => {
            let local = local.unwrap_or(address);
            let destination = End {
                workload: context.workload_of(&pod, local.ip()),
                ..End::at(local)
            };
            let reporter = Reporter::Destination;
            refused_early(
                &context,
                reporter,
                address,
                destination,
                error.flags(),
                error,
            );
        }
    }
}

type Server = server::Connection<TlsStream<ReadAhead>, Chunk>;

async fn accept(
    context: Arc<ProxyContext>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    address: SocketAddr,
) -> Result<(Peer, Server), Unusable> {
    let local = tcp.local_addr().map_err(Unusable::Tls)?;
    let certificate = context.certificates.get(&pod.identity).await?;
    let handshake = TlsAcceptor::from(certificate.server.clone()).accept(ReadAhead::new(tcp));
    let mut tls = timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(Unusable::Tls)?;
    let session = tls.get_mut().1;
    session.set_buffer_limit(Some(TLS_WRITE_BUFFER));
    let leaf = session
        .peer_certificates()
        .and_then(<[_]>::first)
        .ok_or_else(|| Unusable::Tls(io::ErrorKind::InvalidData.into()))?;
    let certificate::Peer {
        identity,
        not_after,
    } = certificate::Peer::of(leaf)?;
    if !context.config.trusts(&identity.trust_domain) {
        return Err(Unusable::TrustDomain(identity.trust_domain));
    }
    let windows = Arc::new(Windows::new(context.tunnels.clone()));
    let connection = server::Builder::new()
        .initial_window_size(windows.announced())
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(MAX_STREAMS)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .handshake(tls)
        .await?;
    let peer = Peer {
        context,
        pod,
        address,
        local: super::sockets::canonical(local),
        identity,
        proved_until: not_after.min(certificate.not_after),
        windows,
    };
    Ok((peer, connection))
}

async fn drive(
    peer: &Arc<Peer>,
    mut connection: Server,
    stop: &CancellationToken,
) -> Result<(), h2::Error> {
    let proved = peer
        .proved_until
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    // Tunnels that are open go on; new ones need a new proof.
    let mut no_more = pin!(async {
        tokio::select! {
            () = sleep(proved) => {}
            () = stop.cancelled() => {}
        }
    });
    let mut stopping = false;
    loop {
        let accepted = poll_fn(|cx| loop {
            let accepted = connection.poll_accept(cx);
            let announce = |size| connection.set_initial_window_size(size);
            if accepted.is_ready() || !peer.windows.announce(announce) {
                return accepted;
            }
        });
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            () = &mut no_more, if !stopping => {
                stopping = true;
                connection.graceful_shutdown();
                continue;
            }
            () = peer.windows.changed() => continue,
        };
        match accepted {
            Some(Ok((request, respond))) => {
                let peer = peer.clone();
                let connections = peer.context.connections.clone();
                peer.windows.opened();
                connections.spawn(async move {
                    peer.tunnel(request, respond).await;
                    peer.windows.closed();
                });
            }
            Some(Err(error)) => return Err(error),
            None => return Ok(()),
        }
    }
}

impl Peer {
    async fn tunnel(&self, request: Request<RecvStream>, mut respond: SendResponse<Chunk>) {
        let started = Instant::now();
        let (head, receive) = request.into_parts();
        let authority = match head.uri.authority() {
            Some(authority) if head.method == Method::CONNECT => authority.as_str().to_owned(),
            _ => {
                answer(&mut respond, StatusCode::BAD_REQUEST);
                let error = format_args!("only CONNECT is served, not {}", head.method);
                return refused_early(
                    &self.context,
                    Reporter::Destination,
                    self.address,
                    End::at(self.local),
                    ResponseFlags::ConnectionFailure,
                    error,
                );
            }
        };
        let workload = self
            .context
            .workload_of_destination(&self.pod, self.local.ip())
            .await;
        let arrival = Authority::parse(&authority).and_then(|parsed| {
            self.context.state.read().arrival(
                &self.context.config.network,
                workload.as_deref(),
                self.local.ip(),
                &parsed,
            )
        });
        let named = forwarded_host(&head.headers);
        let mut observation = self.observe(
            &authority,
            named.as_deref(),
            workload.as_ref(),
            arrival.as_ref().ok(),
            started,
        );
        let arrival = match arrival {
            Ok(arrival) => arrival,
            Err(error) => {
                answer(&mut respond, StatusCode::BAD_REQUEST);
                return observation.fail(ResponseFlags::ConnectionFailure, error);
            }
        };
        let Some(workload) = workload else {
            answer(&mut respond, StatusCode::SERVICE_UNAVAILABLE);
            return observation.fail(
                ResponseFlags::ConnectionFailure,
                "the pod is not known to the control plane yet",
            );
        };
        let connection = Connection {
            source: self.address.ip(),
            identity: Some(self.identity.clone()),
            destination: arrival.destination,
        };
        let changes = self.context.state.policies_changed();
        let judgement = self.context.authorize(&workload, &connection);
        observation.judged(judgement.clone());
        if !judgement.decision.allows() {
            answer(&mut respond, StatusCode::UNAUTHORIZED);
            return observation.fail(
                ResponseFlags::PolicyDenied,
                format_args!(
                    "connection closed due to policy rejection: {}",
                    judgement.decision
                ),
            );
        }
        let application = match self.connect(&arrival).await {
            Ok(application) => application,
            Err(error) => {
                answer(&mut respond, StatusCode::SERVICE_UNAVAILABLE);
                return observation.fail(
                    ResponseFlags::ConnectionFailure,
                    format_args!("connecting to the application: {error}"),
                );
            }
        };
        match respond.send_response(Response::new(()), false) {
            Ok(send) => {
                let revoked = self
                    .context
                    .no_longer_allowed(changes, &workload, &connection);
                let result = copy::tunnel(
                    application,
                    Tunnel::new(send, receive, self.windows.clone()),
                    &observation.traffic.sent,
                    &observation.traffic.received,
                    revoked,
                )
                .await;
                observation.finish(result);
            }
            Err(error) => {
                copy::refuse_tcp(&application);
                observation.fail(ResponseFlags::ConnectionFailure, error);
            }
        }
    }

    async fn connect(&self, arrival: &Arrival) -> io::Result<TcpStream> {
        let mut application = match arrival.proxy_protocol {
            None => {
                self.pod
                    .sockets
                    .connect_as(self.address.ip(), arrival.connect)
                    .await?
            }
            Some(_) => self.pod.sockets.connect(arrival.connect).await?,
        };
        if let Some(hostname) = &arrival.proxy_protocol {
            let header = {
                let state = self.context.state.read();
                let network = &self.context.config.network;
                let client = state.workload_at(network, self.address.ip());
                proxy_protocol::header(
                    self.address,
                    arrival.destination,
                    &self.identity,
                    hostname.as_deref(),
                    client
                        .map(Arc::as_ref)
                        .filter(|c| c.identity() == self.identity),
                )
            };
            application.write_all(&header).await?;
        }
        Ok(application)
    }

    fn observe<'a>(
        &'a self,
        authority: &str,
        named: Option<&str>,
        workload: Option<&Arc<Workload>>,
        arrival: Option<&Arrival>,
        started: Instant,
    ) -> Observation<'a> {
        let destination = arrival.map_or(self.local, |arrival| arrival.destination);
        let source = {
            let state = self.context.state.read();
            let at = state.workload_at(&self.context.config.network, self.address.ip());
            // An address says who a peer was last time it was written down; the certificate says
            // who it is.
            at.filter(|workload| workload.identity() == self.identity)
                .cloned()
        };
        let service = workload
            .and_then(|workload| self.context.service_of(workload, destination.port(), named));
        Observation::start(
            &self.context,
            &self.pod,
            Parties {
                reporter: Reporter::Destination,
                source: End {
                    address: self.address,
                    workload: source,
                    identity: Some(self.identity.clone()),
                },
                destination: End {
                    address: self.local,
                    workload: workload.cloned(),
                    identity: Some(self.pod.identity.clone()),
                },
                target: arrival.map_or(self.local, |arrival| arrival.connect),
                hbone_address: Some(authority.to_owned()),
                service,
            },
            started,
        )
    }
}

/// The service the client asked for, if it says (`host` of RFC 7239's header).
fn forwarded_host(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(FORWARDED)?.to_str().ok()?;
    text.split([';', ','])
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| name.eq_ignore_ascii_case("host"))
        .map(|(_, host)| host.trim_matches('"').to_owned())
}

fn answer(respond: &mut SendResponse<Chunk>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Err(error) = respond.send_response(response, true) {
        debug!(error = %error, "answer not sent");
    }
}
