//! Connections that come to a pod plain, from outside of the mesh. Nobody has proved anything, so
//! policies see them without an identity; a refused one is reset.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use tokio::net::TcpStream;
use tracing::debug;

use super::{
    copy::{self, refuse_tcp, Broken},
    observation::{Observation, Parties},
    refusal,
    sockets::original_destination,
    Pod, ProxyContext, OWN_PORTS,
};
use crate::{
    metrics::{Reporter, ResponseFlags},
    rbac::Connection,
};

/// Serves one captured connection to its end.
pub async fn serve(context: Arc<ProxyContext>, pod: Arc<Pod>, tcp: TcpStream, peer: SocketAddr) {
    let started = Instant::now();
    let destination = match original_destination(&tcp) {
        Ok(destination) => destination,
        Err(error) => {
            debug!(error = %error, "not a redirected connection");
            return refuse_tcp(&tcp);
        }
    };
    if OWN_PORTS.contains(&destination.port()) {
        debug!(peer = %peer, "connection to the proxy's own port refused");
        return refuse_tcp(&tcp);
    }
    let workload = context
        .workload_of_destination(&pod, destination.ip())
        .await;
    let source = context
        .state
        .read()
        .workload_at(&context.config.network, peer.ip())
        .cloned();
    let service = workload
        .as_ref()
        .and_then(|workload| context.service_of(workload, destination.port()));
    let observation = Observation::start(
        &context,
        Parties {
            reporter: Reporter::Destination,
            source_address: peer,
            source,
            source_identity: None,
            destination_address: destination,
            hbone_address: None,
            service,
            destination: workload.clone(),
            destination_identity: None,
        },
        started,
    );
    let Some(workload) = workload else {
        refuse_tcp(&tcp);
        return observation.fail(
            ResponseFlags::ConnectionFailure,
            "the pod is not known to the control plane yet",
        );
    };
    let connection = Connection {
        source: peer.ip(),
        identity: None,
        destination,
    };
    let changes = context.state.policies_changed();
    if let Some(reason) = refusal(&context.authorize(&workload, &connection)) {
        refuse_tcp(&tcp);
        return observation.fail(
            ResponseFlags::PolicyDenied,
            format_args!("connection closed due to policy rejection: {reason}"),
        );
    }
    match pod.sockets.connect_as(peer.ip(), destination).await {
        Ok(application) => {
            let traffic = &observation.traffic;
            let revoked = context.no_longer_allowed(changes, &workload, &connection);
            let result =
                copy::plain(tcp, application, &traffic.received, &traffic.sent, revoked).await;
            observation.finish(result);
        }
        Err(error) => {
            refuse_tcp(&tcp);
            observation.fail(ResponseFlags::ConnectionFailure, Broken::Near(error));
        }
    }
}
