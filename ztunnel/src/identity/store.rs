//! The certificates in use: one for each identity with a pod on this node. The first connection
//! that needs one starts its keeper; everyone else waits for the same answer. The keeper renews at
//! half of the lifetime and holds on to the old certificate while the authority does not answer,
//! until that expires; then connections fail rather than go unauthenticated.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::pki_types::CertificateDer;
use serde::Serialize;
use thiserror::Error;
use tokio::{runtime::Handle, sync::watch, task::AbortHandle};
use tracing::{info, warn};

use super::{
    authority::{Authority, AuthorityError},
    certificate::{CertificateView, WorkloadCertificate},
    Identity,
};
use crate::{
    backoff::{Backoff, WHILE_ABSENT},
    grpc::GrpcError,
};

/// Why there is no certificate to work with.
#[derive(Debug, Error, Clone)]
pub enum NoCertificate {
    #[error("no certificate for {identity}: {reason}")]
    Refused {
        identity: Box<Identity>,
        reason: Arc<str>,
    },
    #[error("the certificate of {0} has expired and could not be renewed")]
    Expired(Box<Identity>),
}

#[derive(Debug, Clone)]
enum Held {
    Awaited,
    Certificate(Arc<WorkloadCertificate>),
    Refused(Arc<str>),
}

struct Keeper {
    held: watch::Receiver<Held>,
    task: AbortHandle,
}

/// An identity's certificate as the admin interface shows it; never its key.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateSummary {
    identity: String,
    state: String,
    cert_chain: Vec<CertificateView>,
    root_certs: Vec<CertificateView>,
}

/// Hands out the certificate of any identity of this node.
pub struct CertificateStore {
    authority: Arc<Authority>,
    keepers: Mutex<HashMap<Identity, Keeper>>,
    runtime: Handle,
}

impl CertificateStore {
    /// Keepers run on `runtime`.
    pub fn new(authority: Authority, runtime: Handle) -> Self {
        Self {
            authority: Arc::new(authority),
            keepers: Mutex::default(),
            runtime,
        }
    }

    /// The current certificate of `identity`, waiting for the first one if need be.
    pub async fn get(
        &self,
        identity: &Identity,
    ) -> Result<Arc<WorkloadCertificate>, NoCertificate> {
        let mut held = self.subscribe(identity);
        let awaited = held
            .wait_for(|held| !matches!(held, Held::Awaited))
            .await
            .map(|held| held.clone());
        match awaited {
            Ok(Held::Certificate(certificate)) if certificate.expired(SystemTime::now()) => {
                Err(NoCertificate::Expired(Box::new(identity.clone())))
            }
            Ok(Held::Certificate(certificate)) => Ok(certificate),
            Ok(Held::Refused(reason)) => Err(NoCertificate::Refused {
                identity: Box::new(identity.clone()),
                reason,
            }),
            Ok(Held::Awaited) | Err(_) => Err(NoCertificate::Refused {
                identity: Box::new(identity.clone()),
                reason: "its last pod has left this node".into(),
            }),
        }
    }

    /// Starts fetching the certificate of an identity that is about to be used.
    pub fn prefetch(&self, identity: &Identity) {
        drop(self.subscribe(identity));
    }

    /// Forgets the certificate of an identity that no pod here has any more.
    pub fn forget(&self, identity: &Identity) {
        if let Some(keeper) = self.lock().remove(identity) {
            keeper.task.abort();
        }
    }

    /// All certificates held or asked for.
    pub fn summaries(&self) -> Vec<CertificateSummary> {
        let mut all: Vec<_> = self
            .lock()
            .iter()
            .map(|(identity, keeper)| summary(identity, &keeper.held.borrow()))
            .collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    fn subscribe(&self, identity: &Identity) -> watch::Receiver<Held> {
        let mut keepers = self.lock();
        if let Some(keeper) = keepers.get(identity) {
            return keeper.held.clone();
        }
        let (publish, held) = watch::channel(Held::Awaited);
        let task = self
            .runtime
            .spawn(keep(self.authority.clone(), identity.clone(), publish))
            .abort_handle();
        keepers.insert(
            identity.clone(),
            Keeper {
                held: held.clone(),
                task,
            },
        );
        held
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Keeper>> {
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn keep(authority: Arc<Authority>, identity: Identity, publish: watch::Sender<Held>) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
    loop {
        let pause = match authority.issue(&identity).await {
            Ok(certificate) => {
                let until_renewal = certificate
                    .renew_at()
                    .duration_since(SystemTime::now())
                    .unwrap_or_default();
                info!(identity = %identity, serial = certificate.serial,
                    renew_in_s = until_renewal.as_secs(), "certificate issued");
                publish.send_replace(Held::Certificate(Arc::new(certificate)));
                backoff.reset();
                // A lifetime shorter than this would have us do nothing but renew.
                until_renewal.max(Duration::from_secs(1))
            }
            Err(error) => {
                let pause = match &error {
                    AuthorityError::Remote(GrpcError::Absent { .. }) => {
                        backoff.next_within(WHILE_ABSENT)
                    }
                    _ => backoff.next(),
                };
                warn!(identity = %identity, error = %error, retry_in_ms = pause.as_millis() as u64,
                    "certificate not issued");
                publish.send_if_modified(|held| {
                    let keep_old =
                        matches!(held, Held::Certificate(old) if !old.expired(SystemTime::now()));
                    if !keep_old {
                        *held = Held::Refused(error.to_string().into());
                    }
                    !keep_old
                });
                pause
            }
        };
        tokio::time::sleep(pause).await;
    }
}

fn summary(identity: &Identity, held: &Held) -> CertificateSummary {
    let (state, certificate) = match held {
        Held::Awaited => ("Initializing".to_owned(), None),
        Held::Refused(reason) => (format!("Unavailable: {reason}"), None),
        Held::Certificate(certificate) => ("Available".to_owned(), Some(certificate)),
    };
    let views = |of: fn(&WorkloadCertificate) -> &Vec<CertificateDer<'static>>| {
        certificate
            .map(|certificate| {
                let certificates = of(certificate).iter();
                certificates.filter_map(CertificateView::of).collect()
            })
            .unwrap_or_default()
    };
    CertificateSummary {
        identity: identity.to_string(),
        state,
        cert_chain: views(|certificate| &certificate.chain),
        root_certs: views(|certificate| &certificate.roots),
    }
}
