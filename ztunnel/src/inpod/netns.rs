//! Network namespaces of pods. A socket belongs to the namespace its thread was in when it was
//! made, and stays there; so a thread steps into the pod's namespace for that one call and back.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    os::unix::fs::MetadataExt,
    sync::OnceLock,
};

use nix::sched::{setns, CloneFlags};

static HOME: OnceLock<OwnedFd> = OnceLock::new();

/// Remembers the namespace the process started in. Call once, before any other thread starts.
pub fn remember_home() -> io::Result<()> {
    let home = File::open("/proc/self/ns/net")?;
    HOME.get_or_init(|| home.into());
    Ok(())
}

/// A network namespace held open by descriptor.
#[derive(Debug)]
pub struct NetworkNamespace {
    descriptor: OwnedFd,
    identity: (u64, u64),
}

impl NetworkNamespace {
    /// Takes a descriptor of a namespace file.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let file = File::from(descriptor);
        let metadata = file.metadata()?;
        Ok(Self {
            descriptor: file.into(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// Whether both are the same namespace, whatever their descriptors.
    pub fn is_same(&self, other: &Self) -> bool {
        self.identity == other.identity
    }

    /// Runs `work`, which must not wait, inside the namespace.
    pub fn run<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let home = HOME
            .get()
            .ok_or_else(|| io::Error::other("the home namespace is not known"))?;
        setns(self.descriptor.as_fd(), CloneFlags::CLONE_NEWNET)?;
        let result = work();
        if let Err(error) = setns(home, CloneFlags::CLONE_NEWNET) {
            // A worker left behind in a pod would make every later socket the pod's.
            eprintln!("{{\"level\":\"error\",\"message\":\"cannot return to the home network namespace: {error}\"}}");
            std::process::abort();
        }
        result
    }
}
