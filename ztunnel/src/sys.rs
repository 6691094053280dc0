//! The few kernel calls that no safe wrapper offers. The only module with unsafe code: each
//! function is one call, its safety argued where it stands, its interface safe.
#![allow(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{recvmsg, ControlMessageOwned, MsgFlags};
use socket2::Socket;
use tokio::io::unix::AsyncFd;

/// Lets the runtime watch a socket for readiness.
pub fn watch(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: a `Socket` owns its descriptor and answers the same one for as long as it lives,
    // and the `AsyncFd` owns the socket.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Receives one packet and the first file descriptor that came with it; further ones are closed.
pub fn receive_with_fd(
    socket: &impl AsFd,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!([i32; 4]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut first = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            for raw in descriptors {
                // SAFETY: the kernel has just installed `raw` in this process for this message;
                // nobody else knows of it.
                let owned = unsafe { OwnedFd::from_raw_fd(raw) };
                first.get_or_insert(owned);
            }
        }
    }
    if message.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "packet longer than the receive buffer",
        ));
    }
    Ok((message.bytes, first))
}

/// Has the allocator keep what is freed, up to some megabytes, instead of giving it back to the
/// kernel and taking it again, page by page, with every buffer: that was a quarter of the cost of
/// a byte. Call once, before other threads start.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (option, bytes) in [
        (libc::M_MMAP_THRESHOLD, 4 << 20),
        (libc::M_TRIM_THRESHOLD, 16 << 20),
        (libc::M_TOP_PAD, 1 << 20),
    ] {
        // SAFETY: sets a number of the allocator's, which has its own lock; a value that it does
        // not take changes nothing.
        unsafe { libc::mallopt(option, bytes) };
    }
}

/// Bytes the kernel has not yet had acknowledged by the peer of a TCP socket (`SIOCOUTQ`).
pub fn unacknowledged_bytes(socket: &impl AsFd) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is borrowed for the call, and SIOCOUTQ (= TIOCOUTQ) writes one int.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &mut count) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Lets a socket carry a source address that is not the machine's (`IP_TRANSPARENT`), for IPv6
/// sockets when `v6`. Needs CAP_NET_ADMIN in the socket's network namespace.
pub fn set_transparent(socket: &impl AsFd, v6: bool) -> io::Result<()> {
    if v6 {
        set_flag(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT)
    } else {
        set_flag(socket, libc::SOL_IP, libc::IP_TRANSPARENT)
    }
}

/// Makes `bind` to port 0 choose the port at `connect`, so that a port is taken per 4-tuple
/// rather than per address (`IP_BIND_ADDRESS_NO_PORT`).
pub fn set_bind_address_no_port(socket: &impl AsFd) -> io::Result<()> {
    set_flag(socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT)
}

fn set_flag(socket: &impl AsFd, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let one: libc::c_int = 1;
    // SAFETY: the option value is one int that outlives the call, of the size stated.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const one).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
