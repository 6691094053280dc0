//! Bytes from one side to the other, exactly. Each direction ends on its own: a FIN becomes the end
//! of the stream and the other way round, after everything before it. A reset on one side becomes
//! a reset on the other. Memory is bounded by one read and by HTTP/2's flow control: who does
//! not read is not read for.

use std::{
    cell::RefCell,
    future::{poll_fn, Future},
    io,
    net::Shutdown,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{ready, Poll},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::{select, Either};
use h2::{RecvStream, SendStream};
use prometheus_client::metrics::counter::Counter;
use socket2::SockRef;
use thiserror::Error;
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    stream::{Chunk, InFlight, Tunnel},
    windows::Windows,
};
use crate::{rbac::Judgement, sys};

/// Reads begin small, for the many connections that only ever carry a little, and grow while
/// they come back full.
const SMALLEST_READ: usize = 4 << 10;
const LARGEST_READ: usize = 256 << 10;
/// The buffer a thread moves plain connections' bytes through.
const PLAIN_BUFFER: usize = 128 << 10;
/// How long bytes before a reset may take to reach the application.
const DELIVER_BEFORE_RESET: Duration = Duration::from_secs(1);

/// Why a connection did not end with a FIN in both directions.
#[derive(Debug, Error)]
pub enum Broken {
    /// The side whose TCP connection the proxy accepted or opened towards the application.
    #[error("connection to the application: {0}")]
    Near(io::Error),
    /// The tunnel, or the other TCP connection.
    #[error("connection to the peer: {0}")]
    Far(io::Error),
    /// Neither; the proxy was told to end it.
    #[error("connection closed due to policy change: {}", .0.decision)]
    Revoked(Judgement),
}

/// Bytes moved, counted as they move.
#[derive(Debug, Default)]
pub struct Traffic {
    /// From client to server.
    pub received: Direction,
    /// From server to client.
    pub sent: Direction,
}

/// One direction of a connection's traffic, and the metric that adds it up with others'.
#[derive(Debug, Default)]
pub struct Direction {
    bytes: AtomicU64,
    metric: Counter,
}

impl Direction {
    pub fn new(metric: Counter) -> Self {
        Self {
            bytes: AtomicU64::new(0),
            metric,
        }
    }

