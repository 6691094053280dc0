//! The node proxy of an Istio ambient mesh. It serves the pods of one node from outside of them:
//! sockets inside each pod's network namespace, one process on the node. This file wires the
//! parts together; each part explains itself in its own module.
//!
//! Traffic has its own threads, so that discovery, certificates and the admin ports stay responsive
//! when traffic is heavy, and the other way round. Each pod belongs to one of them.
#![deny(unsafe_code, unsafe_op_in_unsafe_fn)]

mod admin;
mod backoff;
mod config;
mod dns;
#[cfg(test)]
mod fuzz;
mod grpc;
mod http_server;
mod identity;
mod inpod;
mod proto;
mod proxy;
mod proxy_protocol;
mod rbac;
mod state;
mod sys;
mod telemetry;
mod xds;

use std::{
    error::Error,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use nix::sys::resource::{getrlimit, setrlimit, Resource};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle, Runtime},
    signal::unix::{signal, SignalKind},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use config::{Config, XdsSource};
use identity::{authority::Authority, store::CertificateStore};
use inpod::PodManager;
use proxy::{pool::Pool, succession, ProxyContext};
use state::shared::SharedState;
use telemetry::{access_log::AccessLog, flow_records, log_format, metrics::Metrics, Flows};
use xds::client::DiscoveryClient;

const USAGE: &str = "\
meshlight-ztunnel: the node proxy of an ambient mesh

Takes no arguments; is configured by environment variables named as Istio's ztunnel
names them (XDS_ADDRESS, CA_ADDRESS, XDS_ROOT_CA, CA_ROOT_CA, INPOD_UDS, NODE_NAME,
POD_NAME, POD_NAMESPACE, CLUSTER_ID, TRUST_DOMAIN, ...).

  --version   print the version
  --help      print this";

const POOL_SWEEP: Duration = Duration::from_secs(10);
const DRAIN_LOOK: Duration = Duration::from_millis(50);

