//! A TCP stream read in large pieces. TLS asks for one record's bytes at a time; asking the kernel
//! as often costs more than a copy.

use std::{
    io,
    pin::Pin,
    task::{ready, Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

const CAPACITY: usize = 128 << 10;

/// Reads ahead; writes pass straight through.
pub struct ReadAhead {
    tcp: TcpStream,
    buffer: Vec<u8>,
    position: usize,
}

impl ReadAhead {
    pub fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            buffer: Vec::new(),
            position: 0,
        }
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.position == this.buffer.len() {
            this.buffer.clear();
            this.position = 0;
            loop {
                ready!(this.tcp.poll_read_ready(cx))?;
                this.buffer.reserve(CAPACITY);
                match this.tcp.try_read_buf(&mut this.buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        // Idle connections hold no memory.
                        this.buffer = Vec::new();
                    }
                    Err(error) => return Poll::Ready(Err(error)),
                    Ok(_) => break,
                }
            }
        }
        let available = &this.buffer[this.position..];
        let count = available.len().min(into.remaining());
        into.put_slice(&available[..count]);
        this.position += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
