//! Tunnels' connections, shared. One TLS connection carries many tunnels, but only of one pod to
//! one workload under one identity: a pod never speaks through another's certificate. A connection
//! is replaced before it is full and when it dies; a new tunnel that finds it dead tries the next.

use std::{
    collections::HashMap,
    future::{poll_fn, Future},
    io,
    net::SocketAddr,
    pin::{pin, Pin},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex, MutexGuard, PoisonError,
    },
    time::{Duration, Instant, SystemTime},
};

use h2::client::{self, SendRequest};
use http::{HeaderMap, Method, Request, StatusCode};
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::{sync::watch, time::timeout};
use tokio_rustls::TlsConnector;
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::{
    read_ahead::ReadAhead,
    stream::{Chunk, Tunnel, MAX_FRAME, MAX_HEADERS, SEND_BUFFER},
    windows::{OpenTunnels, Windows, CONNECTION_WINDOW},
    Pod,
};
use crate::{
    identity::{
        certificate::{CertificateError, Peer},
        store::{CertificateStore, NoCertificate},
        Identity,
    },
    telemetry::metrics::ResponseFlags,
};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Connections that may turn out dead before a tunnel gives up.
const ATTEMPTS: usize = 4;
pub const TLS_WRITE_BUFFER: usize = 256 << 10;

/// Why there is no tunnel.
#[derive(Debug, Error)]
pub enum TunnelError {
    #[error(transparent)]
    NoCertificate(#[from] NoCertificate),
    #[error("connecting to {to}: {error}{}", hint(.error))]
    Connect { to: SocketAddr, error: io::Error },
    #[error("TLS with {to}: {error}")]
    Tls { to: SocketAddr, error: io::Error },
    #[error("identity of {to}: {error}")]
    Certificate {
        to: SocketAddr,
        error: CertificateError,
    },
    #[error("identity of {to}: expected {}, found {found}", expected.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "))]
    WrongIdentity {
        to: SocketAddr,
        expected: Vec<Identity>,
        found: Box<Identity>,
    },
    #[error("HTTP/2 with {to}: {error}")]
    Http2 { to: SocketAddr, error: h2::Error },
    #[error("{to} did not answer the tunnel request in time")]
    Timeout { to: SocketAddr },
    #[error("http status: {}{}", .0, meaning(*.0))]
    Refused(StatusCode),
    #[error("{0}")]
    Shared(Arc<TunnelError>),
}

impl TunnelError {
    /// Istio's letters for it.
    pub fn flags(&self) -> ResponseFlags {
        match self {
            Self::NoCertificate(_) => ResponseFlags::IdentityError,
            Self::Connect { error, .. } if error.kind() == io::ErrorKind::TimedOut => {
                ResponseFlags::NetworkPolicy
            }
            Self::Connect { .. } | Self::Timeout { .. } => ResponseFlags::ConnectionFailure,
            Self::Tls { .. } | Self::Certificate { .. } | Self::WrongIdentity { .. } => {
                ResponseFlags::TlsFailure
            }
            Self::Http2 { .. } => ResponseFlags::Http2Failure,
            Self::Refused(StatusCode::UNAUTHORIZED) => ResponseFlags::PolicyDenied,
            Self::Refused(_) => ResponseFlags::ConnectionFailure,
            Self::Shared(error) => error.flags(),
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::TimedOut {
        " (is port 15008 reachable from this pod?)"
    } else {
        ""
    }
}

fn meaning(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => " (denied by a policy of the destination)",
        StatusCode::SERVICE_UNAVAILABLE => " (the destination refused the connection)",
        _ => "",
    }
}

/// What tunnels must have in common to share a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    pub source: Identity,
    /// The pod the connection leaves from: its network namespace and its address.
    pub pod: Arc<str>,
    pub to: SocketAddr,
    /// Who may answer.
    pub destination: Vec<Identity>,
}

type Connecting = watch::Receiver<Option<Result<(), Arc<TunnelError>>>>;

#[derive(Default)]
struct Slot {
    connections: Vec<Arc<Connection>>,
    connecting: Option<Connecting>,
}

/// One HTTP/2 connection and how busy it is.
struct Connection {
    requests: SendRequest<Chunk>,
    windows: Arc<Windows>,
    /// When the first of both ends' certificates ends: who proved an identity then has not proved
    /// it for tunnels opened afterwards.
    expires: SystemTime,
    /// Set when the connection has ended or refuses new streams.
    closed: AtomicBool,
    idle_since: Mutex<Instant>,
}

/// A place in a connection, given back when dropped.
pub struct Lease(Arc<Connection>);

impl Drop for Lease {
    fn drop(&mut self) {
        if self.0.windows.closed() == 0 {
            *lock(&self.0.idle_since) = Instant::now();
        }
    }
}

/// All connections to other nodes' proxies.
pub struct Pool {
    slots: Mutex<HashMap<PoolKey, Slot>>,
    certificates: Arc<CertificateStore>,
    tunnels: Arc<OpenTunnels>,
    max_streams: usize,
    idle: Duration,
    /// The tasks that move the connections' frames.
    drivers: TaskTracker,
}

enum Found {
    Free(Lease),
    Wait(Connecting),
    Connect(watch::Sender<Option<Result<(), Arc<TunnelError>>>>),
}

impl Pool {
    pub fn new(
        certificates: Arc<CertificateStore>,
        tunnels: Arc<OpenTunnels>,
        max_streams: usize,
        idle: Duration,
    ) -> Self {
        Self {
            slots: Mutex::default(),
            certificates,
            tunnels,
            max_streams,
            idle,
            drivers: TaskTracker::new(),
        }
    }

