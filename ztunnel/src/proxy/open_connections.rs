//! The connections of a pod that are open now, for the admin interface.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

use crate::telemetry::metrics::Reporter;

/// One connection, as far as the admin interface tells of it.
#[derive(Debug, Clone)]
pub struct OpenConnection {
    pub reporter: Reporter,
    pub source: SocketAddr,
    /// Outbound: the address the client asked for. Inbound: the application's.
    pub target: SocketAddr,
    /// Outbound: where the proxy connected to.
    pub through: SocketAddr,
    pub service: Option<Arc<str>>,
    pub tunnelled: bool,
}

/// All of a pod.
#[derive(Debug, Clone, Default)]
pub struct OpenConnections(Arc<Mutex<Book>>);

#[derive(Debug, Default)]
struct Book {
    next: u64,
    open: BTreeMap<u64, OpenConnection>,
}

/// Takes a connection out of the book when dropped.
pub struct Registered {
    book: OpenConnections,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.book.lock().open.remove(&self.number);
    }
}

/// As Istio's ztunnel writes them.
#[derive(Debug, Serialize)]
pub struct ConnectionsView {
    inbound: Vec<ConnectionView>,
    outbound: Vec<ConnectionView>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ConnectionView {
    src: SocketAddr,
    original_dst: Option<String>,
    actual_dst: SocketAddr,
    protocol: &'static str,
}

impl OpenConnections {
    pub fn register(&self, connection: OpenConnection) -> Registered {
        let mut book = self.lock();
        let number = book.next;
        book.next += 1;
        book.open.insert(number, connection);
        Registered {
            book: self.clone(),
            number,
        }
    }

    pub fn any(&self) -> bool {
        !self.lock().open.is_empty()
    }

    pub fn view(&self) -> ConnectionsView {
        let (mut inbound, mut outbound) = (vec![], vec![]);
        for connection in self.lock().open.values() {
            let protocol = if connection.tunnelled { "HBONE" } else { "TCP" };
            match connection.reporter {
                Reporter::Source => outbound.push(ConnectionView {
                    src: connection.source,
                    original_dst: Some(connection.target.to_string()),
                    actual_dst: connection.through,
                    protocol,
                }),
                Reporter::Destination => inbound.push(ConnectionView {
                    src: connection.source,
                    original_dst: connection.service.as_ref().map(ToString::to_string),
                    actual_dst: connection.target,
                    protocol,
                }),
            }
        }
        ConnectionsView { inbound, outbound }
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
