//! The mesh state as the program shares it: discovery writes a batch at a time, connections read,
//! and those that are open learn when the policies they passed may have changed.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use tokio::sync::watch;

use super::{service::Service, workload::Workload, MeshState};
use crate::rbac::Policy;

/// One change to the mesh.
#[derive(Debug)]
pub enum Change {
    PutWorkload(Box<Workload>),
    PutService(Box<Service>),
    PutPolicy(Box<Policy>),
    /// A workload by uid or a service by `NAMESPACE/HOSTNAME`.
    RemoveAddress(String),
    RemovePolicy(String),
}

/// The one mesh state of the process.
#[derive(Debug)]
pub struct SharedState {
    state: RwLock<MeshState>,
    policies_changed: watch::Sender<u64>,
    changes: watch::Sender<u64>,
    synchronized: watch::Sender<bool>,
}

impl Default for SharedState {
    fn default() -> Self {
        Self {
            state: RwLock::default(),
            policies_changed: watch::Sender::new(0),
            changes: watch::Sender::new(0),
            synchronized: watch::Sender::new(false),
        }
    }
}

impl SharedState {
    /// For lookups; held for as long as one takes, never across a wait.
    pub fn read(&self) -> RwLockReadGuard<'_, MeshState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies changes together: no reader sees some without the others.
    pub fn apply(&self, changes: Vec<Change>) {
        let mut policies_changed = false;
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            match change {
                Change::PutWorkload(workload) => policies_changed |= state.put_workload(*workload),
                Change::PutService(service) => state.put_service(*service),
                Change::PutPolicy(policy) => {
                    state.put_policy(*policy);
                    policies_changed = true;
                }
                Change::RemoveAddress(name) => state.remove_address(&name),
                Change::RemovePolicy(key) => {
                    state.remove_policy(&key);
                    policies_changed = true;
                }
            }
        }
        drop(state);
        self.changes.send_modify(|version| *version += 1);
        if policies_changed {
            self.policies_changed.send_modify(|version| *version += 1);
        }
    }

    /// Changes whenever a connection that passed might not pass any more.
    pub fn policies_changed(&self) -> watch::Receiver<u64> {
        self.policies_changed.subscribe()
    }

    /// Changes with every batch.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Says that the whole mesh has been learned once.
    pub fn set_synchronized(&self) {
        self.synchronized.send_replace(true);
    }

    pub fn synchronized(&self) -> watch::Receiver<bool> {
        self.synchronized.subscribe()
    }
}
