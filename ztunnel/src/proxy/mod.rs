//! The data path. In every pod it serves, the proxy listens for three kinds of connections, each
//! with a module of its own: what the pod opens (`outbound`), what other proxies tunnel to it
//! (`inbound`), and what comes to it plain (`plaintext`).

pub mod copy;
mod inbound;
mod observation;
pub mod open_connections;
mod outbound;
mod plaintext;
pub mod pool;
mod read_ahead;
pub mod sockets;
mod stream;
pub mod succession;
pub mod windows;

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use crate::{
    config::{Config, DNS_PORT, INBOUND_HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT},
    dns::Responder,
    identity::{store::CertificateStore, Identity},
    rbac::{self, Connection, Judgement},
    state::{service::Service, shared::SharedState, workload::Workload},
    telemetry::{metrics::Metrics, Flows},
};
use open_connections::OpenConnections;
use pool::Pool;
use sockets::PodSockets;
use windows::OpenTunnels;

/// Ports of the proxy in a pod; connections to them through the proxy would go in circles.
const OWN_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, INBOUND_HBONE_PORT];
/// How long a pod may be unknown to discovery after the node agent told of it.
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);
/// Pause when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What all connections share.
pub struct ProxyContext {
    pub config: Config,
    pub state: Arc<SharedState>,
    pub certificates: Arc<CertificateStore>,
    pub metrics: Arc<Metrics>,
    pub flows: Flows,
    pub pool: Pool,
    pub tunnels: Arc<OpenTunnels>,
    /// Who answers for names that the mesh does not know.
    pub name_servers: Vec<SocketAddr>,
    /// The runtimes of the threads that carry traffic.
    pub workers: Vec<Handle>,
    /// The pods served, by uid.
    pub pods: Mutex<BTreeMap<String, Arc<Pod>>>,
    /// Every connection being served.
    pub connections: TaskTracker,
}

/// A pod as the node agent described it.
pub struct Pod {
    pub uid: Arc<str>,
    pub name: String,
    pub namespace: Arc<str>,
    pub identity: Identity,
    /// Its name in discovery.
    pub workload_uid: String,
    pub sockets: PodSockets,
    pub connections: OpenConnections,
    /// Which of the workers carries its traffic.
    pub worker: usize,
}

/// The listeners of one pod; dropping it closes them and lets connections go on.
pub struct PodProxy {
    pub pod: Arc<Pod>,
    stop: CancellationToken,
    listeners: TaskTracker,
}

impl PodProxy {
    /// Opens the listeners; when this returns, the pod's connections may be redirected.
    pub fn start(context: &Arc<ProxyContext>, pod: Pod) -> io::Result<Self> {
        let pod = Arc::new(pod);
        // Sockets and tasks made from here on are the worker's, and so are all that they make.
        let _entered = context.workers[pod.worker].enter();
        let open = |port| {
            let listener = pod.sockets.listen(port);
            listener.map_err(|error| io::Error::new(error.kind(), format!("port {port}: {error}")))
        };
        let (outbound, plaintext, hbone) = (
            open(OUTBOUND_PORT)?,
            open(INBOUND_PLAINTEXT_PORT)?,
            open(INBOUND_HBONE_PORT)?,
        );
        let names = if context.config.dns_capture {
            let at = |error: io::Error| {
                io::Error::new(error.kind(), format!("port {DNS_PORT}: {error}"))
            };
            Some((
                pod.sockets.listen_for_datagrams(DNS_PORT).map_err(at)?,
                pod.sockets.listen_locally(DNS_PORT).map_err(at)?,
            ))
        } else {
            None
        };
        context.certificates.prefetch(&pod.identity);

        let stop = CancellationToken::new();
        let listeners = TaskTracker::new();
        let shared = || (context.clone(), pod.clone());
        listeners.spawn(accept(outbound, context.clone(), stop.clone(), {
            let (context, pod) = shared();
            move |tcp, peer| outbound::serve(context.clone(), pod.clone(), tcp, peer)
        }));
        listeners.spawn(accept(plaintext, context.clone(), stop.clone(), {
            let (context, pod) = shared();
            move |tcp, peer| plaintext::serve(context.clone(), pod.clone(), tcp, peer)
        }));
        listeners.spawn(accept(hbone, context.clone(), stop.clone(), {
            let ((context, pod), stop) = (shared(), stop.clone());
            move |tcp, peer| inbound::serve(context.clone(), pod.clone(), tcp, peer, stop.clone())
        }));
        if let Some((datagrams, connections)) = names {
            let responder = Responder::new(context.clone(), pod.clone());
            listeners.spawn(responder.clone().serve_datagrams(datagrams, stop.clone()));
            listeners.spawn(accept(
                connections,
                context.clone(),
                stop.clone(),
                move |tcp, peer| responder.clone().serve_connection(tcp, peer),
            ));
        }
        listeners.close();
        Ok(Self {
            pod,
            stop,
            listeners,
        })
    }