    /// Opens a tunnel to `authority` from inside `pod`.
    pub async fn open(
        &self,
        pod: &Arc<Pod>,
        key: &PoolKey,
        authority: &str,
        headers: &HeaderMap,
    ) -> Result<(Tunnel, Lease), TunnelError> {
        let mut last = TunnelError::Timeout { to: key.to };
        for _ in 0..ATTEMPTS {
            let lease = self.lease(pod, key).await?;
            match request(&lease.0, key.to, authority, headers).await {
                Ok(tunnel) => return Ok((tunnel, lease)),
                // Nothing of the application was sent yet, so another connection may serve.
                Err(TunnelError::Http2 { to, error }) => {
                    if !error.is_reset() || error.reason() == Some(h2::Reason::REFUSED_STREAM) {
                        lease.0.closed.store(true, Ordering::Release);
                    }
                    debug!(to = %to, error = %error, "pooled connection could not take a tunnel");
                    last = TunnelError::Http2 { to, error };
                }
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Lets go of a pod's connections; tunnels in them go on to their end.
    pub fn forget(&self, pod: &str) {
        lock(&self.slots).retain(|key, _| &*key.pod != pod);
    }

    /// Lets go of all connections and waits until what was sent on them has left.
    pub async fn close(&self) {
        lock(&self.slots).clear();
        self.drivers.close();
        self.drivers.wait().await;
    }

    /// Lets go of connections that nobody has used for a while. Run now and then.
    pub fn release_idle(&self) {
        let idle = |connection: &Connection| {
            connection.windows.open() == 0 && lock(&connection.idle_since).elapsed() >= self.idle
        };
        lock(&self.slots).retain(|_, slot| {
            slot.connections.retain(|connection| {
                !connection.closed.load(Ordering::Acquire) && !idle(connection)
            });
            !slot.connections.is_empty() || slot.connecting.is_some()
        });
    }

    /// Connections held, and tunnels in them.
    pub fn usage(&self) -> (usize, usize) {
        let slots = lock(&self.slots);
        let connections = || slots.values().flat_map(|slot| &slot.connections);
        (
            connections().count(),
            connections()
                .map(|connection| connection.windows.open())
                .sum(),
        )
    }

    async fn lease(&self, pod: &Arc<Pod>, key: &PoolKey) -> Result<Lease, TunnelError> {
        loop {
            match self.find(key) {
                Found::Free(lease) => return Ok(lease),
                Found::Wait(mut connecting) => {
                    let result = connecting
                        .wait_for(Option::is_some)
                        .await
                        .ok()
                        .and_then(|result| result.clone());
                    if let Some(Err(error)) = result {
                        return Err(TunnelError::Shared(error));
                    }
                }
                Found::Connect(announce) => return self.connect(pod, key, announce).await,
            }
        }
    }

    fn find(&self, key: &PoolKey) -> Found {
        let mut slots = lock(&self.slots);
        let slot = slots.entry(key.clone()).or_default();
        let now = SystemTime::now();
        slot.connections.retain(|connection| {
            !connection.closed.load(Ordering::Acquire) && now < connection.expires
        });
        for connection in &slot.connections {
            if let Some(lease) = self.join(connection) {
                return Found::Free(lease);
            }
        }
        // An abandoned attempt has dropped its sender.
        if let Some(connecting) = &slot.connecting {
            if connecting.has_changed().is_ok() && connecting.borrow().is_none() {
                return Found::Wait(connecting.clone());
            }
        }
        let (announce, connecting) = watch::channel(None);
        slot.connecting = Some(connecting);
        Found::Connect(announce)
    }

    /// Takes a place in a connection if there is one. Under the lock of the slots.
    fn join(&self, connection: &Arc<Connection>) -> Option<Lease> {
        let most = self
            .max_streams
            .min(connection.requests.current_max_send_streams());
        if connection.windows.open() >= most {
            return None;
        }
        connection.windows.opened();
        Some(Lease(connection.clone()))
    }

    async fn connect(
        &self,
        pod: &Arc<Pod>,
        key: &PoolKey,
        announce: watch::Sender<Option<Result<(), Arc<TunnelError>>>>,
    ) -> Result<Lease, TunnelError> {
        let connected = self.establish(pod, key).await;
        let mut slots = lock(&self.slots);
        let slot = slots.entry(key.clone()).or_default();
        slot.connecting = None;
        match connected {
            Ok(connection) => {
                connection.windows.opened();
                slot.connections.push(connection.clone());
                announce.send_replace(Some(Ok(())));
                Ok(Lease(connection))
            }
            Err(error) => {
                let error = Arc::new(error);
                announce.send_replace(Some(Err(error.clone())));
                Err(TunnelError::Shared(error))
            }
        }
    }

    async fn establish(
        &self,
        pod: &Arc<Pod>,
        key: &PoolKey,
    ) -> Result<Arc<Connection>, TunnelError> {
        let to = key.to;
        let certificate = self.certificates.get(&key.source).await?;
        let tcp = pod
            .sockets
            .connect(to)
            .await
            .map_err(|error| TunnelError::Connect { to, error })?;
        let handshake = TlsConnector::from(certificate.client.clone())
            .connect(ServerName::IpAddress(to.ip().into()), ReadAhead::new(tcp));
        let mut tls = timeout(HANDSHAKE_TIMEOUT, handshake)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| TunnelError::Tls { to, error })?;
        let session = tls.get_mut().1;
        session.set_buffer_limit(Some(TLS_WRITE_BUFFER));
        let leaf = session
            .peer_certificates()
            .and_then(<[_]>::first)
            .ok_or_else(|| TunnelError::Tls {
                to,
                error: io::ErrorKind::InvalidData.into(),
            })?;
        let peer = Peer::of(leaf).map_err(|error| TunnelError::Certificate { to, error })?;
        if !key.destination.contains(&peer.identity) {
            return Err(TunnelError::WrongIdentity {
                to,
                expected: key.destination.clone(),
                found: Box::new(peer.identity),
            });
        }
        let windows = Arc::new(Windows::new(self.tunnels.clone()));
        let (requests, mut connection) = client::Builder::new()
            .initial_window_size(windows.announced())
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_send_buffer_size(SEND_BUFFER)
            .max_header_list_size(MAX_HEADERS)
            .enable_push(false)
            .handshake::<_, Chunk>(tls)
            .await
            .map_err(|error| TunnelError::Http2 { to, error })?;
        let pings = connection.ping_pong();
        let shared = Arc::new(Connection {
            requests,
            windows: windows.clone(),
            expires: certificate.not_after.min(peer.not_after),
            closed: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
        });
        let watched = Arc::downgrade(&shared);
        self.drivers.spawn(async move {
            let mut silent = pin!(unanswered(pings));
            let reason = loop {
                let ended = poll_fn(|cx| loop {
                    let ended = Pin::new(&mut connection).poll(cx);
                    let announce = |size| connection.set_initial_window_size(size);
                    if ended.is_ready() || !windows.announce(announce) {
                        return ended;
                    }
                });
                tokio::select! {
                    result = ended => break result.err().map(|error| error.to_string()),
                    () = &mut silent => break Some("no answer to a ping".to_owned()),
                    () = windows.changed() => {}
                }
            };
            if let Some(connection) = watched.upgrade() {
                connection.closed.store(true, Ordering::Release);
            }
            debug!(to = %to, reason, "pooled connection ended");
        });
        Ok(shared)
    }
}

/// Returns when the peer does not answer any more.
async fn unanswered(pings: Option<h2::PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        if !matches!(
            timeout(PING_TIMEOUT, pings.ping(h2::Ping::opaque())).await,
            Ok(Ok(_))
        ) {
            return;
        }
    }
}

async fn request(
    connection: &Connection,
    to: SocketAddr,
    authority: &str,
    headers: &HeaderMap,
) -> Result<Tunnel, TunnelError> {
    let failed = |error| TunnelError::Http2 { to, error };
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = authority
        .parse()
        .map_err(|_| failed(h2::Reason::PROTOCOL_ERROR.into()))?;
    *request.headers_mut() = headers.clone();
    let answered = async {
        let mut requests = connection.requests.clone().ready().await.map_err(failed)?;
        let (response, send) = requests.send_request(request, false).map_err(failed)?;
        let response = response.await.map_err(failed)?;
        Ok::<_, TunnelError>((response, send))
    };
    let (response, send) = timeout(CONNECT_RESPONSE_TIMEOUT, answered)
        .await
        .map_err(|_| TunnelError::Timeout { to })??;
    let (head, receive) = response.into_parts();
    if head.status != StatusCode::OK {
        return Err(TunnelError::Refused(head.status));
    }
    Ok(Tunnel::new(send, receive, connection.windows.clone()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(source: &str, pod: &str, to: &str, destination: &str) -> PoolKey {
        PoolKey {
            source: Identity::new("cluster.local", "shop", source),
            pod: pod.into(),
            to: to.parse().unwrap(),
            destination: vec![Identity::new("cluster.local", "shop", destination)],
        }
    }

    #[test]
    fn tunnels_share_only_when_everything_agrees() {
        let one = key("cart", "pod-1", "10.0.0.1:15008", "db");
        assert_eq!(one, key("cart", "pod-1", "10.0.0.1:15008", "db"));
        for other in [
            key("front", "pod-1", "10.0.0.1:15008", "db"),
            key("cart", "pod-2", "10.0.0.1:15008", "db"),
            key("cart", "pod-1", "10.0.0.2:15008", "db"),
            key("cart", "pod-1", "10.0.0.1:15008", "other"),
        ] {
            assert_ne!(one, other);
        }
    }
}
