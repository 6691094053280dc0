//! How many bytes a tunnel's sender may have on their way before the application takes them. A
//! reader that stalls holds its own window and nothing else: the connection's window is as good as
//! unlimited, so that its neighbours go on, and the streams' windows shrink as tunnels become many,
//! so that all of them stalling cost bounded memory.
//!
//! A receiver gives window back in large pieces: what a resting tunnel has used and not got back
//! may be more than a smaller window has, and then the sender may send nothing more (RFC 9113,
//! 6.9.2). HTTP/2's library looks at what is due only when more is taken, which cannot happen any
//! more, so that every tunnel is told to look once the peer has acknowledged the smaller size.

use std::sync::{
    atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    Arc,
};

use tokio::sync::{futures::Notified, Notify};

/// The window of all streams of a connection together: HTTP/2's largest (RFC 9113, 6.9.1).
pub const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
const LARGEST: u32 = 4 << 20;
const SMALLEST: u32 = 64 << 10;
/// What the streams of one connection, and all of the process, may hold if none is read.
const PER_CONNECTION: usize = 8 << 20;
const PER_PROCESS: usize = 128 << 20;

/// Tunnels open in the process.
#[derive(Debug, Default)]
pub struct OpenTunnels(AtomicUsize);

/// The windows of one connection's streams.
#[derive(Debug)]
pub struct Windows {
    all: Arc<OpenTunnels>,
    open: AtomicUsize,
    announced: AtomicU32,
    /// Told when another size is due.
    changed: Notify,
    /// The size announced last is smaller than the one before, and not known to be acknowledged.
    shrinking: AtomicBool,
    /// Tells the tunnels that the peer has acknowledged a smaller size.
    shrunk: Notify,
}

impl Windows {
    pub fn new(all: Arc<OpenTunnels>) -> Self {
        let size = size(1, all.0.load(Ordering::Relaxed) + 1);
        Self {
            all,
            open: AtomicUsize::new(0),
            announced: AtomicU32::new(size),
            changed: Notify::new(),
            shrinking: AtomicBool::new(false),
            shrunk: Notify::new(),
        }
    }

    /// The size the peer knows.
    pub fn announced(&self) -> u32 {
        self.announced.load(Ordering::Relaxed)
    }

    /// Tunnels open in this connection.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    /// Counts a tunnel in.
    pub fn opened(&self) {
        self.open.fetch_add(1, Ordering::AcqRel);
        self.all.0.fetch_add(1, Ordering::Relaxed);
        self.tell();
    }

    /// Counts a tunnel out; answers how many are left in this connection.
    pub fn closed(&self) -> usize {
        self.all.0.fetch_sub(1, Ordering::Relaxed);
        let left = self.open.fetch_sub(1, Ordering::AcqRel) - 1;
        self.tell();
        left
    }

    /// Waits until another size may be due.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Ready when the peer has acknowledged a smaller size after this call: then what it has
    /// not got back yet is due.
    pub fn shrunk(&self) -> Notified<'_> {
        self.shrunk.notified()
    }

    /// Has `tell` tell the peer the size that is due, if one is; answers whether it did. To be
    /// called after every step of the connection: `tell` fails while the peer still has to
    /// acknowledge the size before. That it succeeds again is the one sign of the acknowledgement
    /// there is, and after a smaller size that sign is worth telling the same size again.
    pub fn announce<E>(&self, tell: impl FnOnce(u32) -> Result<(), E>) -> bool {
        let (due, announced) = (self.due(), self.announced());
        let waiting = self.shrinking.load(Ordering::Relaxed);
        if due.is_none() && !waiting {
            return false;
        }
        let size = due.unwrap_or(announced);
        if tell(size).is_err() {
            return false;
        }
        self.announced.store(size, Ordering::Relaxed);
        self.shrinking.store(size < announced, Ordering::Relaxed);
        if waiting {
            self.shrunk.notify_waiters();
        }
        true
    }

    fn tell(&self) {
        if self.due().is_some() {
            self.changed.notify_one();
        }
    }

    /// The size to announce. Grows late, so that tunnels that come and go change nothing.
    fn due(&self) -> Option<u32> {
        let (now, open) = (self.announced(), self.open.load(Ordering::Relaxed));
        let size = size(open, self.all.0.load(Ordering::Relaxed));
        (size < now || size >= now.saturating_mul(4)).then_some(size)
    }
}

/// A power of two, for a connection of `open` tunnels in a process of `all`.
fn size(open: usize, all: usize) -> u32 {
    let share = |budget: usize, among: usize| budget / among.max(1).next_power_of_two();
    let size = share(PER_CONNECTION, open).min(share(PER_PROCESS, all));
    u32::try_from(size)
        .unwrap_or(LARGEST)
        .clamp(SMALLEST, LARGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_tunnels_have_small_windows() {
        for (open, all, expected) in [
            (0, 0, LARGEST),
            (1, 1, LARGEST),
            (2, 2, LARGEST),
            (3, 3, LARGEST / 2),
            (100, 100, 64 << 10),
            (1, 1000, 128 << 10),
            (100, 10_000, SMALLEST),
        ] {
            assert_eq!(size(open, all), expected, "{open} of {all}");
        }
    }

    /// A connection that takes a size when the one before is acknowledged.
    #[derive(Default)]
    struct Settings(Option<u32>);

    impl Settings {
        fn tell(&mut self, size: u32) -> Result<(), ()> {
            self.0.is_none().then(|| self.0 = Some(size)).ok_or(())
        }
    }

    #[tokio::test]
    async fn tunnels_are_told_once_a_smaller_window_is_acknowledged() {
        let windows = Windows::new(Arc::default());
        let mut settings = Settings::default();
        let announce = |settings: &mut Settings| windows.announce(|size| settings.tell(size));
        assert!(!announce(&mut settings), "nothing is due");
        for _ in 0..3 {
            windows.opened();
        }
        let mut shrunk = std::pin::pin!(windows.shrunk());
        let mut told = || futures_util::FutureExt::now_or_never(shrunk.as_mut()).is_some();
        assert!(announce(&mut settings) && settings.0 == Some(LARGEST / 2));
        windows.opened();
        windows.opened();
        assert!(!announce(&mut settings) && !told(), "not acknowledged");
        assert_eq!(settings.0.take(), Some(LARGEST / 2));
        assert!(announce(&mut settings) && told());
        assert_eq!(
            settings.0.take(),
            Some(LARGEST / 4),
            "what was due meanwhile"
        );
        let mut shrunk = std::pin::pin!(windows.shrunk());
        assert!(announce(&mut settings));
        assert!(futures_util::FutureExt::now_or_never(shrunk.as_mut()).is_some());
        assert_eq!(settings.0.take(), Some(LARGEST / 4), "the same again");
        assert!(!announce(&mut settings), "and no more");
    }

    #[test]
    fn windows_shrink_at_once_and_grow_late() {
        let windows = Windows::new(Arc::default());
        assert_eq!(windows.announced(), LARGEST);
        for _ in 0..3 {
            windows.opened();
        }
        assert_eq!(windows.due(), Some(LARGEST / 2));
        windows.announced.store(LARGEST / 2, Ordering::Relaxed);
        assert_eq!(windows.closed(), 2);
        assert_eq!(windows.due(), None);
        windows.announced.store(LARGEST / 4, Ordering::Relaxed);
        assert_eq!(windows.due(), Some(LARGEST));
    }
}
