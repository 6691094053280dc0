//! The end of the process without an end of the pods' connections. A successor opens the same
//! ports beside this one's before this one is told to go; then this one stops listening at once
//! and may take its time over what it carries. Without a successor nobody else would answer, so it
//! goes on listening while it finishes, and does not stay long: the successor may only come once
//! it has gone.

use std::{fs, io, sync::PoisonError, time::Duration};

use tracing::warn;

use super::ProxyContext;
use crate::config::INBOUND_HBONE_PORT;

/// The state of a listening socket in `/proc/net/tcp`.
const LISTENING: &str = "0A";
/// How long a process without a successor finishes its connections.
pub const ALONE: Duration = Duration::from_secs(5);

/// Whether another proxy listens in every pod that this one serves.
pub fn has_successor(context: &ProxyContext) -> bool {
    let pods: Vec<_> = {
        let pods = context.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.values().cloned().collect()
    };
    pods.iter().all(|pod| {
        let tables = pod.sockets.namespace().run(|| {
            let read = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
            Ok::<_, io::Error>(read("tcp")? + &read("tcp6").unwrap_or_default())
        });
        match tables {
            Ok(tables) => listeners(&tables, INBOUND_HBONE_PORT) > 1,
            // A pod whose namespace is gone needs nobody.
            Err(error) => {
                warn!(pod = pod.name, error = %error, "cannot see who else listens in the pod");
                true
            }
        }
    })
}

/// Sockets that listen on a port, by the kernel's tables.
fn listeners(tables: &str, port: u16) -> usize {
    let port = format!("{port:04X}");
    tables
        .lines()
        .filter(|line| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let local = words.next().and_then(|address| address.rsplit_once(':'));
            let state = words.nth(1);
            local.is_some_and(|(_, at)| at == port) && state == Some(LISTENING)
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_counted() {
        let tables = "  sl  local_address rem_address   st tx_queue\n\
             0: 00000000:3AA0 00000000:0000 0A 00000000:00000000\n\
             1: 0100007F:3AA0 0200007F:9999 01 00000000:00000000\n\
             2: 00000000000000000000000000000000:3AA0 00000000000000000000000000000000:0000 0A 0:0\n\
             3: 00000000:3A99 00000000:0000 0A 00000000:00000000\n";
        assert_eq!(listeners(tables, 15008), 2);
        assert_eq!(listeners(tables, 15001), 1);
        assert_eq!(listeners(tables, 15006), 0);
    }
}