    /// Closes the listeners, returning once nothing listens any more. Tunnels and connections go
    /// on until they end by themselves.
    pub async fn close(self, context: &ProxyContext) {
        self.stop.cancel();
        self.listeners.wait().await;
        context.pool.forget(&self.pod.uid);
    }
}

/// Accepts until stopped, then whatever the kernel had accepted already.
async fn accept<F>(
    listener: TcpListener,
    context: Arc<ProxyContext>,
    stop: CancellationToken,
    serve: impl Fn(TcpStream, SocketAddr) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let take = |tcp: TcpStream, peer| match sockets::prepare(&tcp) {
        Ok(()) => {
            context
                .connections
                .spawn(serve(tcp, sockets::canonical(peer)));
        }
        Err(error) => debug!(error = %error, "connection ended before it was served"),
    };
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, peer)) => take(tcp, peer),
                Err(error) => {
                    warn!(error = %error, "no connection accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            () = stop.cancelled() => break,
        }
    }
    let Ok(listener) = listener.into_std() else {
        return;
    };
    while let Ok((tcp, peer)) = listener.accept() {
        if let Ok(tcp) = tcp
            .set_nonblocking(true)
            .and_then(|()| TcpStream::from_std(tcp))
        {
            take(tcp, peer);
        }
    }
}

impl ProxyContext {
    /// The worker with the fewest pods.
    pub fn least_busy_worker(&self) -> usize {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        (0..self.workers.len())
            .min_by_key(|worker| pods.values().filter(|pod| pod.worker == *worker).count())
            .unwrap_or(0)
    }

    /// Whether an application has a connection open through this proxy.
    pub fn busy(&self) -> bool {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.values().any(|pod| pod.connections.any())
    }

    /// The pod's own entry in discovery, if it is there yet.
    pub fn workload_of(&self, pod: &Pod, address: IpAddr) -> Option<Arc<Workload>> {
        let state = self.state.read();
        state
            .workload(&pod.workload_uid)
            .or_else(|| {
                state
                    .workload_at(&self.config.network, address)
                    .filter(|workload| {
                        workload.namespace == pod.namespace && *workload.name == *pod.name
                    })
            })
            .cloned()
    }

    /// The pod's own entry, waiting a little for discovery to tell of a new pod: without it nobody
    /// knows which policies govern it.
    async fn workload_of_destination(&self, pod: &Pod, address: IpAddr) -> Option<Arc<Workload>> {
        if let Some(workload) = self.workload_of(pod, address) {
            return Some(workload);
        }
        let mut changes = self.state.changes();
        let appears = async {
            loop {
                if let Some(workload) = self.workload_of(pod, address) {
                    return Some(workload);
                }
                changes.changed().await.ok()?;
            }
        };
        timeout(WORKLOAD_WAIT, appears).await.ok().flatten()
    }

    /// Judges a connection to `workload` by the policies of this moment.
    fn judge(&self, workload: &Workload, connection: &Connection) -> Judgement {
        let policies = {
            let state = self.state.read();
            // Selections change with the workload, so look at its latest form.
            let latest = state.workload(&workload.uid);
            state.policies_of(latest.map_or(workload, AsRef::as_ref), |key| {
                warn!(policy = key, workload = %workload.uid, "a policy that selects the workload is not known");
            })
        };
        rbac::judge(&policies, connection)
    }

    /// Judges a new connection, and writes down what was refused, or would have been.
    fn authorize(&self, workload: &Workload, connection: &Connection) -> Judgement {
        let judgement = self.judge(workload, connection);
        self.metrics.judged(&judgement, workload);
        if let Some(would) = &judgement.dry_run {
            tracing::info!(
                source = %connection.source,
                identity = connection.identity.as_ref().map(ToString::to_string),
                destination = %connection.destination,
                reason = %would,
                "dry run: the connection would be refused"
            );
        }
        judgement
    }

    /// Returns, with the judgement, when changes make the connection one that is not allowed.
    async fn no_longer_allowed(
        &self,
        mut changes: watch::Receiver<u64>,
        workload: &Workload,
        connection: &Connection,
    ) -> Judgement {
        while changes.changed().await.is_ok() {
            let judgement = self.judge(workload, connection);
            if !judgement.decision.allows() {
                self.metrics.judged(&judgement, workload);
                return judgement;
            }
        }
        std::future::pending().await
    }

    /// The service a connection to a workload's port most likely means, for metrics: the one the
    /// client names, else the first that the port serves.
    fn service_of(
        &self,
        workload: &Workload,
        port: u16,
        named: Option<&str>,
    ) -> Option<Arc<Service>> {
        let key = workload
            .services
            .iter()
            .filter(|(_, ports)| ports.values().any(|target| *target == port))
            .map(|(key, _)| key)
            .min_by_key(|key| (named != Some(&*key.hostname), *key))?;
        self.state.read().service(key).cloned()
    }
}
