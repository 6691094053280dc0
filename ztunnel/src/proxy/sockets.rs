//! Sockets inside a pod's network namespace, all carrying the proxy's mark, so that the pod's own
//! redirection rules let them pass.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    time::timeout,
};
use tracing::warn;

use crate::{config::PACKET_MARK, inpod::netns::NetworkNamespace, sys};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 4096;
/// A peer that vanished is noticed within about KEEPALIVE_IDLE + PROBES * INTERVAL.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(180);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_PROBES: u32 = 6;

/// Makes sockets in one pod.
#[derive(Debug)]
pub struct PodSockets {
    namespace: NetworkNamespace,
    /// Cleared when the kernel refuses, so that it is asked and told once.
    may_mark: AtomicBool,
    may_spoof: AtomicBool,
}

impl PodSockets {
    /// `original_source` asks for connections to the application to keep the client's address.
    pub fn new(namespace: NetworkNamespace, original_source: bool) -> Self {
        Self {
            namespace,
            may_mark: AtomicBool::new(true),
            may_spoof: AtomicBool::new(original_source),
        }
    }

    pub fn namespace(&self) -> &NetworkNamespace {
        &self.namespace
    }

    /// Listens on all addresses of the pod. The port can be shared with another proxy, so that a
    /// successor may open it before its predecessor closes.
    pub fn listen(&self, port: u16) -> io::Result<TcpListener> {
        let everywhere = [
            SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port),
            SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port),
        ];
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in everywhere {
            match self.listen_at(address) {
                Ok(listener) => return Ok(listener),
                // Without IPv6, the second address is the one.
                Err(error)
                    if [Errno::EAFNOSUPPORT as i32, Errno::EADDRNOTAVAIL as i32]
                        .contains(&error.raw_os_error().unwrap_or(0)) =>
                {
                    last = error;
                }
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Listens on the pod's loopback address alone.
    pub fn listen_locally(&self, port: u16) -> io::Result<TcpListener> {
        self.listen_at(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))
    }

    /// Takes datagrams on the pod's loopback address: answers must come from the very address
    /// that redirected queries went to.
    pub fn listen_for_datagrams(&self, port: u16) -> io::Result<UdpSocket> {
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let socket = self.socket(address.ip(), Type::DGRAM, Protocol::UDP)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        UdpSocket::from_std(socket.into())
    }

    /// A socket for datagrams to and from `to`.
    pub fn datagram(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.socket(to.ip(), Type::DGRAM, Protocol::UDP)?;
        socket.connect(&to.into())?;
        UdpSocket::from_std(socket.into())
    }

    fn listen_at(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.stream_socket(address.ip())?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    }

    /// Connects from the pod's own address.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.stream_socket(to.ip())?;
        connect(socket, to).await
    }

    /// Connects with `source` as the address the other side sees, if the kernel permits.
    pub async fn connect_as(&self, source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.stream_socket(to.ip())?;
        if source.is_ipv4() == to.is_ipv4()
            && source != to.ip()
            && !source.is_loopback()
            && self.may_spoof.load(Ordering::Relaxed)
        {
            match spoof(&socket, source) {
                Ok(()) => {}
                Err(error) if not_permitted(&error) => {
                    self.may_spoof.store(false, Ordering::Relaxed);
                    warn!(error = %error, "the application will see the proxy's address, not its clients'");
                    return self.connect(to).await;
                }
                Err(error) => return Err(error),
            }
        }
        connect(socket, to).await
    }

    fn stream_socket(&self, family_of: IpAddr) -> io::Result<Socket> {
        self.socket(family_of, Type::STREAM, Protocol::TCP)
    }

    fn socket(&self, family_of: IpAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        let domain = Domain::for_address(SocketAddr::new(family_of, 0));
        let socket = self
            .namespace
            .run(|| Socket::new(domain, kind.nonblocking().cloexec(), Some(protocol)))?;
        self.mark(&socket)?;
        Ok(socket)
    }

    /// Puts the proxy's mark on a socket.
    pub fn mark(&self, socket: &Socket) -> io::Result<()> {
        if self.may_mark.load(Ordering::Relaxed) {
            match socket.set_mark(PACKET_MARK) {
                Err(error) if not_permitted(&error) => {
                    self.may_mark.store(false, Ordering::Relaxed);
                    warn!(error = %error, "sockets stay unmarked: without CAP_NET_ADMIN redirection may loop");
                }
                other => return other,
            }
        }
        Ok(())
    }
}

fn spoof(socket: &Socket, source: IpAddr) -> io::Result<()> {
    sys::set_transparent(socket, source.is_ipv6())?;
    sys::set_bind_address_no_port(socket)?;
    socket.bind(&SocketAddr::new(source, 0).into())
}

fn not_permitted(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

async fn connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(to);
    let stream = timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    prepare(&stream)?;
    Ok(stream)
}

/// What every connected socket of the proxy is set to.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )
}

/// The address a redirected connection was opened to (`SO_ORIGINAL_DST`).
pub fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let v4 = stream.local_addr()?.ip().to_canonical().is_ipv4();
    let original = if v4 {
        socket.original_dst_v4()?
    } else {
        socket.original_dst_v6()?
    };
    original
        .as_socket()
        .map(canonical)
        .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

/// An address without the disguise of IPv4 in IPv6.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
