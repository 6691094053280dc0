//! Packets of the node agent's socket (`SOCK_SEQPACKET`): one protobuf message each, perhaps with a
//! file descriptor.

use std::{io, os::fd::OwnedFd, path::Path};

use prost::Message;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{unix::AsyncFd, Interest};

use crate::{
    proto::zds::{workload_response::Payload, Ack, WorkloadResponse},
    sys,
};

const LARGEST_PACKET: usize = 64 << 10;

/// A connected packet socket.
pub struct PacketSocket(AsyncFd<Socket>);

impl PacketSocket {
    /// Connects; the agent must be listening already.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking().cloexec(), None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self(sys::watch(socket)?))
    }

    /// Sends one message.
    pub async fn send(&self, message: &impl Message) -> io::Result<()> {
        let packet = message.encode_to_vec();
        self.0
            .async_io(Interest::WRITABLE, |socket| socket.send(&packet))
            .await?;
        Ok(())
    }

    /// The next message with its descriptor; `None` when the agent closed.
    pub async fn receive<M: Message + Default>(&self) -> io::Result<Option<(M, Option<OwnedFd>)>> {
        let mut packet = vec![0; LARGEST_PACKET];
        let (length, descriptor) = self
            .0
            .async_io(Interest::READABLE, |socket| {
                sys::receive_with_fd(socket, &mut packet)
            })
            .await?;
        if length == 0 {
            return Ok(None);
        }
        let message = M::decode(&packet[..length])
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, descriptor)))
    }
}

/// The answer to a request; an error says why it could not be fulfilled.
pub fn acknowledgement(error: Option<String>) -> WorkloadResponse {
    WorkloadResponse {
        payload: Some(Payload::Ack(Ack {
            error: error.unwrap_or_default(),
        })),
    }
}
