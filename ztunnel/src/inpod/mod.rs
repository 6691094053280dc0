//! Which pods this proxy serves: told by the node agent over a unix socket, one packet a message,
//! each new pod with a descriptor of its network namespace. The proxy answers after its listeners
//! are open, so the agent may then redirect the pod's connections. Losing the agent changes
//! nothing for the pods; a new one tells everything again.

pub mod netns;
mod packet;
mod roster;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    backoff::Backoff,
    identity::Identity,
    proto::zds::{workload_request::Payload, AddWorkload, Version, WorkloadRequest, ZdsHello},
    proxy::{open_connections::OpenConnections, sockets::PodSockets, Pod, PodProxy, ProxyContext},
};
use netns::NetworkNamespace;
use packet::PacketSocket;
use roster::Roster;

/// Kubernetes names the service account of pods that do not say.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// Why a pod cannot be served, in words for the node agent.
#[derive(Debug, Error)]
enum NotServed {
    #[error("add without uid")]
    NoUid,
    #[error("add without workload_info, or without its name or namespace")]
    NoInfo,
    #[error("add without a network-namespace descriptor")]
    NoNamespace,
    #[error("network namespace: {0}")]
    Namespace(io::Error),
    #[error("listeners: {0}")]
    Listeners(io::Error),
    #[error("message of no known kind")]
    Unknown,
}

/// The pods served, kept in step with the node agent's word.
pub struct PodManager {
    context: Arc<ProxyContext>,
    path: PathBuf,
    pods: HashMap<String, PodProxy>,
    /// Set once the first snapshot has been taken in.
    settled: watch::Sender<bool>,
}

impl PodManager {
    /// The receiver turns true when the pods of the first snapshot are served.
    pub fn new(context: Arc<ProxyContext>) -> (Self, watch::Receiver<bool>) {
        let (settled, watched) = watch::channel(false);
        let path = context.config.inpod_uds.clone();
        let manager = Self {
            context,
            path,
            pods: HashMap::new(),
            settled,
        };
        (manager, watched)
    }

    /// Follows the node agent until `stop`, then closes all listeners.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
        loop {
            let mut followed = false;
            tokio::select! {
                result = self.follow(&mut followed) => {
                    if followed {
                        backoff.reset();
                    }
                    let pause = backoff.next();
                    let reason = result.err().map_or_else(|| "closed by the agent".to_owned(), |error| error.to_string());
                    info!(path = %self.path.display(), reason, retry_in_ms = pause.as_millis() as u64,
                        pods = self.pods.len(), "not connected to the node agent");
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = stop.cancelled() => break,
                    }
                }
                () = stop.cancelled() => break,
            }
        }
        for (_, pod) in self.pods.drain() {
            pod.close(&self.context).await;
        }
    }

    async fn follow(&mut self, followed: &mut bool) -> io::Result<()> {
        let socket = PacketSocket::connect(&self.path)?;
        socket
            .send(&ZdsHello {
                version: Version::V1.into(),
            })
            .await?;
        info!(path = %self.path.display(), "connected to the node agent");
        let mut roster = Roster::default();
        while let Some((request, descriptor)) = socket.receive::<WorkloadRequest>().await? {
            *followed = true;
            let answer = self.handle(&mut roster, request, descriptor).await;
            if let Err(error) = &answer {
                warn!(error = %error, "node agent's request not fulfilled");
            }
            let error = answer.err().map(|error| error.to_string());
            socket.send(&packet::acknowledgement(error)).await?;
        }
        Ok(())
    }

    async fn handle(
        &mut self,
        roster: &mut Roster,
        request: WorkloadRequest,
        descriptor: Option<OwnedFd>,
    ) -> Result<(), NotServed> {
        match request.payload {
            Some(Payload::Add(add)) => {
                roster.told_of(&add.uid);
                self.add(add, descriptor).await
            }
            Some(Payload::Keep(keep)) => {
                roster.told_of(&keep.uid);
                Ok(())
            }
            Some(Payload::Del(del)) => {
                self.remove(&del.uid).await;
                Ok(())
            }
            Some(Payload::SnapshotSent(_)) => {
                for uid in roster.snapshot_complete(self.pods.keys()) {
                    self.remove(&uid).await;
                }
                info!(pods = self.pods.len(), "node agent's snapshot complete");
                self.settled.send_replace(true);
                Ok(())
            }
            None => Err(NotServed::Unknown),
        }
    }

    async fn add(
        &mut self,
        add: AddWorkload,
        descriptor: Option<OwnedFd>,
    ) -> Result<(), NotServed> {
        if add.uid.is_empty() {
            return Err(NotServed::NoUid);
        }
        let info = add
            .workload_info
            .filter(|info| !info.name.is_empty() && !info.namespace.is_empty())
            .ok_or(NotServed::NoInfo)?;
        let namespace = NetworkNamespace::new(descriptor.ok_or(NotServed::NoNamespace)?)
            .map_err(NotServed::Namespace)?;
        let context = self.context.clone();
        let config = &context.config;
        let service_account = match info.service_account.as_str() {
            "" => DEFAULT_SERVICE_ACCOUNT,
            named => named,
        };
        let identity = Identity::new(
            config.trust_domain.as_str(),
            info.namespace.as_str(),
            service_account,
        );
        if let Some(known) = self.pods.get(&add.uid) {
            let pod = &known.pod;
            if pod.identity == identity && pod.sockets.namespace().is_same(&namespace) {
                return Ok(());
            }
            self.remove(&add.uid).await;
        }
        let pod = Pod {
            uid: add.uid.as_str().into(),
            workload_uid: format!(
                "{}//Pod/{}/{}",
                config.cluster_id, info.namespace, info.name
            ),
            name: info.name,
            namespace: info.namespace.as_str().into(),
            identity,
            sockets: PodSockets::new(namespace, config.original_source),
            connections: OpenConnections::default(),
            worker: context.least_busy_worker(),
        };
        let proxy = PodProxy::start(&context, pod).map_err(NotServed::Listeners)?;
        info!(uid = add.uid, name = proxy.pod.name, namespace = %proxy.pod.namespace, "pod served");
        served(&context).insert(add.uid.clone(), proxy.pod.clone());
        self.pods.insert(add.uid, proxy);
        context.metrics.pods.set(self.pods.len() as i64);
        Ok(())
    }

    async fn remove(&mut self, uid: &str) {
        let Some(proxy) = self.pods.remove(uid) else {
            return;
        };
        let pod = proxy.pod.clone();
        served(&self.context).remove(uid);
        proxy.close(&self.context).await;
        info!(uid, name = pod.name, namespace = %pod.namespace, "pod no longer served");
        if !self
            .pods
            .values()
            .any(|other| other.pod.identity == pod.identity)
        {
            self.context.certificates.forget(&pod.identity);
        }
        self.context.metrics.pods.set(self.pods.len() as i64);
    }
}

fn served(context: &ProxyContext) -> MutexGuard<'_, BTreeMap<String, Arc<Pod>>> {
    context.pods.lock().unwrap_or_else(PoisonError::into_inner)
}