    pub fn total(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn add(&self, count: usize) {
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        self.metric.inc_by(count as u64);
    }
}

/// Joins a TCP connection with a tunnel until both directions have ended, or until `revoked` says
/// why they must. `from_tcp` counts what the TCP side says, `to_tcp` what it hears.
pub async fn tunnel(
    tcp: TcpStream,
    mut tunnel: Tunnel,
    from_tcp: &Direction,
    to_tcp: &Direction,
    revoked: impl Future<Output = Judgement>,
) -> Result<(), Broken> {
    let (in_flight, windows) = (tunnel.in_flight.clone(), tunnel.windows.clone());
    let result = unless(revoked, async {
        let upload = pin!(into_tunnel(&tcp, &mut tunnel.send, &in_flight, from_tcp));
        let download = pin!(out_of_tunnel(&mut tunnel.receive, &windows, &tcp, to_tcp));
        match select(upload, download).await {
            // What came before the reset is still delivered.
            Either::Left((Err(Broken::Far(error)), download)) => {
                download.await.and(Err(Broken::Far(error)))
            }
            Either::Left((Ok(()), download)) => match select(download, pin!(reset(&tcp))).await {
                Either::Left((result, _)) => result,
                Either::Right((error, _)) => Err(Broken::Near(error)),
            },
            Either::Right((Ok(()), upload)) => upload.await,
            Either::Left((broken, _)) | Either::Right((broken, _)) => broken,
        }
    })
    .await;
    match &result {
        Ok(()) => {}
        Err(Broken::Near(_)) => {
            drop(tcp);
            tunnel.reset_after_flush().await;
        }
        Err(Broken::Far(_)) => reset_tcp(tcp).await,
        Err(Broken::Revoked(_)) => {
            refuse_tcp(&tcp);
            tunnel.reset();
        }
    }
    result
}

/// Joins two TCP connections until both directions have ended, or until `revoked` says why they
/// must.
pub async fn plain(
    near: TcpStream,
    far: TcpStream,
    from_near: &Direction,
    to_near: &Direction,
    revoked: impl Future<Output = Judgement>,
) -> Result<(), Broken> {
    let result = unless(revoked, async {
        let out = pin!(pump(&near, &far, from_near));
        let back = pin!(pump(&far, &near, to_near));
        match select(out, back).await {
            Either::Left((Ok(()), back)) => match select(back, pin!(reset(&near))).await {
                Either::Left((result, _)) => result.map_err(Broken::reversed),
                Either::Right((error, _)) => Err(Broken::Near(error)),
            },
            Either::Right((Ok(()), out)) => match select(out, pin!(reset(&far))).await {
                Either::Left((result, _)) => result,
                Either::Right((error, _)) => Err(Broken::Far(error)),
            },
            Either::Left((broken, _)) => broken,
            Either::Right((broken, _)) => broken.map_err(Broken::reversed),
        }
    })
    .await;
    match &result {
        Ok(()) => {}
        Err(Broken::Near(_)) => {
            drop(near);
            reset_tcp(far).await;
        }
        Err(Broken::Far(_)) => {
            drop(far);
            reset_tcp(near).await;
        }
        Err(Broken::Revoked(_)) => {
            refuse_tcp(&near);
            refuse_tcp(&far);
        }
    }
    result
}

async fn unless(
    revoked: impl Future<Output = Judgement>,
    work: impl Future<Output = Result<(), Broken>>,
) -> Result<(), Broken> {
    match select(pin!(work), pin!(revoked)).await {
        Either::Left((result, _)) => result,
        Either::Right((judgement, _)) => Err(Broken::Revoked(judgement)),
    }
}

impl Broken {
    /// As seen from the other side.
    fn reversed(self) -> Self {
        match self {
            Self::Near(error) => Self::Far(error),
            Self::Far(error) => Self::Near(error),
            Self::Revoked(judgement) => Self::Revoked(judgement),
        }
    }
}

/// Closes a TCP connection so that its peer sees a reset, after the bytes before it.
pub async fn reset_tcp(tcp: TcpStream) {
    let delivered = async {
        let mut pause = Duration::from_micros(200);
        while sys::unacknowledged_bytes(&tcp).is_ok_and(|bytes| bytes > 0) {
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    };
    // An application that does not read loses them, as it would without a proxy.
    let _ = timeout(DELIVER_BEFORE_RESET, delivered).await;
    let _ = SockRef::from(&tcp).set_linger(Some(Duration::ZERO));
}

/// Closes a TCP connection that nothing was sent on with a reset, at once.
pub fn refuse_tcp(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

async fn into_tunnel(
    tcp: &TcpStream,
    send: &mut SendStream<Chunk>,
    in_flight: &InFlight,
    count: &Direction,
) -> Result<(), Broken> {
    let mut buffer = BytesMut::new();
    let mut read_size = SMALLEST_READ;
    loop {
        poll_fn(|cx| {
            if let Poll::Ready(reason) = send.poll_reset(cx) {
                return Poll::Ready(Err(Broken::Far(by_peer(reason))));
            }
            tcp.poll_read_ready(cx).map_err(Broken::Near)
        })
        .await?;
        // Nothing is read that could not be sent: who stalls costs no memory here.
        let room = capacity(tcp, send, read_size).await?.min(read_size);
        buffer.reserve(room);
        let read = match tcp.try_read_buf(&mut (&mut buffer).limit(room)) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Others may need what this stream does not use.
                send.reserve_capacity(0);
                buffer = BytesMut::new();
                continue;
            }
            Err(error) => return Err(Broken::Near(error)),
        };
        if read == 0 {
            return send
                .send_data(Chunk::empty(), true)
                .map_err(|error| Broken::Far(of_http2(error)));
        }
        count.add(read);
        if read >= read_size {
            read_size = (read_size * 2).min(LARGEST_READ);
        } else if read < read_size / 8 {
            read_size = (read_size / 2).max(SMALLEST_READ);
        }
        send.send_data(in_flight.chunk(buffer.split().freeze()), false)
            .map_err(|error| Broken::Far(of_http2(error)))?;
    }
}

/// Waits until some of `size` bytes may be sent; answers how many, or how the TCP side broke in
/// the meantime.
async fn capacity(
    tcp: &TcpStream,
    send: &mut SendStream<Chunk>,
    size: usize,
) -> Result<usize, Broken> {
    send.reserve_capacity(size);
    loop {
        match send.capacity() {
            0 => {}
            capacity => return Ok(capacity),
        }
        let granted = pin!(poll_fn(|cx| send.poll_capacity(cx)));
        match select(granted, pin!(reset(tcp))).await {
            Either::Left((granted, _)) => granted
                .unwrap_or_else(|| Err(h2::Reason::CANCEL.into()))
                .map_err(|error| Broken::Far(of_http2(error)))?,
            Either::Right((error, _)) => return Err(Broken::Near(error)),
        };
    }
}

async fn out_of_tunnel(
    receive: &mut RecvStream,
    windows: &Windows,
    tcp: &TcpStream,
    count: &Direction,
) -> Result<(), Broken> {
    let mut shrunk = pin!(windows.shrunk());
    loop {
        let chunk = poll_fn(|cx| loop {
            let chunk = receive.poll_data(cx);
            if chunk.is_ready() || shrunk.as_mut().poll(cx).is_pending() {
                return chunk;
            }
            shrunk.set(windows.shrunk());
            // Nothing more is taken, but what was taken may be due now.
            if let Err(error) = receive.flow_control().release_capacity(0) {
                return Poll::Ready(Some(Err(error)));
            }
        });
        let Some(chunk) = chunk.await else { break };
        let chunk = chunk.map_err(|error| Broken::Far(of_http2(error)))?;
        write_all(tcp, &chunk).await.map_err(Broken::Near)?;
        count.add(chunk.len());
        receive
            .flow_control()
            .release_capacity(chunk.len())
            .map_err(|error| Broken::Far(of_http2(error)))?;
    }
    finish(tcp).map_err(Broken::Near)
}

async fn write_all(tcp: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match tcp.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tcp.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Moves one direction of a plain connection; errors are `Near` for `from`, `Far` for `to`.
fn pump<'a>(
    from: &'a TcpStream,
    to: &'a TcpStream,
    count: &'a Direction,
) -> impl Future<Output = Result<(), Broken>> + 'a {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    // What was read and could not be written yet; empty most of the time.
    let mut pending = Bytes::new();
    poll_fn(move |cx| loop {
        while !pending.is_empty() {
            ready!(to.poll_write_ready(cx)).map_err(Broken::Far)?;
            match to.try_write(&pending) {
                Ok(written) => drop(pending.split_to(written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(Broken::Far(error))),
            }
        }
        ready!(from.poll_read_ready(cx)).map_err(Broken::Near)?;
        let ended = BUFFER.with_borrow_mut(|buffer| {
            buffer.resize(PLAIN_BUFFER, 0);
            let read = match from.try_read(buffer) {
                Ok(0) => return Ok(true),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(Broken::Near(error)),
            };
            count.add(read);
            let written = match to.try_write(&buffer[..read]) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(Broken::Far(error)),
            };
            if written < read {
                pending = Bytes::copy_from_slice(&buffer[written..read]);
            }
            Ok(false)
        })?;
        if ended {
            return Poll::Ready(finish(to).map_err(Broken::Far));
        }
    })
}

/// Says that no more bytes follow.
fn finish(tcp: &TcpStream) -> io::Result<()> {
    match SockRef::from(tcp).shutdown(Shutdown::Write) {
        // The other side has closed both directions already: it needs no telling.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Waits for a reset of a connection that nobody reads from any more.
async fn reset(tcp: &TcpStream) -> io::Error {
    if let Err(error) = tcp.ready(Interest::ERROR).await {
        return error;
    }
    match tcp.take_error() {
        Ok(Some(error)) | Err(error) => error,
        // Reported already, to whoever wrote last.
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

fn by_peer(reason: Result<h2::Reason, h2::Error>) -> io::Error {
    match reason {
        Ok(reason) => io::Error::new(
            io::ErrorKind::ConnectionReset,
            format!("stream reset: {}", reason.description()),
        ),
        Err(error) => of_http2(error),
    }
}

fn of_http2(error: h2::Error) -> io::Error {
    if error.is_io() {
        if let Some(io) = error.into_io() {
            return io;
        }
        return io::ErrorKind::BrokenPipe.into();
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error.to_string())
}
