//! Connections that come to a pod plain, from outside of the mesh. Nobody has proved anything, so
//! policies see them without an identity; a refused one is reset.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use tokio::net::TcpStream;
use tracing::debug;

use super::{
    copy::{self, refuse_tcp, Broken},
    observation::{refused_early, Observation, Parties},
    sockets::original_destination,
    Pod, ProxyContext, OWN_PORTS,
};
use crate::{
    rbac::Connection,
    telemetry::{
        metrics::{Reporter, ResponseFlags},
        End,
    },
};

/// Serves one captured connection to its end.
pub async fn serve(context: Arc<ProxyContext>, pod: Arc<Pod>, tcp: TcpStream, peer: SocketAddr) {
    let started = Instant::now();
    let _socket = context.metrics.socket(Reporter::Destination);
    let destination = match original_destination(&tcp) {
        Ok(destination) => destination,
        Err(error) => {
            debug!(error = %error, "not a redirected connection");
            return refuse_tcp(&tcp);
        }
    };
    let workload = context
        .workload_of_destination(&pod, destination.ip())
        .await;
    // Who could reach the hand-over port of a waypoint could claim to be anybody.
    let hand_over = workload
        .as_ref()
        .and_then(|workload| workload.proxy_protocol_port);
    if OWN_PORTS.contains(&destination.port()) || hand_over == Some(destination.port()) {
        refuse_tcp(&tcp);
        let end = End {
            workload,
            ..End::at(destination)
        };
        return refused_early(
            &context,
            Reporter::Destination,
            peer,
            end,
            ResponseFlags::ConnectionFailure,
            "the port is the proxy's own",
        );
    }
    let source = context
        .state
        .read()
        .workload_at(&context.config.network, peer.ip())
        .cloned();
    let service = workload
        .as_ref()
        .and_then(|workload| context.service_of(workload, destination.port(), None));
    let mut observation = Observation::start(
        &context,
        &pod,
        Parties {
            reporter: Reporter::Destination,
            source: End {
                workload: source,
                ..End::at(peer)
            },
            destination: End {
                workload: workload.clone(),
                ..End::at(destination)
            },
            target: destination,
            hbone_address: None,
            service,
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
    let judgement = context.authorize(&workload, &connection);
    observation.judged(judgement.clone());
    if !judgement.decision.allows() {
        refuse_tcp(&tcp);
        return observation.fail(
            ResponseFlags::PolicyDenied,
            format_args!(
                "connection closed due to policy rejection: {}",
                judgement.decision
            ),
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
