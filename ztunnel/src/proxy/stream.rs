//! The HTTP/2 streams that carry tunnels: their settings, and the chunks sent on them. A chunk
//! knows when HTTP/2 has done with it, so that a reset can be sent after the bytes before it
//! instead of in their place.

use std::{
    sync::{
        atomic::{AtomicUsize, Ordering},
        Arc,
    },
    time::Duration,
};

use bytes::{Buf, Bytes};
use h2::{RecvStream, SendStream};
use tokio::{sync::Notify, time::timeout};

use super::windows::Windows;

/// The largest DATA frame taken.
pub const MAX_FRAME: u32 = 1 << 20;
/// Bytes one stream may have waiting for its connection.
pub const SEND_BUFFER: usize = 512 << 10;
/// Headers of a tunnel are a handful of short ones.
pub const MAX_HEADERS: u32 = 16 << 10;
/// Resets by the peer that may wait to be noticed; aborted connections are an application's
/// ordinary business and must not end the others' connection.
pub const MAX_PENDING_RESETS: usize = 1024;

/// How long bytes before a reset may take to leave.
const FLUSH_BEFORE_RESET: Duration = Duration::from_secs(1);

/// The two halves of a tunnel.
pub struct Tunnel {
    pub send: SendStream<Chunk>,
    pub receive: RecvStream,
    pub in_flight: InFlight,
    /// Those of its connection.
    pub windows: Arc<Windows>,
}

impl Tunnel {
    pub fn new(send: SendStream<Chunk>, receive: RecvStream, windows: Arc<Windows>) -> Self {
        Self {
            send,
            receive,
            in_flight: InFlight::default(),
            windows,
        }
    }

    /// Ends both directions at once.
    pub fn reset(mut self) {
        self.send.send_reset(h2::Reason::CANCEL);
    }

    /// Ends both directions abruptly, after what was sent before.
    pub async fn reset_after_flush(mut self) {
        let flushed = self.in_flight.drained();
        // If the connection does not take them in time, the reset overtakes them.
        let _ = timeout(FLUSH_BEFORE_RESET, flushed).await;
        self.send.send_reset(h2::Reason::CANCEL);
    }
}

/// Bytes handed to HTTP/2.
#[derive(Debug)]
pub struct Chunk {
    bytes: Bytes,
    in_flight: Option<InFlight>,
}

impl Chunk {
    /// The end of a stream.
    pub fn empty() -> Self {
        Self {
            bytes: Bytes::new(),
            in_flight: None,
        }
    }
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if let Some(in_flight) = &self.in_flight {
            in_flight.done();
        }
    }
}

/// Counts the chunks of a stream that HTTP/2 still holds.
#[derive(Debug, Clone, Default)]
pub struct InFlight(Arc<Count>);

#[derive(Debug, Default)]
struct Count {
    chunks: AtomicUsize,
    drained: Notify,
}

impl InFlight {
    /// Counts `bytes` in.
    pub fn chunk(&self, bytes: Bytes) -> Chunk {
        self.0.chunks.fetch_add(1, Ordering::Relaxed);
        Chunk {
            bytes,
            in_flight: Some(self.clone()),
        }
    }

    /// Waits until HTTP/2 holds none.
    pub async fn drained(&self) {
        loop {
            let drained = self.0.drained.notified();
            if self.0.chunks.load(Ordering::Acquire) == 0 {
                return;
            }
            drained.await;
        }
    }

    fn done(&self) {
        if self.0.chunks.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.drained.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drained_waits_for_the_last_chunk() {
        let in_flight = InFlight::default();
        in_flight.drained().await;
        let (first, second) = (
            in_flight.chunk(Bytes::from_static(b"a")),
            in_flight.chunk(Bytes::from_static(b"b")),
        );
        drop(first);
        let waiting = timeout(Duration::from_millis(20), in_flight.drained());
        assert!(waiting.await.is_err());
        drop(second);
        in_flight.drained().await;
    }
}