type AnyError = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        None => {}
        Some("--version" | "version") => {
            println!("meshlight-ztunnel {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some("--help" | "-h") => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        // How Istio's image starts its proxy.
        Some("proxy") => {}
        Some(other) => {
            eprintln!("meshlight-ztunnel: unknown argument {other}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meshlight-ztunnel: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), AnyError> {
    let config = Config::from_environment()?;
    log_format::start(config.log_format, &config.log_levels);
    sys::keep_freed_memory();
    inpod::netns::remember_home()?;
    raise_descriptor_limit();
    let control = Builder::new_current_thread().enable_all().build()?;
    let workers = workers(config.worker_threads)?;
    // Readiness, the node agent, and the signals.
    let steering = Builder::new_current_thread().enable_all().build()?;

    let state = Arc::new(SharedState::default());
    let metrics = Arc::new(Metrics::default());
    let authority = Authority::new(&config)?;
    let certificates = Arc::new(CertificateStore::new(authority, control.handle().clone()));
    let tunnels = Arc::default();
    let pool = Pool::new(
        certificates.clone(),
        Arc::clone(&tunnels),
        config.pool_max_streams,
        config.pool_idle,
    );
    let dropped = metrics.flow_records_dropped.clone();
    let records = match &config.flow_collector {
        None => None,
        Some(collector) => Some(flow_records::Exporter::start(
            collector,
            &config,
            dropped,
            control.handle(),
        )?),
    };
    let context = Arc::new(ProxyContext {
        flows: Flows {
            access_log: AccessLog::to_stdout(config.log_format, metrics.log_lines_lost.clone())?,
            records,
        },
        pods: Mutex::default(),
        name_servers: name_servers(&config),
        workers,
        state,
        certificates,
        metrics,
        pool,
        tunnels,
        connections: TaskTracker::new(),
        config,
    });
    let quit = CancellationToken::new();
    run_control(control, &context, quit.clone())?;
    steering.block_on(serve(context, quit))
}

/// The threads that carry traffic, each with a runtime of its own: a connection's tasks wake each
/// other without waking another thread.
fn workers(count: usize) -> Result<Vec<Handle>, AnyError> {
    (0..count)
        .map(|number| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let handle = runtime.handle().clone();
            thread::Builder::new()
                .name(format!("traffic-{number}"))
                .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
            Ok(handle)
        })
        .collect()
}

/// Who is asked for names that the mesh does not know.
fn name_servers(config: &Config) -> Vec<SocketAddr> {
    let servers = match &config.dns_upstream {
        Some(server) => server
            .parse()
            .or_else(|_| server.parse().map(|address| SocketAddr::new(address, 53)))
            .into_iter()
            .collect(),
        None => dns::name_servers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default()),
    };
    if config.dns_capture && servers.is_empty() {
        warn!("no name server is known: only names of the mesh will be answered");
    }
    servers
}

/// Starts what is not traffic, on a thread of its own.
fn run_control(
    runtime: Runtime,
    context: &Arc<ProxyContext>,
    quit: CancellationToken,
) -> Result<(), AnyError> {
    let config = &context.config;
    let handle: &Handle = runtime.handle();
    match &config.xds {
        XdsSource::File(path) => {
            let (path, domain) = (path.clone(), config.trust_domain.clone());
            handle.spawn(xds::file::follow(path, domain, context.state.clone()));
        }
        XdsSource::Remote { address, root } => {
            let endpoint = grpc::Endpoint::new(address, root)?;
            let (state, metrics) = (context.state.clone(), context.metrics.clone());
            handle.spawn(DiscoveryClient::new(endpoint, config, state, metrics).run());
        }
    }
    let (admin, metrics) = runtime.block_on(async {
        Ok::<_, AnyError>((
            listen(Ipv4Addr::LOCALHOST.into(), config.admin_port).await?,
            listen(Ipv4Addr::UNSPECIFIED.into(), config.metrics_port).await?,
        ))
    })?;
    handle.spawn(http_server::serve(
        admin,
        admin::handler(context.clone(), quit),
    ));
    handle.spawn(http_server::serve(
        metrics,
        admin::metrics_handler(context.clone()),
    ));
    thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(())
}

/// Serves pods until told to stop, then lets connections finish for a while.
async fn serve(context: Arc<ProxyContext>, quit: CancellationToken) -> Result<(), AnyError> {
    let config = &context.config;
    let readiness = listen(Ipv4Addr::UNSPECIFIED.into(), config.readiness_port).await?;
    let (pods, pods_served) = PodManager::new(context.clone());
    tokio::spawn(http_server::serve(
        readiness,
        admin::readiness_handler(context.state.synchronized(), pods_served),
    ));
    tokio::spawn(sweep_pool(context.clone()));
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = config.node_name,
        threads = config.worker_threads,
        "running"
    );

    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let stop = CancellationToken::new();
    let serving = tokio::spawn({
        let (mut synchronized, stop) = (context.state.synchronized(), stop.clone());
        async move {
            // A pod served before its policies are known would be served without them.
            let known = async { synchronized.wait_for(|known| *known).await.is_ok() };
            if stop.run_until_cancelled(known).await == Some(true) {
                pods.run(stop).await;
            }
        }
    });
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = quit.cancelled() => {}
    }
    let succeeded = succession::has_successor(&context);
    let grace = if succeeded {
        config.termination_grace
    } else {
        config.termination_grace.min(succession::ALONE)
    };
    info!(
        successor = succeeded,
        connections = context.connections.len(),
        grace_ms = grace.as_millis() as u64,
        "draining"
    );
    let drained = async {
        if !succeeded {
            // Nobody else would answer. Idle connections of peers are no reason to stay.
            while context.busy() {
                tokio::time::sleep(DRAIN_LOOK).await;
            }
        }
        stop.cancel();
        context.connections.close();
        let _ = serving.await;
        // Idle pooled connections of peers and ours end here; tunnels end by themselves.
        tokio::join!(context.pool.close(), context.connections.wait());
    };
    match timeout(grace, drained).await {
        Ok(()) => info!("drained"),
        Err(_) => warn!(
            connections = context.connections.len(),
            "connections cut after the grace period"
        ),
    }
    Ok(())
}

async fn sweep_pool(context: Arc<ProxyContext>) {
    loop {
        tokio::time::sleep(POOL_SWEEP).await;
        context.pool.release_idle();
    }
}

async fn listen(address: IpAddr, port: u16) -> Result<TcpListener, AnyError> {
    let address = SocketAddr::new(address, port);
    TcpListener::bind(address)
        .await
        .map_err(|error| format!("listening on {address}: {error}").into())
}

/// Every connection takes two descriptors; the usual soft limit of 1024 is a few hundred of them.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(error = %error, "descriptor limit stays");
    }
}
